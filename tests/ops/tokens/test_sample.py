"""Sampling against brute force in float64 and loops, its distribution, and its independence of company."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.ops.tokens.sample import edited, largest, sample
from gemcutter.ops.tokens.sample_batch import SHORTLIST, SampleBatch, SampleRow, uniform_of
from gemcutter.params import SamplingParams, resolve

VOCAB = 300


def row(seed=0, index=0, prompt=(), output=(), **params) -> SampleRow:
    return SampleRow(resolve(SamplingParams(**params), {}), seed, index, list(prompt), list(output))


def draw(logits, rows, device="cpu", **kwargs) -> list[int]:
    batch = SampleBatch.build(rows, logits.shape[1], device, **kwargs)
    return sample(logits, batch).token_ids.tolist()


def tied_logits(rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    """bf16 after a soft cap: many exact ties, also for the largest."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 40
    return (torch.tanh(x.bfloat16() / 30) * 30).bfloat16()


def distribution(logits: torch.Tensor, p: SamplingParams) -> np.ndarray:
    """Exact probabilities of one row [V], by sorting and loops in float64."""
    x = logits.double().numpy() / p.temperature
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if p.top_k > 0:
        order = order[: p.top_k]
    mass = {i: math.exp(x[i] - x[order[0]]) for i in order}
    total, kept, before = sum(mass.values()), [], 0.0
    for i in order:
        if p.top_p < 1.0 and before >= p.top_p * total:
            break
        if mass[i] >= p.min_p:
            kept.append(i)
        before += mass[i]
    out = np.zeros(len(x))
    out[kept] = [mass[i] for i in kept]
    return out / out.sum()


def test_greedy_takes_the_lowest_of_equal_logits():
    logits = tied_logits(64, 0)
    got = draw(logits, [row(temperature=0.0)] * 64)
    values = logits.float().tolist()
    assert got == [v.index(max(v)) for v in values]
    assert sum(v.count(max(v)) > 1 for v in values) > 32, "the rows hold too few ties to test anything"


@pytest.mark.parametrize("temperature", [1e-6, 0.7, 5.0])
def test_top_k_1_is_greedy(temperature):
    logits = tied_logits(32, 1)
    rows = [row(seed=i, temperature=temperature, top_k=1) for i in range(32)]
    assert draw(logits, rows) == draw(logits, [row(temperature=0.0)] * 32)


@pytest.mark.parametrize(
    "vocab,n", [(1, 1), (63, 64), (64, 20), (65, 64), (4096, 64), (5000, 64), (70001, 64), (300, 0)]
)
def test_largest_is_the_head_of_a_stable_sort(vocab, n):
    scores = tied_logits(3, vocab, vocab)
    values, ids = largest(scores, n)
    want = scores.sort(dim=-1, descending=True, stable=True)
    m = min(n, vocab)
    assert torch.equal(values[:, :m], want.values[:, :m]) and torch.equal(ids[:, :m], want.indices[:, :m])
    assert (values[:, m:] == float("-inf")).all() and values.shape == ids.shape == (3, n)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([0, 1, 2, 5, 64, 65, 299, 10**9]),
    top_p=st.sampled_from([1e-9, 0.3, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
)
def test_every_quantile_falls_where_the_float64_cdf_says(seed, top_k, top_p, min_p, temperature):
    """Draw at 64 evenly spread uniforms: the tokens drawn and their shares are those of the exact distribution."""
    params = resolve(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), {})
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    batch = SampleBatch.build([SampleRow(params, 0, i, [], []) for i in range(64)], VOCAB, "cpu")
    for part in [batch.shortlist] if batch.shortlist else batch.sort + batch.whole:
        part.uniform[:] = (part.rows.double() + 0.5) / 64
    got = sample(logits.expand(64, -1), batch).token_ids.tolist()
    exact = distribution(logits[0], params)
    in_order = range(VOCAB) if batch.whole else np.argsort(-logits[0].numpy(), kind="stable")
    cdf = np.cumsum(exact[in_order])
    want = [int(in_order[min(np.searchsorted(cdf, (i + 0.5) / 64, side="right"), VOCAB - 1)]) for i in range(64)]
    assert got == want


