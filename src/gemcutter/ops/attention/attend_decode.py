"""Decode attention on a GPU: one query a sequence, its keys split over programs, partial results merged.

Splits are SPLIT keys long and begin at multiples of SPLIT in the sequence. Split s, counted from the first
one in sight, goes into partial s % MAX_SLOTS; a partial folds its splits in ascending order, and the merge
takes the partials in ascending order. So a row's bits depend on its sequence alone, and the launch on no
length that only the GPU knows: a CUDA graph captured at one length replays at any. Hopper has kernels of its own
(`attend_decode_hopper.py`), one query a sequence as here.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.attention.attend_decode_hopper import launch_hopper, takes_cache
from gemcutter.ops.attention.kv_fp8 import kv_bytes, kv_load
from gemcutter.ops.attention.online_softmax import FLOOR, LOG2E, fold
from gemcutter.ops.chain import chained, join, release

SPLIT = 128  # keys; 26B at batch 1 with 8192 keys then keeps 2 kv heads x 64 splits on 132 SMs
MAX_SLOTS = 64  # partials of one sequence and head; fp32, so D x 256 bytes
PROGRAMS = 1056  # wanted in flight, 8 for each of 132 SMs; changes who computes a partial, never its bits
ROWS = 16  # of the query tile: the tensor cores' smallest, and Gemma 4's largest group


@triton.jit
def _key_range(kv_len_ptr, seq, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """kv_len, the oldest visible key, the split it lies in, and the number of splits from that one on."""
    kv_len = tl.load(kv_len_ptr + seq)
    first_key = tl.maximum(kv_len - WINDOW, 0) if WINDOW > 0 else 0
    first_split = first_key // SPLIT
    return kv_len, first_key, first_split, tl.cdiv(kv_len, SPLIT) - first_split


@triton.jit(do_not_specialize=["max_pages", "slots"])
def _partial_kernel(
    q_ptr, k_ptr, v_ptr, kv_scales_ptr, kv_len_ptr, pages_ptr, part_ptr, top_ptr, total_ptr, max_pages, slots,
    page_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (worker, kv head, sequence): partials worker, worker + workers, ... of the kv head's group."""
    release(CHAINED)
    join(CHAINED)
    workers = tl.num_programs(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    kv_len, first_key, first_split, num_splits = _key_range(kv_len_ptr, seq, WINDOW, SPLIT)
    TILES: tl.constexpr = SPLIT // BLOCK_N
    dims = tl.arange(0, D)[None, :]
    row = tl.arange(0, ROWS)
    head = (seq * KV_HEADS + kv_head) * GROUP + row  # of all sequences' heads
    used = row < GROUP
    k_ptr += kv_head * PAGE * D
    v_ptr += kv_head * PAGE * D
    pages_ptr += seq * max_pages
    k_scale, v_scale = 1.0, 1.0
    if kv_scales_ptr is not None:
        k_scale, v_scale = tl.load(kv_scales_ptr + kv_head), tl.load(kv_scales_ptr + KV_HEADS + kv_head)

    for slot in range(tl.program_id(0), tl.minimum(num_splits, slots), workers):
        q = tl.load(q_ptr + head[:, None] * D + dims, mask=used[:, None], other=0.0)
        acc = tl.zeros([ROWS, D], tl.float32)
        top = tl.full([ROWS], FLOOR, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        # The slot's splits as one run of tiles, so that loads stay in flight from one split to the next.
        rounds = (num_splits - 1 - slot) // slots  # splits of this slot before its last
        last_begin = (first_split + slot + rounds * slots) * SPLIT
        tiles = rounds * TILES + tl.cdiv(tl.minimum(kv_len - last_begin, SPLIT), BLOCK_N)
        for tile in range(0, tiles):
            start = (first_split + slot + tile // TILES * slots) * SPLIT + tile % TILES * BLOCK_N
            key = start + tl.arange(0, BLOCK_N)
            # Hidden keys are read at a live one: freed pages and the tail of the last page may hold NaN.
            live = tl.minimum(tl.maximum(key, first_key), kv_len - 1)
            page = tl.load(pages_ptr + live // PAGE).to(tl.int64)
            rows = (page * page_stride + live % PAGE * D)[:, None]
            k = kv_load(k_ptr + rows + dims, q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if kv_scales_ptr is not None:
                scores *= k_scale
            scores = tl.where((key == live)[None, :], scores, float("-inf"))
            acc, top, total = fold(acc, top, total, scores, v_ptr + rows + dims, q.dtype, SCALE, PRECISION)
        at = head * slots + slot
        tl.store(part_ptr + at[:, None] * D + dims, acc * v_scale, mask=used[:, None])
        tl.store(top_ptr + at, top, mask=used)
        tl.store(total_ptr + at, total, mask=used)


@triton.jit(do_not_specialize=["slots"])
def _merge_kernel(
    kv_len_ptr, part_ptr, top_ptr, total_ptr, out_ptr, slots,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, SPLIT: tl.constexpr, MAX_SLOTS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, BLOCK_D dims): the partials' weighted sum, 16 partials at a time."""
    release(CHAINED)
    join(CHAINED)
    seq = tl.program_id(0).to(tl.int64)
    head = seq * HEADS + tl.program_id(1)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    num_splits = _key_range(kv_len_ptr, seq, WINDOW, SPLIT)[3]
    num_slots = tl.minimum(num_splits, slots)
    slot = tl.arange(0, MAX_SLOTS)  # always as wide: the order of the sums must not follow the page table
    tops = tl.load(top_ptr + head * slots + slot, mask=slot < num_slots, other=FLOOR)
    totals = tl.load(total_ptr + head * slots + slot, mask=slot < num_slots, other=0.0)
    highest = tl.max(tops, 0)
    total = tl.sum(tl.exp2((tops - highest) * (LOG2E * SCALE)) * totals, 0)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, num_slots, 16):
        some = begin + tl.arange(0, 16)
        held = some < num_slots
        some_tops = tl.load(top_ptr + head * slots + some, mask=held, other=FLOOR)
        at = (head * slots + some)[:, None] * D + dims[None, :]
        part = tl.load(part_ptr + at, mask=held[:, None], other=0.0)
        acc += tl.sum(part * tl.exp2((some_tops - highest) * (LOG2E * SCALE))[:, None], 0)
    acc = tl.where(num_slots > 0, acc / total, 0.0)
    tl.store(out_ptr + head * D + dims, acc.to(out_ptr.dtype.element_ty))


def decode_tile(dtype: torch.dtype, head_dim: int, num_seqs: int) -> dict[str, int]:
    """Tile and launch sizes: the tile a function of dtype and head_dim only, since it orders a row's sums.

    64 KiB of keys and values a buffer. Few sequences leave an SM with one program, which then holds two buffers;
    many keep three programs on it, and each covers the others' waits. Triton makes (num_stages - 1) / 2 buffers
    here: half the stages go to the page ids that the loads wait for.
    """
    if dtype == torch.float32:  # FMA instead of tensor cores; small, or the unrolled dot spills
        return dict(BLOCK_N=16, num_warps=4, num_stages=1)
    if head_dim <= 128:
        return dict(BLOCK_N=64, num_warps=4, num_stages=5)
    return dict(BLOCK_N=64 if head_dim <= 256 else 32, num_warps=4, num_stages=5 if num_seqs <= 4 else 3)


def launch_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_scales: torch.Tensor | None,
    kv_len: torch.Tensor,
    pages: torch.Tensor,
    num_seqs: int,
    window: int | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of the first num_seqs sequences, one token each, into the first num_seqs rows of `out`.

    Workspace: num_seqs x num_heads x slots x (D + 2) x 4 bytes, slots being at most MAX_SLOTS and at most the
    splits of the page table or of the window. 26B with 64 sequences: 128 MiB in full layers, 9 in windowed
    ones.
    """
    if num_seqs == 0:
        return
    num_kv_heads, page_size, head_dim = k_cache.shape[1:]
    num_heads = q.shape[1]
    group = num_heads // num_kv_heads
    assert group <= ROWS, f"{group} query heads of one KV head; the kernel packs at most {ROWS}"
    assert head_dim & (head_dim - 1) == 0 and 32 <= head_dim <= 512, f"no kernel for head_dim {head_dim}"
    assert all(x.is_contiguous() for x in (q, k_cache, v_cache, pages, out)), "tensors must be dense"
    # Of shapes and window alone. Fewer than MAX_SLOTS only where no sequence can have more splits.
    splits = triton.cdiv(pages.shape[1] * page_size, SPLIT)
    if window is not None:
        splits = min(splits, triton.cdiv(window, SPLIT) + 1)
    slots = min(splits, MAX_SLOTS)
    part = torch.empty(num_seqs, num_heads, slots, head_dim, dtype=torch.float32, device=q.device)
    top = torch.empty(num_seqs, num_heads, slots, dtype=torch.float32, device=q.device)
    total = torch.empty_like(top)
    workers = max(1, min(slots, triton.cdiv(PROGRAMS, num_seqs * num_kv_heads)))
    if takes_cache(q, k_cache, v_cache):
        launch_hopper(
            q,
            k_cache,
            v_cache,
            kv_scales,
            kv_len,
            pages,
            window,
            scale,
            out,
            (part, top, total),
            workers,
            SPLIT,
            ROWS,
        )
        return
    _partial_kernel[(workers, num_kv_heads, num_seqs)](
        q, *kv_bytes(k_cache, v_cache), kv_scales, kv_len, pages, part, top, total, pages.shape[1], slots,
        k_cache.stride(0),
        KV_HEADS=num_kv_heads, GROUP=group, D=head_dim, PAGE=page_size, WINDOW=window or 0,
        SCALE=scale, SPLIT=SPLIT, ROWS=ROWS, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **decode_tile(q.dtype, head_dim, num_seqs), **chained(q),
        enable_fp_fusion=True,  # said outright: the default is an environment variable's
    )  # fmt: skip
    block_d = min(head_dim, 128)
    _merge_kernel[(num_seqs, num_heads, head_dim // block_d)](
        kv_len, part, top, total, out, slots,
        HEADS=num_heads, D=head_dim, BLOCK_D=block_d, WINDOW=window or 0,
        SCALE=scale, SPLIT=SPLIT, MAX_SLOTS=MAX_SLOTS, num_warps=4, enable_fp_fusion=True, **chained(q),
    )  # fmt: skip
