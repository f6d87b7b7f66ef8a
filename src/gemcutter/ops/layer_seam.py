"""From one layer to the next: close the branch, add to the residual, scale, and norm for the next reader.

with experts: out = norm(out) * dense_post + norm(routed) * expert_post
hidden = (residual + norm(out) * post) * scalar
next_in = norm(hidden) * next_norm

Every norm is rounded to the dtype, then every sum and product. The per-layer input of E2B and E4B comes between the
residual and the scalar, so there the op runs twice: without scalar and next norm, then with them on the injection.
Source: HF `Gemma4TextDecoderLayer`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.library import define
from gemcutter.ops.mean_square import mean_square
from gemcutter.ops.rms_norm import rms_norm_reference, row_tile


class Routed(NamedTuple):
    """The experts' branch: what they return, and the norms that only layers with experts have."""

    out: torch.Tensor  # [T, H], dense
    dense_post: torch.Tensor  # [H]
    expert_post: torch.Tensor  # [H]


def layer_seam(
    out: torch.Tensor,
    residual: torch.Tensor,
    post: torch.Tensor,
    eps: float,
    scalar: torch.Tensor | None = None,
    next_norm: torch.Tensor | None = None,
    routed: Routed | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch on a GPU.

    Args:
        out: [T, H] of float32, bfloat16 or float16, the branch; dense rows, row stride free. T may be 0.
        residual: [T, H], likewise.
        post: [H].
        scalar: [1] and next_norm: [H], together or not at all.

    Returns:
        hidden, next_in: [T, H] each; next_in None without next_norm.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    hidden, *next_in = _layer_seam(out, residual, post, eps, scalar, next_norm, *(routed or (None, None, None)))
    return hidden, next_in[0] if next_in else None


def check_layer_seam(out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post) -> None:
    check_matrix("out", out)
    check_matrix("residual", residual, like=out)
    if (scalar is None) != (next_norm is None):
        raise ValueError("scalar and next_norm come together: one of them is None")
    if scalar is not None:
        check_weight("scalar", scalar, 1, out)
    if routed is not None:
        check_matrix("routed.out", routed, like=out)
        if not routed.is_contiguous():
            raise ValueError(f"routed.out has strides {routed.stride()}: it must be dense; call .contiguous()")
    named = dict(post=post, next_norm=next_norm, dense_post=dense_post, expert_post=expert_post)
    for name, weight in named.items():
        if weight is not None:
            check_weight(name, weight, out.shape[1], out)


def layer_seam_reference(
    out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post
) -> list[torch.Tensor]:
    if routed is not None:
        out = rms_norm_reference(out, dense_post, eps) + rms_norm_reference(routed, expert_post, eps)
    hidden = residual + rms_norm_reference(out, post, eps)
    if next_norm is None:
        return [hidden]
    hidden = hidden * scalar
    return [hidden, rms_norm_reference(hidden, next_norm, eps)]


@triton.jit
def _normed(x, weight_ptr, col, inside, eps, H: tl.constexpr, dtype: tl.constexpr):
    """norm(x) * weight, rounded to dtype, as float."""
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    return (x * tl.rsqrt(mean_square(x, H) + eps) * weight).to(dtype).to(tl.float32)


@triton.jit
def _layer_seam_kernel(
    out_ptr, residual_ptr, post_ptr, scalar_ptr, next_norm_ptr, routed_ptr, dense_post_ptr, expert_post_ptr,
    hidden_ptr, next_in_ptr, out_stride, residual_stride, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """LAST: nothing comes between this residual and the scalar, so scale, and norm for the next reader."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    inside = col < H
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    at = row * H + col
    x = tl.load(out_ptr + row * out_stride + col, mask=inside, other=0.0).to(tl.float32)
    if EXPERTS:
        routed = tl.load(routed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        routed = _normed(routed, expert_post_ptr, col, inside, eps, H, dtype)
        x = (_normed(x, dense_post_ptr, col, inside, eps, H, dtype) + routed).to(dtype).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + col, mask=inside, other=0.0).to(tl.float32)
    hidden = (residual + _normed(x, post_ptr, col, inside, eps, H, dtype)).to(dtype)
    if LAST:
        hidden = (hidden.to(tl.float32) * tl.load(scalar_ptr).to(tl.float32)).to(dtype)
        next_in = _normed(hidden.to(tl.float32), next_norm_ptr, col, inside, eps, H, dtype)
        tl.store(next_in_ptr + at, next_in.to(dtype), mask=inside)
    tl.store(hidden_ptr + at, hidden, mask=inside)


def layer_seam_launch(
    out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post
) -> list[torch.Tensor]:
    tokens, width = out.shape
    outs = [
        torch.empty_like(out, memory_format=torch.contiguous_format) for _ in range(1 if next_norm is None else 2)
    ]
    if tokens:
        _layer_seam_kernel[(tokens,)](
            out, residual, post, scalar, next_norm, routed, dense_post, expert_post,
            outs[0], outs[-1], out.stride(0), residual.stride(0), eps,
            H=width, EXPERTS=routed is not None, LAST=next_norm is not None, **row_tile(width),
        )  # fmt: skip
    return outs


_layer_seam = define(
    "layer_seam(Tensor out, Tensor residual, Tensor post, float eps, Tensor? scalar, Tensor? next_norm,"
    " Tensor? routed, Tensor? dense_post, Tensor? expert_post) -> Tensor[]",
    check=check_layer_seam, reference=layer_seam_reference, launch=layer_seam_launch,
)  # fmt: skip
