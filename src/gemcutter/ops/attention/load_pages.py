"""Keys and values of the paged cache by TMA: what attention's kernels share, and the loading warps of prefill."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gemcutter.ops.hopper import descriptor, load_tile, loads_by_tma

KEYS = gl.constexpr(64)  # a tile
COLS = gl.constexpr(256)  # a stage, with 64 keys 32 KiB
BOX = gl.constexpr(64)  # columns that one load brings: 128 bytes, the swizzle of shared memory
LOADERS = gl.constexpr(2)  # warps that share a stage; with one a sliding layer of 8192 tokens takes 250 µs for 242


@gluon.jit
def _hide(share, start, first_key, last_key):
    """Zero the values of keys outside first_key : last_key + 1: there may be NaN, and 0 * NaN would reach acc."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    for part in gl.static_range(KEYS // 16):
        key = start + part * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
        seen = ((key >= first_key) & (key <= last_key))[:, None]
        for block in gl.static_range(COLS // BOX // LOADERS):
            piece = share.slice(block * BOX, BOX, 1).slice(part * 16, 16)
            values = piece.load(layout)
            piece.store(gl.where(seen, values, gl.zeros_like(values)))


@gluon.jit
def rows_of(start, tiles, pages_ptr, kv_head, KV_HEADS: gl.constexpr, PAGE: gl.constexpr):
    """Where in the cache the boxes of a tile begin that starts with key `start`."""
    HEIGHT: gl.constexpr = PAGE if PAGE < KEYS else KEYS
    rows = ()
    for box in gl.static_range(KEYS // HEIGHT):
        key = start + box * HEIGHT
        live = gl.minimum(gl.maximum(key // PAGE, tiles[2] // PAGE), tiles[3] // PAGE)
        rows = rows + ((gl.load(pages_ptr + live) * KV_HEADS + kv_head) * PAGE + key % PAGE,)
    return rows


@gluon.jit
def load_pages(
    loader: gl.constexpr, desc, stages, pages_ptr, kv_head, first_col, tiles, KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """A warp's share of all stages, PARTS a tile, from column first_col on.

    stages: shared memory [STAGES, KEYS, COLS], and the barriers that say full (of values, LOADERS more) and free.
    tiles: the first, and how many; the first and last key that the program's rows see. Pages are clamped to those
    with such a key. Where a tile of values has others, they are zeroed before it is handed over; their scores are
    dropped by the mask, whatever they are.
    """
    whole, ready, empty = stages
    first_tile, num_tiles, first_key, last_key = tiles
    HEIGHT: gl.constexpr = PAGE if PAGE < KEYS else KEYS  # of a box
    BLOCKS: gl.constexpr = COLS // BOX // LOADERS
    hidden_tiles = 0
    for n in range(num_tiles * PARTS):
        start = (first_tile + n // PARTS) * KEYS
        col = first_col + n % PARTS * COLS + loader * BLOCKS * BOX
        rows = rows_of(start, tiles, pages_ptr, kv_head, KV_HEADS, PAGE)
        stage = n % STAGES
        done = stage
        hidden = False
        if VALUES:
            hidden = (start < first_key) | (start + KEYS - 1 > last_key)
            done = gl.where(hidden, STAGES + loader, stage)  # a barrier of this warp's own
        mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(done), KEYS * BLOCKS * BOX * 2)
        share = whole.index(stage).slice(loader * BLOCKS * BOX, BLOCKS * BOX, 1)
        for block in gl.static_range(BLOCKS):
            for box in gl.static_range(KEYS // HEIGHT):
                target = share.slice(block * BOX, BOX, 1).slice(box * HEIGHT, HEIGHT)
                load_tile(desc, [rows[box], col + block * BOX], ready.index(done), target)
        if VALUES:
            if hidden:
                mbarrier.wait(ready.index(done), hidden_tiles & 1)
                hidden_tiles += 1
                _hide(share, start, first_key, last_key)
                fence_async_shared()
                mbarrier.arrive(ready.index(stage), count=1)


def as_words(cache: torch.Tensor) -> torch.Tensor:
    """An FP8 cache as bfloat16, two elements in one, for kernels that take them apart and multiply bfloat16."""
    return cache.view(torch.bfloat16) if cache.dtype == torch.float8_e4m3fn else cache


def boxes(cache: torch.Tensor, keys: int, columns: int) -> TensorDescriptor:
    """The cache as rows of keys, to be loaded in boxes of so many, or of one page where pages are shorter."""
    return descriptor(cache.flatten(0, 2), [min(cache.shape[2], keys), columns])


def pages_by_tma(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Whether TMA loads such pages: eight keys are one round of the swizzle, and rows are counted in 32 bits."""
    k_cache, v_cache = as_words(k_cache), as_words(v_cache)
    fits = k_cache.dtype == q.dtype
    page_size = k_cache.shape[2]
    power = page_size & (page_size - 1) == 0 and page_size >= 8
    return fits and power and k_cache.shape[:3].numel() < 2**31 and loads_by_tma(k_cache, v_cache)


def loads_pages(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Whether such a cache comes by these loads."""
    return q.shape[-1] in (256, 512) and pages_by_tma(q, k_cache, v_cache)
