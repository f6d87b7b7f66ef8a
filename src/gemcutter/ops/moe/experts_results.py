"""What becomes of the sums of `experts_hopper.py`: scales of FP8, the activation, their places in the result."""

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def places(order_ptr, row, end, UP: gl.constexpr, layout: gl.constexpr):
    """Rows of the result, of a tile's rows from `row` on: the same ones of UP, else back to slots."""
    row += gl.arange(0, layout.shape[0], gl.SliceLayout(1, layout))
    return row if UP else gl.load(order_ptr + row, mask=row < end, other=0)


@gluon.jit
def row_scales(scale_ptr, order_ptr, row, end, TOP_K: gl.constexpr, UP: gl.constexpr, layout: gl.constexpr):
    row += gl.arange(0, layout.shape[0], gl.SliceLayout(1, layout))
    source = gl.load(order_ptr + row, mask=row < end, other=0) // TOP_K if UP else row
    return gl.load(scale_ptr + source, mask=row < end, other=0.0)


@gluon.jit
def channel_scales(scale_ptr, first, col, N: gl.constexpr, COLS: gl.constexpr, layout: gl.constexpr):
    """Of columns from `col` on, whose channels begin with `first`."""
    lane = gl.arange(0, COLS, gl.SliceLayout(0, layout))
    return gl.load(scale_ptr + first + lane, mask=(col + lane < N) | (N % COLS == 0), other=0.0)


@functools.cache  # made anew for each launch, layouts took a tenth of the host's time for a prompt's step
def rows_layout_of(rows: int, columns: int) -> gl.DistributedLinearLayout:
    """Of a result about to be stored: 16 bytes a thread, and a row where the accumulator has it.

    From one layout to the other nothing leaves its warp, so 2 KiB of shared memory and no barrier do.
    """
    registers = [
        [0, 1],
        [0, 2],
        [0, 4],
        *([0, i] for i in _powers(32, columns)),
        [8, 0],
        *([i, 0] for i in _powers(64, rows)),
    ]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, columns])


def _powers(begin: int, end: int) -> list[int]:
    return [1 << i for i in range(begin.bit_length() - 1, end.bit_length() - 1)]
