"""The seams: references against HF's modules step by step, kernels against references bit for bit."""

import pytest
import torch
from transformers.models.gemma4 import modeling_gemma4 as hf
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8
from gemcutter.ops.seams.attention_seam import attention_seam, attention_seam_launch, attention_seam_reference
from gemcutter.ops.seams.layer_seam import Routed, layer_seam, layer_seam_launch, layer_seam_reference
from gemcutter.ops.seams.slot_sum import slot_sum_reference
from gemcutter.verify.compare import count_differing

EPS = 1e-6
WIDTHS = [192, 1536, 2560, 2816, 3840, 5376]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(tokens: int, width: int, dtype, seed: int, device="cpu") -> torch.Tensor:
    """Normal rows, and where there are so many: large, small, constant, zero, infinite, NaN, heavy-tailed ones."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    odd = [
        lambda r: r * 1e4, lambda r: r * 1e-4, lambda r: torch.full_like(r, 0.37), torch.zeros_like,
        lambda r: torch.where(torch.arange(width) == 5, 6e4, r), lambda r: r.clone().fill_(float("inf")),
        lambda r: torch.where(torch.arange(width) == 7, float("nan"), r), lambda r: r**5, lambda r: r * 1e-39,
    ]  # fmt: skip
    for i, change in enumerate(odd[: max(0, tokens - 2)]):
        x[i + 1] = change(x[i + 1])
    return x.to(device, dtype)


def weights(count: int, width: int, dtype, device="cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [(torch.rand(width, generator=generator) + 0.5).to(device, dtype) for _ in range(count)]


def slots_of(tokens: int, width: int, dtype, seed: int, device="cpu") -> tuple[torch.Tensor, ...]:
    """Experts' outputs [T, 8, width], odd ones among them, with ids and weights, some ids twice."""
    slots = rows(tokens * 8, width, dtype, seed, device).view(tokens, 8, width)
    generator = torch.Generator().manual_seed(seed)
    ids, weights = torch.randint(20, (tokens, 8), generator=generator), torch.rand(tokens, 8, generator=generator)
    return slots, ids.to(device), weights.to(device)


def norm(weight: torch.Tensor) -> hf.Gemma4RMSNorm:
    module = hf.Gemma4RMSNorm(len(weight), eps=EPS)
    module.weight.data = weight
    return module


