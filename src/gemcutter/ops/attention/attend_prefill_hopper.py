"""Prefill attention at head dims 256 and 512 on Hopper, in Gluon: four warps load, two warpgroups multiply.

A program owns 128 rows, 64 a warpgroup, and 256 columns of the output. At head dim 512 two programs share the rows
and both compute the scores. That is half as many products again, but an accumulator of 512 columns leaves room for
64 rows only, and then keys and values come twice from L2, which feeds the tensor cores too slowly.

Keys and values come by TMA in tiles of 64 keys by 256 columns (`load_pages.py`). The warpgroups run on their
own, so that one multiplies while the other is at its softmax. At head dim 256 there is room for two tiles of each,
and a warpgroup also starts the next tile's scores before it adds up this one's values.

Measured on one H200 at 8192 tokens of 26B-A4B, TFLOP/s of visible pairs: sliding layers 531 (Triton's kernel 324),
full ones 422 (186), where the card is at its 700 W and slows its clock.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gemcutter.ops.attention.load_pages import BOX, COLS, KEYS, LOADERS, boxes, load_pages
from gemcutter.ops.attention.online_softmax import FLOOR, LOG2E
from gemcutter.ops.hopper import barrier

ROWS = gl.constexpr(64)  # a warpgroup, the M of one wgmma
HELD = gl.constexpr(128)  # columns of Q in registers at head dim 512


@gluon.jit
def _start_scores(
    n, held_q, near_q, q, k, ready, PARTS: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Q times the keys of the tile whose stages are n and on; `_attend` says where Q lies."""
    scores = gl.zeros([ROWS, KEYS], gl.float32, LAYOUT)
    for part in gl.static_range(PARTS):
        stage = (n + part) % STAGES
        mbarrier.wait(ready.index(stage), (n + part) // STAGES & 1)
        keys = k.index(stage)
        if part < PARTS - 1:
            held_keys, near_keys = keys.slice(0, HELD, 1).permute((1, 0)), keys.slice(HELD, HELD, 1).permute((1, 0))
            scores = warpgroup_mma(held_q, held_keys, scores, use_acc=False, is_async=True)
            scores = warpgroup_mma(near_q, near_keys, scores, is_async=True)
        else:
            scores = warpgroup_mma(q, keys.permute((1, 0)), scores, use_acc=part > 0, is_async=True)
    return scores


@gluon.jit
def _finish_scores(scores, n, empty, PARTS: gl.constexpr, STAGES: gl.constexpr, LATER: gl.constexpr):
    """LATER: products started since, which go on."""
    for part in gl.static_range(PARTS):
        scores = warpgroup_mma_wait(PARTS - 1 - part + LATER, deps=(scores,))
        mbarrier.arrive(empty.index((n + part) % STAGES), count=1)
    return scores


@gluon.jit
def _start_values(acc, weight, n, v, ready, STAGES: gl.constexpr):
    mbarrier.wait(ready.index(n % STAGES), n // STAGES & 1)
    return warpgroup_mma(weight, v.index(n % STAGES), acc, is_async=True)


@gluon.jit
def _finish_values(acc, n, empty, STAGES: gl.constexpr):
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(n % STAGES), count=1)
    return acc


@gluon.jit
def _fold(
    scores, top, total, start, positions, factor, WINDOW: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Weights of a tile's keys, the new maximum and sum, and the factor of what was summed before.

    The maximum is held in powers of two and rounded once, so that one number is taken off a key's score and off the
    maximum before. Where a tile has nothing for a row, the factor is 1 and all weights are 0, exactly.
    """
    pos, first_pos, last_pos = positions
    cut = start + KEYS - 1 > first_pos
    if WINDOW > 0:
        cut = cut | (start < last_pos - WINDOW + 1)
    if cut:
        key = start + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
        seen = key[None, :] <= pos[:, None]
        if WINDOW > 0:
            seen = seen & (pos[:, None] - key[None, :] < WINDOW)
        scores = gl.where(seen, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * factor)
    below = gl.zeros_like(scores) - new_top[:, None]
    weight = gl.exp2(gl.fma(scores, gl.full_like(scores, factor), below))
    fade = gl.exp2(top - new_top)
    return weight, new_top, total * fade + gl.sum(weight, 1), fade


@gluon.jit
def _attend(
    first, near_q, q, keys, values, q_ptr, out_ptr, query_begin, query_len, held, kv_head, first_col, tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, WINDOW: gl.constexpr,
    SCALE: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup's 64 rows over all tiles, row `first` and on.

    Rows behind the last token repeat it and are not stored. The last 256 columns of Q lie in q; at head dim 512 the
    128 before them in near_q, and the first in registers, which leaves room for a third stage of keys: 18.0 ms for
    19.3 with two, for 8192 tokens of 32768. keys, values: stages in shared memory, and the barriers that say full
    and free.
    """
    k, k_ready, k_empty = keys
    v, v_ready, v_empty = values
    first_tile, num_tiles, first_key, last_key = tiles
    factor: gl.constexpr = LOG2E * SCALE
    PARTS: gl.constexpr = D // COLS
    dtype: gl.constexpr = q.dtype
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # 16 bytes a thread
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    of_q: gl.constexpr = gl.DotOperandLayout(0, of_scores, 2)
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    of_weight: gl.constexpr = gl.DotOperandLayout(0, of_acc, 2)

    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    token = query_begin + gl.minimum(row // GROUP, query_len - 1)
    head = kv_head * GROUP + row % GROUP
    at = ((token.to(gl.int64) * (KV_HEADS * GROUP) + head) * D)[:, None]
    at += gl.arange(0, BOX, gl.SliceLayout(0, wide))[None, :]
    loaded, near, held_q = (), (), 0
    for block in gl.static_range(COLS // BOX):
        loaded = loaded + (gl.load(q_ptr + at + D - COLS + block * BOX),)
    if PARTS > 1:
        for block in gl.static_range(HELD // BOX):
            near = near + (gl.load(q_ptr + at + HELD + block * BOX),)
        row_held = first + gl.arange(0, ROWS, gl.SliceLayout(1, of_q))
        token_held = query_begin + gl.minimum(row_held // GROUP, query_len - 1)
        held_at = (token_held.to(gl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + row_held % GROUP) * D
        held_q = gl.load(q_ptr + held_at[:, None] + gl.arange(0, HELD, gl.SliceLayout(0, of_q))[None, :])
        for block in gl.static_range(HELD // BOX):
            near_q.slice(block * BOX, BOX, 1).store(near[block])
    for block in gl.static_range(COLS // BOX):
        q.slice(block * BOX, BOX, 1).store(loaded[block])
    fence_async_shared()
    barrier()

    pos = first + gl.arange(0, ROWS, gl.SliceLayout(1, of_scores))
    pos = held + gl.minimum(pos // GROUP, query_len - 1)
    first_pos = held + gl.minimum(first // GROUP, query_len - 1)
    last_pos = held + gl.minimum((first + ROWS - 1) // GROUP, query_len - 1)
    positions = (pos, first_pos, last_pos)
    top = gl.full([ROWS], FLOOR, gl.float32, gl.SliceLayout(1, of_scores))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, of_scores))
    acc = gl.zeros([ROWS, COLS], gl.float32, of_acc)
    key = first_tile * KEYS
    if V_STAGES > 1:
        scores = _start_scores(0, held_q, near_q, q, k, k_ready, PARTS, K_STAGES, of_scores)
        scores = _finish_scores(scores, 0, k_empty, PARTS, K_STAGES, 0)
        weight, top, total, fade = _fold(scores, top, total, key, positions, factor, WINDOW, of_scores)
        weight = gl.convert_layout(weight.to(dtype), of_weight)
        for tile in range(1, num_tiles):
            key += KEYS
            scores = _start_scores(tile * PARTS, held_q, near_q, q, k, k_ready, PARTS, K_STAGES, of_scores)
            acc = _start_values(acc, weight, tile - 1, v, v_ready, V_STAGES)
            scores = _finish_scores(scores, tile * PARTS, k_empty, PARTS, K_STAGES, 1)
            weight, top, total, fade = _fold(scores, top, total, key, positions, factor, WINDOW, of_scores)
            acc = _finish_values(acc, tile - 1, v_empty, V_STAGES)
            acc *= gl.convert_layout(fade, gl.SliceLayout(1, of_acc))[:, None]
            weight = gl.convert_layout(weight.to(dtype), of_weight)
        acc = _start_values(acc, weight, num_tiles - 1, v, v_ready, V_STAGES)
        acc = _finish_values(acc, num_tiles - 1, v_empty, V_STAGES)
    else:
        for tile in range(num_tiles):
            scores = _start_scores(tile * PARTS, held_q, near_q, q, k, k_ready, PARTS, K_STAGES, of_scores)
            scores = _finish_scores(scores, tile * PARTS, k_empty, PARTS, K_STAGES, 0)
            weight, top, total, fade = _fold(scores, top, total, key, positions, factor, WINDOW, of_scores)
            acc *= gl.convert_layout(fade, gl.SliceLayout(1, of_acc))[:, None]
            weight = gl.convert_layout(weight.to(dtype), of_weight)
            acc = _start_values(acc, weight, tile, v, v_ready, V_STAGES)
            acc = _finish_values(acc, tile, v_empty, V_STAGES)
            key += KEYS

    share = gl.convert_layout(gl.full_like(total, 1.0) / total, gl.SliceLayout(1, of_acc))
    # Through the shared memory of Q, which nobody reads any more: straight from the accumulator a store would write
    # 16 bytes a row, and a sliding layer of 8192 tokens take 269 µs for 250.
    q.store((acc * share[:, None]).to(dtype))
    for block in gl.static_range(COLS // BOX):
        result = q.slice(block * BOX, BOX, 1).load(wide)
        gl.store(out_ptr + at + first_col + block * BOX, result, mask=(row < query_len * GROUP)[:, None])


@gluon.jit(do_not_specialize=["first_seq", "max_pages", "query_tiles"])
def _prefill_hopper_kernel(
    q_ptr, k_desc, v_desc, out_ptr, query_start_ptr, kv_len_ptr, pages_ptr, first_seq, max_pages,
    query_tiles, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    WINDOW: gl.constexpr, SCALE: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Row r of a sequence is query head r % GROUP of token r // GROUP."""
    PARTS: gl.constexpr = D // COLS
    program = gl.program_id(0)
    first_col = program % PARTS * COLS
    kv_head = program // PARTS % KV_HEADS
    tile = program // (PARTS * KV_HEADS)
    seq = first_seq + tile // query_tiles
    first_row = (query_tiles - 1 - tile % query_tiles) * (2 * ROWS)  # the last rows see most keys: start them first
    query_begin = gl.load(query_start_ptr + seq)
    query_len = gl.load(query_start_ptr + seq + 1) - query_begin
    held = gl.load(kv_len_ptr + seq) - query_len
    if first_row < query_len * GROUP:
        last_key = held + gl.minimum((first_row + 2 * ROWS - 1) // GROUP, query_len - 1)
        first_key = 0
        if WINDOW > 0:
            first_key = gl.maximum(held + first_row // GROUP - WINDOW + 1, 0)
        first_tile = first_key // KEYS
        num_tiles = last_key // KEYS + 1 - first_tile
        pages_ptr += seq.to(gl.int64) * max_pages

        dtype: gl.constexpr = q_ptr.dtype.element_ty
        shared: gl.constexpr = k_desc.layout
        q_low = gl.allocate_shared_memory(dtype, [ROWS, COLS], shared)
        q_high = gl.allocate_shared_memory(dtype, [ROWS, COLS], shared)
        near_low, near_high = q_low, q_high
        if PARTS > 1:
            near_low = gl.allocate_shared_memory(dtype, [ROWS, HELD], shared)
            near_high = gl.allocate_shared_memory(dtype, [ROWS, HELD], shared)
        k_stages = gl.allocate_shared_memory(dtype, [K_STAGES, KEYS, COLS], shared)
        v_stages = gl.allocate_shared_memory(dtype, [V_STAGES, KEYS, COLS], shared)
        k_ready = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [V_STAGES + LOADERS, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(K_STAGES):
            mbarrier.init(k_ready.index(stage), count=LOADERS)
            mbarrier.init(k_empty.index(stage), count=2)
        for stage in gl.static_range(V_STAGES):
            mbarrier.init(v_ready.index(stage), count=LOADERS)
            mbarrier.init(v_empty.index(stage), count=2)
        for loader in gl.static_range(LOADERS):
            mbarrier.init(v_ready.index(V_STAGES + loader), count=1)
        fence_async_shared()
        tiles = (first_tile, num_tiles, first_key, last_key)
        keys = (k_stages, k_ready, k_empty)
        values = (v_stages, v_ready, v_empty)
        gl.warp_specialize(
            [
                (_attend, (
                    first_row, near_low, q_low, keys, values, q_ptr, out_ptr, query_begin, query_len, held, kv_head,
                    first_col, tiles, KV_HEADS, GROUP, D, WINDOW, SCALE, K_STAGES, V_STAGES,
                )),
                (_attend, (
                    first_row + ROWS, near_high, q_high, keys, values, q_ptr, out_ptr, query_begin, query_len, held,
                    kv_head, first_col, tiles, KV_HEADS, GROUP, D, WINDOW, SCALE, K_STAGES, V_STAGES,
                )),
                (load_pages, (
                    0, k_desc, keys, pages_ptr, kv_head, 0, tiles, KV_HEADS, PAGE, PARTS, K_STAGES, False,
                )),
                (load_pages, (
                    1, k_desc, keys, pages_ptr, kv_head, 0, tiles, KV_HEADS, PAGE, PARTS, K_STAGES, False,
                )),
                (load_pages, (
                    0, v_desc, values, pages_ptr, kv_head, first_col, tiles, KV_HEADS, PAGE, 1, V_STAGES, True,
                )),
                (load_pages, (
                    1, v_desc, values, pages_ptr, kv_head, first_col, tiles, KV_HEADS, PAGE, 1, V_STAGES, True,
                )),
            ],
            [4, 1, 1, 1, 1],
            [232, 40, 40, 40, 40],  # registers a thread; the first warpgroup takes the remaining 232
        )  # fmt: skip


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    kv_len: torch.Tensor,
    pages: torch.Tensor,
    first_seq: int,
    num_seqs: int,
    max_query_len: int,
    window: int | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Arguments as in `launch_prefill`, of sequences that are there."""
    num_kv_heads, page_size, head_dim = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    query_tiles = triton.cdiv(max_query_len * group, 2 * ROWS.value)
    programs = query_tiles * (head_dim // COLS.value) * num_kv_heads * num_seqs
    _prefill_hopper_kernel[(programs,)](
        q, *(boxes(cache, KEYS.value, BOX.value) for cache in (k_cache, v_cache)), out, query_start, kv_len,
        pages, first_seq, pages.shape[1], query_tiles,
        KV_HEADS=num_kv_heads, GROUP=group, D=head_dim, PAGE=page_size, WINDOW=window or 0,
        SCALE=scale, K_STAGES=2 if head_dim == 256 else 3, V_STAGES=512 // head_dim,  # with Q 192 and 224 KiB
        num_warps=4,
        enable_fp_fusion=False,  # copies of the loop's body must not be contracted apart
    )  # fmt: skip
