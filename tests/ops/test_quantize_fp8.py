"""Per-token FP8: the reference by brute force over e4m3's values, the kernel's cast and division by hard cases."""

import importlib

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fp8_cases import DTYPES, fp8_rows, same_bits
from interpreter import interpret

from gemcutter.ops.quantize_fp8 import (
    Quantized,
    divide,
    e4m3_bits,
    quantize_fp8,
    quantize_fp8_launch,
    quantize_fp8_reference,
    quantized_bits,
)
from gemcutter.verify.compiles import compile_op

E4M3 = torch.float8_e4m3fn
WIDTHS = [1, 70, 704, 2112, 2816, 5120, 5376]
WIDE = [15360, 21504, 65536]


def nearest(quotient: np.ndarray) -> np.ndarray:
    """float64 magnitudes up to 448 -> the codes of the nearest e4m3, by distance to each; ties to the even code."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    distance = np.abs(quotient[..., None] - values)
    tied = distance == distance.min(-1, keepdims=True)
    return np.where(tied, codes + 1000 * (codes % 2), 10_000).argmin(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_by_brute_force(dtype):
    x = fp8_rows(300, dtype)
    q, scale = quantize_fp8(x)
    assert q.shape == x.shape and q.dtype == E4M3 and scale.shape == (16, 1) and scale.dtype == torch.float32
    for row, bits, s in zip(x.float().numpy(), q.view(torch.uint8).numpy(), scale.squeeze(1).numpy(), strict=True):
        if not np.isfinite(row).all():
            assert (bits == 0x7F).all() and (np.isnan(s) if np.isnan(row).any() else s == np.inf)
            continue
        assert s == max(np.abs(row).max(), np.float32(1e-10)) / np.float32(448)
        quotient = (row / s).astype(np.float64)
        want = nearest(np.minimum(np.abs(quotient), 448)) | np.where(np.signbit(row), 0x80, 0)
        assert np.array_equal(bits, want)
    assert torch.equal(x[1:3] == 0, q[1:3].float() == 0) and scale[1] == scale[2] > 0
    assert (q[2].view(torch.uint8) == 0x80).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_is_near(dtype):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = quantize_fp8(x).dequantize(dtype)
    assert back.dtype == dtype
    largest = x.float().abs().amax(-1, keepdim=True)
    error = (back.float() - x.float()).abs()
    half_place = torch.maximum(x.float().abs() / 16, largest / 448 * 2**-10)
    assert (error <= half_place * (1 + 2 * torch.finfo(dtype).eps) + x.float().abs() * torch.finfo(dtype).eps).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(dtype):
    found = quantize_fp8(torch.empty(0, 2816, dtype=dtype))
    assert isinstance(found, Quantized)
    assert found.q.shape == (0, 2816) and found.q.dtype == E4M3
    assert found.scale.shape == (0, 1) and found.scale.dtype == torch.float32
    plain = found.dequantize(torch.bfloat16)  # what a reader without FP8 gets
    assert plain.shape == (0, 2816) and plain.dtype == torch.bfloat16
    assert torch.nn.functional.linear(plain, torch.ones(8, 2816, dtype=torch.bfloat16)).shape == (0, 8)


def test_alone_as_in_a_crowd():
    x = fp8_rows(704, torch.bfloat16)
    q, scale = quantize_fp8(x)
    for row in range(16):
        same_bits(quantize_fp8(x[row : row + 1]), (q[row : row + 1], scale[row : row + 1]))


def test_opcheck():
    for x in (torch.randn(5, 70), torch.randn(5, 140).bfloat16()[:, :70], torch.randn(0, 70).half()):
        torch.library.opcheck(torch.ops.gemcutter.quantize_fp8.default, (x,))


def test_refusals():
    with pytest.raises(TypeError, match="x is torch.int32"):
        quantize_fp8(torch.ones(2, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match="two dims"):
        quantize_fp8(torch.ones(8))
    with pytest.raises(ValueError, match="contiguous"):
        quantize_fp8(torch.ones(8, 2).T)
    with pytest.raises(ValueError, match="no elements"):
        quantize_fp8(torch.ones(2, 0))
    with pytest.raises(ValueError, match="up to 65536"):
        quantize_fp8(torch.ones(1, 65537))
    with pytest.raises(RuntimeError, match="no gradient"):
        quantize_fp8(torch.ones(2, 8, requires_grad=True)).scale.sum().backward()


# The kernel's cast and division.


@triton.jit
def cast_kernel(x_ptr, bits_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(bits_ptr + at, e4m3_bits(x))


@triton.jit
def instruction_kernel(x_ptr, bits_ptr, BLOCK: tl.constexpr):
    """The same in rows that are as their largest, 448, says: what the target has for it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    peak = tl.full((1, 1), 448.0, tl.float32).to(tl.int32, bitcast=True)
    tl.store(bits_ptr + at, quantized_bits(tl.load(x_ptr + at), peak))


