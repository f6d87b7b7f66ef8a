"""Keys and values of an FP8 cache for the warpgroups of prefill, which multiply bfloat16 out of shared memory.

A warp's share of a stage comes by TMA as words of two elements into the half of it that the words fill, and is
widened in place, a few rows at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from gemcutter.ops.kv_fp8_hopper import halves
from gemcutter.ops.linear_hopper import load_tile
from gemcutter.ops.load_pages import BOX, COLS, KEYS, barrier, load_pages, rows_of

SOME = gl.constexpr(8)  # rows widened at once: 24 registers


@gluon.jit
def load_fp8_pages(
    loader: gl.constexpr, desc, stages, pages_ptr, kv_head, first_col, tiles, KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `load_pages`, but values that no row sees are left as they are, for they are finite.

    Of the barriers that say full, one more for each loader says that its words have come.
    """
    whole, ready, empty = stages
    first_tile, num_tiles = tiles[0], tiles[1]
    HEIGHT: gl.constexpr = PAGE if PAGE < KEYS else KEYS  # of a box
    # A lane has four words of a row and four 32 words on: 8 columns of one block and 8 of the other.
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [1, 1], [1, 0])
    landed = ready.index(STAGES + loader)
    for n in range(num_tiles * PARTS):
        col = (first_col + n % PARTS * COLS) // 2 + loader * BOX
        rows = rows_of((first_tile + n // PARTS) * KEYS, tiles, pages_ptr, kv_head, KV_HEADS, PAGE)
        stage = n % STAGES
        low_block = whole.index(stage).slice(loader * 2 * BOX, BOX, 1)
        high_block = whole.index(stage).slice(loader * 2 * BOX + BOX, BOX, 1)
        mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(landed, KEYS * BOX * 2)
        for box in gl.static_range(KEYS // HEIGHT):
            load_tile(desc, [rows[box], col], landed, high_block.slice(box * HEIGHT, HEIGHT))
        mbarrier.wait(landed, n & 1)
        for part in gl.static_range(KEYS // SOME):
            low, high = halves(high_block.slice(part * SOME, SOME).load(layout))
            wide = gl.join(low, high).reshape([SOME, 2, BOX]).permute((0, 2, 1))
            first, second = gl.split(wide)
            barrier()  # a lane's columns lie where the words of others were
            low_block.slice(part * SOME, SOME).store(first)
            high_block.slice(part * SOME, SOME).store(second)
        fence_async_shared()
        mbarrier.arrive(ready.index(stage), count=1)


@gluon.jit
def load(
    loader: gl.constexpr, desc, stages, where, first_col, KV_HEADS: gl.constexpr, PAGE: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, VALUES: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """A loading warp, whatever the cache holds. where: the sequence's pages, the KV head, the tiles."""
    pages_ptr, kv_head, tiles = where
    if FP8:
        load_fp8_pages(loader, desc, stages, pages_ptr, kv_head, first_col, tiles, KV_HEADS, PAGE, PARTS, STAGES)
    else:
        load_pages(
            loader, desc, stages, pages_ptr, kv_head, first_col, tiles, KV_HEADS, PAGE, PARTS, STAGES, VALUES
        )
