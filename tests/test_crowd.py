"""In a crowd and short of pages, requests get exactly the tokens that each gets alone on an idle engine.

float32 on the CPU, where company moves a logit by 1e-6 and so no draw in practice. What a greedy request gets
alone is HF's (test_parity.py), what a draw gives is the float64 distribution's (ops/test_sample.py).
"""

import random

import pytest
import tiny_models
from drive import Outcome, collect, finish, request

from gemcutter.cache.layout import CacheLayout
from gemcutter.checkpoint.config import read_spec
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine
from gemcutter.schedule.request import Request

CONTEXT = 64
KINDS = {
    "moe": {"sliding_window": 12},  # one page and a half
    "ple_shared": {},  # layers that read others' K/V; a window of exactly one page
    "dense": {"layer_types": ["full_attention"] * 5},  # one kind of pages only
}


@pytest.fixture(scope="module", params=list(KINDS))
def case(request, tmp_path_factory):
    """A checkpoint, requests, and what each gets alone: whole prompts, no reuse, pages for everything."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.make(request.param, **KINDS[request.param]).save_pretrained(folder)
    rng = random.Random(request.param)
    bases = [[rng.randrange(3, 100) for _ in range(40)] for _ in range(2)]
    requests = [random_request(rng, str(i), bases) for i in range(20)]
    engine = start(folder, disable_radix_cache=True)
    return folder, requests, {item.id: finish(engine, [item])[0] for item in requests}


def start(folder, **options) -> Engine:
    options = {"device": "cpu", "page_size": 8, "context_length": CONTEXT, **options}
    return Engine.start(EngineConfig(model_path=str(folder), **options))


def random_request(rng: random.Random, id: str, bases: list[list[int]]) -> Request:
    """A prompt that may begin as others do; every way to draw, and most ways to change logits."""
    own = [rng.randrange(3, 100) for _ in range(rng.randrange(1, 14))]
    params = {
        "temperature": rng.choice([0.0, 0.7, 1.0, 3.0]),
        "top_k": rng.choice([0, 0, 5, 64]),
        "top_p": rng.choice([1.0, 0.6]),
        "min_p": rng.choice([0.0, 0.0, 0.05]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.7]),
        "frequency_penalty": rng.choice([0.0, 1.5]),
        "presence_penalty": rng.choice([0.0, 0.0, -1.0]),
        "logit_bias": rng.choice([None, {5: 4.0, 7: -100.0}]),
        "max_tokens": rng.choice([1, 20, 20, None]),
        "logprobs": rng.choice([None, 2]),
    }
    stop_ids = rng.sample(range(100), rng.choice([0, 0, 6]))
    prompt = rng.choice(bases)[: rng.choice([0, 8, 17, 40])] + own
    return request(id, prompt, seed=rng.randrange(2**63), stop_ids=stop_ids, **params)


CROWDS = {
    "chunks_of_13": {"max_running_requests": 8, "chunked_prefill_size": 13},
    "one_token_chunks": {"max_running_requests": 5, "chunked_prefill_size": 1},
    "step_under_a_page_no_reuse": {"max_prefill_tokens": 5, "disable_radix_cache": True},
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_crowd_equals_alone(case, crowd, monkeypatch):
    folder, requests, alone = case
    budget = smallest_budget(folder, CROWDS[crowd]) * 3 // 2
    monkeypatch.setattr("gemcutter.engine.kv_byte_budget", lambda *_: budget)
    engine = start(folder, **CROWDS[crowd])
    rng = random.Random(crowd)
    arriving = rng.sample(requests, len(requests))
    outcomes: dict[str, Outcome] = {}
    aborted, preempted = set(), set()
    while arriving or engine.has_work:
        for item in [arriving.pop() for _ in range(min(rng.randrange(4), len(arriving)))]:
            engine.submit(item)
            outcomes[item.id] = Outcome()
        running = [id for id, outcome in outcomes.items() if outcome.finish_reason is None]
        if running and rng.random() < 0.01:
            engine.abort(id := rng.choice(running))
            aborted.add(id)
        collect(engine, outcomes)
        engine.check_invariants()
        preempted |= {sequence.id for sequence in engine._scheduler._live.values() if sequence.preemptions}
    assert not any(engine.stats().pages_used.values())
    for id, outcome in outcomes.items():
        wanted = alone[id]
        if id in aborted:
            assert outcome.finish_reason == "abort"
            assert outcome.token_ids == wanted.token_ids[: len(outcome.token_ids)]
        else:
            assert (outcome.token_ids, outcome.finish_reason) == (wanted.token_ids, wanted.finish_reason), id
            for ours, theirs in zip(outcome.logprobs, wanted.logprobs, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-3)
    drawn = [item.id for item in requests if not item.params.greedy]
    assert preempted.intersection(drawn) - aborted, "no request that draws was recomputed: too easy"
    reused = sum(outcome.cached_tokens for outcome in outcomes.values())
    assert (reused == 0) == ("no_reuse" in crowd)


def smallest_budget(folder, options: dict) -> int:
    """Bytes that hold one request of CONTEXT tokens."""
    layout = CacheLayout.of(read_spec(folder), page_size=8, element_bytes=4)
    chunk = min(options.get("chunked_prefill_size", 2048), options.get("max_prefill_tokens", 8192))
    pages = layout.one_request(CONTEXT, chunk)
    return sum((count + 1) * layout.page_bytes[kind] for kind, count in pages.items())
