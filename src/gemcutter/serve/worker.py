"""The engine process: take messages, step the engine, send one report a step."""

import gc
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, parent_process

import zmq

from gemcutter.config import EngineConfig
from gemcutter.serve import wire

STATS_EVERY = 0.1  # seconds between two stats while the engine is busy
LINGER_MS = 1000  # for the last word to leave


def start_engine(config: EngineConfig):
    """The real engine. Imported here, for the API process names this function and wants no torch."""
    from gemcutter.engine import Engine

    return Engine.start(config)


def main(config: EngineConfig, inbox: str, outbox: str, start: Callable) -> None:
    """Entry of the engine process.

    Args:
        inbox: ZeroMQ address to pull `Submit`, `Abort` and `Stop` from.
        outbox: ZeroMQ address to push `Ready`, `Report` and `Failed` to.
        start: makes the engine from the config; importable by name, since the process is spawned.
    """
    # A signal to the whole process group is the API process's to handle: it drains, then says Stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, LINGER_MS)
        pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for socket, address in ((pull, inbox), (push, outbox)):
            socket.set_hwm(0)  # no message is dropped or waited for; what travels is bounded by the queue limit
            socket.connect(address)
        code = _run(config, pull, push, start)
        pull.close()
        push.close()
    sys.stderr.flush()
    # Not sys.exit: threads of a device library must not keep a finished process alive.
    os._exit(code)


def _run(config: EngineConfig, pull: zmq.Socket, push: zmq.Socket, start: Callable) -> int:
    try:
        engine = start(config)
    except Exception as error:
        mendable = isinstance(error, (ValueError, OSError))
        if not mendable:
            traceback.print_exc()
        push.send(wire.encode(wire.Failed(message=one_line(error), mendable=mendable)))
        return 1
    gc.collect()
    gc.freeze()  # some 200,000 objects of torch and the engine: walking them stopped a step for 0.1 s now and then
    push.send(
        wire.encode(wire.Ready(context_length=engine.context_length, vocab=engine.spec.vocab, stats=engine.stats()))
    )
    try:
        _loop(engine, pull, push)
    except Exception as error:
        traceback.print_exc()
        push.send(wire.encode(wire.Failed(message=one_line(error), mendable=False)))
        return 1
    return 0


def _loop(engine, pull: zmq.Socket, push: zmq.Socket) -> None:
    """Until Stop. An exception out of `step` ends the process: the engine's state is not to be trusted.

    While the engine has patience, what arrives is taken in and joins its next step.
    """
    told = 0.0
    while True:
        refusals: list[wire.Refusal] = []
        for message in _arrived(pull, engine.patience if engine.has_work else None):
            match message:
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
            push.send(wire.encode(wire.Report(updates=updates, refusals=refusals, stats=stats)))


def _submit(engine, requests) -> Iterator[wire.Refusal]:
    for request in requests:
        try:
            engine.submit(request)
        except ValueError as error:
            yield wire.Refusal(id=request.id, message=str(error), invalid=True)
        except Exception as error:  # one request's trouble is not the others'
            traceback.print_exc()
            yield wire.Refusal(id=request.id, message=one_line(error), invalid=False)


def _arrived(pull: zmq.Socket, seconds: float | None) -> list[wire.Submit | wire.Abort | wire.Stop]:
    """Every message that is there; if there is none, what comes within so many seconds, None for any number."""
    messages = _here(pull)
    if not messages:
        select.select([pull], [], [], seconds)  # its own `poll` takes whole milliseconds
        messages = _here(pull)
    return messages


def _here(pull: zmq.Socket) -> list[wire.Submit | wire.Abort | wire.Stop]:
    messages = []
    while True:
        try:
            messages.append(wire.to_engine.decode(pull.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return messages


def _die_with_parent() -> None:
    """A killed API process leaves no engine behind, not even one that hangs in a step or still loads."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
