"""Causal attention of a step's queries over the paged KV cache, full or windowed, without a soft cap."""

import torch

from gemcutter.batch import StepBatch
from gemcutter.ops.attention.attend_decode import launch_decode
from gemcutter.ops.attention.attend_prefill import launch_prefill
from gemcutter.ops.attention.kv_fp8 import kv_from_fp8

REFERENCE_QUERIES = 16  # scored together by the reference


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: StepBatch,
    pages: torch.Tensor,
    window: int | None,
    scale: float = 1.0,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every query token over its own sequence, this step's keys included.

    Token t of sequence i stands at position kv_len[i] - query_len[i] + t. It sees key j iff j <= position
    and, under a window, position - j < window.

    Args:
        q: [T, num_heads, D], normed and roped.
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, D] of q's dtype, or float8_e4m3fn with kv_scales;
            this step's K/V already written.
        batch: query_start, kv_len and the three bounds are read. Its first num_decodes sequences have one
            query token each, max_query_len bounds the others.
        pages: [S, max_pages] int32, of this layer's kind. What no query sees is never read as data: freed
            pages, the dump and the tail of the last page may hold NaN.
        window: tokens visible to a query, itself included; None sees all.
        scale: of the scores: 1 in Gemma 4, whose head norms stand in for it.
        kv_scales: [2, num_kv_heads] float32, powers of two: what an element of the keys and of the values in an FP8
            cache is to be multiplied with (`kv_fp8.py`).

    On Hopper a decode reads `batch`, `pages`, and keys and values older than the step (a sequence's below
    kv_len - T), before the kernels ahead of it are done. They must be settled, as `ops/chain.py` has it: written by
    an earlier step, or by PyTorch's copies ahead of this step's first op. No op of the step may write them.

    Returns:
        [T, num_heads, D] of q's dtype. A row's bits depend on its own sequence, and on a GPU on whether it is
        decoded or prefilled (the two kernels sum in different orders), never on the chunk or the rest of the
        batch. A sequence with kv_len 0 (a padded row of a CUDA graph) gets zeros.
    """
    num_heads, num_kv_heads, page_size = q.shape[1], k_cache.shape[1], k_cache.shape[2]
    fits = q.dtype if kv_scales is None else torch.float8_e4m3fn
    assert k_cache.dtype == v_cache.dtype == fits, f"the cache is {k_cache.dtype}, {fits} is needed"
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not divide over {num_kv_heads}"
    table = pages.shape[1] * page_size
    assert batch.max_kv_len <= table, f"{batch.max_kv_len} keys, but the page table ends at {table}"
    if not q.is_cuda:
        return attend_reference(q, k_cache, v_cache, batch, pages, window, scale, kv_scales)
    out = torch.empty_like(q)
    launch_decode(q, k_cache, v_cache, kv_scales, batch.kv_len, pages, batch.num_decodes, window, scale, out)
    launch_prefill(
        q, k_cache, v_cache, kv_scales, batch.query_start, batch.kv_len, pages,
        batch.num_decodes, batch.max_query_len, batch.max_kv_len, window, scale, out,
    )  # fmt: skip
    return out


def attend_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: StepBatch,
    pages: torch.Tensor,
    window: int | None,
    scale: float = 1.0,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """HF's `eager_attention_forward`, REFERENCE_QUERIES positions at a time; any device.

    Scores, scaled scores and probabilities are rounded to q's dtype, the softmax is fp32. The blocks begin at
    multiples of REFERENCE_QUERIES in the sequence and are always whole: queries of other steps, and keys that no
    query sees, are zeros. Each product then has a shape and a place in it that follow from the query's position
    alone, and so have its bits, for a library's matrix product may sum in another order for another shape. Nothing
    but keys that a query of the step sees is gathered; of an FP8 cache what it stands for, which q's dtype holds.
    """
    out = torch.zeros_like(q)
    starts, lengths = batch.query_start.tolist(), batch.kv_len.tolist()
    for i, held in enumerate(lengths):
        if held == 0:
            continue
        first = held - (starts[i + 1] - starts[i])  # position of the sequence's first query
        begin, end = (
            first // REFERENCE_QUERIES * REFERENCE_QUERIES,
            -(-held // REFERENCE_QUERIES) * REFERENCE_QUERIES,
        )
        queries = q.new_zeros(end - begin, *q.shape[1:])
        queries[first - begin : held - begin] = q[starts[i] : starts[i + 1]]
        oldest, seen = _oldest_visible(begin, window), _oldest_visible(first, window)
        k, v = (
            _gather(cache, of_cache, pages[i], oldest, seen, held, end, q.dtype)
            for cache, of_cache in zip(
                (k_cache, v_cache), (None, None) if kv_scales is None else kv_scales, strict=True
            )
        )
        mixed = []
        for block in range(begin, end, REFERENCE_QUERIES):
            rows = slice(block - begin, block - begin + REFERENCE_QUERIES)
            keys = slice(_oldest_visible(block, window) - oldest, block + REFERENCE_QUERIES - oldest)
            mixed.append(_attend_block(queries[rows], k[:, keys], v[:, keys], window, scale))
        out[starts[i] : starts[i + 1]] = torch.cat(mixed)[first - begin : held - begin]
    return out


def _oldest_visible(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _gather(
    cache: torch.Tensor,
    kv_scale: torch.Tensor | None,
    pages: torch.Tensor,
    oldest: int,
    seen: int,
    held: int,
    end: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Keys or values oldest : end of one sequence, [num_kv_heads, end - oldest, D]; zeros but for seen : held."""
    page_size = cache.shape[2]
    first = seen // page_size
    some = cache[pages[first : -(-held // page_size)].long()]  # [n, num_kv_heads, page_size, D]
    some = some.transpose(0, 1).flatten(1, 2)
    if kv_scale is not None:
        some = kv_from_fp8(some, kv_scale, dtype)
    out = some.new_zeros(cache.shape[1], end - oldest, cache.shape[3])
    out[:, seen - oldest : held - oldest] = some[:, seen - first * page_size : held - first * page_size]
    return out


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float
) -> torch.Tensor:
    """Queries over keys; the last of both stand at the same position.

    q: [t, num_heads, D]; k, v: [num_kv_heads, n, D].
    """
    t, n = len(q), k.shape[1]
    group = q.shape[1] // k.shape[0]
    grouped = q.unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)  # [num_kv_heads, group * t, D]
    scores = torch.matmul(grouped, k.transpose(1, 2))
    if scale != 1.0:
        scores *= scale
    every = torch.ones(t, n, dtype=torch.bool, device=q.device)
    hidden = every.triu(n - t + 1)  # keys behind the query
    if window is not None:
        hidden |= every.tril(n - t - window)
    scores.unflatten(1, (group, t)).masked_fill_(hidden, float("-inf"))
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    mixed = torch.matmul(probs, v)
    return mixed.unflatten(1, (group, t)).permute(2, 0, 1, 3).flatten(1, 2)
