"""Norm, gate, embedding, soft cap and router: references against HF's own modules, kernels against references."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma4 import modeling_gemma4 as hf
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

from gemcutter.ops.activations.geglu import geglu, geglu_reference, gelu_mul, gelu_mul_reference
from gemcutter.ops.moe.select_experts import select_experts
from gemcutter.ops.norms.rms_norm import rms_norm, rms_norm_reference
from gemcutter.ops.tokens.embed import embed, embed_reference
from gemcutter.ops.tokens.logits import logits, softcap_, softcap_reference_
from gemcutter.verify.compare import count_differing

DTYPES = [torch.float32, torch.bfloat16]
HALVES = [torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0, device="cpu"):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (5, 2816), (3, 4, 256), (7, 33)], ids=str)
def test_rms_norm_is_hf(shape, dtype, hf_sums_as_we_do):
    norm = hf.Gemma4RMSNorm(shape[-1], eps=1e-6).to(dtype)
    norm.weight.data = randn(shape[-1], dtype=dtype, seed=1) + 1
    bare = hf.Gemma4RMSNorm(shape[-1], eps=1e-6, with_scale=False)
    for scale in (1e-4, 1.0, 300.0):
        x = randn(*shape, dtype=dtype, scale=scale)
        assert torch.equal(rms_norm(x, norm.weight.data, 1e-6), norm(x))
        assert torch.equal(rms_norm(x, None, 1e-6), bare(x))
    wide = randn(6, shape[-1] * 3, dtype=dtype)
    assert torch.equal(rms_norm(wide[:, : shape[-1]], None, 1e-6), bare(wide[:, : shape[-1]].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (1, 704), (9, 2112), (4, 96)], ids=str)
def test_geglu_is_hf(shape, dtype):
    rows, width = shape
    gate, up = randn(rows, width, dtype=dtype, scale=3), randn(rows, width, dtype=dtype, seed=1)
    act = hf.ACT2FN["gelu_pytorch_tanh"]
    assert torch.equal(geglu(torch.cat([gate, up], -1)), act(gate) * up)
    layers = torch.stack([gate, up, gate], 1)  # as per-layer inputs lie: [T, L, P]
    assert torch.equal(gelu_mul(gate, layers[:, 1]), act(gate) * up)


def test_dense_ops_refuse():
    x, ids = randn(4, 64), torch.tensor([0, 1])
    for call, error, message in (
        (lambda: geglu(x.double()), TypeError, "gate_up is torch.float64"),
        (lambda: geglu(x[:, :63]), ValueError, "63 columns"),
        (lambda: geglu(x.T), ValueError, "contiguous"),
        (lambda: geglu(x[0]), ValueError, "two dims"),
        (lambda: gelu_mul(x, x[:2]), ValueError, r"up has shape \(2, 64\): \(4, 64\) is needed"),
        (lambda: gelu_mul(x, x.half()), TypeError, "up is torch.float16"),
        (lambda: embed(ids.int(), x, 8.0), TypeError, "token_ids are torch.int32"),
        (lambda: embed(ids[None], x, 8.0), ValueError, "flatten"),
        (lambda: embed(ids, x.T, 8.0), ValueError, "table has strides"),
        (lambda: softcap_(x.T, 30.0), ValueError, "must be dense"),
        (lambda: softcap_(x.int(), 30.0), TypeError, "x is torch.int32"),
        (lambda: softcap_(x, 0.0), ValueError, "cap is 0.0"),
        (lambda: softcap_(x, float("nan")), ValueError, "cap is nan"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    ops, x = torch.ops.gemcutter, randn(4, 64, dtype=dtype)
    for op, args in (
        (ops.geglu, (x,)),
        (ops.gelu_mul, (x, torch.stack([x, x], 1)[:, 1])),
        (ops.embed, (torch.tensor([3, 0]), x, 64**0.5)),
        (ops.softcap_, (x, 30.0)),
    ):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1536, 2816, 5376])
def test_embed_is_hf(width, dtype):
    table = hf.Gemma4TextScaledWordEmbedding(50, width, 0, embed_scale=width**0.5).to(dtype)
    ids = torch.tensor([0, 49, 3, 3, 17])
    assert torch.equal(embed(ids, table.weight.data, width**0.5), table(ids))
    assert embed(ids[:0], table.weight.data, width**0.5).shape == (0, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_round_where_hf_does(dtype):
    hidden, head = randn(5, 64, dtype=dtype), randn(301, 64, dtype=dtype, seed=1)
    x = F.linear(hidden, head)
    assert torch.equal(logits(hidden, head, None), x)
    want = x / 30.0
    want = torch.tanh(want)
    want = want * 30.0
    assert torch.equal(logits(hidden, head, 30.0), want)
    assert logits(hidden[:0], head, 30.0).shape == (0, 301)


def router(dtype, experts=128, top_k=8, hidden=256):
    config = Gemma4TextConfig(
        hidden_size=hidden, num_experts=experts, top_k_experts=top_k, enable_moe_block=True, moe_intermediate_size=8
    )
    module = hf.Gemma4TextRouter(config).to(dtype)
    module.proj.weight.data = randn(experts, hidden, dtype=dtype, seed=2, scale=0.5)
    module.scale.data = randn(hidden, dtype=dtype, seed=3) + 1
    module.per_expert_scale.data = randn(experts, dtype=dtype, seed=4) + 1
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_selection_is_hfs_router(rows, dtype):
    module = router(dtype)
    x = randn(rows, 256, dtype=dtype, scale=4)
    _, weights, ids = module(x)
    x = module.norm(x) * module.scale * module.scalar_root_size
    got_ids, got_weights = select_experts(module.proj(x), module.per_expert_scale, 8)
    assert torch.equal(got_ids, ids) and torch.equal(got_weights, weights)
    assert got_weights.dtype == torch.float32 and got_ids.dtype == torch.int64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("width", [256, 1536, 2816, 5376, 33])
def test_gpu_rms_norm(width, dtype):
    weight = randn(width, dtype=dtype, seed=1, device="cuda") + 1
    for rows in (0, 1, 700):
        wide = randn(rows, 2, width + 8, dtype=dtype, scale=5, device="cuda")
        for x in (wide[:, :, :width], wide[:, 1, :width]):
            for w in (weight, None):
                got = rms_norm(x, w, 1e-6)
                want = rms_norm_reference(x, w, 1e-6)
                assert torch.equal(got, want), f"{(got != want).sum()} of {got.numel()} differ"
    assert torch.equal(rms_norm(x[5:6], w, 1e-6), got[5:6])


def every_value(dtype) -> torch.Tensor:
    """All 65536 values of a half type, NaN and infinities included; of float32 as many random bit patterns."""
    bits = torch.arange(2**16)
    if dtype != torch.float32:
        return bits.to(torch.int16).view(dtype).cuda()
    patterns = torch.randint(0, 2**32, (2**16,), generator=torch.Generator().manual_seed(0))
    return torch.cat([patterns.to(torch.int32).view(dtype), randn(2**16, scale=3)]).cuda()


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    wrong = count_differing(got, want)
    assert not wrong, f"{wrong} of {want.numel()} differ"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gpu_geglu(dtype):
    gate = every_value(dtype)
    for up in (torch.ones_like(gate), randn(len(gate), dtype=dtype, seed=1, device="cuda")):
        x = torch.cat([gate, up])[None]
        same(geglu(x), geglu_reference(x))
    for rows, width in ((0, 704), (1, 704), (300, 2112), (7, 21504), (5, 33)):
        x = randn(rows, 2 * width, dtype=dtype, scale=3, device="cuda")
        same(geglu(x), geglu_reference(x))
        layers = randn(rows, 3, width, dtype=dtype, seed=2, device="cuda")
        gate, up = x[:, :width].contiguous(), layers[:, 1]
        same(gelu_mul(gate, up), gelu_mul_reference(gate, up))
        same(gelu_mul(gate[3:4], up[3:4]), gelu_mul(gate, up)[3:4])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gpu_softcap(dtype):
    for cap in (30.0, 50.0, 0.3):
        x = every_value(dtype)
        want = x.clone()
        softcap_reference_(want, cap)
        softcap_(x, cap)
        same(x, want)
    hidden = randn(6, 64, dtype=dtype, scale=3, device="cuda")
    head = randn(5003, 64, dtype=dtype, seed=1, device="cuda")
    want = F.linear(hidden, head)
    softcap_reference_(want, 30.0)
    same(logits(hidden, head, 30.0), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gpu_embed(dtype):
    for width in (33, 256, 1536, 2816, 5376, 35 * 256):
        wide = randn(300, width + 8, dtype=dtype, scale=3, device="cuda")
        wide[7], wide[8], wide[9] = float("inf"), -0.0, torch.finfo(dtype).tiny / 4
        for table in (wide[:, :width], wide[:, :width].contiguous()):
            for rows in (0, 1, 5, 700):
                ids = torch.randint(300, (rows,), device="cuda")
                ids[:3] = torch.tensor([7, 8, 9], device="cuda")[:rows]
                same(embed(ids, table, width**0.5), embed_reference(ids, table, width**0.5))


@pytest.mark.gpu
def test_gpu_embed_past_int32():
    """Per-layer embeddings of E4B: 262144 rows of 10752 are 2.8e9 elements."""
    table = torch.empty(262_144, 10_752, dtype=torch.bfloat16, device="cuda")
    ids = torch.tensor([0, 262_143, 199_999, 200_000, 131_072], device="cuda")
    for seed, row in enumerate(ids.tolist()):
        table[row] = randn(10_752, seed=seed, dtype=torch.bfloat16, device="cuda")
    same(embed(ids, table, 16.0), table[ids] * 16.0)
