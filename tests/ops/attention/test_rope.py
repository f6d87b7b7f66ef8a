"""rope_table against HF's Gemma4TextRotaryEmbedding, bit for bit."""

import pytest
import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

from gemcutter.ops.attention.rope import rope_table
from gemcutter.spec import RopeSpec

SLIDING, FULL = RopeSpec(theta=1e4, angles=128), RopeSpec(theta=1e6, angles=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind, rope, head_dim", [("sliding", SLIDING, 256), ("full", FULL, 512)])
def test_table_has_hfs_bits(kind, rope, head_dim, dtype):
    config = Gemma4TextConfig(num_hidden_layers=6, head_dim=256, global_head_dim=512)
    context = 16384 + 200  # beyond one piece of the table's making
    hf = Gemma4TextRotaryEmbedding(config)
    want = hf(torch.empty(1, dtype=dtype), torch.arange(context)[None], f"{kind}_attention")
    for got, wanted in zip(rope_table(rope, head_dim, context, dtype, "cpu"), want, strict=True):
        assert got.dtype == dtype and got.shape == (context, rope.angles)
        assert torch.equal(got, wanted[0, :, : rope.angles])
        assert torch.equal(got, wanted[0, :, head_dim // 2 : head_dim // 2 + rope.angles])


def test_far_positions():
    """The end of the largest context against float64: fp32 angles are off by at most their own rounding."""
    position = 262143
    cos, sin = rope_table(FULL, 512, position + 1, torch.float32, "cpu")
    angle = position * 1e6 ** (-2 * torch.arange(64, dtype=torch.float64) / 512)
    reach = 4 * 2.0**-24 * angle + 1e-7
    assert ((cos[position] - angle.cos()).abs() <= reach).all()
    assert ((sin[position] - angle.sin()).abs() <= reach).all()


@pytest.mark.gpu
def test_table_on_a_gpu():
    for rope, head_dim in ((SLIDING, 256), (FULL, 512)):
        for here, there in zip(
            rope_table(rope, head_dim, 40000, torch.float32, "cpu"),
            rope_table(rope, head_dim, 40000, torch.float32, "cuda"),
            strict=True,
        ):
            assert (here - there.cpu()).abs().max() < 1e-6
