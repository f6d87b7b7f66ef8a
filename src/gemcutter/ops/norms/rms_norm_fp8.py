"""RMSNorm, with or without a residual added before it, and FP8 quantisation of its rows in one launch.

residual_out = x + residual, rounded to the dtype before the norm reads it
q, scale = quantize_fp8(rms_norm(residual_out, weight)), the norm rounded to the dtype before its largest is taken
Source: `rms_norm.py`, `quantize_fp8.py`; the sum's rounding is HF's, whose residual is a tensor of the dtype.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.norms.rms_norm import rms_norm_reference
from gemcutter.ops.quantize_fp8 import (
    Quantized,
    check_quantized_width,
    empty_quantized,
    quantize_fp8_reference,
)
from gemcutter.ops.row import added, load_row, norm_factor, normed, row_tile, store_row
from gemcutter.ops.row_fp8 import hand_out


def rms_norm_fp8(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None
) -> tuple[Quantized, torch.Tensor | None]:
    """Add, normalise and quantise each row.

    Args:
        x: [T, H] of float32, bfloat16 or float16; dense rows, row stride free. T may be 0, H is at most 65536.
        weight: [H] of x's dtype, dense, or None.
        eps: added to the mean square.
        residual: like x, or None.

    Returns:
        quantized: q [T, H] and scale [T, 1], as of `quantize_fp8`; without tokens too.
        residual_out: [T, H] of x's dtype, contiguous; None without residual.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    q, scale, *residual_out = _rms_norm_fp8(x, weight, eps, residual)
    return Quantized(q, scale), residual_out[0] if residual_out else None


def check_rms_norm_fp8(x, weight, eps, residual) -> None:
    check_matrix("x", x)
    check_quantized_width("x", x.shape[1])
    if weight is not None:
        check_weight("weight", weight, x.shape[1], x)
    if residual is not None:
        check_matrix("residual", residual, like=x)


def rms_norm_fp8_reference(x, weight, eps, residual) -> list[torch.Tensor]:
    if residual is None:
        return [*quantize_fp8_reference(rms_norm_reference(x, weight, eps))]
    hidden = (x + residual).contiguous()
    return [*quantize_fp8_reference(rms_norm_reference(hidden, weight, eps)), hidden]


@triton.jit
def _rms_norm_fp8_kernel(
    x_ptr, weight_ptr, residual_ptr, q_ptr, scale_ptr, hidden_ptr, x_stride, residual_stride, eps,
    H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, WEIGHTED: tl.constexpr, ADDED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = None
    if WEIGHTED:
        weight = load_row(weight_ptr, None, H, PARTS, PART)
    join(CHAINED)
    release(CHAINED)
    x = load_row(x_ptr + row * x_stride, None, H, PARTS, PART)
    if ADDED:
        x = added(x, load_row(residual_ptr + row * residual_stride, None, H, PARTS, PART))
        store_row(hidden_ptr + row * H, x, None, H, PARTS, PART)
    hand_out(q_ptr, scale_ptr, normed(x, norm_factor(x, eps, H), weight), row, H, PARTS, PART)


def rms_norm_fp8_launch(x, weight, eps, residual) -> list[torch.Tensor]:
    rows, width = x.shape
    q, scale = empty_quantized(rows, width, x.device)
    hidden = [] if residual is None else [torch.empty(rows, width, dtype=x.dtype, device=x.device)]
    if rows:
        added = residual is not None
        _rms_norm_fp8_kernel[(rows,)](
            x, weight, residual, q.view(torch.uint8), scale, hidden[0] if added else None,
            x.stride(0), residual.stride(0) if added else 0, eps,
            H=width, WEIGHTED=weight is not None, ADDED=added, **row_tile(width), **chained(x),
        )  # fmt: skip
    return [q, scale, *hidden]


_rms_norm_fp8 = define(
    "rms_norm_fp8(Tensor x, Tensor? weight, float eps, Tensor? residual) -> Tensor[]",
    check=check_rms_norm_fp8, reference=rms_norm_fp8_reference, launch=rms_norm_fp8_launch,
)  # fmt: skip
