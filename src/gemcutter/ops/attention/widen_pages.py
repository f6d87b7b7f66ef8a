"""What prompts see of an FP8 cache, in the model's dtype: a copy in pages of its own, made once a layer and step.

Every tile of queries would else widen the same keys by itself: done by the loading warps of Hopper's kernel, 8192
tokens took 8069 µs in a full layer of 26B-A4B, with a cache in bfloat16 2324.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.attention.kv_fp8 import kv_bytes, kv_load

PAGE_SIZE = 64  # keys; one load by TMA brings a page
TOGETHER = 32768  # keys of one copy, unless one sequence has more: 256 MiB in a sliding layer of 26B-A4B, K and V


@triton.jit(do_not_specialize=["first_seq", "max_pages", "copied", "columns"])
def _widen_kernel(
    k_ptr, v_ptr, kv_scales_ptr, k_copy_ptr, v_copy_ptr, table_ptr, query_start_ptr, kv_len_ptr, pages_ptr,
    first_seq, max_pages, copied, columns, page_stride,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, COPY_PAGE: tl.constexpr,
):  # fmt: skip
    """Program (page of the copy, counted from the oldest in sight; kv head; sequence)."""
    kv_head = tl.program_id(1)
    seq = first_seq + tl.program_id(2)
    kv_len = tl.load(kv_len_ptr + seq)
    first_key = 0
    if WINDOW > 0:
        query_len = tl.load(query_start_ptr + seq + 1) - tl.load(query_start_ptr + seq)
        first_key = tl.maximum(kv_len - query_len - WINDOW + 1, 0)
    logical = first_key // COPY_PAGE + tl.program_id(0)
    if logical * COPY_PAGE >= kv_len:
        return
    page = tl.program_id(2) * copied + tl.program_id(0)
    if kv_head == 0:
        tl.store(table_ptr + seq.to(tl.int64) * columns + logical, page)

    key = logical * COPY_PAGE + tl.arange(0, COPY_PAGE)
    live = tl.minimum(tl.maximum(key, first_key), kv_len - 1)  # pages of other keys may be anybody's
    source = tl.load(pages_ptr + seq.to(tl.int64) * max_pages + live // PAGE).to(tl.int64)
    dims = tl.arange(0, D)[None, :]
    rows = (source * page_stride + (kv_head * PAGE + live % PAGE) * D)[:, None] + dims
    at = (page.to(tl.int64) * KV_HEADS + kv_head) * (COPY_PAGE * D) + tl.arange(0, COPY_PAGE)[:, None] * D + dims
    dtype: tl.constexpr = k_copy_ptr.dtype.element_ty
    k = kv_load(k_ptr + rows, tl.float32) * tl.load(kv_scales_ptr + kv_head)
    tl.store(k_copy_ptr + at, k.to(dtype))
    v = kv_load(v_ptr + rows, tl.float32) * tl.load(kv_scales_ptr + KV_HEADS + kv_head)
    tl.store(v_copy_ptr + at, v.to(dtype))


def copied_pages(max_query_len: int, max_kv_len: int, window: int | None) -> int:
    """Of a sequence, at most: pages of the copy with keys that its queries see."""
    seen = max_kv_len if window is None else min(max_kv_len, window - 1 + max_query_len + PAGE_SIZE)
    return triton.cdiv(seen, PAGE_SIZE)


def sequences_together(copied: int) -> int:
    """How many may share a copy, with so many pages each."""
    return max(1, TOGETHER // (copied * PAGE_SIZE))


def widen_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_scales: torch.Tensor,
    query_start: torch.Tensor,
    kv_len: torch.Tensor,
    pages: torch.Tensor,
    first_seq: int,
    num_seqs: int,
    copied: int,
    max_kv_len: int,
    window: int | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and page table of sequences first_seq : first_seq + num_seqs, each with `copied` pages at most;
    other arguments as in `attend`.

    Returns:
        Two copies [pages, num_kv_heads, PAGE_SIZE, D] of dtype, exact, and [S, columns] int32: where in them lie
        the pages of those sequences with keys that a query sees. Other keys of such a page are finite.
    """
    page_size, head_dim = k_cache.shape[2:]
    shape = (num_seqs * copied, k_cache.shape[1], PAGE_SIZE, head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=k_cache.device) for _ in range(2))
    table = torch.empty(len(kv_len), triton.cdiv(max_kv_len, PAGE_SIZE), dtype=torch.int32, device=k_cache.device)
    _widen_kernel[(copied, k_cache.shape[1], num_seqs)](
        *kv_bytes(k_cache, v_cache), kv_scales, k, v, table, query_start, kv_len, pages, first_seq, pages.shape[1],
        copied, table.shape[1], k_cache.stride(0),
        KV_HEADS=k_cache.shape[1], D=head_dim, PAGE=page_size, WINDOW=window or 0, COPY_PAGE=PAGE_SIZE,
        num_warps=8,
    )  # fmt: skip
    return k, v, table
