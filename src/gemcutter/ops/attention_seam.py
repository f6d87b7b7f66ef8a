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

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.library import define
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
        attended: [T, H] of float32, bfloat16 or float16, out of o_proj; dense rows, row stride free. T may be 0.
        residual: [T, H], likewise.
        post, pre, expert_pre, router_scale: [H]; the last two together or not at all.

    Returns:
        hidden, mlp_in, expert_in, router_in: [T, H] each; the last two None without experts.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    hidden, mlp_in, *more = _attention_seam(attended, residual, post, pre, eps, expert_pre, router_scale)
    return hidden, mlp_in, *(more or (None, None))


def check_attention_seam(attended, residual, post, pre, eps, expert_pre, router_scale) -> None:
    check_matrix("attended", attended)
    check_matrix("residual", residual, like=attended)
    if (expert_pre is None) != (router_scale is None):
        raise ValueError("expert_pre and router_scale come together: one of them is None")
    named = dict(post=post, pre=pre, expert_pre=expert_pre, router_scale=router_scale)
    for name, weight in named.items():
        if weight is not None:
            check_weight(name, weight, attended.shape[1], attended)


def attention_seam_reference(attended, residual, post, pre, eps, expert_pre, router_scale) -> list[torch.Tensor]:
    hidden = residual + rms_norm_reference(attended, post, eps)
    mlp_in = rms_norm_reference(hidden, pre, eps)
    if expert_pre is None:
        return [hidden, mlp_in]
    router_in = rms_norm_reference(hidden, None, eps) * router_scale * hidden.shape[-1] ** -0.5
    return [hidden, mlp_in, rms_norm_reference(hidden, expert_pre, eps), router_in]


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


def attention_seam_launch(attended, residual, post, pre, eps, expert_pre, router_scale) -> list[torch.Tensor]:
    tokens, width = attended.shape
    with_experts = expert_pre is not None
    outs = [
        torch.empty_like(attended, memory_format=torch.contiguous_format) for _ in range(4 if with_experts else 2)
    ]
    if tokens:
        _attention_seam_kernel[(tokens,)](
            attended, residual, post, pre, expert_pre, router_scale, *outs, *[None] * (4 - len(outs)),
            attended.stride(0), residual.stride(0), eps, width**-0.5,
            H=width, EXPERTS=with_experts, **row_tile(width),
        )  # fmt: skip
    return outs


_attention_seam = define(
    "attention_seam(Tensor attended, Tensor residual, Tensor post, Tensor pre, float eps,"
    " Tensor? expert_pre, Tensor? router_scale) -> Tensor[]",
    check=check_attention_seam, reference=attention_seam_reference, launch=attention_seam_launch,
)  # fmt: skip
