"""Sort of (token, expert) slots by expert, as a grouped matrix product wants its rows.

Stable: slots of one expert stay in order, so that a token's place depends on the ids alone. Slot i is the i-th of
the flattened [T, k] ids, which is token i // k.

Up to 4096 slots (decoding) one launch: the key (expert, slot) is unique, and the place of a slot is the number of
smaller keys. That is slots^2 comparisons, 16.8 million at most, spread over the whole GPU without one barrier, and
`starts` is the same count for the keys (expert, 0). Beyond, where the square would grow, two launches: how often
each expert occurs in each chunk of the slots; then each chunk adds up those before it and counts within itself.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define

SPAN = tl.constexpr(4096)  # slots that one launch sorts
MAX_EXPERTS = 1024
_CHUNKS = 128  # at most so many: each reads the counts of all


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


@triton.jit(do_not_specialize=["slots"])
def _rank_kernel(
    ids_ptr, order_ptr, starts_ptr, slots,
    E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Queries: the keys of all slots, then (e, 0) for e to E; the place of each is the number of smaller keys."""
    release(CHAINED)
    join(CHAINED)
    slot = tl.arange(0, KEYS)
    ids = tl.load(ids_ptr + slot, mask=slot < slots, other=E).to(tl.int32)
    key = ids * SPAN + slot  # padding sorts behind every query
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    is_slot = at < slots
    expert = at - slots
    query = tl.load(ids_ptr + at, mask=is_slot, other=0).to(tl.int32) * SPAN + at
    query = tl.where(is_slot, query, expert * SPAN)
    place = tl.sum((key[:, None] < query[None, :]).to(tl.int32), axis=0)
    tl.store(order_ptr + place, at, mask=is_slot)
    tl.store(starts_ptr + expert, place, mask=(expert >= 0) & (expert <= E))


@triton.jit(do_not_specialize=["slots", "chunk"])
def _count_kernel(
    ids_ptr, counts_ptr, slots, chunk,
    E: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """counts[p, e]: slots of expert e in chunk p, which is so many blocks."""
    release(CHAINED)
    join(CHAINED)
    begin = tl.program_id(0) * chunk
    expert = tl.arange(0, E_BLOCK)
    counts = tl.zeros([E_BLOCK], tl.int32)
    for first in range(0, chunk, BLOCK):
        slot = begin + first + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + slot, mask=slot < slots, other=E).to(tl.int32)
        counts += tl.histogram(ids, E_BLOCK, mask=slot < slots)
    tl.store(counts_ptr + tl.program_id(0) * E + expert, counts, mask=expert < E)


@triton.jit(do_not_specialize=["slots", "chunk", "chunks"])
def _place_kernel(
    ids_ptr, counts_ptr, order_ptr, starts_ptr, slots, chunk, chunks,
    E: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program p places the slots of its chunk; the first one writes `starts` as well."""
    release(CHAINED)
    join(CHAINED)
    mine = tl.program_id(0)
    expert = tl.arange(0, E_BLOCK)
    before = tl.zeros([E_BLOCK], tl.int32)
    total = tl.zeros([E_BLOCK], tl.int32)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < chunks)[:, None] & (expert < E)[None, :]
        counts = tl.load(counts_ptr + row[:, None] * E + expert[None, :], mask=inside, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((row < mine)[:, None], counts, 0), axis=0)
    stops = tl.cumsum(total, axis=0)
    if mine == 0:
        tl.store(starts_ptr + expert, stops - total, mask=expert < E)
        tl.store(starts_ptr + E, slots)
    next_place = stops - total + before

    lane = tl.arange(0, BLOCK)
    for first in range(0, chunk, BLOCK):
        slot = mine * chunk + first + lane
        inside = slot < slots
        ids = tl.load(ids_ptr + slot, mask=inside, other=E).to(tl.int32)
        # Lanes ahead with the same expert, of the keys ids * BLOCK + lane: one difference, one comparison. Along
        # axis 0, which a thread adds up by itself.
        ahead = (ids * BLOCK + lane)[:, None] - (ids * BLOCK)[None, :]
        rank = tl.sum((ahead.to(tl.uint32, bitcast=True) < lane.to(tl.uint32)[None, :]).to(tl.int32), axis=0)
        place = tl.gather(next_place, tl.where(inside, ids, 0), 0) + rank
        tl.store(order_ptr + place, slot, mask=inside)
        next_place += tl.histogram(ids, E_BLOCK, mask=inside)


def sort_by_expert_launch(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots = ids.numel()
    order = torch.empty(slots, dtype=torch.int32, device=ids.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    if slots <= SPAN.value:
        keys = 1024 if slots <= 1024 else SPAN.value
        queries = 16
        _rank_kernel[(triton.cdiv(slots + num_experts + 1, queries),)](
            ids, order, starts, slots,
            E=num_experts, QUERIES=queries, KEYS=keys, num_warps=4 if keys == 1024 else 8, **chained(ids),
        )  # fmt: skip
        return order, starts
    block = 256
    chunk = triton.cdiv(triton.cdiv(slots, _CHUNKS), block) * block
    chunks = triton.cdiv(slots, chunk)
    counts = torch.empty(chunks, num_experts, dtype=torch.int32, device=ids.device)
    # A power of two from 16: smaller histograms are not compiled everywhere.
    e_block = max(16, triton.next_power_of_2(num_experts))
    shape = dict(E=num_experts, E_BLOCK=e_block, BLOCK=block, num_warps=8, **chained(ids))
    _count_kernel[(chunks,)](ids, counts, slots, chunk, **shape)
    _place_kernel[(chunks,)](
        ids, counts, order, starts, slots, chunk, chunks, ROWS=max(1, 8192 // e_block), **shape
    )
    return order, starts


_sort_by_expert = define(
    "sort_by_expert(Tensor ids, int num_experts) -> (Tensor, Tensor)",
    check=check_sort_by_expert, reference=sort_by_expert_reference, launch=sort_by_expert_launch,
)  # fmt: skip
