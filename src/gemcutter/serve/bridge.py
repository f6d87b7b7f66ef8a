"""Bridge: the API process's end of the engine process. Starts it, talks to it, sees it die."""

import asyncio
import multiprocessing
import signal
import socket
import traceback
from collections.abc import Callable

from gemcutter.config import EngineConfig
from gemcutter.schedule.request import Request, Stats
from gemcutter.serve import wire, worker
from gemcutter.serve.errors import ApiError, bad_request
from gemcutter.serve.flight import Flight
from gemcutter.serve.pipe import Splitter, frame

STOP_SECONDS = 1.5  # for the engine process to leave by itself before it is killed


class EngineDied(Exception):
    """The engine process could not start or is gone; the message says why."""


class Bridge:
    """Everything here runs on the event loop's thread."""

    def __init__(self, config: EngineConfig, start: Callable) -> None:
        self.stats: Stats | None = None  # the newest
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why the engine died
        self._max_flying = config.max_queued_requests
        self._flights: dict[str, Flight] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_word: str | None = None
        self._mendable = False
        self._started: asyncio.Future[wire.Ready] = asyncio.get_running_loop().create_future()
        ours, theirs = socket.socketpair()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=worker.main, args=(config, theirs, start), name="engine")
        self._process.start()
        theirs.close()
        asyncio.get_running_loop().add_reader(self._process.sentinel, self._on_exit)
        self._ear = _Ear(self._hear)
        self._connecting = asyncio.create_task(
            asyncio.get_running_loop().create_unix_connection(lambda: self._ear, sock=ours)
        )
        self._burial: asyncio.Task | None = None

    async def ready(self) -> wire.Ready:
        """Raises, if the engine does not start, ValueError for what the user can mend and else EngineDied."""
        await asyncio.wait([self._connecting])
        await asyncio.wait([self._started, self.gone], return_when=asyncio.FIRST_COMPLETED)
        if self.gone.done():
            raise (ValueError if self._mendable else EngineDied)(self.gone.result())
        return self._started.result()

    @property
    def alive(self) -> bool:
        return not self.gone.done() and self._last_word is None

    def check_room(self, count: int) -> None:
        """Raises ApiError if `count` more sequences are more than the server takes."""
        if count > self._max_flying:
            raise bad_request(f"one request may ask for {self._max_flying} sequences here, got {count}")
        if len(self._flights) + count > self._max_flying:
            raise ApiError(
                503,
                f"{len(self._flights)} requests are waiting or running; try again later",
                code="queue_full",
            )

    def open(self, requests: list[Request]) -> Flight:
        """Send the sequences of one API request to the engine. Whoever opens closes.

        Raises ApiError (503) if the engine is gone or the queue is full.
        """
        if not self.alive:
            raise ApiError(503, "the engine is not running", code="engine_dead")
        self.check_room(len(requests))
        flight = Flight([request.id for request in requests])
        for request in requests:
            assert request.id not in self._flights, f"request id {request.id} is taken"
            self._flights[request.id] = flight
        self._idle.clear()
        self._send(wire.Submit(requests=requests))
        return flight

    def land(self, ids: list[str]) -> None:
        """No more news of these sequences is wanted; those that still run are aborted."""
        running = [id for id in ids if self._flights.pop(id, None) is not None]
        if running and self.alive:
            self._send(wire.Abort(ids=running))
        if not self._flights:
            self._idle.set()

    def abort_all(self, error: ApiError) -> None:
        flights = dict.fromkeys(self._flights.values())
        self.land(list(self._flights))
        for flight in flights:
            flight.fail(error)

    async def idle(self) -> None:
        """Until no request waits or runs."""
        await self._idle.wait()

    async def stop(self) -> None:
        """End the engine process within about STOP_SECONDS, gently if it listens."""
        if self._started.done():  # one that still loads does not listen
            self._send(wire.Stop())
            await asyncio.wait([self.gone], timeout=STOP_SECONDS)
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        if self._burial is not None:
            self._burial.cancel()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        (await self._connecting)[0].abort()

    def _send(self, message: wire.Submit | wire.Abort | wire.Stop) -> None:
        """If the engine is dying, into the void; `_on_exit` will say so to everyone."""
        self._ear.transport.write(frame(wire.encode(message)))

    def _hear(self, message: bytes) -> None:
        try:
            self._take(wire.from_engine.decode(message))
        except Exception:  # our bug; deaf to the engine, the server would only look alive
            traceback.print_exc()
            self._last_word = "its messages could not be read"
            self._process.kill()

    def _take(self, message: wire.Ready | wire.Report | wire.Failed) -> None:
        match message:
            case wire.Report():
                self._deliver(message)
            case wire.Ready():
                self.stats = message.stats
                self._started.set_result(message)
            case wire.Failed():
                self._last_word, self._mendable = message.message, message.mendable

    def _deliver(self, report: wire.Report) -> None:
        if report.stats is not None:
            self.stats = report.stats
        for update in report.updates:
            flight = self._flights.get(update.id)
            if flight is None:  # aborted while this was on its way
                continue
            if update.finish_reason is not None:
                del self._flights[update.id]
            if update.finish_reason == "error":
                flight.fail(ApiError(500, update.error or "the engine gave up this request"))
            else:
                flight.put(update)
        for refusal in report.refusals:
            flight = self._flights.pop(refusal.id, None)
            if flight is not None:
                flight.fail(ApiError(400 if refusal.invalid else 500, refusal.message))
        if not self._flights:
            self._idle.set()

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._burial = asyncio.create_task(self._bury())

    async def _bury(self) -> None:
        await self._ear.closed.wait()  # a last word may still be in the pipe
        self._process.join()
        reason = self._last_word or f"engine process {_ending(self._process.exitcode)}"
        self.gone.set_result(reason)
        self.abort_all(ApiError(500, f"the engine died: {reason}", code="engine_dead"))


class _Ear(asyncio.Protocol):
    """Hands over whole messages, and knows when no more will come."""

    def __init__(self, hear: Callable[[bytes], None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = asyncio.Event()
        self._hear = hear
        self._splitter = Splitter()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._splitter.push(data):
            self._hear(message)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"left with exit code {code}"
