"""The sum of a token's slots, which are its experts' outputs: each times its weight, in ascending expert id.

Product and sum are rounded to the dtype at each step, as HF's `index_add_` does. Equal ids, which no router makes,
keep slot order. `layer_seam` takes the sum in its registers, so that nobody writes it.

slots: [T, k, H]; ids: [T, k] int32 or int64 in [0, 2^26), which the caller guarantees; weights: [T, k] float32.
All are dense, k is 1 to 32.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.row import load_row


def check_slots(ids: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> None:
    """TypeError, ValueError: unless ids and weights are a sum's for every row of x."""
    for name, given, dtypes in (("ids", ids, (torch.int32, torch.int64)), ("weights", weights, (torch.float32,))):
        if given.dtype not in dtypes or given.device != x.device:
            raise TypeError(f"{name} are {given.dtype} on {given.device}: {dtypes[-1]} on {x.device} is needed")
        dense = given.ndim == 2 and given.is_contiguous() and given.shape == ids.shape
        if not dense or len(given) != len(x) or not 1 <= given.shape[1] <= 32:
            got = f"{name} have shape {tuple(given.shape)}, strides {given.stride()}"
            raise ValueError(f"{got}: [{len(x)}, k] is needed, k from 1 to 32, dense, one weight an id")


def slot_sum_reference(slots: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(slots[:, 0])
    row = torch.arange(len(slots), device=slots.device)
    for slot in ids.sort(dim=-1, stable=True).indices.unbind(-1):
        out += (slots[row, slot] * weights[row, slot, None]).to(out.dtype)
    return out


@triton.jit
def slots_in_order(ids_ptr, weights_ptr, row, TOP_K: tl.constexpr):
    """Where a row's slots stand, in ascending id, and their weights.

    Keys of id and slot, by insertion: every thread sorts all of them, so no thread waits for another.
    """
    UNIT: tl.constexpr = triton.next_power_of_2(TOP_K)
    order = ()
    for i in tl.static_range(TOP_K):
        key = tl.load(ids_ptr + row * TOP_K + i).to(tl.int32) * UNIT + i
        longer = ()
        for j in tl.static_range(i):
            longer += (tl.minimum(order[j], key),)
            key = tl.maximum(order[j], key)
        order = longer + (key,)
    places, weights = (), ()
    for i in tl.static_range(TOP_K):
        places += (row * TOP_K + (order[i] & (UNIT - 1)),)
        weights += (tl.load(weights_ptr + places[i]),)
    return places, weights


@triton.jit
def with_slot(total, slot, weight):
    """A row's sum so far, and one slot's part in it."""
    sums = ()
    for part in tl.static_range(len(slot)):
        y = (slot[part].to(tl.float32) * weight).to(slot[part].dtype)
        sums += ((total[part].to(tl.float32) + y.to(tl.float32)).to(y.dtype),)
    return sums


@triton.jit
def slot_sum(
    slots_ptr, ids_ptr, weights_ptr, row,
    H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, TOP_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A row's sum, as a row in registers. TOGETHER slots are loaded before the first of them is added."""
    places, weights = slots_in_order(ids_ptr, weights_ptr, row, TOP_K)
    total = ()
    for _ in tl.static_range(PARTS):
        total += (tl.zeros([1, PART], slots_ptr.dtype.element_ty),)
    for begin in tl.static_range(0, TOP_K, TOGETHER):
        slots = ()
        for i in tl.static_range(begin, min(begin + TOGETHER, TOP_K)):
            slots += (load_row(slots_ptr + places[i] * H, None, H, PARTS, PART),)
        for i in tl.static_range(len(slots)):
            total = with_slot(total, slots[i], weights[begin + i])
    return total
