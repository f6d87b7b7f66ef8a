"""Causal attention of a step's queries over the paged KV cache, full or windowed.

Scale 1.0 and no softcap, as in Gemma 4.
"""

import torch

from gemcutter.batch import StepBatch
from gemcutter.ops.attend_decode import launch_decode
from gemcutter.ops.attend_prefill import launch_prefill

REFERENCE_QUERIES = 256  # scored together by the reference: scores are at most 256 x heads x kv_len


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: StepBatch,
    pages: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """Attention of every query token over its own sequence, this step's keys included.

    Token t of sequence i stands at position kv_len[i] - query_len[i] + t. It sees key j iff j <= position
    and, under a window, position - j < window.

    Args:
        q: [T, num_heads, D], normed and roped.
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, D] of q's dtype; this step's K/V already
            written.
        batch: query_start, kv_len and the three bounds are read. Its first num_decodes sequences have one
            query token each, max_query_len bounds the others.
        pages: [S, max_pages] int32, of this layer's kind. What no query sees is never read as data: freed
            pages, the dump and the tail of the last page may hold NaN.
        window: tokens visible to a query, itself included; None sees all.

    Returns:
        [T, num_heads, D] of q's dtype. On a GPU a row's bits depend on its own sequence, and on whether it is
        decoded or prefilled, never on the chunk or the rest of the batch. A sequence with kv_len 0 (a padded
        row of a CUDA graph) gets zeros.
    """
    num_heads, num_kv_heads, page_size = q.shape[1], k_cache.shape[1], k_cache.shape[2]
    assert q.dtype == k_cache.dtype == v_cache.dtype, f"q is {q.dtype}, the cache {k_cache.dtype}"
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not divide over {num_kv_heads}"
    table = pages.shape[1] * page_size
    assert batch.max_kv_len <= table, f"{batch.max_kv_len} keys, but the page table ends at {table}"
    if not q.is_cuda:
        return attend_reference(q, k_cache, v_cache, batch, pages, window)
    out = torch.empty_like(q)
    launch_decode(q, k_cache, v_cache, batch.kv_len, pages, batch.num_decodes, window, out)
    launch_prefill(
        q, k_cache, v_cache, batch.query_start, batch.kv_len, pages,
        batch.num_decodes, batch.max_query_len, window, out,
    )  # fmt: skip
    return out


def attend_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: StepBatch,
    pages: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """HF's `eager_attention_forward`, a sequence at a time; any device.

    Scores and probabilities are rounded to q's dtype, the softmax is fp32. Only keys that a query of the
    block sees are gathered, so nothing else can reach the result.
    """
    out = torch.zeros_like(q)
    starts, lengths = batch.query_start.tolist(), batch.kv_len.tolist()
    for i, held in enumerate(lengths):
        if held == 0:
            continue
        first = held - (starts[i + 1] - starts[i])  # position of the sequence's first query
        oldest = _oldest_visible(first, window)
        k, v = (_gather(cache, pages[i], oldest, held) for cache in (k_cache, v_cache))
        # Blocks end at multiples of REFERENCE_QUERIES in the sequence, wherever its chunk begins.
        begin = first
        while begin < held:
            end = min(held, (begin // REFERENCE_QUERIES + 1) * REFERENCE_QUERIES)
            keys = slice(_oldest_visible(begin, window) - oldest, end - oldest)
            rows = slice(starts[i] + begin - first, starts[i] + end - first)
            out[rows] = _attend_block(q[rows], k[:, keys], v[:, keys], begin, end, window)
            begin = end
    return out


def _oldest_visible(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _gather(cache: torch.Tensor, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Keys or values begin : end of one sequence, [num_kv_heads, end - begin, D]."""
    page_size = cache.shape[2]
    first = begin // page_size
    held = cache[pages[first : -(-end // page_size)].long()]  # [n, num_kv_heads, page_size, D]
    held = held.transpose(0, 1).flatten(1, 2)
    return held[:, begin - first * page_size : end - first * page_size]


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: int, end: int, window: int | None
) -> torch.Tensor:
    """Queries at positions begin : end over n keys, the last of them at end - 1.

    q: [end - begin, num_heads, D]; k, v: [num_kv_heads, n, D].
    """
    t, n = end - begin, k.shape[1]
    group = q.shape[1] // k.shape[0]
    grouped = q.unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)  # [num_kv_heads, group * t, D]
    scores = torch.matmul(grouped, k.transpose(1, 2))
    if t > 1:  # a single query sees every key of the block
        position = torch.arange(begin, end, device=q.device)
        distance = position[:, None] - torch.arange(end - n, end, device=q.device)
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        scores.unflatten(1, (group, t)).masked_fill_(hidden, float("-inf"))
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    mixed = torch.matmul(probs, v)
    return mixed.unflatten(1, (group, t)).permute(2, 0, 1, 3).flatten(1, 2)