@pytest.mark.parametrize("top_k", [0, 6, 100], ids=["unsorted", "shortlist", "sorted"])
def test_edges_are_exact(top_k):
    """Four equal tokens, others impossible: quarters of the unit interval belong to them, ends included."""
    logits = torch.full((1, VOCAB), -math.inf)
    equal = [3, 40, 200, 299]
    logits[0, equal] = 1.5

    def at(uniform, **params):
        batch = SampleBatch.build([row(temperature=0.6, top_k=top_k, **params)], VOCAB, "cpu")
        part = batch.shortlist or (batch.sort + batch.whole)[0]
        part.uniform[:] = uniform
        return sample(logits, batch).token_ids.item()

    below = 1 - 2.0**-53
    assert [at(u) for u in (0.0, 0.25, 0.5, 0.75, below)] == [*equal, 299]
    assert [at(u * below) for u in (0.25, 0.5, 0.75)] == equal[:3]
    assert [at(u, min_p=1.0) for u in (0.0, below)] == [3, 299], "min_p keeps what equals the likeliest"
    assert [at(u, top_p=0.5) for u in (0.0, 0.5, below)] == [3, 40, 40], "two of four reach one half"
    assert [at(u, top_p=0.51) for u in (0.0, below)] == [3, 200]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 12},
        {"temperature": 1.0, "top_k": 64, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 100, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    """Chi-square over 20000 output indices of one seed; the bound is the 1 - 1e-6 quantile (Wilson-Hilferty)."""
    n, vocab = 20000, 120
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    counts: Counter[int] = Counter()
    for begin in range(0, n, 5000):
        rows = [row(seed=7, index=begin + i, **params) for i in range(5000)]
        counts.update(draw(logits.expand(5000, -1), rows))
    exact = distribution(logits[0], rows[0].params)
    assert all(exact[token] > 0 for token in counts)
    rare = (exact > 0) & (exact * n < 8)  # pooled, as the test wants no small cell
    cells = [(counts[i], exact[i] * n) for i in np.flatnonzero((exact > 0) & ~rare)]
    if exact[rare].sum() * n >= 8:
        cells.append((sum(counts[i] for i in np.flatnonzero(rare)), exact[rare].sum() * n))
    chi = sum((seen - want) ** 2 / want for seen, want in cells)
    dof = len(cells) - 1
    assert chi < dof * (1 - 2 / (9 * dof) + 4.75 * math.sqrt(2 / (9 * dof))) ** 3


def test_uniform_is_uniform_over_indices_and_over_seeds():
    pinned = [uniform_of(0, 0), uniform_of(1, 0), uniform_of(0, 1), uniform_of(-1, 3), uniform_of(2**64 - 1, 3)]
    assert pinned[3] == pinned[4] and len(set(pinned)) == 4
    # SplitMix64's own stride between seeds must not make one stream the other, shifted.
    assert uniform_of(0x9E3779B97F4A7C15, 0) != uniform_of(0, 1)
    for draws in (
        [uniform_of(3, i) for i in range(20000)],
        [uniform_of(i, 0) for i in range(20000)],
        [(uniform_of(i, 1) - uniform_of(i, 0)) % 1.0 for i in range(20000)],
        [(uniform_of(i + 1, 4) - uniform_of(i, 4)) % 1.0 for i in range(20000)],
        [(uniform_of(i + 1, 4) - uniform_of(i, 5)) % 1.0 for i in range(20000)],
    ):
        assert 0.0 <= min(draws) and max(draws) < 1.0
        counts = np.bincount((np.array(draws) * 100).astype(int), minlength=100)
        assert ((counts - 200.0) ** 2 / 200.0).sum() < 185  # chi-square of 99 degrees, p = 5e-7


def test_penalties_and_bias_against_loops():
    rng = np.random.default_rng(0)
    vocab, rows = 50, []
    for i in range(24):
        rows.append(
            row(
                prompt=rng.integers(0, vocab, 30).tolist(),
                output=rng.integers(0, vocab, rng.integers(0, 20)).tolist(),
                temperature=0.0,
                repetition_penalty=[None, 1.7, 0.6][i % 3],
                frequency_penalty=[0.0, 1.5, -1.0][i // 3 % 3],
                presence_penalty=[0.0, 1.1][i // 9 % 2],
                logit_bias=[None, {3: 4.0, 11: -100.0}][i % 2],
            )
        )
    logits = torch.randn(24, vocab, generator=torch.Generator().manual_seed(2)) * 3
    before = logits.clone()
    want = []
    for i, item in enumerate(rows):
        x, p = logits[i].double().tolist(), item.params
        for token in set(item.prompt_ids) | set(item.output_ids):
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        for token, count in Counter(item.output_ids).items():
            x[token] -= p.frequency_penalty * count + p.presence_penalty
        for token, bias in (p.logit_bias or {}).items():
            x[token] += bias
        x[7] = x[9] = -math.inf
        want.append(x)
    scores = edited(logits, SampleBatch.build(rows, vocab, "cpu", suppress=[7, 9]))
    torch.testing.assert_close(scores.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-5)
    got = draw(logits, rows, suppress=[7, 9])
    assert got == [x.index(max(x)) for x in want]
    assert torch.equal(logits, before), "the caller's logits were changed"
    # The same edits reach the sampled paths.
    sampled = [item._replace(params=resolve(_with(item.params, temperature=1e-5), {})) for item in rows]
    assert draw(logits, sampled, suppress=[7, 9]) == got


def _with(params: SamplingParams, **changes) -> SamplingParams:
    return SamplingParams(**{name: getattr(params, name) for name in params.__struct_fields__} | changes)


def mixed_rows(count: int) -> list[SampleRow]:
    """Rows of every path, side by side."""
    rng = np.random.default_rng(1)
    kinds = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_k": 64, "top_p": 0.95, "logprobs": 0},
        {"temperature": 1.2, "top_p": 0.7, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}},
        {"temperature": 1.5, "top_k": 200, "min_p": 0.02, "logprobs": 20},
    ]
    seeds, outputs = rng.integers(2**63, size=count).tolist(), rng.integers(0, 20, (count, 5)).tolist()
    return [row(seed=seeds[i], index=i, prompt=range(20), output=outputs[i], **kinds[i % 6]) for i in range(count)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_row_alone_equals_the_row_in_a_crowd(device):
    count, vocab = 54, 3000 if device == "cpu" else 262144
    logits, rows = tied_logits(count, 9, vocab).to(device), mixed_rows(count)
    batch = SampleBatch.build(rows, vocab, device)
    together = sample(logits, batch)
    logprobs = together.logprobs()
    for i in range(0, count, 1 if device == "cpu" else 5):
        alone = sample(logits[i : i + 1], SampleBatch.build(rows[i : i + 1], vocab, device))
        assert alone.token_ids.item() == together.token_ids[i].item(), f"row {i}"
        assert alone.logprobs()[0] == logprobs[i], f"row {i}"
    # Reversed company, one row missing: the others stay.
    order = list(range(count))[::-1][1:]
    got = draw(logits[order], [rows[i] for i in order], device)
    assert got == [together.token_ids[i].item() for i in order]


@pytest.mark.gpu
def test_gpu_draws_the_cpu_tokens():
    vocab = 262144
    logits, rows = tied_logits(24, 4, vocab), mixed_rows(24)
    assert draw(logits.cuda(), rows, "cuda") == draw(logits, rows)


@pytest.mark.gpu
def test_gpu_argmax_takes_the_lowest_of_equal_logits():
    logits = tied_logits(40, 6, 262144).cuda()
    logits[0, :] = 1.0
    logits[1, 262143], logits[1, 200000], logits[1, 131071] = 31.0, 31.0, 31.0
    first = (logits == logits.amax(-1, keepdim=True)).int().cpu().argmax(-1)
    assert draw(logits, [row(temperature=0.0)] * 40, "cuda") == first.tolist()
    assert draw(logits[1:2], [row(temperature=0.0)], "cuda") == [131071]


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3)) * 4
    rows = [
        row(temperature=0.0, logprobs=2, logit_bias={17: 100.0}),
        row(temperature=0.5),
        row(temperature=2.0, top_k=5, logprobs=0, seed=3),
        row(temperature=0.0, logprobs=5, repetition_penalty=3.0, prompt=range(100)),
    ]
    result = sample(logits, SampleBatch.build(rows, VOCAB, "cpu"))
    tokens, got = result.token_ids.tolist(), result.logprobs()
    assert tokens[0] == 17 and got[1] is None
    exact = torch.log_softmax(logits.double(), -1)
    for i, alternatives in ((0, 2), (2, 0), (3, 5)):
        top = exact[i].topk(alternatives).indices.tolist()
        assert list(got[i])[0] == tokens[i] and set(got[i]) == {tokens[i], *top}
        assert all(math.isclose(v, exact[i, t].item(), abs_tol=2e-6) for t, v in got[i].items())


