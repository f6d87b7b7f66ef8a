"""Linears in FP8: against float64 of the quantised values, and rows that do not know each other."""

import pytest
import torch

from gemcutter.ops.gate_up import gate_up
from gemcutter.ops.geglu import geglu
from gemcutter.ops.linear import linear
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8
from gemcutter.verify.compare import count_differing
from gemcutter.verify.inputs import Draw, Kind

# Not test_schema, which compares copies by arithmetic that PyTorch has not for e4m3.
CHECKED = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(rows: int, columns: int, depth: int, dtype=torch.bfloat16, device="cpu") -> tuple[torch.Tensor, Quantized]:
    generator = torch.Generator(device).manual_seed(rows + columns)
    x = torch.randn(rows, depth, generator=generator, device=device)
    if rows:
        x[:, :: 1 + depth // 3] *= 40  # outliers, as activations have them
    weight = torch.randn(columns, depth, generator=generator, device=device) * depth**-0.5
    weight *= torch.logspace(-3, 1, columns, device=device)[:, None]  # so that a lost channel scale is seen
    return x.to(dtype), quantize_fp8(weight)


def exact(x: torch.Tensor, weight: Quantized) -> torch.Tensor:
    """In float64, of the quantised values; and the sum of magnitudes, by which a float sum may be off."""
    q, scale = (each.double() for each in quantize_fp8(x))
    w = weight.q.double() * weight.scale.double()
    return q * scale @ w.T, (q * scale).abs() @ w.abs().T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 96), (256, 704), (33, 2112)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 21])
def test_is_the_product_of_the_quantised(rows, shape, dtype):
    x, weight = case(rows, *shape, dtype)
    found, (want, size) = linear(x, weight), exact(x, weight)
    assert found.dtype == dtype and found.shape == (rows, shape[0])
    bound = torch.finfo(dtype).eps * want.abs() + 1e-6 * size + torch.finfo(dtype).smallest_normal
    assert ((found.double() - want).abs() <= bound).all()
    if dtype == torch.bfloat16:
        pair = linear(quantize_fp8(x), weight)
        assert pair.dtype == dtype and torch.equal(pair, found)
    if rows:
        for given in ((x, None), quantize_fp8(x)):
            torch.library.opcheck(
                torch.ops.gemcutter.linear_fp8.default, (*given, *weight, None), test_utils=CHECKED
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_is_added_before_the_rounding(dtype):
    x, weight = case(21, 70, 96, dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1)).to(dtype) * 4
    found, (want, size) = linear(x, weight, bias), exact(x, weight)
    want += bias.double()
    bound = 0.51 * torch.finfo(dtype).eps * want.abs().clamp(min=1e-3) + 1e-6 * size
    assert ((found.double() - want).abs() <= bound).all()
    with pytest.raises(TypeError, match="bias is"):
        linear(x, weight, bias.double())


def test_scales_come_in_turn():
    """(sum * the channel's scale) * the row's, each rounded to float; sums of small integers have no order."""
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randint(-3, 4, (n, 64), generator=generator).float() for n in (40, 50))
    x[:, 0], w[:, 0] = 448.0, -448.0  # so that quantising leaves the integers as they are
    x, w = (a * torch.exp(torch.randn(len(a), 1, generator=generator)) for a in (x, w))
    (q, scale), weight = quantize_fp8(x), quantize_fp8(w)
    total = (q.double() @ weight.q.double().T).float()
    found = linear(x, weight)
    assert torch.equal(found, (total * weight.scale.T) * scale)
    assert not torch.equal(found, (total * scale) * weight.scale.T)
    assert not torch.equal(found, total * (scale * weight.scale.T))


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
def test_kinds_of_values(kind):
    """What is finite stays what float64 says; a row that is not gives NaN, and to no other row."""
    x = Draw(9, kind, torch.bfloat16, "cpu").rows(320)
    x[4] = 1.0
    _, weight = case(0, 40, 320)
    found, (want, size) = linear(x, weight), exact(x, weight)
    finite = x.isfinite().all(1)
    assert found[~finite].isnan().all() and not found[finite].isnan().any() and found[4].isfinite().all()
    bound = torch.finfo(torch.bfloat16).eps * want.abs() + 1e-6 * size + 1e-37
    # Held to it where no product overflows: neither the result nor the sum times x's scale alone.
    held = finite[:, None] & (size / weight.scale.T.clamp(max=1) < torch.finfo(torch.bfloat16).max / 2)
    assert ((found.double() - want).abs() <= bound)[held].all()
    assert kind == Kind.HUGE or held[finite].all()


