"""What fills the ring of stages that `experts_hopper.py` multiplies from, each with a step of a tile's K.

A tile is a row of the table, [expert, first row, end of the expert's rows], and some columns; row 0 tells how many
rows follow. Program p of P loads tiles p, p + P, ..., in the order in which they are multiplied. `free` says that a
stage may be written, `ready` that it has been.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from gemcutter.ops.hopper import load_tile
from gemcutter.ops.moe.experts_weave import load_woven

# As with `load_tile`: 3.9 has it under the shorter name only.
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def tile_at(table_ptr, tile, N: gl.constexpr, COLS: gl.constexpr):
    """Expert, rows [first, end) and first column of a tile; columns fastest, so that rows stay in the cache."""
    column_tiles: gl.constexpr = (N + COLS - 1) // COLS
    at = table_ptr + (1 + tile // column_tiles) * 3
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), tile % column_tiles * COLS


@gluon.jit
def _load_weights(weight_desc, row, k, ready, stage, N: gl.constexpr, UP: gl.constexpr):
    if UP:
        HALF: gl.constexpr = stage.shape[0] // 2
        load_woven(weight_desc, row, k, ready, stage.slice(0, HALF))
        load_woven(weight_desc, row + N, k, ready, stage.slice(HALF, HALF))
    else:
        load_woven(weight_desc, row, k, ready, stage)


@gluon.jit
def load_rows(
    x_desc, weight_desc, ring, table_ptr, tiles,
    N: gl.constexpr, K: gl.constexpr, COLS: gl.constexpr,
):  # fmt: skip
    """Office of one warp: rows that lie one after the other."""
    x_stages, w_stages, ready, free = ring
    STAGES: gl.constexpr = x_stages.shape[0]
    HALF: gl.constexpr = x_stages.shape[1] // 2
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    ROW: gl.constexpr = BLOCK_K * x_stages.dtype.primitive_bitwidth // 8  # bytes
    BYTES: gl.constexpr = (COLS + HALF) * ROW
    used = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, end, col = tile_at(table_ptr, tile, N, COLS)
        whole = end - row > HALF
        for k in range(0, K, BLOCK_K):
            now = used % STAGES
            mbarrier.wait(free.index(now), (used // STAGES + 1) & 1)
            mbarrier.expect(ready.index(now), BYTES, pred=end - row <= HALF)
            mbarrier.expect(ready.index(now), BYTES + HALF * ROW, pred=whole)
            _load_weights(weight_desc, expert * N + col, k, ready.index(now), w_stages.index(now), N, False)
            x = x_stages.index(now)
            load_tile(x_desc, [row, k], ready.index(now), x.slice(0, HALF))
            load_tile(x_desc, [row + HALF, k], ready.index(now), x.slice(HALF, HALF), pred=whole)
            used += 1


@gluon.jit
def load_scattered_rows(
    x_ptr, x_stride, weight_desc, ring, table_ptr, order_ptr, tiles,
    N: gl.constexpr, K: gl.constexpr, COLS: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """Office of four warps: rows order[row] // TOP_K of x, by copies of 16 bytes, x_stride of them to a row."""
    x_stages, w_stages, ready, free = ring
    STAGES: gl.constexpr = x_stages.shape[0]
    BLOCK_M: gl.constexpr = x_stages.shape[1]
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    PACK: gl.constexpr = 128 // x_stages.dtype.primitive_bitwidth  # elements of 16 bytes
    BYTES: gl.constexpr = 2 * COLS * BLOCK_K * 16 // PACK
    layout: gl.constexpr = gl.BlockedLayout([1, PACK], [4, 8], [gl.num_warps(), 1], [1, 0])
    lane_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    used = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, first_row, end, col = tile_at(table_ptr, tile, N, COLS)
        row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        token = gl.load(order_ptr + row, mask=row < end, other=0) // TOP_K
        x_at = x_ptr + token.to(gl.int64)[:, None] * x_stride * PACK + lane_k[None, :]
        for k in range(0, K, BLOCK_K):
            now = used % STAGES
            mbarrier.wait(free.index(now), (used // STAGES + 1) & 1)
            mbarrier.expect(ready.index(now), BYTES)
            _load_weights(weight_desc, expert * 2 * N + col, k, ready.index(now), w_stages.index(now), N, True)
            real = (row < end)[:, None] & (lane_k < K - k)[None, :]  # the others come as zeros
            copy_rows(x_stages.index(now), x_at + k, mask=real)
            async_copy.mbarrier_arrive(ready.index(now), increment_count=False)
            used += 1