def test_a_broken_row_harms_no_other():
    logits = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(8)).repeat_interleave(2, 0)[:12]
    rows = mixed_rows(12)
    want = draw(logits, rows)
    for bad in (math.nan, math.inf, -math.inf):
        for victim in range(6):
            broken = logits.clone()
            broken[victim, 5:] = bad
            got = draw(broken, rows)
            assert [t for i, t in enumerate(got) if i != victim] == [t for i, t in enumerate(want) if i != victim]
            assert 0 <= got[victim] < VOCAB
            if bad == -math.inf:
                assert got[victim] < 5
            if bad == math.inf:
                assert got[victim] >= 5


def test_the_common_batch_makes_no_tensor():
    batch = SampleBatch.build([row(temperature=0.0)] * 128, 262144, "cpu")
    assert batch.any_greedy and batch.shortlist is None and not batch.sort and not batch.whole
    assert batch.repetition is None and batch.addition is None and batch.logprob_rows is None
    assert sample(torch.randn(0, 10), SampleBatch.build([], 10, "cpu")).token_ids.shape == (0,)
    with pytest.raises(AssertionError, match="3 rows of logits for a batch of 128"):
        sample(torch.randn(3, 10), batch)
    assert SHORTLIST == 64  # two short sorts of 4096 at V = 262144, see `largest`
