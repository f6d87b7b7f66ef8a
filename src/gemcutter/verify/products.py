"""Launches of the matrix products, few rows and many, for `compiles.py`: they are no cases of `verify`."""

import functools
from collections.abc import Callable

import torch

from gemcutter.ops.activations.activation import Activation
from gemcutter.ops.linears.float_linear import float_linear_launch
from gemcutter.ops.linears.gate_up_fp8_hopper import stream_gate_up_fp8
from gemcutter.ops.linears.gate_up_hopper import stream_gate_up
from gemcutter.ops.linears.linear import linear_launch
from gemcutter.ops.linears.linear_fp8 import linear_fp8_launch
from gemcutter.ops.linears.linear_fp8_hopper import stream_row
from gemcutter.ops.linears.linear_hopper import stream
from gemcutter.ops.linears.linear_row_hopper import stream_row as stream_linear_row
from gemcutter.ops.moe.experts import experts_launch
from gemcutter.ops.moe.experts_fp8 import experts_fp8_launch
from gemcutter.ops.moe.experts_hopper import grouped_experts
from gemcutter.ops.moe.experts_stream_hopper import stream_experts
from gemcutter.ops.quantize_fp8 import Quantized, pair_of
from gemcutter.ops.seams.seam_gate_up_hopper import stream_seam_gate_up
from gemcutter.ops.seams.seam_gate_up_wide_hopper import stream_seam_gate_up_wide
from gemcutter.ops.seams.seam_linear_hopper import stream_seam_linear

WIDE = ((2560, 10240), (1536, 6144))  # E4B's MLP, and E2B's


def product_launches() -> dict[str, list[Callable[[], object]]]:
    """By op, or by the file of its kernels."""
    found: dict[str, list[Callable[[], object]]] = {}
    # A row of tiles each.
    found["experts"] = [functools.partial(_experts, rows, act) for rows in (1, 1024, 4096) for act in Activation]
    found["experts_fp8"] = [
        functools.partial(_experts_fp8, rows, act) for rows in (1, 400, 4096) for act in Activation
    ]
    both = [(in_fp8, act) for in_fp8 in (False, True) for act in Activation]
    found["experts_hopper"] = [functools.partial(_grouped_experts, *each) for each in both]
    found["experts_stream_hopper"] = [
        functools.partial(_stream_experts, in_fp8, rows, act) for rows in (1, 16) for in_fp8, act in both
    ]
    found["gate_up_hopper"] = [functools.partial(_gate_up, rows, count) for rows in (1, 16) for count in (0, 128)]
    found["float_linear"] = [functools.partial(_float_linear, rows) for rows in (1, 100)]
    found["seam_gate_up_hopper"] = [
        functools.partial(_seam_gate_up, count, in_fp8) for count in (0, 128) for in_fp8 in (False, True)
    ]
    found["seam_gate_up_wide_hopper"] = [functools.partial(_seam_gate_up_wide, *shape) for shape in WIDE]
    found["seam_linear_hopper"] = [functools.partial(_seam_linears, in_fp8) for in_fp8 in (False, True)]
    found["linear"] = [functools.partial(_linear, rows) for rows in (1, 20, 64)]
    found["linear_hopper"] = [functools.partial(_stream, rows) for rows in (1, 20, 64)]
    found["linear_hopper"] += [functools.partial(_stream, rows, fp8=True) for rows in (1, 9, 20, 64)]
    # Wide enough that tiles of more than 64 rows are taken.
    found["linear_hopper"] += [functools.partial(_stream, rows, columns=4352, fp8=True) for rows in (128, 200)]
    found["linear_row_hopper"] = [functools.partial(_linear_row, *shape) for shape in ((2112, 2816), (5376, 21504))]
    found["linear_fp8"] = [functools.partial(_linear_fp8, rows) for rows in (1, 20)]
    found["linear_fp8_hopper"] = [functools.partial(_row, pair) for pair in (True, False)]
    found["gate_up_fp8_hopper"] = [
        functools.partial(_gate_up_fp8, rows, count) for rows in (1, 16) for count in (0, 128)
    ]
    return found


def _experts(rows: int, activation: Activation) -> None:
    experts_launch(*_experts_arguments(rows), False, activation)


def _experts_fp8(rows: int, activation: Activation) -> None:
    x, ids, gate_up, down = _experts_arguments(rows, in_fp8=True)
    experts_fp8_launch(*x, ids, *gate_up, *down, False, activation)


def _grouped_experts(in_fp8: bool, activation: Activation, tokens: int = 1100) -> None:
    x, ids, gate_up, down = _experts_arguments(tokens, in_fp8)
    order, starts = (torch.zeros(n, dtype=torch.int32) for n in (ids.numel(), len(pair_of(down)[0]) + 1))
    grouped_experts(x, order, starts, gate_up, down, ids.shape[1], activation)


