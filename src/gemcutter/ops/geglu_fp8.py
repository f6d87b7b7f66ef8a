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
    quantize_rows,
    quantized_row_tile,
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
def _geglu_fp8_kernel(gate_up_ptr, q_ptr, scale_ptr, row_stride, I: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    inside = col < I
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + row * row_stride + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + I + col, mask=inside, other=0.0).to(tl.float32)
    y = (gelu_tanh(gate).to(dtype).to(tl.float32) * up).to(dtype)
    q, scale = quantize_rows(y.to(tl.float32))
    tl.store(q_ptr + row * I + col, q, mask=inside)
    tl.store(scale_ptr + row + tl.zeros_like(scale).to(tl.int32), scale)


def geglu_fp8_launch(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    q, scale = empty_quantized(rows, width, gate_up.device)
    if rows:
        _geglu_fp8_kernel[(rows,)](
            gate_up, q.view(torch.uint8), scale, gate_up.stride(0), I=width, **quantized_row_tile(width)
        )  # fmt: skip
    return q, scale


_geglu_fp8 = define(
    "geglu_fp8(Tensor gate_up) -> (Tensor, Tensor)",
    check=check_geglu_fp8, reference=geglu_fp8_reference, launch=geglu_fp8_launch,
)  # fmt: skip
