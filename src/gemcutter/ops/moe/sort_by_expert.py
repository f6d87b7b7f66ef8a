"""Sort of (token, expert) slots by expert, as a grouped matrix product wants its rows.

Stable: slots of one expert stay in order, so that a token's place depends on the ids alone. Slot i is the i-th of
the flattened [T, k] ids, which is token i // k.

Up to 1024 slots (decoding) one launch: the key (expert, slot) is unique, and the place of a slot is the number of
smaller keys. That is slots^2 comparisons, a million at most, spread over the whole GPU, and `starts` is the same
count for the keys (expert, 0). Beyond, where the square would grow, three launches: how often each expert occurs in
each block of 128 or 256 slots; these counts added up from block to block; then each block counts within itself.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define

SPAN = tl.constexpr(1024)  # slots that one launch sorts
MAX_EXPERTS = 1024


def sort_by_expert(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group slots by expert.

    Args:
        ids: [T, k] int32 or int64 in [0, num_experts), which the caller guarantees; dense. T may be 0.
        num_experts: E, from 1 to 1024.

    Returns:
        order: [T * k] int32: slots, those of expert e at order[starts[e] : starts[e + 1]], ascending.
        starts: [E + 1] int32.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _sort_by_expert(ids, num_experts)


def check_sort_by_expert(ids: torch.Tensor, num_experts: int) -> None:
    check_ids(ids)
    if not ids.is_contiguous():
        raise ValueError(f"ids have strides {ids.stride()}: they must be dense; call .contiguous()")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}: 1 to {MAX_EXPERTS} are taken")
    if ids.numel() >= 2**31:
        raise ValueError(f"{ids.numel()} slots: order is int32, so fewer than 2^31; sort in parts")


def check_ids(ids: torch.Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids are {ids.dtype}: int32 or int64 is needed; cast them")
    if ids.ndim != 2:
        raise ValueError(f"ids have shape {tuple(ids.shape)}: two dims are needed, tokens and their experts")


def sort_by_expert_reference(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, order = torch.sort(ids.flatten(), stable=True)
    edges = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    return order.to(torch.int32), torch.searchsorted(ids, edges, out_int32=True)


@triton.jit
def _count_smaller(keys, queries):
    """For each query the number of smaller keys, whose differences fit in 32 bits: their signs, added up.

    A comparison takes 2 instructions so, and 2.75 as one. Along axis 0, which a thread adds up by itself.
    """
    sign = (keys[:, None] - queries[None, :]).to(tl.uint32, bitcast=True) >> 31
    return tl.sum(sign.to(tl.int32, bitcast=True), axis=0)


@triton.jit(do_not_specialize=["slots"])
def _rank_kernel(
    ids_ptr, order_ptr, starts_ptr, slots,
    E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Queries: the keys of all slots, then (e, 0) for e to E; the place of each is the number of smaller keys."""
    join(CHAINED)
    release(CHAINED)
    slot = tl.arange(0, KEYS)
    ids = tl.load(ids_ptr + slot, mask=slot < slots, other=E).to(tl.int32)
    key = ids * SPAN + slot  # padding sorts behind every query
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    is_slot = at < slots
    expert = at - slots
    query = tl.load(ids_ptr + at, mask=is_slot, other=0).to(tl.int32) * SPAN + at
    query = tl.where(is_slot, query, expert * SPAN)
    place = _count_smaller(key, query)
    tl.store(order_ptr + place, at, mask=is_slot)
    tl.store(starts_ptr + expert, place, mask=(expert >= 0) & (expert <= E))


@triton.jit(do_not_specialize=["slots"])
def _count_kernel(
    ids_ptr, counts_ptr, slots, E: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr
):  # fmt: skip
    """counts[p, e]: slots of expert e in block p."""
    join(CHAINED)
    release(CHAINED)
    block, expert = tl.program_id(0), tl.arange(0, E_BLOCK)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    counts = tl.histogram(tl.load(ids_ptr + slot, mask=inside, other=0).to(tl.int32), E_BLOCK, mask=inside)
    tl.store(counts_ptr + block.to(tl.int64) * E + expert, counts, mask=expert < E)