def _stream_experts(in_fp8: bool, rows: int, activation: Activation) -> None:
    for settled in (False, True):
        stream_experts(*_experts_arguments(rows, in_fp8), settled, activation)


def _experts_arguments(
    tokens: int, in_fp8: bool = False, count: int = 128, top_k: int = 8, hidden: int = 2816, width: int = 704
) -> tuple:
    def matrix(*dims: int) -> torch.Tensor | Quantized:
        return _pair(*dims) if in_fp8 else torch.empty(dims, dtype=torch.bfloat16)

    ids = torch.zeros(tokens, top_k, dtype=torch.int64)
    return matrix(tokens, hidden), ids, matrix(count, 2 * width, hidden), matrix(count, hidden, width)


def _linear(rows: int, depth: int = 2816, columns: int = 2112) -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    linear_launch(half(rows, depth), half(columns, depth))
    linear_launch(half(rows, depth), half(columns, depth), half(columns))


def _float_linear(rows: int, depth: int = 5120, columns: int = 160) -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    float_linear_launch(half(rows, depth), half(columns, depth))


def _gate_up(rows: int, count: int, depth: int = 2816, width: int = 2112) -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    router = (half(rows, depth), half(count, depth)) if count else (None, None)
    logits = half(rows, count) if count else None
    stream_gate_up(half(rows, depth), half(2 * width, depth), *router, half(rows, width), logits)


def _seam_gate_up(count: int, in_fp8: bool, depth: int = 2816, width: int = 2112) -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    row, norm, matrix = half(1, depth), half(depth), _pair if in_fp8 else half
    router = (norm, norm, half(count, depth)) if count else (None, None, None)
    expert_in = [] if not count else [*_pair(1, depth)] if in_fp8 else [row]
    logits, weight = half(1, count) if count else None, pair_of(matrix(2 * width, depth))
    stream_seam_gate_up(row, row, norm, norm, 1e-6, *weight, *router, row, half(1, width), expert_in, logits)


def _seam_gate_up_wide(depth: int, width: int) -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    row, norm = half(1, depth), half(depth)
    stream_seam_gate_up_wide(row, row, norm, norm, 1e-6, half(2 * width, depth), row, half(1, width))


def _seam_linears(in_fp8: bool, depth: int = 2816, top_k: int = 8) -> None:
    """To the next layer's projection, behind experts and without, and to the gate of a per-layer input."""
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    row, norm, ids = half(1, depth), half(depth), torch.zeros(1, top_k, dtype=torch.int64)
    slots = half(1, top_k, depth), norm, norm, ids, torch.zeros(1, top_k)
    forms = [(4096, half(1), norm, *slots, None, settled) for settled in (False, True)]
    forms += [(4096, half(1), norm, *[None] * 6, False)]
    forms += [(256, *[None] * 7, half(1, 256), settled) for settled in (False, True)]
    for columns, *form in forms:
        weight, product = _pair(columns, depth) if in_fp8 else half(columns, depth), half(1, columns)
        stream_seam_linear(row, row, norm, 1e-6, *pair_of(weight), *form, row, product)


def _pair(*shape: int) -> Quantized:
    return Quantized(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(*shape[:-1], 1))


def _linear_fp8(rows: int, depth: int = 2816, columns: int = 2112) -> None:
    linear_fp8_launch(*_pair(rows, depth), *_pair(columns, depth), None)


def _row(pair: bool, depth: int = 2816, columns: int = 2112) -> None:
    x = _pair(1, depth) if pair else (torch.empty(1, depth, dtype=torch.bfloat16), None)
    stream_row(*x, *_pair(columns, depth), None, torch.empty(1, columns, dtype=torch.bfloat16))


def _gate_up_fp8(rows: int, count: int, depth: int = 2816, width: int = 2112) -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    router = (half(rows, depth), half(count, depth)) if count else (None, None)
    logits = half(rows, count) if count else None
    stream_gate_up_fp8(*_pair(rows, depth), *_pair(2 * width, depth), *router, half(rows, width), logits)


def _linear_row(columns: int, depth: int) -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    for bias in (None, half(columns)):
        stream_linear_row(half(1, depth), half(columns, depth), bias, half(1, columns))


def _stream(rows: int, depth: int = 2816, columns: int = 2112, fp8: bool = False) -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    if fp8:
        (x, scale), (weight, weight_scale) = _pair(rows, depth), _pair(columns, depth)
        stream(x, weight, half(rows, columns), None, scale, weight_scale)
        return
    stream(half(rows, depth), half(columns, depth), half(rows, columns))
    stream(half(rows, depth), half(columns, depth), half(rows, columns), half(columns))
