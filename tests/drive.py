"""Drive an engine by hand in tests: submit, step until done, collect."""

from array import array
from dataclasses import dataclass, field

from gemcutter.engine import Engine
from gemcutter.params import SamplingParams, resolve
from gemcutter.schedule.request import Request


@dataclass
class Outcome:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0


def request(id: str, prompt_ids: list[int], seed: int = 0, stop_ids=(), **params) -> Request:
    params = resolve(SamplingParams(**{"temperature": 0.0, **params}), {})
    return Request(id=id, prompt_ids=array("i", prompt_ids), params=params, stop_ids=frozenset(stop_ids), seed=seed)


def collect(engine: Engine, outcomes: dict[str, Outcome]) -> None:
    """One step; its updates are added to the outcomes."""
    for update in engine.step():
        outcome = outcomes.setdefault(update.id, Outcome())
        outcome.token_ids += update.token_ids
        outcome.logprobs += update.logprobs or []
        outcome.finish_reason = update.finish_reason
        outcome.cached_tokens = max(outcome.cached_tokens, update.cached_tokens)


def finish(engine: Engine, requests: list[Request], limit: int = 10_000) -> list[Outcome]:
    """Submit all, step until nothing is left; outcomes in the order of the requests."""
    outcomes: dict[str, Outcome] = {}
    for item in requests:
        engine.submit(item)
    for _ in range(limit):
        if not engine.has_work:
            return [outcomes[item.id] for item in requests]
        collect(engine, outcomes)
    raise AssertionError(f"not done after {limit} steps")
