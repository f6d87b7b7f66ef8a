"""Decode attention on Hopper, in Gluon: pages come by TMA, those of earlier steps before the chain is joined.

Splits, partials and their order are those of `attend_decode.py`, whose kernels serve other cards and dtypes. While
the kernels ahead norm and rotate this step's query, the keys and values of earlier steps are already under way
(`attend.py` says what a caller owes them). The merge takes 16 partials at a time, all whose loads are under way
together.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.attention.kv_fp8_hopper import apart, halves, keys_of
from gemcutter.ops.attention.load_pages import as_words, boxes, pages_by_tma
from gemcutter.ops.hopper import PROCESSORS, load_tile

LOG2E = gl.constexpr(1.4426950408889634)
FLOOR = gl.constexpr(-1e30)  # as in online_softmax.py
SOME = gl.constexpr(16)  # partials merged at a time
MERGED_DIMS = 64  # of a program of the merge, one warp


@gluon.jit
def _boxes(
    pages_ptr, start, kv_len, kv_head,
    KV_HEADS: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Where in the cache the tile's boxes of keys begin; pages past the last are read at the last."""
    last = (kv_len - 1) // PAGE
    rows = ()
    for i in gl.static_range(BLOCK_N // BOX):
        at = start + i * BOX
        page = gl.load(pages_ptr + gl.minimum(at // PAGE, last))
        rows += ((page * KV_HEADS + kv_head) * PAGE + at % PAGE,)
    return rows


@gluon.jit
def _num_slots(kv_len, slots, WINDOW: gl.constexpr, SPLIT: gl.constexpr):
    """The oldest visible key, the split it lies in, the splits from there on, and the partials they go into."""
    first_key = gl.maximum(kv_len - WINDOW, 0) if WINDOW > 0 else 0
    first_split = first_key // SPLIT
    num_splits = (kv_len + SPLIT - 1) // SPLIT - first_split
    return first_key, first_split, num_splits, gl.minimum(num_splits, slots)


@gluon.jit
def _begin_of(slot, tile, slots, first_split, SPLIT: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first key of a slot's tile."""
    TILES: gl.constexpr = SPLIT // BLOCK_N
    return (first_split + slot + tile // TILES * slots) * SPLIT + tile % TILES * BLOCK_N


@gluon.jit(do_not_specialize=["max_pages", "slots", "tokens"])
def _partial_hopper_kernel(
    q_ptr, k_desc, v_desc, kv_scales_ptr, kv_len_ptr, pages_ptr, part_ptr, top_ptr, total_ptr, max_pages, slots,
    tokens,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, WINDOW: gl.constexpr,
    SCALE: gl.constexpr, SPLIT: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Program (worker, kv head, sequence): partials worker, worker + workers, ... of the kv head's group."""
    gdc_launch_dependents()
    FP8: gl.constexpr = kv_scales_ptr is not None
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    WIDTH: gl.constexpr = D // 2 if FP8 else D  # of a key, in elements of 16 bits
    WARPS: gl.constexpr = gl.num_warps()
    BOX: gl.constexpr = PAGE if PAGE < BLOCK_N else BLOCK_N
    BYTES: gl.constexpr = BLOCK_N * WIDTH * 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)

    ALONG: gl.constexpr = 16 if FP8 else 8
    ACROSS: gl.constexpr = D // ALONG if D < 32 * ALONG else 32
    by_row: gl.constexpr = gl.BlockedLayout([1, ALONG], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, by_row))[:, None]
    dims = gl.arange(0, D, gl.SliceLayout(0, by_row))[None, :]

    kv_head = gl.program_id(1)
    seq = gl.program_id(2).to(gl.int64)
    kv_len = gl.load(kv_len_ptr + seq)
    first_key, first_split, num_splits, num_slots = _num_slots(kv_len, slots, WINDOW, SPLIT)
    pages_ptr += seq * max_pages
    if FP8:
        k_scale, v_scale = gl.load(kv_scales_ptr + kv_head), gl.load(kv_scales_ptr + KV_HEADS + kv_head)
    head = (seq * KV_HEADS + kv_head) * GROUP  # of all sequences' heads

    if gl.program_id(0) < num_slots:
        k_stages = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, WIDTH], k_desc.layout)
        v_stages = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, WIDTH], v_desc.layout)
        q_shared = gl.allocate_shared_memory(dtype, [ROWS, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(i), count=1)
            mbarrier.init(v_ready.index(i), count=1)
        fence_async_shared()

        # A step of so many tokens wrote so many keys of a sequence at most; the others are older.
        old = gl.maximum(kv_len - tokens, 0)
        done = 0  # tiles
        for slot in range(gl.program_id(0), num_slots, gl.num_programs(0)):
            # The slot's splits as one run of tiles, so that loads stay in flight from one split to the next.
            rounds = (num_splits - 1 - slot) // slots  # splits of this slot before its last
            last_begin = (first_split + slot + rounds * slots) * SPLIT
            tiles = rounds * (SPLIT // BLOCK_N) + (gl.minimum(kv_len - last_begin, SPLIT) + BLOCK_N - 1) // BLOCK_N
            rows = ()
            for i in gl.static_range(STAGES):
                begin = _begin_of(slot, i, slots, first_split, SPLIT, BLOCK_N)
                rows += (_boxes(pages_ptr, begin, kv_len, kv_head, KV_HEADS, PAGE, BLOCK_N, BOX),)
            for i in gl.static_range(STAGES):
                stage = (done + i) % STAGES
                begin = _begin_of(slot, i, slots, first_split, SPLIT, BLOCK_N)
                mbarrier.expect(k_ready.index(stage), BYTES, pred=i < tiles)
                mbarrier.expect(v_ready.index(stage), BYTES, pred=i < tiles)
                for j in gl.static_range(BLOCK_N // BOX):
                    is_old = (i < tiles) & (gl.minimum(begin + j * BOX + BOX, kv_len) <= old)
                    k_box, v_box = (
                        k_stages.index(stage).slice(j * BOX, BOX),
                        v_stages.index(stage).slice(j * BOX, BOX),
                    )
                    load_tile(k_desc, [rows[i][j], 0], k_ready.index(stage), k_box, pred=is_old)
                    load_tile(v_desc, [rows[i][j], 0], v_ready.index(stage), v_box, pred=is_old)
            gdc_wait()
            q = gl.load(q_ptr + (head + row) * D + dims, mask=row < GROUP, other=0.0)
            for i in gl.static_range(STAGES):
                stage = (done + i) % STAGES
                begin = _begin_of(slot, i, slots, first_split, SPLIT, BLOCK_N)
                if (i < tiles) & (gl.minimum(begin + BLOCK_N, kv_len) > old):
                    for j in gl.static_range(BLOCK_N // BOX):
                        is_new = gl.minimum(begin + j * BOX + BOX, kv_len) > old
                        k_box, v_box = (
                            k_stages.index(stage).slice(j * BOX, BOX),
                            v_stages.index(stage).slice(j * BOX, BOX),
                        )
                        load_tile(k_desc, [rows[i][j], 0], k_ready.index(stage), k_box, pred=is_new)
                        load_tile(v_desc, [rows[i][j], 0], v_ready.index(stage), v_box, pred=is_new)
            old = kv_len  # all that is read from here on is there
            q_shared.store(apart(q) if FP8 else q)

            acc = gl.zeros([ROWS, WIDTH], gl.float32, mma)
            odd = acc
            top = gl.full([ROWS], FLOOR, gl.float32, gl.SliceLayout(1, mma))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, mma))
            for tile in range(0, tiles):
                stage = done % STAGES
                phase = (done // STAGES) & 1
                begin = _begin_of(slot, tile, slots, first_split, SPLIT, BLOCK_N)
                more = tile + STAGES < tiles
                next_begin = _begin_of(slot, tile + STAGES, slots, first_split, SPLIT, BLOCK_N)
                at = _boxes(pages_ptr, next_begin, kv_len, kv_head, KV_HEADS, PAGE, BLOCK_N, BOX)

                mbarrier.wait(k_ready.index(stage), phase)
                k = k_stages.index(stage).permute((1, 0)).load(right)
                if FP8:
                    k = keys_of(k, right)
                scores = mma_v2(q_shared.load(left), k, gl.zeros([ROWS, BLOCK_N], gl.float32, mma))
                if FP8:
                    scores *= k_scale
                if more:
                    mbarrier.expect(k_ready.index(stage), BYTES)
                    for j in gl.static_range(BLOCK_N // BOX):
                        box = k_stages.index(stage).slice(j * BOX, BOX)
                        load_tile(k_desc, [at[j], 0], k_ready.index(stage), box)
                key = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma))
                scores = gl.where(((key >= first_key) & (key < kv_len))[None, :], scores, float("-inf"))
                new_top = gl.maximum(top, gl.max(scores, 1))
                weight = gl.exp2((scores - new_top[:, None]) * (LOG2E * SCALE))
                fade = gl.exp2((top - new_top) * (LOG2E * SCALE))
                total = total * fade + gl.sum(weight, 1)
                top = new_top

                weight = gl.convert_layout(weight.to(dtype), left)
                mbarrier.wait(v_ready.index(stage), phase)
                v = v_stages.index(stage).load(right)
                if FP8:
                    v, v_odd = halves(v)
                    odd = mma_v2(weight, v_odd, odd * fade[:, None])
                elif (begin < first_key) | (begin + BLOCK_N > kv_len):
                    # Freed pages and the tail of the last one may hold NaN; hidden scores are replaced above.
                    of_v = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(1, right))
                    v = gl.where(((of_v >= first_key) & (of_v < kv_len))[:, None], v, 0.0)
                acc = mma_v2(weight, v, acc * fade[:, None])
                if more:
                    mbarrier.expect(v_ready.index(stage), BYTES)
                    for j in gl.static_range(BLOCK_N // BOX):
                        box = v_stages.index(stage).slice(j * BOX, BOX)
                        load_tile(v_desc, [at[j], 0], v_ready.index(stage), box)
                done += 1
            member = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
            place = (head + member) * slots + slot
            dim = gl.arange(0, WIDTH, gl.SliceLayout(0, mma)) * (D // WIDTH)
            at = part_ptr + place[:, None] * D + dim[None, :]
            if FP8:
                gl.store(at + 1, odd * v_scale, mask=(member < GROUP)[:, None])
                acc *= v_scale
            gl.store(at, acc, mask=(member < GROUP)[:, None])
            gl.store(top_ptr + place, top, mask=member < GROUP)
            gl.store(total_ptr + place, total, mask=member < GROUP)
    else:
        gdc_wait()


@gluon.jit(do_not_specialize=["slots"])
def _merge_hopper_kernel(
    kv_len_ptr, part_ptr, top_ptr, total_ptr, out_ptr, slots,
    HEADS: gl.constexpr, D: gl.constexpr, DIMS: gl.constexpr, WINDOW: gl.constexpr, SCALE: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Program (sequence, head, DIMS dims), a warp: the partials' weighted mean, SOME a time in ascending slot."""
    gdc_launch_dependents()
    seq = gl.program_id(0).to(gl.int64)
    head = seq * HEADS + gl.program_id(1)
    num_slots = _num_slots(gl.load(kv_len_ptr + seq), slots, WINDOW, SPLIT)[3]
    layout: gl.constexpr = gl.BlockedLayout([SOME, DIMS // 32], [1, 32], [1, 1], [1, 0])  # a column a thread
    some = gl.arange(0, SOME, gl.SliceLayout(1, layout))
    dims = gl.program_id(2) * DIMS + gl.arange(0, DIMS, gl.SliceLayout(0, layout))
    gdc_wait()
    highest, total = FLOOR, 0.0
    acc = gl.zeros([DIMS], gl.float32, gl.SliceLayout(0, layout))
    for begin in range(0, num_slots, SOME):
        held = begin + some < num_slots
        at = head * slots + begin + some
        tops = gl.load(top_ptr + at, mask=held, other=FLOOR)
        totals = gl.load(total_ptr + at, mask=held, other=0.0)
        parts = gl.load(part_ptr + at[:, None] * D + dims[None, :], mask=held[:, None], other=0.0)
        before = highest
        highest = gl.maximum(highest, gl.max(tops, 0))
        fade = gl.exp2((before - highest) * (LOG2E * SCALE))
        share = gl.exp2((tops - highest) * (LOG2E * SCALE))
        total = total * fade + gl.sum(share * totals, 0)
        acc = acc * fade + gl.sum(parts * share[:, None], 0)
    mean = gl.where(num_slots > 0, acc / total, 0.0)
    gl.store(out_ptr + head * D + dims, mean.to(out_ptr.dtype.element_ty))


def takes_cache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Whether these kernels do: 64 columns of 16 bits fill the swizzle of shared memory."""
    return as_words(k_cache).shape[3] >= 64 and pages_by_tma(q, k_cache, v_cache)


def hopper_tile(head_dim: int, few: bool) -> tuple[int, int, dict[str, int]]:
    """Keys of a tile, stages, and the most registers of a thread.

    64 KiB of keys and values a stage, 32 in FP8. Few programs, with an SM each, hold a split of 256 dims whole;
    else three share one, and each covers the others' waits: four sequences of 1024 keys take 13 µs so, and 18 with
    two stages.
    """
    block_n, stages = (64, 2) if head_dim <= 256 else (32, 3)
    return (block_n, stages, {}) if few else (block_n, 1, {"maxnreg": 168})


def launch_hopper(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_scales: torch.Tensor | None,
    kv_len: torch.Tensor,
    pages: torch.Tensor,
    window: int | None,
    scale: float,
    out: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    workers: int,
    split: int,
    rows: int,
) -> None:
    """Both kernels, on `launch_decode`'s workspace: partials' sums, tops and totals by sequence, head, slot."""
    num_kv_heads, page_size, head_dim = k_cache.shape[1:]
    num_seqs, num_heads, slots = partials[1].shape
    block_n, stages, registers = hopper_tile(head_dim, workers * num_kv_heads * num_seqs <= PROCESSORS)
    words = as_words(k_cache), as_words(v_cache)
    caches = (boxes(cache, block_n, cache.shape[3]) for cache in words)
    shape = dict(D=head_dim, WINDOW=window or 0, SCALE=scale, SPLIT=split)
    options = dict(launch_pdl=True, enable_fp_fusion=False)
    _partial_hopper_kernel[(workers, num_kv_heads, num_seqs)](
        q, *caches, kv_scales, kv_len, pages, *partials, pages.shape[1], slots, len(q),
        KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, PAGE=page_size,
        ROWS=rows, BLOCK_N=block_n, STAGES=stages, **shape,
        num_warps=4, **options, **registers,
    )  # fmt: skip
    _merge_hopper_kernel[(num_seqs, num_heads, head_dim // MERGED_DIMS)](
        kv_len, *partials, out, slots, HEADS=num_heads, DIMS=MERGED_DIMS, **shape, num_warps=1, **options
    )
