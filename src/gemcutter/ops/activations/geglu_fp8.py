"""GeGLU and FP8 quantisation of its rows in one launch: quantize_fp8(gelu_tanh(gate) * up).

The gelu is rounded to the dtype, the product again, and of that the largest is taken.
Source: `geglu.py`, `quantize_fp8.py`.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.activations.geglu import geglu_reference, gelu
from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.load_order import after, mixed
from gemcutter.ops.quantize_fp8 import (
    Quantized,
    check_quantized_width,
    empty_quantized,
    load_part,
    magnitudes,
    quantize_fp8_reference,
    row_parts,
    scale_of,
    store_row,
)
from gemcutter.ops.row import columns


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


@triton.jit(do_not_specialize=["rows"])
def _geglu_fp8_kernel(
    gate_up_ptr, q_ptr, scale_ptr, row_stride, rows,
    I: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    col = columns(PART)
    gate_ptr = gate_up_ptr + row * row_stride
    up_ptr = gate_ptr + I
    join(CHAINED)
    release(CHAINED)
    gates, ups, ys = (), (), ()
    for part in tl.static_range(PARTS):
        gates += (load_part(gate_ptr + part * PART, col, I - part * PART),)
        ups += (load_part(up_ptr + part * PART, col, I - part * PART),)
    loaded = mixed(gates[0], ups[0], ups[PARTS - 1])
    for part in tl.static_range(1, PARTS):
        loaded = mixed(loaded, gates[part], ups[part])
    for part in tl.static_range(PARTS):
        gate = after(gates[part], loaded, rows)
        ys += ((gelu(gate).to(tl.float32) * ups[part].to(tl.float32)).to(dtype),)
    largest = magnitudes(ys[0].to(tl.float32))
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, magnitudes(ys[part].to(tl.float32)))
    peak = tl.max(largest, 1, keep_dims=True)
    store_row(ys, peak, q_ptr + row * I, col, I, PARTS, PART, dtype != tl.float32)
    tl.store(scale_ptr + row + tl.zeros_like(peak), scale_of(peak))


def geglu_fp8_launch(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    q, scale = empty_quantized(rows, width, gate_up.device)
    if rows:
        warps = 16 if width > 4096 else 8 if rows < 4096 else 4
        _geglu_fp8_kernel[(rows,)](
            gate_up, q.view(torch.uint8), scale, gate_up.stride(0), rows,
            I=width, **row_parts(width, warps), **chained(gate_up),
        )  # fmt: skip
    return q, scale


_geglu_fp8 = define(
    "geglu_fp8(Tensor gate_up) -> (Tensor, Tensor)",
    check=check_geglu_fp8, reference=geglu_fp8_reference, launch=geglu_fp8_launch,
)  # fmt: skip
