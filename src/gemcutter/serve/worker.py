"""The engine process: take messages, step the engine, send one report a step."""

import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, parent_process

from gemcutter.config import EngineConfig
from gemcutter.serve import wire
from gemcutter.serve.pipe import Closed, Pipe

STATS_EVERY = 0.1  # seconds between two stats while the engine is busy


def start_engine(config: EngineConfig):
    """The real engine. Imported here, for the API process names this function and wants no torch."""
    from gemcutter.engine import Engine

    return Engine.start(config)


def main(config: EngineConfig, end: socket.socket, start: Callable) -> None:
    """Entry of the engine process.

    Args:
        end: of the pipe on which `Submit`, `Abort` and `Stop` come, and `Ready`, `Report` and `Failed` go.
        start: makes the engine from the config; importable by name, since the process is spawned.
    """
    # A signal to the whole process group is the API process's to handle: it drains, then says Stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        code = _run(config, Pipe(end), start)
    except Closed:
        code = 1
    sys.stderr.flush()
    # Not sys.exit: threads of a device library must not keep a finished process alive.
    os._exit(code)


def _run(config: EngineConfig, pipe: Pipe, start: Callable) -> int:
    try:
        engine = start(config)
    except Exception as error:
        mendable = isinstance(error, (ValueError, OSError))
        if not mendable:
            traceback.print_exc()
        pipe.send(wire.encode(wire.Failed(message=_one_line(error), mendable=mendable)))
        return 1
    gc.collect()
    gc.freeze()  # some 200,000 objects of torch and the engine: walking them stopped a step for 0.1 s now and then
    pipe.send(
        wire.encode(wire.Ready(context_length=engine.context_length, vocab=engine.spec.vocab, stats=engine.stats()))
    )
    try:
        _loop(engine, pipe)
    except Closed:
        raise
    except Exception as error:
        traceback.print_exc()
        pipe.send(wire.encode(wire.Failed(message=_one_line(error), mendable=False)))
        return 1
    return 0


def _loop(engine, pipe: Pipe) -> None:
    """Until Stop. An exception out of `step` ends the process: the engine's state is not to be trusted.

    While the engine has patience, what arrives is taken in and joins its next step.
    """
    told = 0.0
    while True:
        refusals: list[wire.Refusal] = []
        for message in pipe.receive(engine.patience if engine.has_work else None):
            match wire.to_engine.decode(message):
                case wire.Submit(requests):
                    refusals += _submit(engine, requests)
                case wire.Abort(ids):
                    for id in ids:
                        engine.abort(id)
                case wire.Stop():
                    return
        updates = engine.step() if engine.has_work and not engine.patience else []
        now = time.monotonic()
        stats = None
        if now - told >= STATS_EVERY or not engine.has_work:
            stats, told = engine.stats(), now
        if updates or refusals or stats is not None:
            pipe.send(wire.encode(wire.Report(updates=updates, refusals=refusals, stats=stats)))


def _submit(engine, requests) -> Iterator[wire.Refusal]:
    for request in requests:
        try:
            engine.submit(request)
        except ValueError as error:
            yield wire.Refusal(id=request.id, message=str(error), invalid=True)
        except Exception as error:  # one request's trouble is not the others'
            traceback.print_exc()
            yield wire.Refusal(id=request.id, message=_one_line(error), invalid=False)


def _die_with_parent() -> None:
    """A killed API process leaves no engine behind, not even one that hangs in a step or still loads."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
