"""What becomes of the sums of `experts_hopper.py`: scales of FP8, the activation, their places in the result."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemcutter.ops.activation import activate

activate_gate = gluon.jit(activate.fn)


@gluon.jit
def places(order_ptr, row, end, UP: gl.constexpr, layout: gl.constexpr):
    """Rows of the result, of a tile's rows from `row` on: the same ones of UP, else back to slots."""
    row += gl.arange(0, layout.shape[0], gl.SliceLayout(1, layout))
    return row if UP else gl.load(order_ptr + row, mask=row < end, other=0)


@gluon.jit
def row_scales(
    scale_ptr, order_ptr, row, end,
    ROWS: gl.constexpr, TOP_K: gl.constexpr, UP: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    row += gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    source = gl.load(order_ptr + row, mask=row < end, other=0) // TOP_K if UP else row
    return gl.load(scale_ptr + source, mask=row < end, other=0.0)


@gluon.jit
def channel_scales(
    scale_ptr, expert, col, N: gl.constexpr, COLS: gl.constexpr, UP: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Of COLS columns; of UP those of gate, then those of up."""
    lane = gl.arange(0, 2 * COLS if UP else COLS, gl.SliceLayout(0, layout))
    col += lane % COLS
    channel = expert * (2 * N if UP else N) + col + lane // COLS * N
    return gl.load(scale_ptr + channel, mask=col < N, other=0.0)


@gluon.jit
def store_results(
    acc, out_ptr, target, row, end, col,
    N: gl.constexpr, COLS: gl.constexpr, UP: gl.constexpr, ACTIVATION: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Of UP gate's and up's columns are activated to one. layout: of what is stored."""
    ROWS: gl.constexpr = acc.shape[0]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    if UP:
        gate, up = acc.reshape([ROWS, 2, COLS]).permute((0, 2, 1)).split()
        activated = activate_gate(gate.to(dtype), ACTIVATION).to(gl.float32)
        result = gl.convert_layout((activated * up.to(dtype).to(gl.float32)).to(dtype), layout)
    else:
        result = gl.convert_layout(acc.to(dtype), layout)
    row += gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    col += gl.arange(0, COLS, gl.SliceLayout(0, layout))
    at = out_ptr + target[:, None].to(gl.int64) * N + col[None, :]
    gl.store(at, result, mask=(row < end)[:, None] & (col < N)[None, :])


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
