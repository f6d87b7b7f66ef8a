"""Mixed requests, what each gets alone, and crowds that must give each the very same: tokens, logprobs, reason."""

import random
from dataclasses import dataclass, field, replace

from drive import Outcome, collect, finish, request

from gemcutter.cache.layout import CacheLayout
from gemcutter.checkpoint.config import read_spec
from gemcutter.engine import Engine
from gemcutter.schedule.request import Request


def mixed_request(
    rng: random.Random, id: str, bases: list[list[int]], prefixes: list[int], own: int, most: list[int | None]
) -> Request:
    """A prompt that may begin as others do; every way to draw, and most ways to change logits.

    Args:
        bases: what prompts have in common; its tokens are what is drawn from.
        prefixes: lengths of the common part to choose from; then come 1 to `own` other tokens.
        most: max_tokens to choose from.
    """
    known = sorted(set().union(*bases))
    params = {
        "temperature": rng.choice([0.0, 0.7, 1.0, 3.0]),
        "top_k": rng.choice([0, 0, 5, 64]),
        "top_p": rng.choice([1.0, 0.6]),
        "min_p": rng.choice([0.0, 0.0, 0.05]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.7]),
        "frequency_penalty": rng.choice([0.0, 1.5]),
        "presence_penalty": rng.choice([0.0, 0.0, -1.0]),
        "logit_bias": rng.choice([None, {5: 4.0, 7: -100.0}]),
        "max_tokens": rng.choice(most),
        "logprobs": rng.choice([None, 2, 2]),
    }
    stop_ids = rng.sample(known, rng.choice([0, 0, 6]))
    prompt = rng.choice(bases)[: rng.choice(prefixes)] + rng.choices(known, k=rng.randrange(1, own + 1))
    return request(id, prompt, seed=rng.randrange(2**63), stop_ids=stop_ids, **params)


def alone(engine: Engine, requests: list[Request]) -> dict[str, Outcome]:
    """Each on the idle engine, which must not reuse prefixes."""
    assert engine.config.disable_radix_cache
    return {item.id: finish(engine, [item])[0] for item in requests}


def next_turns(requests: list[Request], outcomes: dict[str, Outcome], count: int, longest: int) -> list[Request]:
    """Requests whose prompts are those of others, their answers, and something new."""
    turns = []
    for item in sorted(requests, key=lambda item: -len(outcomes[item.id].token_ids)):
        prompt = [*item.prompt_ids, *outcomes[item.id].token_ids, *item.prompt_ids[:3]]
        if len(prompt) < longest and len(turns) < count:
            turns.append(request(f"{item.id} goes on", prompt, seed=item.seed, max_tokens=6, logprobs=1))
    return turns


@dataclass
class Seen:
    """What a crowd went through."""

    preempted: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    cached_tokens: int = 0


def check_crowd(
    engine: Engine, requests: list[Request], wanted: dict[str, Outcome], rng: random.Random, aborts: float = 0.0
) -> Seen:
    """Let requests arrive over time, in any order; assert that each gets the outcome wanted, to the bit.

    With `aborts`, in each step a request is aborted with that probability; what it got is a beginning of it.
    """
    arriving = rng.sample(requests, len(requests))
    outcomes: dict[str, Outcome] = {}
    seen = Seen()
    while arriving or engine.has_work:
        for item in [arriving.pop() for _ in range(min(rng.randrange(4), len(arriving)))]:
            engine.submit(item)
            outcomes[item.id] = Outcome()
        running = [id for id, outcome in outcomes.items() if outcome.finish_reason is None]
        if running and rng.random() < aborts:
            engine.abort(id := rng.choice(running))
            seen.aborted.add(id)
        collect(engine, outcomes)
        engine.check_invariants()
        seen.preempted |= {sequence.id for sequence in engine._scheduler._live.values() if sequence.preemptions}
    assert not any(engine.stats().pages_used.values())
    for id, got in outcomes.items():
        seen.cached_tokens += got.cached_tokens
        want = wanted[id]
        if id in seen.aborted:
            length = len(got.token_ids)
            want = Outcome(want.token_ids[:length], want.logprobs[:length], "abort")
        assert replace(got, cached_tokens=0) == replace(want, cached_tokens=0), id
    return seen


def tight_budget(folder, context: int, page_size: int, element_bytes: int, **options) -> int:
    """Bytes that hold one request of `context` tokens and half of another."""
    layout = CacheLayout.of(read_spec(folder), page_size, element_bytes)
    chunk = min(options.get("chunked_prefill_size", 8192), options.get("max_prefill_tokens", 8192))
    pages = layout.one_request(context, chunk)
    return sum((count + 1) * layout.page_bytes[kind] for kind, count in pages.items()) * 3 // 2
