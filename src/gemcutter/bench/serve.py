"""Load on an OpenAI endpoint: send, record, then read and count."""

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from gemcutter.bench.serve_client import Endpoint, Exchange, exchange, read_completion, unwrap
from gemcutter.bench.serve_load import Ask
from gemcutter.bench.serve_metrics import figures

WARMUP_TOKENS = 32  # that a warm-up request asks for at most


def served_model(endpoint: Endpoint) -> str:
    """The name of the first model that the endpoint lists.

    Raises:
        ValueError: it cannot be reached, or lists none.
    """
    try:
        status, body = unwrap(asyncio.run(exchange(endpoint, endpoint.request("GET", "/v1/models"))))
        text = b"".join(data for _, data in body)
        if status != 200:
            raise ValueError(f"HTTP {status}: {text.decode(errors='replace')[:300]}")
        return msgspec.json.decode(text)["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        where = f"{endpoint.host}:{endpoint.port}{endpoint.path}/v1/models"
        raise ValueError(f"{where} names no model ({error}); start the server, or give --model") from error


@dataclass(frozen=True)
class Target:
    """An endpoint, and what every request to it says."""

    endpoint: Endpoint
    model: str
    ignore_eos: bool = True  # ask for the whole output length
    extra_body: dict = field(default_factory=dict)  # fields added, or put in the place of ours

    def request(self, ask: Ask) -> bytes:
        body = {
            "model": self.model, "prompt": ask.prompt, "max_tokens": ask.output_len, "temperature": 0.0,
            "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": self.ignore_eos,
        }  # fmt: skip
        return self.endpoint.request("POST", "/v1/completions", body | self.extra_body)


def warm_up(target: Target, asks: list[Ask]) -> None:
    """Send these all at once, for a few tokens each.

    Raises:
        ValueError: one failed, so measuring would be in vain.
    """
    asks = [Ask(ask.prompt, min(ask.output_len, WARMUP_TOKENS)) for ask in asks]
    requests = [target.request(ask) for ask in asks]
    if not requests:
        return
    records, _ = asyncio.run(_send(target.endpoint, requests, [0.0] * len(asks), None, lambda: None))
    for record, ask in zip(records, asks, strict=True):
        if error := read_completion(record, ask.output_len).error:
            raise ValueError(f"a warm-up request failed: {error}")


def measure(
    target: Target,
    asks: list[Ask],
    gaps: list[float],
    max_concurrency: int | None,
    done: Callable[[], None] = lambda: None,
) -> dict:
    """Send every ask and report the figures of serve_metrics, and `client_cpu_share`: this process's share of one
    core; near 1, the client itself is what was measured.

    Args:
        target: where to.
        asks: what to send, at least one.
        gaps: seconds before each request, counted from when the one before it was due.
        max_concurrency: requests under way at once; the others wait, and their clocks do not run. None: any number.
        done: called after each request.
    """
    requests = [target.request(ask) for ask in asks]
    gc.collect()
    gc.disable()  # a collection in the middle of a run stops every stamp
    try:
        cpu = time.process_time()
        records, duration = asyncio.run(_send(target.endpoint, requests, gaps, max_concurrency, done))
        cpu = time.process_time() - cpu
    finally:
        gc.enable()
    answers = [read_completion(record, ask.output_len) for record, ask in zip(records, asks, strict=True)]
    return figures(asks, answers, duration) | {"client_cpu_share": cpu / duration}


async def _send(
    endpoint: Endpoint, requests: list[bytes], gaps: list[float], limit: int | None, done: Callable[[], None]
) -> tuple[list[Exchange], float]:
    """The records, in order, and the seconds from the first request to the end of the last."""
    gate = asyncio.Semaphore(limit or len(requests))

    async def one(request: bytes) -> Exchange:
        async with gate:
            record = await exchange(endpoint, request)
        done()
        return record

    begin, tasks, due = time.perf_counter(), [], 0.0
    for request, gap in zip(requests, gaps, strict=True):
        due += gap
        if (wait := begin + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(request)))
    records = await asyncio.gather(*tasks)
    return records, time.perf_counter() - begin
