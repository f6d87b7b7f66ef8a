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

from gemcutter.ops.mean_square import mean_square
from gemcutter.ops.rms_norm import rms_norm_reference, row_tile


class Routed(NamedTuple):
    """The experts' branch: what they return, and the norms that only layers with experts have."""

    out: torch.Tensor  # [T, H]
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
        out: [T, H], the branch; contiguous rows, row stride free. T may be 0.
        residual: [T, H], likewise.
        post: [H].
        scalar: [1] and next_norm: [H], together or not at all.

    Returns:
        hidden, next_in: [T, H] each; next_in None without next_norm.
    """
    assert (scalar is None) == (next_norm is None), "scalar and next_norm come together"
    run = layer_seam_reference if out.is_cpu else layer_seam_launch
    return run(out, residual, post, eps, scalar, next_norm, routed)


def layer_seam_reference(out, residual, post, eps, scalar=None, next_norm=None, routed=None):
    if routed is not None:
        experts = rms_norm_reference(routed.out, routed.expert_post, eps)
        out = rms_norm_reference(out, routed.dense_post, eps) + experts
    hidden = residual + rms_norm_reference(out, post, eps)
    if next_norm is None:
        return hidden, None
    hidden = hidden * scalar
    return hidden, rms_norm_reference(hidden, next_norm, eps)


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


def layer_seam_launch(out, residual, post, eps, scalar=None, next_norm=None, routed=None):
    tokens, width = out.shape
    assert residual.shape == out.shape, f"residual {residual.shape}, branch {out.shape}"
    assert out.stride(1) == residual.stride(1) == 1, "rows must be contiguous"
    experts = Routed(None, None, None) if routed is None else routed
    assert routed is None or routed.out.is_contiguous(), "the experts' output must be contiguous"
    hidden = torch.empty(tokens, width, dtype=out.dtype, device=out.device)
    next_in = None if next_norm is None else torch.empty_like(hidden)
    if tokens:
        _layer_seam_kernel[(tokens,)](
            out, residual, post, scalar, next_norm, experts.out, experts.dense_post, experts.expert_post,
            hidden, next_in, out.stride(0), residual.stride(0), eps,
            H=width, EXPERTS=routed is not None, LAST=next_norm is not None, **row_tile(width),
        )  # fmt: skip
    return hidden, next_in
