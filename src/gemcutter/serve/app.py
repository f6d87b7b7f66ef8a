"""serve: the life of a server: start the engine process, listen, and leave cleanly whatever ends it."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from gemcutter.checkpoint.files import locate
from gemcutter.config import EngineConfig
from gemcutter.serve import worker
from gemcutter.serve.bridge import Bridge, EngineDied
from gemcutter.serve.errors import ApiError
from gemcutter.serve.routes import build_app
from gemcutter.serve.service import Service
from gemcutter.text.tokens import Tokenizer

DRAIN_SECONDS = 5.0  # after SIGTERM, for requests to finish; then they are aborted
CLOSE_SECONDS = 2  # after that, for connections to take their last bytes
LAST_SECONDS = 9.5  # after a signal the process is gone, even if a thread still tokenizes or loads
LINGER_SECONDS = 2.0  # after the engine died, for clients and probes to hear of it


def serve(config: EngineConfig, start_engine: Callable = worker.start_engine) -> int:
    """Run a server until SIGTERM, SIGINT or the engine's death.

    Args:
        start_engine: EngineConfig -> Engine, called in the engine process; importable by name.

    Returns:
        The exit code: 0 after a signal, 2 if the server cannot start as the user asked, 1 if the engine broke.
        stderr says why.
    """
    try:
        listener = _bind(config.host, config.port)
    except OSError as error:
        return _complain(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}", 2)
    with listener:
        try:
            return asyncio.run(_live(config, listener, start_engine))
        except (ValueError, OSError) as error:
            return _complain(f"cannot start: {' '.join(str(error).split())}", 2)
        except EngineDied as error:
            return _complain(f"cannot start: {error}", 1)


async def _live(config: EngineConfig, listener: socket.socket, start_engine: Callable) -> int:
    loop = asyncio.get_running_loop()
    signalled, hurried = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if not signalled.is_set():  # asyncio waits for its threads, however long they take
            last = threading.Timer(LAST_SECONDS, os._exit, (0,))
            last.daemon = True
            last.start()
        (hurried if signalled.is_set() else signalled).set()  # a second signal cuts the drain short

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    bridge = Bridge(config, start_engine)
    try:
        service = await _first(signalled.wait(), _start(config, bridge))
        if not isinstance(service, Service):
            return 0
        # What is off here is not used, and uvicorn's log says what our own lines say.
        quiet = {"log_level": "error", "access_log": False, "ws": "none", "lifespan": "off"}
        bare = {"proxy_headers": False, "server_header": False}
        server = _Server(
            uvicorn.Config(build_app(service), timeout_graceful_shutdown=CLOSE_SECONDS, **quiet, **bare)
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if serving.done():
            await serving  # raises
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(
            f"gemcutter serves {service.name} at {url}, {service.context_length} tokens of context",
            flush=True,
        )
        await _first(signalled.wait(), _wait(bridge.gone), _wait(serving))
        code = 0
        service.closing = True
        if not bridge.alive:
            code = _complain(f"the engine died: {await bridge.gone}", 1)
            await asyncio.sleep(LINGER_SECONDS)
        else:
            await _first(bridge.idle(), hurried.wait(), _wait(bridge.gone), asyncio.sleep(DRAIN_SECONDS))
            bridge.abort_all(ApiError(503, "the server is shutting down", code="shutting_down"))
        server.should_exit = True
        await serving
        return code
    finally:
        await bridge.stop()


async def _start(config: EngineConfig, bridge: Bridge) -> Service:
    """The tokenizer loads here while the engine loads there."""
    loading = asyncio.to_thread(_load_text, config)
    ready, (folder, tokenizer) = await asyncio.gather(bridge.ready(), loading)
    return Service(config, folder, tokenizer, bridge, ready)


def _load_text(config: EngineConfig) -> tuple[Path, Tokenizer | None]:
    folder = locate(config.model_path, config.revision, weights=False)
    return folder, Tokenizer.load(folder)


class _Server(uvicorn.Server):
    """uvicorn stops listening at a signal and then dies of it; here a drain comes first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _first(*awaitables):
    """The result of whichever is done first; the others are cancelled."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return next(task for task in tasks if task in done).result()


async def _wait(future: asyncio.Future) -> None:
    """Until it is done; cancelling this wait does not cancel it."""
    await asyncio.wait([future])


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol said outright: asyncio turns Nagle's delay off only where it reads IPPROTO_TCP; without that a
    # stream's first chunk waits 40 ms for the acknowledgement of its headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _complain(why: str, code: int) -> int:
    print(f"gemcutter: {why}", file=sys.stderr, flush=True)
    return code
