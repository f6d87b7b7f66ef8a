"""The engine against HF: random small models of eight kinds, greedy, float32 on the CPU (and on a GPU if marked).

The oracle is HF's eager model without a cache: each token from a fresh forward over the whole sequence.
"""

import pytest
import tiny_models
import torch
from drive import finish, request

from gemcutter.config import EngineConfig
from gemcutter.engine import Engine

NEW = 20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def greedy(model, prompt: list[int]) -> tuple[list[int], list[torch.Tensor]]:
    ids, logprobs = list(prompt), []
    for _ in range(NEW):
        with torch.no_grad():
            row = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        logprobs.append(torch.log_softmax(row, -1).cpu())
        ids.append(int(row.argmax()))
    return ids[len(prompt) :], logprobs


@pytest.fixture(scope="module", params=tiny_models.KINDS)
def case(request, tmp_path_factory):
    """(folder, prompts, HF's tokens and log-probabilities) of one kind."""
    model = tiny_models.make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    window = getattr(model.config, "sliding_window", 8)
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, window - 1, window, window + 1, 2 * window + 3, 4 * window]
    prompts = [torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    prompts.append(prompts[-1][: 3 * window] + prompts[3])  # shares a prefix with the one before it
    return folder, prompts, [greedy(model, prompt) for prompt in prompts]


def start(folder, device: str, **options) -> Engine:
    options = {"max_running_requests": 8, "page_size": 8, "max_total_tokens": 2048, **options}
    return Engine.start(EngineConfig(model_path=str(folder), device=device, **options))


def check(outcome, expected) -> None:
    tokens, logprobs = expected
    assert outcome.token_ids == tokens
    for token, ours, theirs in zip(tokens, outcome.logprobs, logprobs, strict=True):
        assert len(ours) >= 5 and token in ours
        for id, value in ours.items():
            assert abs(value - theirs[id].item()) < 1e-3
        top = set(theirs.topk(4).indices.tolist())  # the fifth may tie with the sixth
        assert top <= set(ours)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no_reuse"])
@pytest.mark.parametrize("chunk", [7, 2048], ids=["chunks_of_7", "whole"])
def test_greedy_equals_hf(case, chunk, reuse, device):
    folder, prompts, expected = case
    engine = start(folder, device, chunked_prefill_size=chunk, disable_radix_cache=not reuse)
    requests = [request(str(i), p, max_tokens=NEW, logprobs=5) for i, p in enumerate(prompts)]
    for _ in range(2):  # the second round meets a warm prefix cache
        for item, wanted in zip(requests, expected, strict=True):  # alone
            check(finish(engine, [item])[0], wanted)
        for outcome, wanted in zip(finish(engine, requests), expected, strict=True):  # together
            check(outcome, wanted)
    cached = [outcome.cached_tokens for outcome in finish(engine, requests)]
    assert any(cached) == reuse, cached
    engine.check_invariants()
    assert not any(engine.stats().pages_used.values())


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_equals_hf_under_preemption(case, device):
    """A cache far too small for all at once: requests are preempted and recomputed, and still say the same."""
    folder, prompts, expected = case
    engine = start(folder, device, context_length=80, max_total_tokens=96, chunked_prefill_size=16)
    requests = [request(str(i), p, max_tokens=NEW, logprobs=5) for i, p in enumerate(prompts)]
    for outcome, wanted in zip(finish(engine, requests), expected, strict=True):
        check(outcome, wanted)
    assert engine.stats().preemptions > 0
    engine.check_invariants()
