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
from triton.language.target_info import cuda_capability_geq

from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.row import columns, load_row
from gemcutter.ops.row import store_row as write_row
from gemcutter.ops.tanh import INTERPRETED

LARGEST = tl.constexpr(448.0)  # of e4m3fn, which has no infinities
FLOOR = tl.constexpr(1e-10)  # of a row's largest magnitude: no division by zero
WIDEST = 65536  # one program holds a row
SHORT_ROW, MANY_ROWS = 1024, 1024  # a program takes several: the experts' activations of more than 128 tokens


class Quantized(NamedTuple):
    """What stands for x [T, H] before an FP8 product, or for a weight, each output channel of it a row.

    One type at every T: without tokens q is [0, H] and scale [0, 1], and neither is dropped. A reader that wants
    x's dtype, with tokens or without, takes `dequantize`, never the pair itself.
    """

    q: torch.Tensor  # [T, H] float8_e4m3fn, contiguous; weights of experts have a dim for the expert ahead of these
    scale: torch.Tensor  # [T, 1] float32, contiguous

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[T, H] of dtype: the product in float, rounded once."""
        return (self.q.float() * self.scale).to(dtype)


def read_as_pair(reader: torch.Tensor | Quantized | None, dtype: torch.dtype) -> bool:
    """Whether the op that makes rows of this dtype quantises them for the linear with this weight.

    A pair tells no dtype, and products of pairs are bfloat16. Other rows are handed on as they are, and quantised
    by their reader, which has the same bits.
    """
    return isinstance(reader, Quantized) and dtype == torch.bfloat16


def pair_of(x: torch.Tensor | Quantized) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The values, and their scales where there are any."""
    return x if isinstance(x, Quantized) else (x, None)


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


def check_quantized(name: str, q: torch.Tensor, scale: torch.Tensor, shape: tuple, device: torch.device) -> None:
    """A pair whose q has this shape, dense, with a dense scale for each of its rows."""
    if q.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise TypeError(f"{name} is {q.dtype} with scales of {scale.dtype}: float8_e4m3fn and float32 are needed")
    if q.device != device or scale.device != device:
        raise TypeError(f"{name} is on {q.device}, its scale on {scale.device}: both are needed on {device}")
    want = (*shape[:-1], 1)
    if q.shape != shape or scale.shape != want or not (q.is_contiguous() and scale.is_contiguous()):
        got = f"q {tuple(q.shape)}, strides {q.stride()}, scale {tuple(scale.shape)}, strides {scale.stride()}"
        raise ValueError(f"{name} has {got}: dense q {tuple(shape)} and scale {want} are needed")


def quantize_fp8_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    peak = wide.abs().amax(-1, keepdim=True)
    # By a tensor: PyTorch on a GPU multiplies by the inverse of a number.
    scale = peak.clamp(min=FLOOR.value) / torch.full_like(peak, LARGEST.value)
    quotient = (wide / scale).clamp(-LARGEST.value, LARGEST.value)
    return torch.where(peak.isfinite(), quotient, torch.nan).to(torch.float8_e4m3fn), scale


@triton.jit
def e4m3_bits(x):
    """float32 -> the bits of the nearest e4m3 as uint8; 448 for all beyond, not for NaN.

    For targets without an instruction, and the interpreter, whose own cast is wrong. To |x| is added
    2^20 times the power of two below it (at least 2^-6, where e4m3's denormals begin): the sum has no bits below
    e4m3's last place, and was rounded to it. It also carries e4m3's exponent in, above the mantissa's three bits.
    """
    size = tl.minimum(tl.abs(x), LARGEST)
    power = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    shifter = power + (20 << 23) + ((power >> 20) - (121 << 3))
    shifted = size + shifter.to(tl.float32, bitcast=True)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (shifted.to(tl.int32, bitcast=True) | sign).to(tl.uint8)


