"""FP8 activations: each row as e4m3 values and one float scale, so that a row of x is about q * scale.

scale = max(largest magnitude of the row, 1e-10) / 448
q = x / scale, clamped to +-448, to the nearest e4m3 (ties to even); a zero keeps its sign
Both divisions are IEEE's. A row of zeros has q = 0 and scale 1e-10 / 448. A row that holds an infinity or a NaN has
scale inf or NaN and NaN in every q (0x7F), so that nothing finite is made of it.
Source: compressed-tensors' dynamic per-token scheme, with the floor of SGLang's group quantisation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.library import define
from gemcutter.ops.rms_norm import row_tile

LARGEST = tl.constexpr(448.0)  # of e4m3fn, which has no infinities
FLOOR = tl.constexpr(1e-10)  # of a row's largest magnitude: no division by zero
WIDEST = 65536  # one program holds a row


class Quantized(NamedTuple):
    """What stands for x [T, H] before an FP8 product.

    One type at every T: without tokens q is [0, H] and scale [0, 1], and neither is dropped. A reader that wants
    x's dtype, with tokens or without, takes `dequantize`, never the pair itself.
    """

    q: torch.Tensor  # [T, H] float8_e4m3fn, contiguous
    scale: torch.Tensor  # [T, 1] float32, contiguous

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[T, H] of dtype: the product in float, rounded once."""
        return (self.q.float() * self.scale).to(dtype)


def quantize_fp8(x: torch.Tensor) -> Quantized:
    """Quantise each row.

    Args:
        x: [T, H] of float32, bfloat16 or float16; dense rows, row stride free. T may be 0, H is at most 65536.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return Quantized(*_quantize_fp8(x))


def check_quantize_fp8(x: torch.Tensor) -> None:
    check_matrix("x", x)
    check_quantized_width("x", x.shape[1])


def check_quantized_width(name: str, width: int) -> None:
    if width > WIDEST:
        raise ValueError(f"{name} gives rows of {width} to quantise: up to {WIDEST} are taken; split them")


def quantize_fp8_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    peak = wide.abs().amax(-1, keepdim=True)
    # By a tensor: PyTorch on a GPU multiplies by the inverse of a number.
    scale = peak.clamp(min=FLOOR.value) / torch.full_like(peak, LARGEST.value)
    quotient = (wide / scale).clamp(-LARGEST.value, LARGEST.value)
    return torch.where(peak.isfinite(), quotient, torch.nan).to(torch.float8_e4m3fn), scale


@triton.jit
def e4m3_bits(x, signed):
    """float32 -> the bits of the e4m3 nearest to |x| under the sign of `signed`, as uint8; 448 for all beyond, not
    for NaN.

    Without Triton's own cast, which is wrong in its interpreter and another routine on each target. To |x| is added
    2^20 times the power of two below it (at least 2^-6, where e4m3's denormals begin): the sum has no bits below
    e4m3's last place, and was rounded to it. It also carries e4m3's exponent in, above the mantissa's three bits.
    """
    size = tl.minimum(tl.abs(x), LARGEST)
    power = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    shifter = power + (20 << 23) + ((power >> 20) - (121 << 3))
    shifted = size + shifter.to(tl.float32, bitcast=True)
    sign = (signed.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (shifted.to(tl.int32, bitcast=True) | sign).to(tl.uint8)


@triton.jit
def row_peak(x):
    """[rows, B] float32 -> [rows, 1] int32, the bits of the largest magnitude, ordered like floats, NaN on top."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)


@triton.jit
def scale_of(peak):
    largest = peak.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(peak < 0x7F800000, tl.maximum(largest, FLOOR), largest), LARGEST)


@triton.jit
def quantized_bits(x, peak):
    """[rows, B] float32, [rows, 1] of its rows -> uint8 [rows, B]."""
    return tl.where(peak < 0x7F800000, e4m3_bits(_divide(x, scale_of(peak)), x), 0x7F)


@triton.jit
def _divide(x, scale):
    """x / scale with IEEE's rounding, the sign of a zero aside, in 5 operations; a division takes 12 and a branch.

    Markstein: a quotient next to the true one, corrected by its exact remainder times the correctly rounded
    inverse, is the correctly rounded quotient. The first correction brings it next to the true one. Where a
    remainder underflows, x / scale is below 2^-40, which is 0 in e4m3.
    """
    inverse, minus = tl.div_rn(1.0, scale), -scale
    quotient = x * inverse
    quotient = tl.fma(tl.fma(quotient, minus, x), inverse, quotient)
    return tl.fma(tl.fma(quotient, minus, x), inverse, quotient)


@triton.jit
def _quantize_fp8_kernel(
    x_ptr, q_ptr, scale_ptr, row_stride, H: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD)[None, :]
    tail = HEAD + tl.arange(0, TAIL)[None, :]
    inside = tail < H
    start = x_ptr + row * row_stride
    x = tl.load(start + head).to(tl.float32)
    rest = tl.load(start + tail, mask=inside, other=0.0).to(tl.float32)
    peak = tl.maximum(row_peak(x), row_peak(rest))
    tl.store(q_ptr + row * H + head, quantized_bits(x, peak))
    tl.store(q_ptr + row * H + tail, quantized_bits(rest, peak), mask=inside)
    tl.store(scale_ptr + row + tl.zeros_like(peak), scale_of(peak))


def quantize_fp8_launch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    q, scale = empty_quantized(rows, width, x.device)
    if rows:
        _quantize_fp8_kernel[(rows,)](
            x, q.view(torch.uint8), scale, x.stride(0), H=width, **split_row_tile(width)
        )  # fmt: skip
    return q, scale


def empty_quantized(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return q, torch.empty(rows, 1, dtype=torch.float32, device=device)


def split_row_tile(width: int) -> dict[str, int]:
    """Launch settings of a kernel that holds one row a program as two tiles, the larger power of two and the rest.

    One tile of 8192 leaves a third of it idle at 5376, and arithmetic, not memory, bounds these kernels; 4096 and
    2048 leave an eighth. 16 warps on rows from 8193 (31B's MLP has 21504): on gfx942 the 1024 lanes of a block.
    """
    tile = row_tile(width)
    block = tile.pop("BLOCK")
    head = max(block // 2, 1)
    tail = triton.next_power_of_2(max(width - head, 1))
    return tile | dict(HEAD=head, TAIL=tail, num_warps=max(tile["num_warps"], min(16, block // 1024)))


_quantize_fp8 = define(
    "quantize_fp8(Tensor x) -> (Tensor, Tensor)",
    check=check_quantize_fp8, reference=quantize_fp8_reference, launch=quantize_fp8_launch,
)  # fmt: skip
