"""attend's reference against HF's eager attention and float64."""

from types import SimpleNamespace

import pytest
import torch
from attend_cases import alone, error, exact, make_case, visible
from transformers.models.gemma4.modeling_gemma4 import eager_attention_forward

from gemcutter.ops.attend import attend

LENGTHS = [(1, 1), (1, 16), (1, 17), (1, 90), (1, 333), (1, 5), (2, 2), (5, 5), (70, 70), (33, 300), (310, 700)]
GEOMETRIES = [(4, 2, 32, 16), (4, 1, 64, None), (6, 2, 32, 37), (4, 4, 64, 1), (16, 1, 32, 512)]


def hf_eager(case) -> torch.Tensor:
    """HF's eager attention of each sequence over all its keys, under HF's additive mask."""
    out = []
    starts = case.batch.query_start.tolist()
    for i, (k, v) in enumerate(zip(case.k, case.v, strict=True)):
        q = case.q[starts[i] : starts[i + 1]]
        lowest = torch.finfo(q.dtype).min
        seen = visible(len(q), len(k), case.window).to(q.device)
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, lowest)
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
        mixed, _ = eager_attention_forward(
            module, *(x.transpose(0, 1)[None] for x in (q, k, v)), mask[None, None], scaling=1.0
        )
        out.append(mixed[0])
    return torch.cat(out)


@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, head_dim, window", GEOMETRIES)
def test_reference_is_hf_eager(heads, kv_heads, head_dim, window, dtype, page_size):
    case = make_case(LENGTHS, heads, kv_heads, head_dim, page_size, window, dtype)
    got, want, truth = attend(*case.args), hf_eager(case), exact(case)
    assert got.dtype == dtype
    assert error(got, truth) < (1e-5 if dtype == torch.float32 else 0.04)
    # Where a block's keys are not all of the sequence's, the BLAS may sum in another order: fp32's last bits.
    assert error(got, want.double()) < (1e-5 if dtype == torch.float32 else 0.02)
    assert (got - truth).norm() <= 1.1 * (want - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_has_hfs_bits_where_all_is_seen(dtype):
    case = make_case([(7, 7), (120, 250)], 8, 2, 64, 16, None, dtype)
    assert torch.equal(attend(*case.args), hf_eager(case))


@pytest.mark.parametrize("window", [None, 20])
def test_reference_alone_is_reference_in_a_crowd(window):
    case = make_case(LENGTHS, 4, 2, 32, 16, window, torch.float32)
    crowd = attend(*case.args)
    for i in range(len(LENGTHS)):
        args, rows = alone(case, i)
        assert torch.equal(attend(*args), crowd[rows]), f"sequence {i}"


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
