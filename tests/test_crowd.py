"""In a crowd and short of pages, requests get the very tokens and logprobs that each gets alone on an idle engine.

Cold and warm, in chunks and whole, preempted and recomputed, by graph and eagerly; on a CPU and on a GPU. What a
greedy request gets alone is HF's (test_parity.py), what a draw gives is the float64 distribution's
(ops/tokens/test_sample.py).
"""

import random

import pytest
import tiny_models
import torch
from crowd import alone, check_crowd, mixed_request, next_turns, tight_budget
from drive import request
from problems import held_out

from gemcutter.checkpoint.files import locate
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine

# Widths are multiples of 32, as in every Gemma 4: PyTorch's tanh has other bits where less than a vector is left.
VOCAB = {"vocab_size": 160, "vocab_size_per_layer_input": 160}
KINDS = {
    "moe": {"sliding_window": 12},  # one page and a half
    "ple_shared": {},  # layers that read others' K/V; a window of exactly one page
    "dense": {"layer_types": ["full_attention"] * 5},  # one kind of pages only
    "glm": {"n_routed_experts": 32},
}


def start(model, **options) -> Engine:
    return Engine.start(EngineConfig(**{"model_path": str(model), "device": "cpu", "page_size": 8, **options}))


@pytest.fixture(scope="module", params=list(KINDS))
def tiny(request, tmp_path_factory):
    """A checkpoint in float32, requests, and what each gets alone: whole prompts, no reuse, pages for all."""
    folder = tmp_path_factory.mktemp(request.param)
    vocab = VOCAB if request.param not in tiny_models.GLM else {"vocab_size": 160}
    tiny_models.make(request.param, **vocab, **KINDS[request.param]).save_pretrained(folder)
    rng = random.Random(request.param)
    bases = [[rng.randrange(3, 100) for _ in range(40)] for _ in range(2)]
    requests = [mixed_request(rng, str(i), bases, [0, 8, 17, 40], 13, [1, 20, 20, None]) for i in range(24)]
    return folder, requests, alone(start(folder, context_length=64, disable_radix_cache=True), requests)