@triton.jit(do_not_specialize=["blocks"])
def _scan_kernel(
    counts_ptr, blocks, E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHAINED: tl.constexpr
):  # fmt: skip
    """counts[p, e]: slots of expert e in the blocks ahead of p; in the row behind the last, in all."""
    join(CHAINED)
    release(CHAINED)
    expert = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.int32)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = counts_ptr + row.to(tl.int64) * E + expert[None, :]
        inside = (row < blocks) & (expert < E)[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + tl.cast(blocks, tl.int64) * E + expert, total, mask=expert < E)


@triton.jit(do_not_specialize=["slots", "blocks"])
def _place_kernel(
    ids_ptr, counts_ptr, order_ptr, starts_ptr, slots, blocks,
    E: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program p places the slots of its block; the first one writes `starts` as well.

    The place of a slot: slots of lower experts, those of its own in the blocks ahead and in its own block. The
    number of smaller keys (expert, slot) in its block counts the last, and lower experts' there once more.
    """
    join(CHAINED)
    block, expert, lane = tl.program_id(0), tl.arange(0, E_BLOCK), tl.arange(0, BLOCK)
    slot = block * BLOCK + lane
    inside = slot < slots
    ids = tl.load(ids_ptr + slot, mask=inside, other=E).to(tl.int32)
    row = counts_ptr + block.to(tl.int64) * E + expert
    ahead = tl.load(row, mask=expert < E, other=0)
    here = tl.load(row + E, mask=expert < E, other=0) - ahead
    total = tl.load(counts_ptr + tl.cast(blocks, tl.int64) * E + expert, mask=expert < E, other=0)
    elsewhere = total - here
    start = tl.cumsum(elsewhere, axis=0) - elsewhere + ahead
    key = ids * BLOCK + lane
    place = tl.gather(start, tl.where(inside, ids, 0), 0) + _count_smaller(key, key)
    release(CHAINED)
    tl.store(order_ptr + place, slot, mask=inside)
    if block == 0:
        tl.store(starts_ptr + expert, tl.cumsum(total, axis=0) - total, mask=expert < E)
        tl.store(starts_ptr + E, slots)


def sort_by_expert_launch(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots = ids.numel()
    order = torch.empty(slots, dtype=torch.int32, device=ids.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    chain = chained(ids)
    if slots <= SPAN.value:
        queries = 16
        _rank_kernel[(triton.cdiv(slots + num_experts + 1, queries),)](
            ids, order, starts, slots,
            E=num_experts, QUERIES=queries, KEYS=512 if slots <= 512 else SPAN.value, num_warps=4, **chain,
        )  # fmt: skip
        return order, starts
    block, cols = 128 if num_experts <= 256 else 256, 4
    blocks = triton.cdiv(slots, block)
    counts = torch.empty(blocks + 1, num_experts, dtype=torch.int32, device=ids.device)
    # A power of two from 16: smaller histograms are not compiled everywhere.
    shape = dict(E=num_experts, E_BLOCK=max(16, triton.next_power_of_2(num_experts)), BLOCK=block)
    rows = min(1024, triton.next_power_of_2(blocks))
    _count_kernel[(blocks,)](ids, counts, slots, num_warps=4, **shape, **chain)
    _scan_kernel[(triton.cdiv(num_experts, cols),)](
        counts, blocks, E=num_experts, ROWS=rows, COLS=cols, num_warps=4, **chain
    )
    _place_kernel[(blocks,)](ids, counts, order, starts, slots, blocks, num_warps=block // 32, **shape, **chain)
    return order, starts


_sort_by_expert = define(
    "sort_by_expert(Tensor ids, int num_experts) -> (Tensor, Tensor)",
    check=check_sort_by_expert, reference=sort_by_expert_reference, launch=sort_by_expert_launch,
)  # fmt: skip
