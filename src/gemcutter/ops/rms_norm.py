"""RMSNorm over the last dim, with or without weight.

y = x * (mean(x^2) + eps)^-0.5 * w in float, rounded once at the end. The weight is w, not 1 + w.
Source: HF `Gemma4RMSNorm`, but for the order in which the squares are summed (`mean_square.py`).
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_rows, check_weight
from gemcutter.ops.library import define
from gemcutter.ops.mean_square import mean_square, mean_square_reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalise each row.

    Args:
        x: [..., H] of float32, bfloat16 or float16, up to 3 dims; rows dense, other strides free.
        weight: [H] of x's dtype, dense, or None.
        eps: added to the mean square.

    Returns:
        [..., H] of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _rms_norm(x, weight, eps)


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> None:
    check_rows("x", x)
    if x.ndim > 3:
        raise ValueError(f"x has {x.ndim} dims, {tuple(x.shape)}: up to 3 are taken; flatten the outer ones")
    if weight is not None:
        check_weight("weight", weight, x.shape[-1], x)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.pow(mean_square_reference(wide) + eps, -0.5)
    if weight is not None:
        wide = wide * weight.float()
    return wide.to(x.dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, outer_stride, inner_stride, inner, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    inside = col < H
    start = x_ptr + row // inner * outer_stride + row % inner * inner_stride
    x = tl.load(start + col, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(mean_square(x, H) + eps)
    if WEIGHTED:
        y = y * tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * H + col, y.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm_launch(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = y.numel() // width
    if rows == 0:
        return y
    flat = x if x.ndim == 3 else x.reshape(-1, 1, width) if x.ndim == 1 else x.unsqueeze(1)
    _rms_norm_kernel[(rows,)](
        flat, weight, y, flat.stride(0), flat.stride(1), flat.shape[1], eps,
        H=width, WEIGHTED=weight is not None, **row_tile(width),
    )  # fmt: skip
    return y


def row_tile(width: int) -> dict[str, int]:
    """Launch settings of a kernel that holds one row a program, every rounding in its place.

    8 warps on rows from 4096: at most 32 floats a thread. A row of 256 (a head) is work for one warp. No fused
    multiply-add: PyTorch rounds a product before it is added.
    """
    block = triton.next_power_of_2(width)
    return dict(BLOCK=block, num_warps=min(8, max(1, block // 512)), enable_fp_fusion=False)


_rms_norm = define(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    check=check_rms_norm, reference=rms_norm_reference, launch=rms_norm_launch,
)  # fmt: skip
