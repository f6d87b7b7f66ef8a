"""The engine process's loop, over an engine that writes down what happens to it."""

import time

import pytest
import zmq
from drive import request
from fake_engine import FakeEngine

from gemcutter.config import EngineConfig
from gemcutter.serve import wire
from gemcutter.serve.worker import _loop


@pytest.fixture
def pipes():
    """Two, each from its push end to its pull end."""
    with zmq.Context() as context:
        both = []
        for name in ("to", "from"):
            push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
            pull.bind(f"inproc://{name}")
            push.connect(f"inproc://{name}")
            both.append((push, pull))
        yield both
        context.destroy(linger=0)


class Patient(FakeEngine):
    """Once the first step is under way, it waits for two more requests, which come one by one."""

    def __init__(self, push: zmq.Socket) -> None:
        super().__init__(EngineConfig())
        self.log: list[str] = []
        self._push = push
        self._coming = ["b", "c"]

    @property
    def patience(self) -> float:
        if self.log[:2] != ["a", "step"] or len(self.log) > 3:
            return 0.0
        if len(self.log) + len(self._coming) == 4:  # the last one is in
            item = request(self._coming.pop(0), [5], max_tokens=1)
            self._push.send(wire.encode(wire.Submit(requests=[item])))
        return 30.0

    def submit(self, item) -> None:
        self.log.append(item.id)
        super().submit(item)

    def step(self):
        self.log.append("step")
        news = super().step()
        if not self._running:
            self._push.send(wire.encode(wire.Stop()))
        return news


def test_who_arrives_while_the_engine_is_patient_joins_its_next_step(pipes):
    (push, pull), (report, outbox) = pipes
    engine = Patient(push)
    push.send(wire.encode(wire.Submit(requests=[request("a", [5], max_tokens=2)])))
    begin = time.monotonic()
    _loop(engine, pull, report)
    assert engine.log == ["a", "step", "b", "c", "step"]
    assert time.monotonic() - begin < 10  # it was woken
    told = []
    while outbox.poll(0):
        told += wire.from_engine.decode(outbox.recv()).updates
    assert [update.id for update in told] == ["a", "a", "b", "c"]