@pytest.mark.parametrize("shape", [(576, 192), (70, 100), (128, 2816)], ids=str)
def test_rows_do_not_know_each_other(shape):
    x, weight = case(70, *shape)
    crowd = linear(x, weight)
    for rows in (1, 2, 3, 15, 16, 17, 33):
        assert torch.equal(linear(x[-rows:], weight), crowd[-rows:]), rows
        assert torch.equal(linear(quantize_fp8(x[-rows:]), weight), crowd[-rows:]), rows
    assert torch.equal(linear(torch.cat([x, x], 1)[:, : x.shape[1]], weight), crowd)


def test_refusals():
    x, weight = case(3, 16, 32)
    pair = quantize_fp8(x)
    for arguments, error, message in (
        ((x.double(), weight), TypeError, "x is torch.float64"),
        ((x[0], weight), ValueError, "two dims"),
        ((pair, x), TypeError, "x is quantised, weight is torch.bfloat16"),
        ((x, Quantized(weight.q, weight.scale.bfloat16())), TypeError, "scales of torch.bfloat16"),
        ((x, Quantized(weight.q, weight.scale[:, 0])), ValueError, r"scale \(16, 1\) are needed"),
        ((x, Quantized(weight.q, weight.scale[:1])), ValueError, r"scale \(16, 1\) are needed"),
        ((x, Quantized(weight.q.float(), weight.scale)), TypeError, "weight is torch.float32"),
        ((x, Quantized(weight.q[:, :16], weight.scale)), ValueError, r"dense q \(16, 32\)"),
        ((Quantized(pair.q, pair.scale[:2]), weight), ValueError, r"scale \(3, 1\) are needed"),
        ((Quantized(pair.q.view(torch.uint8), pair.scale), weight), TypeError, "x is torch.uint8"),
    ):
        with pytest.raises(error, match=message):
            linear(*arguments)


@pytest.mark.parametrize("experts", [0, 10])
@pytest.mark.parametrize("rows", [0, 1, 19])
@pytest.mark.parametrize("up_fp8", [True, False])
@pytest.mark.parametrize("down_fp8", [True, False])
def test_gate_up_is_the_ops_one_by_one(rows, experts, up_fp8, down_fp8):
    """Where either weight is in FP8, or both: a pair for a reader of pairs, else the activation as it is."""
    x, weight = case(rows, 96, 64)
    if not up_fp8:
        weight = weight.dequantize(torch.bfloat16)
    router_x, router = (torch.randn(n, 64).bfloat16() for n in (rows, experts)) if experts else (None, None)
    reader = quantize_fp8(torch.randn(5, 48)) if down_fp8 else torch.randn(5, 48).bfloat16()
    want = geglu(linear(x, weight))
    for given in (x, quantize_fp8(x)) if up_fp8 else (x,):
        found, logits = gate_up(given, weight, router_x, router, reader)
        if isinstance(found, Quantized):
            assert down_fp8
            assert not any(count_differing(a, b) for a, b in zip(found, quantize_fp8(want), strict=True))
        else:
            assert torch.equal(found, want)
        assert torch.equal(linear(found, reader), linear(want, reader))
        assert (logits is None) == (router is None)
        if experts:
            assert torch.equal(logits, linear(router_x, router))