@triton.jit
def divide_kernel(x_ptr, scale_ptr, quotient_ptr, BLOCK: tl.constexpr, SHORT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(quotient_ptr + at, divide(tl.load(x_ptr + at), tl.load(scale_ptr + at), SHORT))


def around_e4m3() -> torch.Tensor:
    """float32 [k * 1024]: every e4m3, every midpoint, three floats to either side of each, and random ones."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).double()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([464.0])]).float().view(torch.int32)
    near = (points[:, None] + torch.arange(-3, 4)).ravel()
    near = near[near >= 0].int().view(torch.float32)
    beyond = torch.tensor([447.999, 448.0001, 449, 460, 479.99, 480, 500, 1e9, 3e38, torch.inf, 1e-45, 1e-38, 1e-9])
    random = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 18 - 10
    found = torch.cat([near, beyond, 2**random])
    found = torch.cat([found, -found])
    return torch.nn.functional.pad(found, (0, -len(found) % 1024))


def check_cast(device: str) -> None:
    x = around_e4m3().to(device)
    want = x.cpu().clamp(-448, 448).to(E4M3).view(torch.uint8)  # PyTorch's on a CPU
    for kernel in (cast_kernel, instruction_kernel):
        got = torch.full(x.shape, 0x55, dtype=torch.uint8, device=device)
        kernel[(len(x) // 1024,)](x, got, BLOCK=1024, enable_fp_fusion=False)
        wrong = got.cpu() != want
        if kernel is instruction_kernel:
            wrong &= x.cpu().isfinite()  # an infinity is not of such a row
        assert not wrong.any(), x[wrong]
    assert torch.equal(want[: len(want) // 4].unique(), torch.arange(0x7F, dtype=torch.uint8))


def short_divisions(dtype, tops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and scale, float32 [k * 4096]: every mantissa of dtype under each of `tops`, a row's largest, as far as a
    quotient is not 0, at three exponents.
    """
    bits = 7 if dtype == torch.bfloat16 else 10
    step = 1 << (23 - bits)
    below = torch.arange(0x3F800000 - 20 * (1 << 23), 0x40000000, step, dtype=torch.int32).view(torch.float32)
    x, top = torch.cartesian_prod(below, (tops * step + 0x3F800000).int().view(torch.float32)).T
    x, top = x[x <= top], top[x <= top]
    powers = (-33, 0, 126) if dtype == torch.bfloat16 else (-24, 0, 15)
    xs = torch.cat([x * 2.0**e for e in powers])
    scales = torch.cat([top * 2.0**e / torch.tensor(448.0) for e in powers])
    pad = (0, -len(xs) % 4096)
    return torch.nn.functional.pad(xs, pad), torch.nn.functional.pad(scales, pad, value=1.0)


def hard_divisions() -> tuple[torch.Tensor, torch.Tensor]:
    """Quotients next to midpoints of e4m3."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(100 * 4096, generator=generator) + 1
    values = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).float()
    middle = ((values[1:] + values[:-1]) / 2)[torch.randint(126, scale.shape, generator=generator)]
    x = (middle.double() * scale.double()).float().view(torch.int32)  # the nearest, and its neighbours
    return (x + torch.randint(-2, 3, x.shape, generator=generator)).int().view(torch.float32), scale


def check_divide(device: str) -> None:
    step = 1 if device == "cuda" else 37
    cases = [
        (*short_divisions(torch.bfloat16, torch.arange(0, 128)), (True, False)),
        (*short_divisions(torch.float16, torch.arange(0, 1024, step)), (True,)),
        (*hard_divisions(), (False,)),
    ]
    for x, scale, forms in cases:
        want = x / scale
        for short in forms:
            got = torch.full_like(x, torch.nan, device=device)
            divide_kernel[(len(x) // 4096,)](
                x.to(device), scale.to(device), got, BLOCK=4096, SHORT=short, enable_fp_fusion=False
            )
            assert torch.equal(got.cpu(), want) and torch.equal(got.cpu().signbit(), want.signbit())
        assert (x * (1.0 / scale) != want).float().mean() > 0.05  # the product would not do
    zeros = torch.tensor([0.0, -0.0] * 2048, device=device)
    for short in (True, False):
        got = torch.full_like(zeros, torch.nan)
        divide_kernel[(1,)](zeros, torch.ones_like(zeros), got, BLOCK=4096, SHORT=short, enable_fp_fusion=False)
        assert torch.equal(got.view(torch.int32), zeros.view(torch.int32))


def check_rows(device: str, widths: list[int], dtypes=DTYPES) -> None:
    for dtype in dtypes:
        for width in widths:
            x = fp8_rows(width, dtype, seed=width, device=device)
            got = quantize_fp8_launch(x)
            same_bits(got, quantize_fp8_reference(x))
            same_bits(quantize_fp8_launch(x[5:13]), [out[5:13] for out in got])
            for row in (0, 7):
                same_bits(quantize_fp8_launch(x[row : row + 1]), [out[row : row + 1] for out in got])
            same_bits(quantize_fp8_launch(x[:0]), quantize_fp8_reference(x[:0]))


def check_interpreted_rows(device: str) -> None:
    check_rows(device, [1, 70, 704])
    check_rows(device, [2112, 5120, 5376, 21504], [torch.bfloat16])


def check_short_rows(device: str) -> None:
    """Several a program, the last of which are not there."""
    module = importlib.import_module("gemcutter.ops.quantize_fp8")
    module.MANY_ROWS = 3
    for dtype in DTYPES:
        for width in (1, 70, 704, 1024):
            x = fp8_rows(width, dtype, seed=width, device=device)
            for rows in (3, 13, 16):
                same_bits(quantize_fp8_launch(x[-rows:]), quantize_fp8_reference(x[-rows:]))


CHECKS = dict(cast=check_cast, divide=check_divide, rows=check_interpreted_rows, short_rows=check_short_rows)


@pytest.fixture(scope="module")
def report() -> str:
    done = interpret(__file__)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(report, name):
    assert f"{name} passed" in report, report[-4000:]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_compiles_to_the_cards_own_cast(target):
    for kernel in compile_op("quantize_fp8", target)["quantize_fp8._quantize_fp8_kernel"]:
        ptx = kernel.asm["ptx"]
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx and "fma.rn.f32" in ptx and ".ftz" not in ptx
        assert sum("div." in line for line in ptx.splitlines()) <= 2  # of a row; the elements' are multiply-adds


@pytest.mark.gpu
def test_gpu_cast_and_division():
    check_cast("cuda")
    check_divide("cuda")


@pytest.mark.gpu
def test_gpu_rows():
    check_rows("cuda", WIDTHS + WIDE)
    many = fp8_rows(704, torch.bfloat16, device="cuda").repeat(100, 1)
    same_bits(quantize_fp8(many[:1597]), quantize_fp8_reference(many[:1597]))
    for rows in (2, 257, 1024):
        x = torch.randn(rows, 5376, device="cuda").bfloat16()
        got = quantize_fp8(x)
        same_bits(got, quantize_fp8_reference(x))
        same_bits(quantize_fp8(x[-1:]), [out[-1:] for out in got])


@pytest.mark.gpu
def test_gpu_far_rows():
    """Offsets past 2^31 elements."""
    x = torch.empty(70_000, 32_768, dtype=torch.bfloat16, device="cuda")[:, :64]
    x[-3:] = torch.randn(3, 64, device="cuda").bfloat16()
    same_bits([out[-3:] for out in quantize_fp8(x)], quantize_fp8_reference(x[-3:]))


if __name__ == "__main__":
    # Poisoned, so that an unwritten output cannot pass for one of zeros.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    for name, check in CHECKS.items():
        check("cpu")
        print(f"{name} passed", flush=True)
