"""From one layer to the next: close the branch, add to the residual, scale, and norm for the next reader.

with experts: routed = the sum of their weighted outputs (`slot_sum.py`)
              out = norm(out) * dense_post + norm(routed) * expert_post
hidden = (residual + norm(out) * post) * scalar
next_in = norm(hidden) * next_norm

Every norm is rounded to the dtype, then every sum and product. The per-layer input of E2B and E4B comes between the
residual and the scalar, so there the op runs twice: without scalar and next norm, then with them on the injection.
Source: HF `Gemma4TextDecoderLayer`.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.norms.rms_norm import rms_norm_reference
from gemcutter.ops.quantize_fp8 import Quantized, check_quantized_width, read_as_pair
from gemcutter.ops.row import added, late, load_row, norm_factor, norm_factors, normed, seam_tile, store_row
from gemcutter.ops.row_fp8 import empty_rows, hand_out, pointers, reference_rows, taken
from gemcutter.ops.seams.slot_sum import check_slots, slot_sum, slot_sum_reference

# Slots whose loads are under way at once. All 8 take registers that keep programs off the SM: 8192 rows of 26B-A4B
# take 159 µs with 8 and 148 with 4. At few rows ptxas makes the same of both.
TOGETHER = 4


class Routed(NamedTuple):
    """The experts' branch: what they return, and the norms that only layers with experts have."""

    out: torch.Tensor  # [T, k, H] with ids and weights; [T, H], their sum, without; dense
    dense_post: torch.Tensor  # [H]
    expert_post: torch.Tensor  # [H]
    ids: torch.Tensor | None = None  # [T, k], as for `slot_sum`
    weights: torch.Tensor | None = None  # [T, k]


