"""The weighted sum of slots, against index_add_ in ascending expert id as HF's experts do it."""

import pytest
import torch

from gemcutter.ops.seams.slot_sum import slot_sum_reference


def added_as_hf_does(slots, ids, weights):
    out = torch.zeros_like(slots[:, 0])
    for expert in ids.unique().tolist():
        for slot in range(ids.shape[1]):  # by itself, since a sum of equal indices is PyTorch's to round
            token = torch.where(ids[:, slot] == expert)[0]
            out.index_add_(0, token, (slots[token, slot] * weights[token, slot, None]).to(slots.dtype))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens,top_k,experts", [(0, 4, 9), (1, 8, 128), (40, 8, 128), (30, 5, 3), (7, 1, 4)])
def test_slot_sum_is_hf(tokens, top_k, experts, dtype):
    """Distinct ids, and ids that many slots share; large and small outputs, so that the order tells."""
    generator = torch.Generator().manual_seed(tokens + top_k)
    scale = 10.0 ** torch.randint(-3, 4, (tokens, top_k, 1), generator=generator)
    slots = (torch.randn(tokens, top_k, 48, generator=generator) * scale).to(dtype)
    slots.view(-1)[::97] = -0.0
    ids = torch.randint(experts, (tokens, top_k), generator=generator)
    if experts > top_k:
        ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=generator)
    got, want = slot_sum_reference(slots, ids, weights), added_as_hf_does(slots, ids, weights)
    assert got.dtype == dtype and torch.equal(got, want)
    assert torch.equal(got.signbit(), want.signbit())
    if tokens > 20 and dtype != torch.float32:
        assert not torch.equal(slot_sum_reference(slots, -ids + experts, weights), want), "the order must tell"


@pytest.mark.parametrize("odd", [float("inf"), float("nan"), 6e4])
def test_odd_slots_come_through(odd):
    slots, ids = torch.ones(2, 3, 8, dtype=torch.float16), torch.tensor([[2, 0, 1], [5, 6, 4]])
    slots[1, 2, 3] = odd
    slots[1, 0, 3] = odd
    weights = torch.full((2, 3), 1.0)
    got, want = slot_sum_reference(slots, ids, weights), added_as_hf_does(slots, ids, weights)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and torch.equal(got.isnan(), want.isnan())
    assert got[1, 3] != 3 and (got[0] == 3).all()
