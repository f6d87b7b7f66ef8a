"""Answer over a bridge that is only a list."""

import asyncio
import time
from array import array

import pytest

from gemcutter.checkpoint.files import locate
from gemcutter.params import SamplingParams
from gemcutter.schedule.request import Request, Update
from gemcutter.serve.answer import Answer
from gemcutter.serve.flight import Flight
from gemcutter.serve.metrics import Metrics
from gemcutter.text.tokens import Tokenizer


class Bridge:
    def __init__(self) -> None:
        self.landed: list[str] = []

    def open(self, requests: list[Request]) -> Flight:
        self.flight = Flight([request.id for request in requests])
        return self.flight

    def land(self, ids: list[str]) -> None:
        self.landed += ids


@pytest.mark.parametrize("size", [1, 3, 100])
def test_tokens_behind_a_stop_string_are_not_counted(size):
    """However many tokens one update brings."""
    tokenizer = Tokenizer.load(locate("carat"))
    ids = tokenizer.encode("one two three four", add_special_tokens=False)
    kept = next(n for n in range(len(ids)) if "three" in tokenizer.decode(ids[:n]))
    params = SamplingParams(stop=("three",), max_tokens=50)
    request = Request(id="r", prompt_ids=array("i", [2, 600]), params=params, stop_ids=frozenset(), seed=0)

    async def run() -> tuple[Answer, Bridge, Metrics, list]:
        bridge, metrics = Bridge(), Metrics()
        answer = Answer(bridge, metrics, tokenizer, [request], 1, time.monotonic())
        for at in range(0, len(ids), size):
            bridge.flight.put(Update(id="r", token_ids=ids[at : at + size]))
        parts = [part async for parts in answer.parts() for part in parts]
        answer.close()
        return answer, bridge, metrics, parts

    answer, bridge, metrics, parts = asyncio.run(run())
    assert kept < len(ids)
    assert "".join(part.delta.text for part in parts) == "one two "
    assert [id for part in parts for id in part.delta.token_ids] == ids[:kept]
    assert answer.usage()["completion_tokens"] == kept
    assert f"gemcutter_generation_tokens_total {float(kept)}" in metrics.text().decode()
    assert bridge.landed[0] == "r"  # the engine would go on
