"""Linears in FP8: against float64 of the quantised values, and rows that do not know each other."""

import pytest
import torch
from interpreter import interpret

from gemcutter.ops.activations.geglu import geglu
from gemcutter.ops.linears.gate_up import gate_up, gate_up_fp8_launch, gate_up_fp8_reference
from gemcutter.ops.linears.gate_up_fp8_hopper import gate_up_fp8_tile, streams_gate_up_fp8
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.linears.linear_fp8 import (
    library_product,
    linear_fp8_launch,
    linear_fp8_reference,
)
from gemcutter.ops.linears.linear_fp8_hopper import is_long, row_stages, streams_row
from gemcutter.ops.linears.linear_hopper import ROWS, stream_fp8_tile, stream_tile
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8, quantize_fp8_reference
from gemcutter.verify.compare import count_differing
from gemcutter.verify.inputs import Draw, Kind

# Not test_schema, which compares copies by arithmetic that PyTorch has not for e4m3.
CHECKED = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# Weights [N, K]: q/k/v, o of both kinds, gate and up, down of 26B-A4B; of 31B q/k/v and down; E4B's per-layer gate.
RELEASED = [
    (8192, 2816), (2816, 4096), (2816, 8192), (4224, 2816), (2816, 2112), (16384, 5376), (5376, 21504), (256, 2560),
]  # fmt: skip
ODD = [(70, 96), (33, 40), (1000, 1088), (48, 208)]
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
    held = finite[:, None] & (size < torch.finfo(torch.bfloat16).max / 2)
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