def same(got, want) -> None:
    """Leaves out what a call without experts or without a next norm does not return."""
    got = [x for x in got if x is not None]
    for name, (g, w) in enumerate(zip(got, want, strict=True)):
        wrong = (g != w) & ~(g.isnan() & w.isnan())
        assert g.dtype == w.dtype and not wrong.any(), f"output {name}: {wrong.sum()} of {g.numel()} differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_attention_seam_is_hf(tokens, dtype, hf_sums_as_we_do):
    attended, residual = rows(tokens, 192, dtype, 1), rows(tokens, 192, dtype, 2)
    post, pre, expert_pre, scale = weights(4, 192, dtype)
    router = hf.Gemma4TextRouter(Gemma4TextConfig(hidden_size=192, num_experts=4, top_k_experts=2)).to(dtype)
    hidden = residual + norm(post)(attended)
    router_in = router.norm(hidden) * scale * router.scalar_root_size
    want = hidden, norm(pre)(hidden), norm(expert_pre)(hidden), router_in
    same(attention_seam(attended, residual, post, pre, EPS, expert_pre, scale), want)
    same(attention_seam(attended, residual, post, pre, EPS), want[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_layer_seam_is_hf(tokens, dtype, hf_sums_as_we_do):
    out, residual, routed = (rows(tokens, 192, dtype, seed) for seed in (3, 4, 5))
    post, following, dense_post, expert_post = weights(4, 192, dtype)
    scalar = torch.tensor([0.8125], dtype=dtype)
    for experts in (None, Routed(routed, dense_post, expert_post)):
        branch = out if experts is None else norm(dense_post)(out) + norm(expert_post)(routed)
        hidden = residual + norm(post)(branch)
        same(layer_seam(out, residual, post, EPS, routed=experts), [hidden])
        hidden = hidden * scalar
        want = hidden, norm(following)(hidden)
        same(layer_seam(out, residual, post, EPS, scalar, following, experts), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_layer_seam_adds_up_the_experts(tokens, dtype):
    slots, ids, top = slots_of(tokens, 192, dtype, 5)
    out, residual = (rows(tokens, 192, dtype, seed) for seed in (3, 4))
    post, dense_post, expert_post = weights(3, 192, dtype)
    added = Routed(slot_sum_reference(slots, ids, top), dense_post, expert_post)
    want = layer_seam(out, residual, post, EPS, routed=added)[:1]
    for chosen in (ids, ids.int()):
        routed = Routed(slots, dense_post, expert_post, chosen, top)
        same(layer_seam(out, residual, post, EPS, routed=routed), want)


FP8, HALF = quantize_fp8(torch.ones(2, 64)), torch.ones(2, 64)


@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_seams_quantise_for_readers_in_fp8(tokens):
    """A pair for each reader in FP8, of what another reader gets; rows of other dtypes go to both as they are."""
    for dtype in DTYPES:
        attended, residual = rows(tokens, 192, dtype, 1), rows(tokens, 192, dtype, 2)
        post, pre, expert_pre, scale = weights(4, 192, dtype)
        plain = attention_seam(attended, residual, post, pre, EPS, expert_pre, scale)
        for readers in ((FP8, HALF), (HALF, FP8), (FP8, FP8), (FP8, None)):
            found = attention_seam(attended, residual, post, pre, EPS, expert_pre, scale, *readers)
            same([found[0], found[3]], [plain[0], plain[3]])
            for got, want, reader in zip(found[1:3], plain[1:3], readers, strict=True):
                handed_out(got, want, reader)
        dense = attention_seam(attended, residual, post, pre, EPS, reader=FP8)
        same(dense[:1], plain[:1])
        handed_out(dense[1], plain[1], FP8)
        assert dense[2:] == (None, None)
        scalar = torch.tensor([0.8125], dtype=dtype)
        want = layer_seam(attended, residual, post, EPS, scalar, pre)
        for reader in (FP8, HALF):
            found = layer_seam(attended, residual, post, EPS, scalar, pre, reader=reader)
            same(found[:1], want[:1])
            handed_out(found[1], want[1], reader)
        same(layer_seam(attended, residual, post, EPS, reader=FP8), layer_seam(attended, residual, post, EPS)[:1])


def handed_out(got, want: torch.Tensor, reader) -> None:
    assert isinstance(got, Quantized) == (reader is FP8 and want.dtype == torch.bfloat16)
    pairs = zip(got, quantize_fp8(want), strict=True) if isinstance(got, Quantized) else [(got, want)]
    assert not sum(count_differing(g, w) for g, w in pairs)


def test_seams_in_fp8_refuse():
    x, (post, pre) = rows(2, 64, torch.bfloat16, 1), weights(2, 64, torch.bfloat16)
    ops = torch.ops.gemcutter
    wide, heavy = torch.ones(1, 65544), torch.ones(65544)
    for call, error, message in (
        (lambda: ops.layer_seam_fp8(x, x, post, EPS, *[None] * 7), ValueError, "next_norm is None"),
        (lambda: ops.attention_seam_fp8(x, x, post, pre, EPS, pre, None, True, True), ValueError, "come together"),
        (
            lambda: ops.attention_seam_fp8(wide, wide, heavy, heavy, EPS, None, None, True, False),
            ValueError, "rows of 65544 to quantise",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    for call in (
        (ops.attention_seam_fp8.default, (x, x, post, pre, EPS, pre, post, True, False)),
        (ops.layer_seam_fp8.default, (x, x, post, EPS, torch.ones(1).bfloat16(), pre, *[None] * 5)),
    ):
        torch.library.opcheck(*call)


def test_layer_seam_refuses_slots():
    x, (post, dense_post, expert_post) = rows(3, 64, torch.float32, 1), weights(3, 64, torch.float32)
    slots, ids, top = slots_of(3, 64, torch.float32, 2)
    given = Routed(slots, dense_post, expert_post, ids, top)
    layer_seam(x, x, post, EPS, routed=given)
    for change, error, message in (
        (dict(ids=None), ValueError, "come together"),
        (dict(weights=None), ValueError, "come together"),
        (dict(ids=ids.float()), TypeError, "ids are torch.float32"),
        (dict(ids=ids[:2], weights=top[:2]), ValueError, r"ids have shape \(2, 8\)"),
        (dict(ids=ids[0], weights=top[0]), ValueError, r"ids have shape \(8,\)"),
        (dict(ids=ids[:, ::2], weights=top[:, :4].contiguous()), ValueError, "dense"),
        (dict(ids=ids[:, :0], weights=top[:, :0], out=slots[:, :0]), ValueError, "k from 1 to 32"),
        (dict(ids=ids.repeat(1, 5), weights=top.repeat(1, 5)), ValueError, "k from 1 to 32"),
        (dict(weights=top.double()), TypeError, "weights are torch.float64"),
        (dict(weights=top[:, :7].contiguous()), ValueError, r"weights have shape \(3, 7\)"),
        (dict(out=slots[:, :7].contiguous()), ValueError, r"routed.out has shape \(3, 7, 64\)"),
        (dict(out=slots.transpose(0, 1).contiguous().transpose(0, 1)), ValueError, "dense"),
        (dict(out=slots.half()), TypeError, "routed.out is torch.float16"),
    ):
        with pytest.raises(error, match=message):
            layer_seam(x, x, post, EPS, routed=given._replace(**change))
    with pytest.raises(ValueError, match="come together"):
        torch.ops.gemcutter.layer_seam(x, x, post, EPS, *[None] * 5, ids, top)


@pytest.mark.parametrize("missing", ("dense_post", "expert_post"))
def test_layer_seam_refuses_half_a_branch(missing):
    """The reference would norm without that weight, where the kernel has none to read."""
    x, (post, dense_post, expert_post) = rows(2, 64, torch.float32, 1), weights(3, 64, torch.float32)
    routed = Routed(x, dense_post, expert_post)
    layer_seam(x, x, post, 1e-6, routed=routed)
    with pytest.raises(ValueError, match=f"routed lacks {missing}: "):
        layer_seam(x, x, post, 1e-6, routed=routed._replace(**{missing: None}))


@pytest.mark.parametrize("given", ("scalar", "next_norm"))
def test_layer_seam_refuses_half_an_end(given):
    x, (post, next_norm) = rows(2, 64, torch.float32, 1), weights(2, 64, torch.float32)
    end = dict(scalar=torch.ones(1), next_norm=next_norm)
    layer_seam(x, x, post, 1e-6, **end)
    with pytest.raises(ValueError, match="come together"):
        layer_seam(x, x, post, 1e-6, **{given: end[given]})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gpu_kernels_have_the_references_bits(width, dtype):
    post, a, b, c = weights(4, width, dtype, "cuda")
    scalar = torch.tensor([0.8125], dtype=dtype, device="cuda")
    for tokens in (0, 1, 2, 7, 64, 257, 1024):
        out, residual, routed = (rows(tokens, width, dtype, seed, "cuda") for seed in (3, 4, 5))
        slots, ids, top = slots_of(tokens, width, dtype, 6, "cuda")
        wide = torch.cat([out, out], 1)[:, :width]  # rows further apart than their width
        for extra in ((None, None), (b, c)):
            got = attention_seam(wide, residual, post, a, EPS, *extra)
            same(got, attention_seam_reference(out, residual, post, a, EPS, *extra))
            got = attention_seam_launch(wide, residual, post, a, EPS, *extra, True, True)
            want = attention_seam_reference(out, residual, post, a, EPS, *extra, True, True)
            assert not sum(map(count_differing, got, want))
        for last in ((None, None), (scalar, a)):
            for experts in (None, Routed(routed, b, c), Routed(slots, b, c, ids, top)):
                got = layer_seam(out, residual, post, EPS, *last, experts)
                flat = experts or (None,) * 5
                same(got, layer_seam_reference(out, residual, post, EPS, *last, *flat))
                fp8 = layer_seam_launch(out, residual, post, EPS, *last, *flat, True)
                want = layer_seam_reference(out, residual, post, EPS, *last, *flat, True)
                assert not sum(map(count_differing, fp8, want))
    alone = Routed(slots[5:6], b, c, ids[5:6], top[5:6])
    same(layer_seam(out[5:6], residual[5:6], post, EPS, scalar, a, alone), [x[5:6] for x in got])
