"""Add a branch to the residual and norm the sum for its readers: GLM's seam, after attention and after the MLP.

with experts: x = the sum of their weighted outputs (`slot_sum.py`) + x, which is the shared expert's
hidden = residual + x
normed = norm(hidden) * weight, rounded twice (`t5_norm.py`)
quantized = quantize_fp8(normed)

Every sum and product is rounded to the dtype. Source: HF `Glm4MoeDecoderLayer` and `Glm4MoeMoE`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.norms.t5_norm import t5_norm_reference
from gemcutter.ops.quantize_fp8 import (
    Quantized,
    check_quantized_width,
    empty_quantized,
    magnitudes,
    quantize_fp8_reference,
    quantized_bits,
    read_as_pair,
    scale_of,
)
from gemcutter.ops.row import added, columns, late, load_row, norm_factor, normed_twice, seam_tile, store_row
from gemcutter.ops.seams.slot_sum import check_slots, slot_sum, slot_sum_reference

TOGETHER = 4  # slots whose loads are under way at once, as in `layer_seam.py`


class Slots(NamedTuple):
    """What a layer's experts return, and what its sum needs."""

    out: torch.Tensor  # [T, k, H] dense
    ids: torch.Tensor  # [T, k], as for `slot_sum`
    weights: torch.Tensor  # [T, k]


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    readers: Sequence[torch.Tensor | Quantized],
    slots: Slots | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor | Quantized]]:
    """One launch on a GPU.

    Args:
        x: [T, H] of float32, bfloat16 or float16, the branch; dense rows, row stride free. T may be 0.
        residual: [T, H], likewise.
        weight: [H].
        eps: added to the mean square.
        readers: weights of the products that take the norm, one or more.
        slots: of the experts beside the branch.

    Returns:
        hidden: [T, H]; and the norm of it for each reader, [T, H] too, or, where bfloat16 goes to a reader in FP8,
        its `quantize_fp8`.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    pairs = [read_as_pair(reader, x.dtype) for reader in readers]
    plain, fp8 = not all(pairs), any(pairs)
    hidden, *forms = _add_norm(x, residual, weight, eps, *(slots or (None, None, None)), plain, fp8)
    quantized = Quantized(*forms[-2:]) if fp8 else None
    return hidden, [quantized if pair else forms[0] for pair in pairs]


def check_add_norm(x, residual, weight, eps, slots, ids, weights, plain, fp8) -> None:
    check_matrix("x", x)
    check_matrix("residual", residual, like=x)
    check_weight("weight", weight, x.shape[1], x)
    if fp8:
        check_quantized_width("x", x.shape[1])
    if not (slots is None) == (ids is None) == (weights is None):
        raise ValueError("slots, ids and weights come together: one of them is None")
    if slots is not None:
        check_slots(ids, weights, x)
        if slots.dtype != x.dtype or slots.device != x.device:
            raise TypeError(f"slots are {slots.dtype} on {slots.device}: {x.dtype} on {x.device} is needed")
        if slots.shape != (*ids.shape, x.shape[1]) or not slots.is_contiguous():
            got = f"slots have shape {tuple(slots.shape)}, strides {slots.stride()}"
            raise ValueError(f"{got}: {(*ids.shape, x.shape[1])}, dense, is needed; call .contiguous()")


def add_norm_reference(x, residual, weight, eps, slots, ids, weights, plain, fp8) -> list[torch.Tensor]:
    if slots is not None:
        x = slot_sum_reference(slots, ids, weights) + x
    hidden = (residual + x).contiguous()
    normed = t5_norm_reference(hidden, weight, eps)
    return [hidden, *[normed] * plain, *(quantize_fp8_reference(normed) if fp8 else ())]


@triton.jit
def _add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, slots_ptr, ids_ptr, weights_ptr, hidden_ptr, normed_ptr, q_ptr, scale_ptr,
    x_stride, residual_stride, eps,
    H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, TOP_K: tl.constexpr, TOGETHER: tl.constexpr,
    PLAIN: tl.constexpr, FP8: tl.constexpr, EARLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """TOP_K: slots to add up, or 0."""
    row = tl.program_id(0).to(tl.int64)
    at = row * H
    weight = load_row(weight_ptr, None, H, PARTS, PART) if EARLY else None
    join(CHAINED)
    release(CHAINED)
    x = load_row(x_ptr + row * x_stride, None, H, PARTS, PART)
    residual = load_row(residual_ptr + row * residual_stride, None, H, PARTS, PART)
    if TOP_K:
        x = added(slot_sum(slots_ptr, ids_ptr, weights_ptr, row, H, PARTS, PART, TOP_K, TOGETHER), x)
    hidden = added(residual, x)
    store_row(hidden_ptr + at, hidden, None, H, PARTS, PART)
    factor = norm_factor(hidden, eps, H)
    normed = normed_twice(hidden, factor, late(weight, weight_ptr, H, PARTS, PART))
    if PLAIN:
        store_row(normed_ptr + at, normed, None, H, PARTS, PART)
    if FP8:
        peak = tl.max(_largest(normed, H))
        qs = ()
        for part in tl.static_range(PARTS):
            qs += (quantized_bits(normed[part].to(tl.float32), peak, x_ptr.dtype.element_ty != tl.float32),)
        store_row(q_ptr + at, qs, None, H, PARTS, PART)
        tl.store(scale_ptr + row, scale_of(peak))


@triton.jit
def _largest(xs, H: tl.constexpr):
    """Bits of the largest magnitude in each column of a row's parts; NaN is on top."""
    PART: tl.constexpr = xs[0].shape[1]
    largest = tl.zeros([1, PART], tl.int32)
    for part in tl.static_range(len(xs)):
        size = magnitudes(xs[part].to(tl.float32))
        if part * PART + PART > H:  # past the row's end 0 times an infinite factor is NaN, the largest of its row
            size = tl.where(columns(PART) < H - part * PART, size, 0)
        largest = tl.maximum(largest, size)
    return largest


def add_norm_launch(x, residual, weight, eps, slots, ids, weights, plain, fp8) -> list[torch.Tensor]:
    tokens, width = x.shape
    hidden, *normed = (torch.empty(tokens, width, dtype=x.dtype, device=x.device) for _ in range(1 + plain))
    quantized = empty_quantized(tokens, width, x.device) if fp8 else ()
    if tokens:
        q, scale = (quantized[0].view(torch.uint8), quantized[1]) if fp8 else (None, None)
        _add_norm_kernel[(tokens,)](
            x, residual, weight, slots, ids, weights, hidden, normed[0] if plain else None, q, scale,
            x.stride(0), residual.stride(0), eps,
            H=width, TOP_K=0 if ids is None else ids.shape[1], TOGETHER=TOGETHER, PLAIN=plain, FP8=fp8,
            **seam_tile(width, tokens, slots is not None), **chained(x),
        )  # fmt: skip
    return [hidden, *normed, *quantized]


_add_norm = define(
    "add_norm(Tensor x, Tensor residual, Tensor weight, float eps, Tensor? slots, Tensor? ids, Tensor? weights,"
    " bool plain, bool fp8) -> Tensor[]",
    check=check_add_norm, reference=add_norm_reference, launch=add_norm_launch,
)  # fmt: skip