@triton.jit
def magnitudes(x):
    """Bits of |x|: as integers they order like the floats, with NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(peak):
    """peak / 448 as IEEE rounds it: a product, corrected by its exact remainder, is that for every mantissa."""
    largest = peak.to(tl.float32, bitcast=True)
    floored = tl.maximum(largest, FLOOR)
    quotient = floored * (1.0 / LARGEST)
    quotient = tl.fma(tl.fma(quotient, -LARGEST, floored), 1.0 / LARGEST, quotient)
    return tl.where(peak < 0x7F800000, quotient, largest)


@triton.jit
def quantized_bits(x, peak, SHORT: tl.constexpr = False):
    """[rows, B] float32, the peaks of its rows [rows, 1] or a scalar -> uint8 [rows, B].

    SHORT: x has the mantissa of a bfloat16 or float16.
    """
    finite = peak < 0x7F800000
    quotient = divide(x, tl.where(finite, scale_of(peak), float("nan")), SHORT)
    if INTERPRETED or not cuda_capability_geq(9, 0):
        return tl.where(finite, e4m3_bits(quotient), 0x7F)
    else:
        return quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def divide(x, scale, SHORT: tl.constexpr):
    """x / scale with IEEE's rounding in 3 or 5 operations; a division takes 12 and a branch.

    Markstein: a quotient next to the true one, corrected by its exact remainder times the correctly rounded
    inverse, is the correctly rounded quotient. The first correction brings it next to the true one. A SHORT x over
    a 448th of another is never so near the middle of two floats that it takes more than that, nor an exact inverse
    (tried for all pairs of mantissas). Where a remainder underflows, x / scale is below 2^-40, which is 0 in e4m3.
    """
    inverse = 1.0 / scale if SHORT else tl.div_rn(1.0, scale)
    quotient = _corrected(x * inverse, x, scale, inverse)
    return quotient if SHORT else _corrected(quotient, x, scale, inverse)


@triton.jit
def _corrected(quotient, x, scale, inverse):
    """The remainder is taken negative, so that a zero keeps its sign."""
    return tl.fma(tl.fma(quotient, scale, x * -1.0), inverse * -1.0, quotient)  # -x is 0 - x to Triton


@triton.jit
def _quantize_fp8_kernel(
    x_ptr, q_ptr, scale_ptr, row_stride,
    H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    SHORT: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    row = tl.program_id(0).to(tl.int64)
    col = columns(PART)
    x_ptr += row * row_stride
    join(CHAINED)
    release(CHAINED)
    xs = ()
    for part in tl.static_range(PARTS):
        xs += (load_part(x_ptr + part * PART, col, H - part * PART),)
    largest = magnitudes(xs[0].to(tl.float32))
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, magnitudes(xs[part].to(tl.float32)))
    peak = tl.max(largest, 1, keep_dims=True)
    store_row(xs, peak, q_ptr + row * H, col, H, PARTS, PART, SHORT)
    tl.store(scale_ptr + row + tl.zeros_like(peak), scale_of(peak))


@triton.jit
def load_part(ptr, col, LEFT: tl.constexpr):
    """Of a row with LEFT columns from ptr on."""
    if col.shape[1] <= LEFT:
        return tl.load(ptr + col)
    else:
        return tl.load(ptr + col, mask=col < LEFT, other=0.0)


@triton.jit
def store_row(xs, peak, ptr, col, H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, SHORT: tl.constexpr):
    for part in tl.static_range(PARTS):
        bits = quantized_bits(xs[part].to(tl.float32), peak, SHORT)
        if part * PART + PART <= H:
            tl.store(ptr + part * PART + col, bits)
        else:
            tl.store(ptr + part * PART + col, bits, mask=col < H - part * PART)


@triton.jit(do_not_specialize=["rows"])
def _quantize_short_rows_kernel(
    x_ptr, q_ptr, scale_ptr, row_stride, rows,
    H: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """ROWS of them a program: a card starts 0.8 programs a ns, and reads a row of 704 in less."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < rows
    join(CHAINED)
    release(CHAINED)
    xs = load_row(x_ptr + row * row_stride, real, H, PARTS, PART)
    largest = magnitudes(xs[0].to(tl.float32))
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, magnitudes(xs[part].to(tl.float32)))
    peak = tl.max(largest, 1, keep_dims=True)
    qs = ()
    for part in tl.static_range(PARTS):
        qs += (quantized_bits(xs[part].to(tl.float32), peak, x_ptr.dtype.element_ty != tl.float32),)
    write_row(q_ptr + row * H, qs, real, H, PARTS, PART)
    tl.store(scale_ptr + row, scale_of(peak), mask=real)


def quantize_fp8_launch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    q, scale = empty_quantized(rows, width, x.device)
    if width <= SHORT_ROW and rows >= MANY_ROWS:
        short = dict(ROWS=8, PARTS=triton.cdiv(width, 256), PART=256, num_warps=4, enable_fp_fusion=False)
        _quantize_short_rows_kernel[(triton.cdiv(rows, short["ROWS"]),)](
            x, q.view(torch.uint8), scale, x.stride(0), rows, H=width, **short, **chained(x)
        )
    elif rows:
        warps = 4 if width <= 3072 else 8 if width <= 8192 else 16
        _quantize_fp8_kernel[(rows,)](
            x, q.view(torch.uint8), scale, x.stride(0), H=width, **row_parts(width, warps), **chained(x)
        )  # fmt: skip
    return q, scale


def empty_quantized(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return q, torch.empty(rows, 1, dtype=torch.float32, device=device)


def row_parts(width: int, warps: int) -> dict[str, int]:
    """Launch settings of a kernel that holds a row of `width` in parts, 4 columns a thread each."""
    part = 128 * warps
    return dict(PARTS=triton.cdiv(width, part), PART=part, num_warps=warps, enable_fp_fusion=False)


_quantize_fp8 = define(
    "quantize_fp8(Tensor x) -> (Tensor, Tensor)",
    check=check_quantize_fp8, reference=quantize_fp8_reference, launch=quantize_fp8_launch,
)  # fmt: skip
