"""The engine process's loop, over an engine that writes down what happens to it."""

import socket
import time

import pytest
from drive import request
from fake_engine import FakeEngine

from gemcutter.config import EngineConfig
from gemcutter.serve import wire
from gemcutter.serve.pipe import Closed, Pipe
from gemcutter.serve.worker import _loop


@pytest.fixture
def pipes():
    """Both ends of one."""
    ends = socket.socketpair()
    yield [Pipe(end) for end in ends]
    for end in ends:
        end.close()


def submit(id: str, max_tokens: int = 1) -> bytes:
    return wire.encode(wire.Submit(requests=[request(id, [5], max_tokens=max_tokens)]))


class Patient(FakeEngine):
    """Once the first step is under way, it waits for two more requests, which come one by one."""

    def __init__(self, clients: Pipe) -> None:
        super().__init__(EngineConfig())
        self.log: list[str] = []
        self._clients = clients
        self._coming = ["b", "c"]

    @property
    def patience(self) -> float:
        if self.log[:2] != ["a", "step"] or len(self.log) > 3:
            return 0.0
        if len(self.log) + len(self._coming) == 4:  # the last one is in
            self._clients.send(submit(self._coming.pop(0)))
        return 30.0

    def submit(self, item) -> None:
        self.log.append(item.id)
        super().submit(item)

    def step(self):
        self.log.append("step")
        news = super().step()
        if not self._running:
            self._clients.send(wire.encode(wire.Stop()))
        return news


def test_who_arrives_while_the_engine_is_patient_joins_its_next_step(pipes):
    clients, pipe = pipes
    engine = Patient(clients)
    clients.send(submit("a", max_tokens=2))
    begin = time.monotonic()
    _loop(engine, pipe)
    assert engine.log == ["a", "step", "b", "c", "step"]
    assert time.monotonic() - begin < 10  # it was woken
    told = [wire.from_engine.decode(message) for message in clients.receive(0)]
    assert [update.id for report in told for update in report.updates] == ["a", "a", "b", "c"]


def test_the_loop_ends_with_its_clients(pipes):
    clients, pipe = pipes
    clients.send(submit("a", max_tokens=10_000))
    clients._end.shutdown(socket.SHUT_WR)
    with pytest.raises(Closed):
        _loop(FakeEngine(EngineConfig()), pipe)
