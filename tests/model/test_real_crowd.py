"""A crowd over layers of 26B-A4B's real shapes, bf16, random weights, on a GPU: the bits each request gets alone.

Prompts reach past the window of 1024, answers past a split of the decode kernel; requests are put back with long
answers and computed again; next turns hold answers in their prompts. Which of attention's two kernels computes a
token must then not depend on any of it: their last bits differ.
"""

import random
import time

import pytest
import torch
from crowd import alone, check_crowd, mixed_request, next_turns, tight_budget
from forward import write_config

from gemcutter.cache.prefix import PrefixChain
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine

CONTEXT = 1600
CROWDS = {
    "whole": {},
    "eager_chunks_of_300": {"chunked_prefill_size": 300, "disable_cuda_graph": True},
    "chunks_of_100_short_of_pages": {"chunked_prefill_size": 100, "max_prefill_tokens": 200},
}


def crowd_requests() -> list:
    rng = random.Random(26)
    bases = [[rng.randrange(3, 4096) for _ in range(1300)] for _ in range(2)]
    return [mixed_request(rng, str(i), bases, [0, 0, 16, 100, 1300], 40, [1, 4, 8, 40, 100]) for i in range(64)]


def start(folder, **options) -> Engine:
    """Dummy weights have norms of 1; q_norm is brought down, as trained weights do, or each query sees one key."""
    options = {
        "device": "cuda",
        "load_format": "dummy",
        "context_length": CONTEXT,
        "max_running_requests": 64,
        **options,
    }
    engine = Engine.start(EngineConfig(model_path=str(folder), **options))
    for layer in engine._runner._model.weights.layers:
        layer.q_norm.mul_(layer.q_norm.numel() ** -0.5)
    return engine


@pytest.mark.gpu
def test_crowd_of_64_equals_alone_at_real_shapes(tmp_path, monkeypatch):
    write_config("26b", tmp_path)
    requests = crowd_requests()
    begin = time.monotonic()
    engine = start(tmp_path, disable_radix_cache=True)
    wanted = alone(engine, requests)
    turns = next_turns(requests, wanted, 10, CONTEXT - 6)
    assert len(turns) == 10
    wanted |= alone(engine, turns)
    print(f"alone: {time.monotonic() - begin:.1f} s, {sum(len(o.token_ids) for o in wanted.values())} tokens")
    for crowd, options in CROWDS.items():
        del engine
        torch.cuda.empty_cache()
        begin = time.monotonic()
        with monkeypatch.context() as patch:
            if "short" in crowd:
                budget = tight_budget(tmp_path, CONTEXT, 16, 2, **options)
                patch.setattr("gemcutter.engine.kv_byte_budget", lambda *_, budget=budget: budget)
            engine = start(tmp_path, **options)
        rng = random.Random(crowd)
        cold = check_crowd(engine, requests, wanted, rng)
        warm = check_crowd(engine, requests + turns, wanted, rng)
        print(f"{crowd}: {time.monotonic() - begin:.1f} s, {cold}, {warm}")
        assert bool(cold.preempted | warm.preempted) == ("short" in crowd)
        assert warm.cached_tokens


@pytest.mark.gpu
def test_answers_reused_by_the_next_turn_would_change_its_bits(tmp_path, monkeypatch):
    """What the rule of prompt pages is for, and that this comparison of crowds sees it."""
    write_config("26b", tmp_path)
    requests = crowd_requests()
    engine = start(tmp_path, disable_radix_cache=True)
    wanted = alone(engine, requests)
    turns = next_turns(requests, wanted, 10, CONTEXT - 6)
    wanted |= alone(engine, turns)
    del engine
    torch.cuda.empty_cache()
    all_of_it = property(lambda chain: len(chain.tokens), lambda chain, length: None)
    monkeypatch.setattr(PrefixChain, "prompt_length", all_of_it, raising=False)
    engine = start(tmp_path)
    assert check_crowd(engine, requests, wanted, random.Random(1)).cached_tokens
    with pytest.raises(AssertionError, match="goes on"):
        check_crowd(engine, turns, wanted, random.Random(2))
