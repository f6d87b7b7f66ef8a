"""Prefill attention on a GPU: flash attention over pages, a KV head's query heads packed into the tile.

Key tiles lie at multiples of BLOCK_N from the sequence's first token, whatever the chunk, and a tile that a
row cannot see leaves its sums as they were: a row's bits depend on its position and its keys, not on chunking
or company. `attend_prefill_hopper.py` does the same on the cards that it is named for.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.attention.attend_prefill_hopper import prefill
from gemcutter.ops.attention.load_pages import loads_pages
from gemcutter.ops.attention.online_softmax import FLOOR, fold
from gemcutter.ops.attention.widen_pages import copied_pages, sequences_together, widen_pages


@triton.jit
def _attend_tiles(
    acc, top, total, q, pos, begin, end, key_first, key_last, k_ptr, v_ptr, pages_ptr, page_stride,
    D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold keys begin : end, in tiles, into the running softmax (acc, top, total) of a query tile.

    Keys outside key_first : key_last + 1 are hidden by the mask. Their loads are clamped to a live key: freed
    pages and the tail of the last page may hold NaN, and 0 * NaN would reach acc.
    """
    dims = tl.arange(0, D)[None, :]
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        live = tl.minimum(tl.maximum(key, key_first), key_last)
        page = tl.load(pages_ptr + live // PAGE).to(tl.int64)
        rows = (page * page_stride + live % PAGE * D)[:, None]
        k = tl.load(k_ptr + rows + dims)
        if BLOCK_M == 64:
            # The branch is always taken. Where it sees a chain of dots, Triton lays all warps along the rows, and
            # both warpgroups would compute the same 64 rows of scores; a dot in a branch shows no chain.
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if start <= key_last:
                scores = tl.dot(q, tl.trans(k))
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = key[None, :] <= pos[:, None]
            if WINDOW > 0:
                seen = seen & (pos[:, None] - key[None, :] < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        acc, top, total = fold(acc, top, total, scores, v_ptr + rows + dims, q.dtype, SCALE, PRECISION)
    return acc, top, total


@triton.jit(do_not_specialize=["first_seq", "max_pages"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, query_start_ptr, kv_len_ptr, pages_ptr, first_seq, max_pages, page_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head, sequence). Row r of a sequence is query head r % GROUP of token r // GROUP."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles see most keys: start them first
    kv_head = tl.program_id(1)
    seq = first_seq + tl.program_id(2)
    query_begin = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_begin
    kv_len = tl.load(kv_len_ptr + seq)
    if tile * BLOCK_M >= query_len * GROUP:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(row // GROUP, query_len - 1)  # rows behind the last token repeat it and are not stored
    pos = kv_len - query_len + token
    first_pos = kv_len - query_len + tile * BLOCK_M // GROUP
    last_pos = kv_len - query_len + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, query_len - 1)

    dims = tl.arange(0, D)[None, :]
    head = kv_head * GROUP + row % GROUP
    at = (((query_begin + token).to(tl.int64) * (KV_HEADS * GROUP) + head) * D)[:, None] + dims
    q = tl.load(q_ptr + at)
    k_ptr += kv_head * PAGE * D
    v_ptr += kv_head * PAGE * D
    pages_ptr += seq.to(tl.int64) * max_pages

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Keys first_key .. last_pos in three runs: cut by a row's window, seen by every row, cut by the diagonal.
    first_key = 0
    clear_end = (first_pos + 1) // BLOCK_N * BLOCK_N
    clear_begin = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_pos - WINDOW + 1, 0)
        clear_begin = tl.cdiv(tl.maximum(last_pos - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        acc, top, total = _attend_tiles(
            acc, top, total, q, pos, first_key // BLOCK_N * BLOCK_N, clear_begin, first_key, last_pos,
            k_ptr, v_ptr, pages_ptr, page_stride, D, PAGE, WINDOW, SCALE, BLOCK_M, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    acc, top, total = _attend_tiles(
        acc, top, total, q, pos, clear_begin, clear_end, first_key, last_pos,
        k_ptr, v_ptr, pages_ptr, page_stride, D, PAGE, WINDOW, SCALE, BLOCK_M, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, top, total = _attend_tiles(
        acc, top, total, q, pos, tl.maximum(clear_begin, clear_end), last_pos + 1, first_key, last_pos,
        k_ptr, v_ptr, pages_ptr, page_stride, D, PAGE, WINDOW, SCALE, BLOCK_M, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, result, mask=(row < query_len * GROUP)[:, None])


def prefill_tile(dtype: torch.dtype, head_dim: int, windowed: bool) -> dict[str, int]:
    """Tile and launch sizes, a function of what a layer knows: the token count must not change bits.

    A query tile, two buffers of key and value tiles and the fp32 accumulator must fit one SM: 227 KiB of
    shared memory and 64 K registers. At D = 256 that is 64 + 2 x 64 KiB and 128 accumulators a thread, as at
    D = 512, where a window's third run of tiles takes 16 KiB more for 32 keys, and would have 232 of 227.
    """
    if dtype == torch.float32:  # FMA instead of tensor cores; small, or the unrolled dot spills
        return dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
    if head_dim <= 256:
        return dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
    return dict(BLOCK_M=64, BLOCK_N=16 if windowed else 32, num_warps=8, num_stages=3)


def launch_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_scales: torch.Tensor | None,
    query_start: torch.Tensor,
    kv_len: torch.Tensor,
    pages: torch.Tensor,
    first_seq: int,
    max_query_len: int,
    max_kv_len: int,
    window: int | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of sequences first_seq onwards into their rows of `out`; arguments as in `attend`."""
    num_seqs = len(kv_len) - first_seq
    if num_seqs <= 0 or max_query_len == 0:
        return
    num_kv_heads, _, head_dim = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    assert head_dim & (head_dim - 1) == 0 and 32 <= head_dim <= 512, f"no kernel for head_dim {head_dim}"
    assert all(x.is_contiguous() for x in (q, k_cache, v_cache, pages, out)), "tensors must be dense"
    copied = copied_pages(max_query_len, max_kv_len, window)
    together = num_seqs if kv_scales is None else sequences_together(copied)
    for first in range(first_seq, len(kv_len), together):
        seqs = min(together, len(kv_len) - first)
        k, v, where = k_cache, v_cache, pages
        if kv_scales is not None:
            k, v, where = widen_pages(
                k_cache, v_cache, kv_scales, query_start, kv_len, pages, first, seqs, copied, max_kv_len,
                window, q.dtype,
            )  # fmt: skip
        if loads_pages(q, k, v):
            prefill(q, k, v, query_start, kv_len, where, first, seqs, max_query_len, window, scale, out)
        else:
            tile = prefill_tile(q.dtype, head_dim, window is not None)
            grid = (triton.cdiv(max_query_len * group, tile["BLOCK_M"]), num_kv_heads, seqs)
            _prefill_kernel[grid](
                q, k, v, out, query_start, kv_len, where, first, where.shape[1], k.stride(0),
                KV_HEADS=num_kv_heads, GROUP=group, D=head_dim, PAGE=k.shape[2], WINDOW=window or 0,
                SCALE=scale, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
                **tile,
                enable_fp_fusion=True,  # said outright: the default is an environment variable's
            )  # fmt: skip
        del k, v, where  # copies, before the next ones need room