TINY_CROWDS = {
    "chunks_of_13": {"max_running_requests": 8, "chunked_prefill_size": 13},
    "one_token_chunks": {"max_running_requests": 5, "chunked_prefill_size": 1},
    "step_under_a_page_no_reuse": {"max_prefill_tokens": 5, "disable_radix_cache": True},
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("crowd", TINY_CROWDS)
def test_tiny_crowd_equals_alone(tiny, crowd, ahead, monkeypatch):
    """Also where each step is launched before the tokens of the last are read, as on a GPU."""
    folder, requests, wanted = tiny
    options = TINY_CROWDS[crowd]
    budget = tight_budget(folder, 64, 8, 4, **options)
    monkeypatch.setattr("gemcutter.engine.kv_byte_budget", lambda *_: budget)
    engine = start(folder, context_length=64, **options)
    engine._ahead = ahead
    seen = check_crowd(engine, requests, wanted, random.Random(crowd), aborts=0.01)
    drawn = {item.id for item in requests if not item.params.greedy}
    print(len((seen.preempted & drawn) - seen.aborted), "requests that draw were recomputed")
    assert (seen.preempted & drawn) - seen.aborted, "too easy"
    assert (seen.cached_tokens == 0) == ("no_reuse" in crowd)


def test_tiny_crowd_with_an_fp8_cache_equals_alone(tmp_path, monkeypatch):
    """K/V are quantised before any are read, so neither chunks nor company nor pages lost show."""
    tiny_models.make("ple_shared", **VOCAB).save_pretrained(tmp_path)
    rng = random.Random(8)
    bases = [[rng.randrange(3, 100) for _ in range(40)] for _ in range(2)]
    requests = [mixed_request(rng, str(i), bases, [0, 8, 17, 40], 13, [1, 20, 20, None]) for i in range(16)]
    options = dict(context_length=64, kv_cache_dtype="fp8_e4m3")
    plain = alone(start(tmp_path, context_length=64, disable_radix_cache=True), requests)
    wanted = alone(start(tmp_path, **options, disable_radix_cache=True), requests)
    assert any(wanted[id].logprobs != plain[id].logprobs for id in wanted), "the cache is none of FP8"
    crowd = {"max_running_requests": 8, "chunked_prefill_size": 13}
    budget = tight_budget(tmp_path, 64, 8, 1, **crowd)
    monkeypatch.setattr("gemcutter.engine.kv_byte_budget", lambda *_: budget)
    engine = start(tmp_path, **options, **crowd)
    assert check_crowd(engine, requests, wanted, rng, aborts=0.01).preempted, "too easy"


CONTEXT = 320
CARAT_CROWDS = {
    "whole": {"max_running_requests": 64},
    "chunks_of_37_short_of_pages": {"max_running_requests": 16, "chunked_prefill_size": 37},
    "chunks_of_16_short_of_pages_no_reuse": {
        "max_running_requests": 7, "chunked_prefill_size": 16, "max_prefill_tokens": 40,
        "disable_radix_cache": True,
    },
}  # fmt: skip
CARATS = [
    pytest.param("carat", "cpu", "auto", ["chunks_of_37_short_of_pages"], id="carat"),
    pytest.param("carat", "cpu", "auto", list(CARAT_CROWDS), id="carat-all", marks=pytest.mark.slow),
    pytest.param("carat", "cpu", "fp8_e4m3", list(CARAT_CROWDS), id="carat-fp8-cache-all", marks=pytest.mark.slow),
    pytest.param("carat-edge", "cpu", "auto", list(CARAT_CROWDS), id="carat-edge-all", marks=pytest.mark.slow),
    pytest.param("carat", "cuda", "auto", list(CARAT_CROWDS), id="carat-cuda", marks=pytest.mark.gpu),
    pytest.param("carat", "cuda", "fp8_e4m3", list(CARAT_CROWDS), id="carat-fp8-cache-cuda", marks=pytest.mark.gpu),
    pytest.param("carat-edge", "cuda", "auto", list(CARAT_CROWDS), id="carat-edge-cuda", marks=pytest.mark.gpu),
]


def carat_requests() -> list:
    rng = random.Random(64)
    texts = [problem.solution.encode() for problem in held_out(12)]
    bases = [[2, *b"".join(texts[i : i + 6])[:230]] for i in (0, 6)]
    return [mixed_request(rng, str(i), bases, [0, 8, 40, 100, 231], 13, [1, 3, 3, 8, 32]) for i in range(64)]


@pytest.mark.parametrize("model, device, cache, crowds", CARATS)
def test_crowd_of_64_equals_alone(model, device, cache, crowds, monkeypatch):
    requests = carat_requests()
    always = dict(device=device, kv_cache_dtype=cache, context_length=CONTEXT)
    solo = start(model, **always, disable_radix_cache=True)
    wanted = alone(solo, requests)
    turns = next_turns(requests, wanted, 10, CONTEXT - 6)
    assert len(turns) == 10
    wanted |= alone(solo, turns)
    for crowd in crowds:
        options = always | CARAT_CROWDS[crowd]
        with monkeypatch.context() as patch:
            if "short" in crowd:
                element_bytes = 2 if cache == "auto" else 1
                budget = tight_budget(locate(model), CONTEXT, 8, element_bytes, **CARAT_CROWDS[crowd])
                patch.setattr("gemcutter.engine.kv_byte_budget", lambda *_, budget=budget: budget)
            engines = [start(model, **options)]
            if device == "cuda":
                engines.append(start(model, **options, disable_cuda_graph=True))
        for engine in engines:
            rng = random.Random(crowd)
            cold = check_crowd(engine, requests, wanted, rng)
            warm = check_crowd(engine, requests + turns, wanted, rng)
            print(model, crowd, cold, warm)
            assert bool(cold.preempted | warm.preempted) == ("short" in crowd)
            assert bool(warm.cached_tokens) == ("no_reuse" not in crowd)


@pytest.mark.parametrize("model", ["carat", "carat-edge"])
def test_threads_do_not_matter(model):
    """At these widths; the libraries cut wider products by the number of threads."""
    engine = start(model, context_length=CONTEXT, disable_radix_cache=True)
    longest = max((item.prompt_ids for item in carat_requests()), key=len)
    requests = [request("long", longest, max_tokens=3, logprobs=5)]
    wanted = alone(engine, requests)
    torch.set_num_threads(2)
    try:
        assert alone(engine, requests) == wanted
    finally:
        torch.set_num_threads(1)