def layer_seam(
    out: torch.Tensor,
    residual: torch.Tensor,
    post: torch.Tensor,
    eps: float,
    scalar: torch.Tensor | None = None,
    next_norm: torch.Tensor | None = None,
    routed: Routed | None = None,
    reader: torch.Tensor | Quantized | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Quantized | None]:
    """One launch on a GPU.

    Args:
        out: [T, H] of float32, bfloat16 or float16, the branch; dense rows, row stride free. T may be 0.
        residual: [T, H], likewise.
        post: [H].
        scalar: [1] and next_norm: [H], together or not at all.
        reader: the weight of the product that takes next_in.

    Returns:
        hidden, next_in: [T, H] each; next_in None without next_norm, and its `quantize_fp8` where bfloat16 goes to
        a reader in FP8.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    fp8 = next_norm is not None and read_as_pair(reader, out.dtype)
    run = _layer_seam_fp8 if fp8 else _layer_seam
    found = iter(run(out, residual, post, eps, scalar, next_norm, *(routed or (None,) * 5)))
    return next(found), None if next_norm is None else taken(found, fp8)


def check_layer_seam(
    out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post, ids, weights
) -> None:
    check_matrix("out", out)
    check_matrix("residual", residual, like=out)
    if (scalar is None) != (next_norm is None):
        raise ValueError("scalar and next_norm come together: one of them is None")
    if not (routed is None) == (dense_post is None) == (expert_post is None):
        given = dict(out=routed, dense_post=dense_post, expert_post=expert_post)
        missing = ", ".join(name for name, x in given.items() if x is None)
        raise ValueError(f"routed lacks {missing}: out, dense_post and expert_post come together")
    if (ids is None) != (weights is None) or (routed is None and ids is not None):
        raise ValueError("routed's slots, ids and weights come together: one of them is None")
    if scalar is not None:
        check_weight("scalar", scalar, 1, out)
    if routed is not None:
        _check_routed(out, routed, ids, weights)
    named = dict(post=post, next_norm=next_norm, dense_post=dense_post, expert_post=expert_post)
    for name, weight in named.items():
        if weight is not None:
            check_weight(name, weight, out.shape[1], out)


def check_layer_seam_fp8(out, residual, post, eps, scalar, next_norm, *routed) -> None:
    check_layer_seam(out, residual, post, eps, scalar, next_norm, *routed)
    check_quantized_width("out", out.shape[1])
    if next_norm is None:
        raise ValueError("next_norm is None: without it nothing is quantised; call layer_seam")


def _check_routed(out, routed, ids, weights) -> None:
    shape = tuple(out.shape)
    if ids is not None:
        check_slots(ids, weights, out)
        shape = (*ids.shape, out.shape[1])
    if routed.dtype != out.dtype or routed.device != out.device:
        raise TypeError(f"routed.out is {routed.dtype} on {routed.device}: {out.dtype} on {out.device} is needed")
    if routed.shape != shape or not routed.is_contiguous():
        got = f"routed.out has shape {tuple(routed.shape)}, strides {routed.stride()}"
        raise ValueError(f"{got}: {shape}, dense, is needed; call .contiguous()")


def layer_seam_reference(
    out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post, ids, weights, fp8=False
) -> list[torch.Tensor]:
    if routed is not None:
        routed = routed if ids is None else slot_sum_reference(routed, ids, weights)
        out = rms_norm_reference(out, dense_post, eps) + rms_norm_reference(routed, expert_post, eps)
    hidden = residual + rms_norm_reference(out, post, eps)
    if next_norm is None:
        return [hidden]
    hidden = hidden * scalar
    return [hidden, *reference_rows(rms_norm_reference(hidden, next_norm, eps), fp8)]


@triton.jit
def _layer_seam_kernel(
    out_ptr, residual_ptr, post_ptr, scalar_ptr, next_norm_ptr, routed_ptr, dense_post_ptr, expert_post_ptr,
    ids_ptr, weights_ptr, hidden_ptr, next_in_ptr, next_scale_ptr, out_stride, residual_stride, eps,
    H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    TOGETHER: tl.constexpr, LAST: tl.constexpr, EARLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """TOP_K: slots to add up, or 0.

    LAST: nothing comes between this residual and the scalar, so scale, and norm for the next reader.
    """
    row = tl.program_id(0).to(tl.int64)
    at = row * H
    post = load_row(post_ptr, None, H, PARTS, PART) if EARLY else None
    dense_post = load_row(dense_post_ptr, None, H, PARTS, PART) if EARLY and EXPERTS else None
    expert_post = load_row(expert_post_ptr, None, H, PARTS, PART) if EARLY and EXPERTS else None
    next_norm = load_row(next_norm_ptr, None, H, PARTS, PART) if EARLY and LAST else None
    scalar = tl.load(scalar_ptr).to(tl.float32) if LAST else None
    join(CHAINED)
    release(CHAINED)
    x = load_row(out_ptr + row * out_stride, None, H, PARTS, PART)
    residual = load_row(residual_ptr + row * residual_stride, None, H, PARTS, PART)
    if EXPERTS:
        if TOP_K:
            routed = slot_sum(routed_ptr, ids_ptr, weights_ptr, row, H, PARTS, PART, TOP_K, TOGETHER)
        else:
            routed = load_row(routed_ptr + at, None, H, PARTS, PART)
        factor, routed_factor = norm_factors(x, routed, eps, H)
        x = normed(x, factor, late(dense_post, dense_post_ptr, H, PARTS, PART))
        routed = normed(routed, routed_factor, late(expert_post, expert_post_ptr, H, PARTS, PART))
        x = added(x, routed)
    factor = norm_factor(x, eps, H)
    hidden = added(residual, normed(x, factor, late(post, post_ptr, H, PARTS, PART)))
    if LAST:
        hidden = normed(hidden, scalar, None)
        factor = norm_factor(hidden, eps, H)
        next_in = normed(hidden, factor, late(next_norm, next_norm_ptr, H, PARTS, PART))
        hand_out(next_in_ptr, next_scale_ptr, next_in, row, H, PARTS, PART)
    store_row(hidden_ptr + at, hidden, None, H, PARTS, PART)


def layer_seam_launch(
    out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post, ids, weights, fp8=False
) -> list[torch.Tensor]:
    tokens, width = out.shape
    hidden, next_in = empty_rows(out, False), [] if next_norm is None else empty_rows(out, fp8)
    if tokens:
        next_ptrs = pointers(next_in) if next_in else (None, None)
        _layer_seam_kernel[(tokens,)](
            out, residual, post, scalar, next_norm, routed, dense_post, expert_post, ids, weights,
            *hidden, *next_ptrs, out.stride(0), residual.stride(0), eps,
            H=width, EXPERTS=routed is not None, TOP_K=0 if ids is None else ids.shape[1], TOGETHER=TOGETHER,
            LAST=next_norm is not None,
            **seam_tile(width, tokens, routed is not None), **chained(out),
        )  # fmt: skip
    return [*hidden, *next_in]


_layer_seam = define(
    "layer_seam(Tensor out, Tensor residual, Tensor post, float eps, Tensor? scalar, Tensor? next_norm,"
    " Tensor? routed, Tensor? dense_post, Tensor? expert_post, Tensor? ids, Tensor? weights) -> Tensor[]",
    check=check_layer_seam, reference=layer_seam_reference, launch=layer_seam_launch,
)  # fmt: skip
_layer_seam_fp8 = define(
    "layer_seam_fp8(Tensor out, Tensor residual, Tensor post, float eps, Tensor? scalar, Tensor? next_norm,"
    " Tensor? routed, Tensor? dense_post, Tensor? expert_post, Tensor? ids, Tensor? weights) -> Tensor[]",
    check=check_layer_seam_fp8, reference=functools.partial(layer_seam_reference, fp8=True),
    launch=functools.partial(layer_seam_launch, fp8=True),
)  # fmt: skip
