"""Between attention and feed-forward: add to the residual, and prepare it for each of its readers.

hidden = residual + norm(attended) * post
mlp_in = norm(hidden) * pre
and in a layer with experts
expert_in = norm(hidden) * expert_pre
router_in = norm(hidden) * router_scale * H^-0.5

Every norm is rounded to the dtype, then every product and the sum (the router's input three times, as in HF). One
mean square serves all readers of `hidden`. Source: HF `Gemma4TextDecoderLayer` and `Gemma4TextRouter`.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.mean_square import mean_square
from gemcutter.ops.rms_norm import rms_norm_reference, row_tile


def attention_seam(
    attended: torch.Tensor,
    residual: torch.Tensor,
    post: torch.Tensor,
    pre: torch.Tensor,
    eps: float,
    expert_pre: torch.Tensor | None = None,
    router_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One launch on a GPU.

    Args:
        attended: [T, H], out of o_proj; rows contiguous, row stride free. T may be 0.
        residual: [T, H], likewise.
        post, pre, expert_pre, router_scale: [H] of the same dtype; the last two together or not at all.

    Returns:
        hidden, mlp_in, expert_in, router_in: [T, H] each; the last two None without experts.
    """
    run = attention_seam_reference if attended.is_cpu else attention_seam_launch
    return run(attended, residual, post, pre, eps, expert_pre, router_scale)


def attention_seam_reference(attended, residual, post, pre, eps, expert_pre=None, router_scale=None):
    hidden = residual + rms_norm_reference(attended, post, eps)
    mlp_in = rms_norm_reference(hidden, pre, eps)
    if expert_pre is None:
        return hidden, mlp_in, None, None
    router_in = rms_norm_reference(hidden, None, eps) * router_scale * hidden.shape[-1] ** -0.5
    return hidden, mlp_in, rms_norm_reference(hidden, expert_pre, eps), router_in


@triton.jit
def _attention_seam_kernel(
    attended_ptr, residual_ptr, post_ptr, pre_ptr, expert_pre_ptr, router_scale_ptr,
    hidden_ptr, mlp_in_ptr, expert_in_ptr, router_in_ptr, attended_stride, residual_stride, eps, root,
    H: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    inside = col < H
    dtype = hidden_ptr.dtype.element_ty
    x = tl.load(attended_ptr + row * attended_stride + col, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + col, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(post_ptr + col, mask=inside, other=0.0).to(tl.float32)
    x = (x * tl.rsqrt(mean_square(x, H) + eps) * weight).to(dtype).to(tl.float32)
    hidden = (residual + x).to(dtype)
    out = row * H + col
    tl.store(hidden_ptr + out, hidden, mask=inside)
    hidden = hidden.to(tl.float32)
    normed = hidden * tl.rsqrt(mean_square(hidden, H) + eps)
    weight = tl.load(pre_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(mlp_in_ptr + out, (normed * weight).to(dtype), mask=inside)
    if EXPERTS:
        weight = tl.load(expert_pre_ptr + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(expert_in_ptr + out, (normed * weight).to(dtype), mask=inside)
        scale = tl.load(router_scale_ptr + col, mask=inside, other=0.0).to(tl.float32)
        scaled = (normed.to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)
        tl.store(router_in_ptr + out, (scaled * root).to(dtype), mask=inside)


def attention_seam_launch(attended, residual, post, pre, eps, expert_pre=None, router_scale=None):
    tokens, width = attended.shape
    assert residual.shape == attended.shape, f"residual {residual.shape}, attended {attended.shape}"
    assert attended.stride(1) == residual.stride(1) == 1, "rows must be contiguous"
    with_experts = expert_pre is not None
    hidden = torch.empty(tokens, width, dtype=attended.dtype, device=attended.device)
    mlp_in = torch.empty_like(hidden)
    expert_in, router_in = (torch.empty_like(hidden) if with_experts else None for _ in range(2))
    if tokens:
        _attention_seam_kernel[(tokens,)](
            attended, residual, post, pre, expert_pre, router_scale, hidden, mlp_in, expert_in, router_in,
            attended.stride(0), residual.stride(0), eps, width**-0.5,
            H=width, EXPERTS=with_experts, **row_tile(width),
        )  # fmt: skip
    return hidden, mlp_in, expert_in, router_in
