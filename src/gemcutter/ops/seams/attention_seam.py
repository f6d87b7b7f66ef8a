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
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.norms.rms_norm import rms_norm_reference
from gemcutter.ops.quantize_fp8 import Quantized, check_quantized_width, read_as_pair
from gemcutter.ops.row import added, late, load_row, norm_factor, normed, seam_tile, store_row
from gemcutter.ops.row_fp8 import empty_rows, hand_out, pointers, reference_rows, taken


def attention_seam(
    attended: torch.Tensor,
    residual: torch.Tensor,
    post: torch.Tensor,
    pre: torch.Tensor,
    eps: float,
    expert_pre: torch.Tensor | None = None,
    router_scale: torch.Tensor | None = None,
    reader: torch.Tensor | Quantized | None = None,
    expert_reader: torch.Tensor | Quantized | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Quantized, torch.Tensor | Quantized | None, torch.Tensor | None]:
    """One launch on a GPU.

    Args:
        attended: [T, H] of float32, bfloat16 or float16, out of o_proj; dense rows, row stride free. T may be 0.
        residual: [T, H], likewise.
        post, pre, expert_pre, router_scale: [H]; the last two together or not at all.
        reader, expert_reader: weights of the products that take mlp_in and expert_in.

    Returns:
        hidden, mlp_in, expert_in, router_in: [T, H] each; the last two None without experts. Where bfloat16 goes to
        a reader in FP8, mlp_in and expert_in are `quantize_fp8` of that.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    given = attended, residual, post, pre, eps, expert_pre, router_scale
    mlp_fp8, expert_fp8 = (read_as_pair(each, attended.dtype) for each in (reader, expert_reader))
    found = iter(
        _attention_seam_fp8(*given, mlp_fp8, expert_fp8) if mlp_fp8 or expert_fp8 else _attention_seam(*given)
    )
    hidden, mlp_in = next(found), taken(found, mlp_fp8)
    if expert_pre is None:
        return hidden, mlp_in, None, None
    return hidden, mlp_in, taken(found, expert_fp8), next(found)


def check_attention_seam(
    attended, residual, post, pre, eps, expert_pre, router_scale, mlp_fp8=False, expert_fp8=False
) -> None:
    check_matrix("attended", attended)
    if mlp_fp8 or expert_fp8:
        check_quantized_width("attended", attended.shape[1])
    check_matrix("residual", residual, like=attended)
    if (expert_pre is None) != (router_scale is None):
        raise ValueError("expert_pre and router_scale come together: one of them is None")
    named = dict(post=post, pre=pre, expert_pre=expert_pre, router_scale=router_scale)
    for name, weight in named.items():
        if weight is not None:
            check_weight(name, weight, attended.shape[1], attended)


def attention_seam_reference(
    attended, residual, post, pre, eps, expert_pre, router_scale, mlp_fp8=False, expert_fp8=False
) -> list[torch.Tensor]:
    hidden = residual + rms_norm_reference(attended, post, eps)
    found = [hidden, *reference_rows(rms_norm_reference(hidden, pre, eps), mlp_fp8)]
    if expert_pre is None:
        return found
    router_in = rms_norm_reference(hidden, None, eps) * router_scale * hidden.shape[-1] ** -0.5
    return [*found, *reference_rows(rms_norm_reference(hidden, expert_pre, eps), expert_fp8), router_in]


@triton.jit
def _attention_seam_kernel(
    attended_ptr, residual_ptr, post_ptr, pre_ptr, expert_pre_ptr, router_scale_ptr,
    hidden_ptr, mlp_in_ptr, mlp_scale_ptr, expert_in_ptr, expert_scale_ptr, router_in_ptr,
    attended_stride, residual_stride, eps, root,
    H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EXPERTS: tl.constexpr, EARLY: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    post = load_row(post_ptr, None, H, PARTS, PART) if EARLY else None
    pre = load_row(pre_ptr, None, H, PARTS, PART) if EARLY else None
    expert_pre = load_row(expert_pre_ptr, None, H, PARTS, PART) if EARLY and EXPERTS else None
    router_scale = load_row(router_scale_ptr, None, H, PARTS, PART) if EARLY and EXPERTS else None
    join(CHAINED)
    release(CHAINED)
    x = load_row(attended_ptr + row * attended_stride, None, H, PARTS, PART)
    residual = load_row(residual_ptr + row * residual_stride, None, H, PARTS, PART)
    factor = norm_factor(x, eps, H)
    hidden = added(residual, normed(x, factor, late(post, post_ptr, H, PARTS, PART)))
    out = row * H
    store_row(hidden_ptr + out, hidden, None, H, PARTS, PART)
    factor = norm_factor(hidden, eps, H)
    pre = late(pre, pre_ptr, H, PARTS, PART)
    hand_out(mlp_in_ptr, mlp_scale_ptr, normed(hidden, factor, pre), row, H, PARTS, PART)
    if EXPERTS:
        expert_pre = late(expert_pre, expert_pre_ptr, H, PARTS, PART)
        hand_out(expert_in_ptr, expert_scale_ptr, normed(hidden, factor, expert_pre), row, H, PARTS, PART)
        router_scale = late(router_scale, router_scale_ptr, H, PARTS, PART)
        store_row(router_in_ptr + out, router_rows(hidden, factor, router_scale, root), None, H, PARTS, PART)


@triton.jit
def router_rows(xs, factor, scales, root):
    """normed, * scale, * root, each rounded to x's dtype."""
    dtype: tl.constexpr = xs[0].dtype
    ys = ()
    for part in tl.static_range(len(xs)):
        y = (xs[part].to(tl.float32) * factor).to(dtype).to(tl.float32)
        y = (y * scales[part].to(tl.float32)).to(dtype).to(tl.float32)
        ys += ((y * root).to(dtype),)
    return ys


def attention_seam_launch(
    attended, residual, post, pre, eps, expert_pre, router_scale, mlp_fp8=False, expert_fp8=False
) -> list[torch.Tensor]:
    tokens, width = attended.shape
    with_experts = expert_pre is not None
    hidden, mlp_in = empty_rows(attended, False), empty_rows(attended, mlp_fp8)
    expert_in, router_in = (
        (empty_rows(attended, expert_fp8), empty_rows(attended, False)) if with_experts else ([], [])
    )
    if tokens:
        more = (*pointers(expert_in), *router_in) if with_experts else (None, None, None)
        _attention_seam_kernel[(tokens,)](
            attended, residual, post, pre, expert_pre, router_scale, *hidden, *pointers(mlp_in), *more,
            attended.stride(0), residual.stride(0), eps, width**-0.5,
            H=width, EXPERTS=with_experts, **seam_tile(width, tokens, with_experts), **chained(attended),
        )  # fmt: skip
    return [*hidden, *mlp_in, *expert_in, *router_in]


_attention_seam = define(
    "attention_seam(Tensor attended, Tensor residual, Tensor post, Tensor pre, float eps,"
    " Tensor? expert_pre, Tensor? router_scale) -> Tensor[]",
    check=check_attention_seam, reference=attention_seam_reference, launch=attention_seam_launch,
)  # fmt: skip
_attention_seam_fp8 = define(
    "attention_seam_fp8(Tensor attended, Tensor residual, Tensor post, Tensor pre, float eps,"
    " Tensor? expert_pre, Tensor? router_scale, bool mlp_fp8, bool expert_fp8) -> Tensor[]",
    check=check_attention_seam, reference=attention_seam_reference, launch=attention_seam_launch,
)  # fmt: skip