@pytest.mark.parametrize("depth", [64, 256, 1536, 2112, 2816, 4096, 5376, 8192, 16384, 21504])
@pytest.mark.parametrize("columns", [128, 2816, 8448, 43008])
def test_stages_fit(columns, depth):
    """Of the kernels of few rows: never more than steps, and with x in what an SM has."""
    steps = -(-depth // 256)
    stages = row_stages(columns, depth)
    x = -(-depth // 1024) * 1024
    x = x + 8 * 1024 if is_long(depth) else x * 8
    assert 4 <= min(stages, steps) + 4 * (steps < 4) and stages <= steps and stages * 64 * 256 + x <= 226 * 1024
    assert is_long(depth) == (depth > 20480)
    for tokens in (1, 8, 9, 16):
        for experts in (0, 128):
            tile = gate_up_fp8_tile(tokens, columns // 2, depth, experts)
            x_bytes = tile["X_ROWS"] * depth * (2 if experts else 1)
            assert tile["X_ROWS"] >= tokens and tile["STAGES"] <= steps
            assert tile["STAGES"] < 1 or tile["STAGES"] * 64 * 256 + x_bytes <= 226 * 1024


def test_plain_kernel_interpreted():
    done = interpret(__file__)
    assert "interpreted passed" in done.stdout, done.stdout + done.stderr


def check_interpreted() -> None:
    for rows, shape, dtype in ((1, (70, 96), torch.float32), (19, (33, 200), torch.bfloat16)):
        x, weight = case(rows, *shape, dtype)
        bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
        pair = quantize_fp8_reference(x)
        for added in (None, bias.bfloat16()):
            want, got = (run(*pair, *weight, added) for run in (linear_fp8_reference, linear_fp8_launch))
            torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)  # the sum's order may turn a last bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 129, 144, 300])
def test_library_gets_rows_that_it_takes(rows, dtype, monkeypatch):
    """On a CPU, with what cuBLASLt does said in other words: whole tiles of 16 rows or a refusal."""

    def refusing(q, weight, scale, weight_scale, out_dtype, use_fast_accum):
        assert len(q) == -(-rows // 16) * 16 and scale.shape == (len(q), 1) and use_fast_accum
        assert weight_scale.shape == (1, weight.shape[1]) and out_dtype in (torch.bfloat16, torch.float32)
        assert not q[rows:].float().any() and not scale[rows:].any()
        return (q.float() @ weight.float() * weight_scale * scale).to(out_dtype)

    x, weight = case(rows, 48, 96, dtype)
    pair, want = quantize_fp8(x), linear(x, weight)
    monkeypatch.setattr(torch, "_scaled_mm", refusing)
    found = library_product(*pair, *weight, dtype)
    assert found.dtype == dtype and found.shape == (rows, 48) and found.is_contiguous()
    torch.testing.assert_close(found, want, rtol=2**-7 if dtype != torch.float32 else 1e-4, atol=1e-5)


def hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize("columns", [128, 2816, 4224, 5376, 8192, 16384, 43008])
def test_tiles_fit_the_card(columns):
    for tile, itemsize in ((stream_tile, 2), (stream_fp8_tile, 1)):
        for tokens in (1, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 192, 193, 256, 1000, 3000):
            block_t, block_k, stages = tile(tokens, columns)
            assert 8 <= block_t < 2 * max(tokens, 16) and block_t <= 256
            assert (ROWS + block_t) * block_k * itemsize * stages <= 226 * 1024
            if itemsize == 1 and tokens > 64:
                # Two tiles of tokens where both find an SM; else the weights are read for once.
                assert (block_t == 64) == (-(-columns // 64) * -(-tokens // 64) <= 132)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*RELEASED, *ODD], ids=str)
def test_gpu_rows_do_not_know_each_other(shape):
    """Alone and among 2048, quantised or not: whatever kernel of ours, and PyTorch's, a row goes through."""
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").fill_(255)  # NaN in what the allocator hands out
    x, weight = case(2048, *shape, device="cuda")
    pair = quantize_fp8(x)
    crowd = linear(pair, weight)
    want, size = exact(x, weight)
    assert ((crowd.double() - want).abs() <= 2**-8 * want.abs() + shape[1] / 32 * 2**-12 * size).all()
    for rows in (
        1,
        2,
        7,
        8,
        9,
        16,
        17,
        32,
        33,
        64,
        65,
        100,
        128,
        129,
        144,
        200,
        256,
        257,
        300,
        512,
        1000,
    ):
        part = slice(2048 - rows, None)
        for given in (Quantized(pair.q[part], pair.scale[part]), x[part]):
            wrong = (linear(given, weight) != crowd[part]).sum().item()
            assert not wrong, f"{wrong} elements of {rows} rows of {type(given).__name__} depend on their company"
    if hopper() and 1024 <= shape[1] <= 8192:
        assert streams_row(x[:1], weight.q) and streams_row(pair.q[:1], weight.q)
    if hopper() and shape[1] == 21504:
        assert streams_row(x[:1], weight.q) and not streams_row(pair.q[:1], weight.q)
    for i in range(0, 2048, 97):
        assert torch.equal(linear(x[i : i + 1], weight), crowd[i : i + 1])
    assert torch.equal(linear_fp8_reference(*pair, *weight, None), crowd)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2816, 2112), (70, 96)], ids=str)
def test_gpu_other_dtypes_bias_and_odd_values(shape, dtype):
    x, weight = case(300, *shape, dtype, "cuda")
    x[3], x[4, 5], x[5, 7], x[6] = 0, torch.inf, torch.nan, 1e-30
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for added in (None, bias):
        crowd = linear_fp8_launch(x, None, *weight, added)
        assert not count_differing(crowd, linear_fp8_reference(x, None, *weight, added))
        for rows in (0, 1, 4, 5, 6, 7, 16, 40, 128):
            alone = linear_fp8_launch(x[max(0, rows - 3) : rows], None, *weight, added)
            assert not count_differing(alone, crowd[max(0, rows - 3) : rows])
            assert not count_differing(linear_fp8_launch(x[:rows], None, *weight, added), crowd[:rows])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2112, 2816, 128), (21504, 5376, 0), (1000, 1088, 130), (33, 320, 7)], ids=str)
def test_gpu_gate_up_has_the_bits_of_the_ops_one_by_one(shape):
    torch.empty(64 << 20, dtype=torch.uint8, device="cuda").fill_(255)
    width, depth, experts = shape
    x, weight = case(40, 2 * width, depth, device="cuda")
    x[1, 5], x[2, 7], x[3] = torch.inf, torch.nan, 0
    generator, router_x, router = torch.Generator("cuda").manual_seed(experts), None, None
    if experts:
        router_x, router = (
            torch.randn(n, depth, generator=generator, device="cuda").bfloat16() for n in (40, experts)
        )
    pair, hidden = quantize_fp8(x), geglu(linear(x, weight))
    for rows in (1, 2, 7, 8, 9, 16, 17, 40):
        given = pair.q[:rows], pair.scale[:rows], *weight, router_x[:rows] if experts else None, router
        if hopper() and width != 33:
            assert streams_gate_up_fp8(given[0], weight.q, *given[4:]) == (rows <= 16)
        found = gate_up_fp8_launch(*given)
        assert not count_differing(found[0], hidden[:rows]), rows
        assert not experts or not count_differing(found[1], linear(router_x[:rows], router)), rows
        assert not sum(map(count_differing, found, gate_up_fp8_reference(*given)))


if __name__ == "__main__":
    check_interpreted()
    print("interpreted passed")
