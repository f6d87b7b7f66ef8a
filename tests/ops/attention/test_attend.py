"""attend's reference against HF's eager attention and float64."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attend_cases import alone, error, exact, make_case, visible
from transformers.models.gemma4.modeling_gemma4 import eager_attention_forward

from gemcutter.ops.attention.attend import REFERENCE_QUERIES, attend

LENGTHS = [(1, 1), (1, 16), (1, 17), (1, 90), (1, 333), (1, 5), (2, 2), (5, 5), (70, 70), (33, 300), (310, 700)]
# q heads, kv heads, head_dim, window, scale of the scores
GEOMETRIES = [
    (4, 2, 32, 16, 1.0),
    (4, 1, 64, None, 1.0),
    (6, 2, 32, 37, 1.0),
    (4, 4, 64, 1, 1.0),
    (16, 1, 32, 512, 1.0),
    (12, 1, 128, None, 128**-0.5),
]


def hf_eager(case, block: int | None = None) -> torch.Tensor:
    """HF's eager attention of each sequence over all its keys, under HF's additive mask.

    With `block`, of so many queries at a time, at multiples of it in the sequence, over the keys that any of them
    sees. Queries and keys that do not exist are zeros.
    """
    out = []
    starts = case.batch.query_start.tolist()
    for i, (k, v) in enumerate(zip(case.k, case.v, strict=True)):
        q = case.q[starts[i] : starts[i + 1]]
        if block is None:
            out.append(hf_attention(q, k, v, visible(len(q), len(k), case.window), case.scale))
            continue
        first, held = len(k) - len(q), len(k)
        tail = -held % block
        q = F.pad(q, (0, 0, 0, 0, first, tail))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, tail)) for x in (k, v))
        parts = []
        for begin in range(0, held + tail, block):
            end = begin + block
            oldest = 0 if case.window is None else max(0, begin - case.window + 1)
            seen = visible(block, end, case.window)[:, oldest:]
            parts.append(hf_attention(q[begin:end], k[oldest:end], v[oldest:end], seen, case.scale))
        out.append(torch.cat(parts)[first:held])
    return torch.cat(out)


def hf_attention(q, k, v, seen, scale) -> torch.Tensor:
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    return eager_attention_forward(module, *heads, mask[None, None].to(q.device), scaling=scale)[0][0]


@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, head_dim, window, scale", GEOMETRIES)
def test_reference_is_hf_eager(heads, kv_heads, head_dim, window, scale, dtype, page_size):
    case = make_case(LENGTHS, heads, kv_heads, head_dim, page_size, window, dtype, scale=scale)
    got, want, truth = attend(*case.args), hf_eager(case), exact(case)
    assert got.dtype == dtype
    assert error(got, truth) < (1e-5 if dtype == torch.float32 else 0.04)
    # A block's keys are not all of the sequence's, so the BLAS may sum in another order: fp32's last bits.
    assert error(got, want.double()) < (1e-5 if dtype == torch.float32 else 0.02)
    assert (got - truth).norm() <= 1.1 * (want - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, head_dim, window, scale", [*GEOMETRIES, (8, 2, 64, None, 1.0)])
def test_reference_has_hfs_bits_block_by_block(heads, kv_heads, head_dim, window, scale, dtype):
    case = make_case(LENGTHS, heads, kv_heads, head_dim, 16, window, dtype, scale=scale)
    assert torch.equal(attend(*case.args), hf_eager(case, REFERENCE_QUERIES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_reference_alone_is_reference_in_a_crowd(window, dtype):
    case = make_case(LENGTHS, 4, 2, 32, 16, window, dtype)
    crowd = attend(*case.args)
    for i in range(len(LENGTHS)):
        args, rows = alone(case, i)
        assert torch.equal(attend(*args), crowd[rows]), f"sequence {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, head_dim, window, scale", GEOMETRIES)
def test_reference_is_the_same_however_a_sequence_is_cut(heads, kv_heads, head_dim, window, scale, dtype):
    """Whole, in chunks, and token by token as a decoder goes; what is not computed yet is NaN."""
    case = make_case([(150, 150)], heads, kv_heads, head_dim, 16, window, dtype, scale=scale)
    whole = attend(*case.args)
    page_size = case.k_cache.shape[2]
    for size in (1, 5, 16, 37, 64):
        k_cache, v_cache = (torch.full_like(cache, float("nan")) for cache in (case.k_cache, case.v_cache))
        for begin in range(0, 150, size):
            end = min(150, begin + size)
            at = torch.arange(begin, end)
            page, offset = case.pages[0, at // page_size].long(), at % page_size
            k_cache[page, :, offset], v_cache[page, :, offset] = case.k[0][begin:end], case.v[0][begin:end]
            batch = replace(
                case.batch,
                query_start=torch.tensor([0, end - begin], dtype=torch.int32),
                kv_len=torch.tensor([end], dtype=torch.int32),
                num_decodes=int(size == 1),
                max_query_len=0 if size == 1 else end - begin,
                max_kv_len=end,
            )
            got = attend(case.q[begin:end], k_cache, v_cache, batch, case.pages, window, scale)
            assert torch.equal(got, whole[begin:end]), f"tokens {begin} to {end}"


def test_nothing_to_do():
    case = make_case([(1, 4)], 4, 2, 32, 16, None, torch.float32)
    case.batch.query_start, case.batch.kv_len = torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    case.batch.num_decodes = 0
    out = attend(case.q[:0], case.k_cache, case.v_cache, case.batch, case.pages[:0], None)
    assert out.shape == (0, 4, 32)


def test_a_short_page_table_is_our_bug():
    case = make_case([(1, 100)], 4, 2, 32, 16, None, torch.float32, spare_pages=0)
    case.batch.max_kv_len = 200
    with pytest.raises(AssertionError, match="200 keys"):
        attend(*case.args)
