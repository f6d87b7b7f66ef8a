"""Fill: one stored tensor into the weight that it is, as it is, dequantised, or quantised."""

from collections.abc import Iterator

import torch

from gemcutter.checkpoint.quantization import Scheme
from gemcutter.model.weights import Linear
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8

CHUNK = 2**18  # elements at once; bounds the memory of casts and of quantising, some 20 bytes each


def fill(view: Linear, stored: torch.Tensor, scheme: Scheme | None, scale: torch.Tensor | None) -> None:
    """Copy a tensor of a file, in chunks, to the device and dtype of its view.

    Args:
        scheme, scale: of a tensor in FP8, the latter as `read_scales` gives it. Into a view in FP8 both go as they
            are, into another goes their product, taken in float32 and rounded once.

    Raises:
        ValueError: a tensor to be quantised holds an infinity or a NaN.
    """
    if isinstance(view, Quantized) and scale is not None:
        fill(view.q, stored, None, None)
        view.scale.copy_(scale)
    elif isinstance(view, Quantized):
        q, scales = view.q.view(-1, view.q.shape[-1]), view.scale.view(-1, 1)
        for begin, end in _row_chunks(*q.shape):
            quantized = quantize_fp8(stored.view(q.shape)[begin:end].to(q.device))
            if not quantized.scale.isfinite().all():
                raise ValueError("holds an infinity or a NaN, which FP8 would make of a whole row")
            q[begin:end].copy_(quantized.q)
            scales[begin:end].copy_(quantized.scale)
    elif scale is not None:
        scale = scale.to(view.device)
        for begin, end in _row_chunks(*view.shape):
            rows = stored[begin:end].to(view.device).float()
            view[begin:end].copy_(rows * _scales_of_rows(scheme, scale, begin, *rows.shape))
    else:
        for ours, theirs in chunks(view, stored):
            ours.copy_(theirs)


def chunks(ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(ours.view(-1).split(CHUNK), theirs.view(-1).split(CHUNK), strict=True)


def _row_chunks(num_rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // columns)
    return ((begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step))


def _scales_of_rows(scheme: Scheme, scale: torch.Tensor, begin: int, count: int, columns: int) -> torch.Tensor:
    """[count, 1], or [count, columns] from blocks, the last of which may be cut off."""
    if scheme.block is None:
        return scale[begin : begin + count]
    rows = torch.arange(begin, begin + count, device=scale.device) // scheme.block[0]
    return scale[rows][:, torch.arange(columns, device=scale.device) // scheme.block[1]]
