"""GeGLU and FP8 quantisation of its rows in one launch: quantize_fp8(gelu_tanh(gate) * up).

The gelu is rounded to the dtype, the product again, and of that the largest is taken.
Source: `geglu.py`, `quantize_fp8.py`.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.geglu import geglu_reference, gelu_tanh
from gemcutter.ops.library import define
from gemcutter.ops.quantize_fp8 import (
    Quantized,
    check_quantized_width,
    empty_quantized,
    quantize_fp8_reference,
    quantized_bits,
    row_peak,
    scale_of,
    split_row_tile,
)


def geglu_fp8(gate_up: torch.Tensor) -> Quantized:
    """Activate and quantise each row.

    Args:
        gate_up: [T, 2I] of float32, bfloat16 or float16, columns gate then up; dense rows, row stride free. T may
            be 0, I is at most 65536.

    Returns:
        q [T, I] and scale [T, 1], as of `quantize_fp8`.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return Quantized(*_geglu_fp8(gate_up))


def check_geglu_fp8(gate_up: torch.Tensor) -> None:
    check_matrix("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has rows of {gate_up.shape[1]}: an even number, gate then up, is needed")
    check_quantized_width("gate_up", gate_up.shape[1] // 2)


def geglu_fp8_reference(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_fp8_reference(geglu_reference(gate_up))


@triton.jit
def _geglu(gate_ptr, up_ptr, inside):
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr, mask=inside, other=0.0).to(tl.float32)
    return (gelu_tanh(gate).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)


@triton.jit
def _geglu_fp8_kernel(
    gate_up_ptr, q_ptr, scale_ptr, row_stride, I: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD)[None, :]
    tail = HEAD + tl.arange(0, TAIL)[None, :]
    start = gate_up_ptr + row * row_stride
    y = _geglu(start + head, start + I + head, head < I)
    rest = _geglu(start + tail, start + I + tail, tail < I)
    peak = tl.maximum(row_peak(y), row_peak(rest))
    tl.store(q_ptr + row * I + head, quantized_bits(y, peak), mask=head < I)
    tl.store(q_ptr + row * I + tail, quantized_bits(rest, peak), mask=tail < I)
    tl.store(scale_ptr + row + tl.zeros_like(peak), scale_of(peak))


def geglu_fp8_launch(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    q, scale = empty_quantized(rows, width, gate_up.device)
    if rows:
        _geglu_fp8_kernel[(rows,)](
            gate_up, q.view(torch.uint8), scale, gate_up.stride(0), I=width, **split_row_tile(width)
        )  # fmt: skip
    return q, scale


_geglu_fp8 = define(
    "geglu_fp8(Tensor gate_up) -> (Tensor, Tensor)",
    check=check_geglu_fp8, reference=geglu_fp8_reference, launch=geglu_fp8_launch,
)  # fmt: skip
