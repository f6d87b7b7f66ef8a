"""RMSNorm over the last dim, with or without weight.

y = x * (mean(x^2) + eps)^-0.5 * w in float, rounded once at the end. The weight is w, not 1 + w.
Source: HF `Gemma4RMSNorm`, but for the order in which the squares are summed (`mean_square.py`).
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_rows, check_weight
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.mean_square import mean_square_reference
from gemcutter.ops.row import load_row, norm_factor, row_tile, store_row


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


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, outer_stride, inner_stride, inner, rows, eps,
    H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr,
    TWICE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """TWICE: rounded before the weight too, as `t5_norm.py` has it."""
    # Rows are counted in int32: 2^31 of them, read and written, would not fit a GPU's memory.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < rows if ROWS > 1 else None
    if WEIGHTED:
        weight = load_row(weight_ptr + tl.zeros_like(row), real, H, PARTS, PART)
    join(CHAINED)
    release(CHAINED)
    start = x_ptr + (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    xs = load_row(start, real, H, PARTS, PART)
    factor = norm_factor(xs, eps, H)
    ys = ()
    for part in tl.static_range(PARTS):
        y = xs[part].to(tl.float32) * factor
        if TWICE:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        if WEIGHTED:
            y *= weight[part].to(tl.float32)
        ys += (y,)
    store_row(y_ptr + row.to(tl.int64) * H, ys, real, H, PARTS, PART)


def rms_norm_launch(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return launch_norm(x, weight, eps, twice=False)


def launch_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, twice: bool) -> torch.Tensor:
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = y.numel() // width
    if rows == 0:
        return y
    if x.is_contiguous():
        x = x.view(rows, 1, width)  # no division of a row's number
    elif x.ndim < 3:
        x = x.reshape(-1, 1, width)
    tile = norm_tile(width, rows)
    _rms_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x, weight, y, x.stride(0), x.stride(1), x.shape[1], rows, eps,
        H=width, WEIGHTED=weight is not None, TWICE=twice, **tile, **chained(y),
    )  # fmt: skip
    return y


def norm_tile(width: int, rows: int) -> dict[str, int]:
    """Launch settings, several narrow rows a program, which else would wait for programs to start: 65,536 heads of
    128 take 8.9 µs, with four a program 20.6.

    In few elements a lane of 4 warps holds 8, in many 16; rows of over 256, which are wider than such a warp, stand
    alone where they are few.
    """
    tile, part = row_tile(width), max(8, triton.next_power_of_2(width))
    if width > 512 or (width > 256 and width * rows < 2**20):
        return tile | dict(ROWS=1)
    held = 1024 if width <= 256 and width * rows < 2**22 else 2048
    return tile | dict(PARTS=1, PART=part, ROWS=held // part, num_warps=4)


_rms_norm = define(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    check=check_rms_norm, reference=rms_norm_reference, launch=rms_norm_launch,
)  # fmt: skip
