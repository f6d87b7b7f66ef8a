"""A row on its way from registers to its reader: as it is, or quantised by the rule of `quantize_fp8.py`."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from gemcutter.ops.quantize_fp8 import (
    Quantized,
    empty_quantized,
    magnitudes,
    quantize_fp8_reference,
    quantized_bits,
    scale_of,
)
from gemcutter.ops.row import columns, store_row


@triton.jit
def hand_out(ptr, scale_ptr, xs, row, H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """Store a row in its dtype; with scale_ptr, which else is None, as e4m3 and its scale."""
    if scale_ptr is None:
        store_row(ptr + row * H, xs, None, H, PARTS, PART)
    else:
        qs, scale = quantised(xs, columns(PART), H)
        store_row(ptr + row * H, qs, None, H, PARTS, PART)
        tl.store(scale_ptr + row, scale)


@triton.jit
def quantised(xs, col, H: tl.constexpr):
    """A row's parts as the bits of e4m3, and its scale. col: the columns of a part."""
    PART: tl.constexpr = xs[0].shape[1]
    ys = ()
    for part in tl.static_range(len(xs)):
        y = xs[part].to(tl.float32)
        # Past the row's end 0 times an infinite factor is NaN, the largest of its row.
        if part * PART + PART > H:
            y = tl.where(col < H - part * PART, y, 0.0)
        ys += (y,)
    largest = tl.abs(ys[0])
    for part in tl.static_range(1, len(xs)):
        largest = tl.maximum(largest, tl.abs(ys[part]), propagate_nan=tl.PropagateNan.ALL)
    peak = tl.max(magnitudes(largest))
    qs = ()
    for part in tl.static_range(len(xs)):
        qs += (quantized_bits(ys[part], peak, xs[0].dtype != tl.float32),)
    return qs, scale_of(peak)


def empty_rows(like: torch.Tensor, fp8: bool) -> list[torch.Tensor]:
    """Dense results of the shape of `like` [T, H]: its dtype's, or e4m3 with their scales."""
    if fp8:
        return [*empty_quantized(*like.shape, like.device)]
    return [torch.empty_like(like, memory_format=torch.contiguous_format)]


def pointers(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `hand_out` takes for them."""
    return (rows[0].view(torch.uint8), rows[1]) if len(rows) == 2 else (rows[0], None)


def reference_rows(x: torch.Tensor, fp8: bool) -> list[torch.Tensor]:
    return [*quantize_fp8_reference(x)] if fp8 else [x]


def taken(results: Iterator[torch.Tensor], fp8: bool) -> torch.Tensor | Quantized:
    """The next of an op's results: one tensor, or two that make a pair."""
    return Quantized(next(results), next(results)) if fp8 else next(results)
