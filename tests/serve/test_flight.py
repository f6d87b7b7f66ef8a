"""Flight and Stopwatch, without a server."""

import asyncio

import pytest

from gemcutter.schedule.request import Update
from gemcutter.serve.errors import ClientGone
from gemcutter.serve.flight import Flight
from gemcutter.serve.metrics import Metrics, Stopwatch


def update(id: str, token: int) -> Update:
    return Update(id=id, token_ids=[token])


def test_news_comes_in_order_and_all_at_once():
    async def run():
        flight = Flight(["a", "b"])
        for token in range(3):
            flight.put(update("b" if token == 1 else "a", token))
        assert [(index, news.token_ids) for index, news in await flight.news()] == [(0, [0]), (1, [1]), (0, [2])]
        waiting = asyncio.create_task(flight.news())
        await asyncio.sleep(0)
        assert not waiting.done()
        flight.put(update("b", 7))
        assert [index for index, _ in await waiting] == [1]

    asyncio.run(run())


def test_failure_comes_after_the_news_and_the_first_one_counts():
    async def run():
        flight = Flight(["a"])
        flight.put(update("a", 1))
        flight.fail(ClientGone())
        flight.fail(ValueError("later"))
        assert len(await flight.news()) == 1
        for _ in range(2):
            with pytest.raises(ClientGone):
                await flight.news()

    asyncio.run(run())


def test_stopwatch_measures_what_the_names_say():
    metrics = Metrics()
    watch = Stopwatch(metrics, arrival=100.0)
    for count, now in ((1, 100.5), (0, 100.6), (2, 101.0), (1, 102.0)):
        watch.tokens(count, now)
    watch.finish("stop", prompt_tokens=7, cached_tokens=3, now=102.5)
    lines = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if line[0] != "#")
    seen = {
        name: (float(lines[f"gemcutter_{name}_sum"]), float(lines[f"gemcutter_{name}_count"]))
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "time_per_output_token_seconds",
            "e2e_request_latency_seconds",
        )
    }
    assert list(seen.values()) == [(0.5, 1), (1.5, 2), (0.5, 1), (2.5, 1)]
    counted = ("prompt_tokens", "cached_prompt_tokens", "generation_tokens")
    assert [float(lines[f"gemcutter_{name}_total"]) for name in counted] == [7, 3, 4]
    assert float(lines['gemcutter_requests_total{finish_reason="stop"}']) == 1
