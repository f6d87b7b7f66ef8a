"""Selection of experts: softmax of a router's logits, its top k, their weights.

In float: softmax over all experts; top k; divided by their sum; times per_expert_scale[id].
Source: HF `Gemma4TextRouter`, whose torch operations the reference is, one by one.

On a GPU one launch returns the bits that PyTorch returns there in a dozen, since an ulp makes or breaks a tie and
so picks another expert. It adds and orders as PyTorch's CUDA kernels do (read in 2.13, for E <= 1024, k <= 32):
- softmax (`PersistentSoftmax.cuh`): lane l of 32 adds exp(x - max) of experts l, l + 32, ... in turn; then lanes
  add up across distances 16, 8, 4, 2, 1. exp is CUDA's expf, the quotient IEEE's.
- top k (`TensorTopK.cu`, `SortUtils.cuh`): of equal probabilities at the last place the lowest ids are chosen.
  Those above the last place by id, then those at it by id, enter a bitonic network of 32 places, which orders
  equal ones by no simple rule.
- sum of the k (`Reduce.cuh`): first i and i + the largest power of two up to k, then halving, which is again
  distances 16, 8, 4, 2, 1 of 32 lanes padded with zeros.

A NaN or inf among the logits, or -inf throughout, makes the row's probabilities NaN: k distinct ids, weights NaN.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from gemcutter.ops.arguments import FLOATS, check_matrix
from gemcutter.ops.library import define

LANES = tl.constexpr(32)
MAX_EXPERTS, MAX_TOP_K = 1024, 32


def select_experts(
    logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from the router's logits.

    Args:
        logits: [T, E] float32, bfloat16 or float16, E up to 1024; dense rows, row stride free. T may be 0.
        per_expert_scale: [E] of any of these dtypes, dense, on the weights.
        top_k: from 1 to E, up to 32.

    Returns:
        ids: [T, top_k] int64, distinct within a row, by descending probability.
        weights: [T, top_k] float32.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _select_experts(logits, per_expert_scale, top_k)


def check_select_experts(logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int) -> None:
    check_matrix("logits", logits)
    experts = logits.shape[1]
    if experts > MAX_EXPERTS:
        raise ValueError(f"logits have {experts} experts: up to {MAX_EXPERTS}, as far as PyTorch's sum is known")
    if not 1 <= top_k <= min(experts, MAX_TOP_K):
        raise ValueError(f"top_k is {top_k} of {experts} experts: 1 to {min(experts, MAX_TOP_K)} are taken")
    if per_expert_scale.dtype not in FLOATS or per_expert_scale.device != logits.device:
        got = f"{per_expert_scale.dtype} on {per_expert_scale.device}"
        raise TypeError(f"per_expert_scale is {got}: a float dtype on {logits.device} is needed")
    if per_expert_scale.shape != (experts,) or not per_expert_scale.is_contiguous():
        got = f"shape {tuple(per_expert_scale.shape)}, strides {per_expert_scale.stride()}"
        raise ValueError(f"per_expert_scale has {got}: one dense scale for each of {experts} experts is needed")


def select_experts_reference(
    logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    weights, ids = torch.topk(probabilities, top_k, -1)
    weights /= weights.sum(-1, keepdim=True)
    return ids, weights * per_expert_scale[ids]


@triton.jit
def _sum_of_lanes(x, lane):
    """Every lane gets the sum of all, added across distances 16, 8, 4, 2, 1."""
    for step in tl.static_range(5):
        x += tl.gather(x, lane ^ (16 >> step), 0)
    return x


@triton.jit
def _rank_as_gathered(key, ids, lane, E: tl.constexpr, TOP_K: tl.constexpr):
    """Reorder keys and ids by id, those equal to the last key behind the others."""
    last = tl.min(tl.where(lane < TOP_K, key, 0x7FFFFFFF), axis=0)
    place = tl.where(lane >= TOP_K, 2 * E + lane, tl.where(key > last, ids, E + ids))
    rank, source = tl.zeros([LANES], tl.int32), lane
    for other in tl.static_range(TOP_K):
        rank += (tl.max(tl.where(lane == other, place, -1), axis=0) < place).to(tl.int32)
    for other in tl.static_range(TOP_K):
        source = tl.where(lane == tl.max(tl.where(lane == other, rank, -1), axis=0), other, source)
    return tl.gather(key, source, 0), tl.gather(ids, source, 0)


@triton.jit
def _sort_as_network(key, ids, lane):
    """Bitonic network, descending: a pair in the wrong order is exchanged, and in descending runs an equal one."""
    for log_size in tl.static_range(1, 6):
        for step in tl.static_range(log_size):
            distance = 1 << (log_size - 1 - step)
            other, other_id = tl.gather(key, lane ^ distance, 0), tl.gather(ids, lane ^ distance, 0)
            is_first = (lane & distance) == 0
            greater = tl.where(is_first, key > other, other > key)
            ascending = (lane & (1 << log_size) & (LANES - 1)) != 0
            exchange = greater == ascending
            key, ids = tl.where(exchange, other, key), tl.where(exchange, other_id, ids)
    return key, ids


@triton.jit
def _select_kernel(
    logits_ptr, scale_ptr, ids_ptr, weights_ptr, row_stride,
    E: tl.constexpr, E_BLOCK: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """One row a program, on one warp."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    expert, lane = tl.arange(0, E_BLOCK), tl.arange(0, LANES)
    x = tl.load(logits_ptr + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)

    # The row once more by lanes, which fixes the order of their sums; it comes from the cache.
    total = tl.zeros([LANES], tl.float32)
    for begin in tl.static_range(0, E_BLOCK, LANES):
        part = tl.load(logits_ptr + begin + lane, mask=begin + lane < E, other=float("-inf")).to(tl.float32)
        total += libdevice.exp(part - top)
    total = tl.max(_sum_of_lanes(total, lane), axis=0)  # equal in all lanes

    # Probabilities are not negative: their bits order like them. All NaN are one value.
    p = tl.div_rn(libdevice.exp(x - top), total)
    left = tl.where(p == p, p.to(tl.int32, bitcast=True), 0x7FC00000)
    left = tl.where(expert < E, left, -1)
    key, ids = tl.full([LANES], -1, tl.int32), tl.zeros([LANES], tl.int32)
    for place in range(TOP_K):
        best = tl.max(left, axis=0)
        chosen = tl.min(tl.where(left == best, expert, E_BLOCK), axis=0)
        left = tl.where(expert == chosen, -1, left)
        key, ids = tl.where(lane == place, best, key), tl.where(lane == place, chosen, ids)

    inside = lane < TOP_K
    if TOP_K > 1:
        follower = tl.gather(key, (lane + 1) % LANES, 0)
        if tl.max(((key == follower) & (lane + 1 < TOP_K)).to(tl.int32), axis=0) > 0:
            key, ids = _rank_as_gathered(key, ids, lane, E, TOP_K)
            key, ids = _sort_as_network(key, ids, lane)

    weight = tl.where(inside, key.to(tl.float32, bitcast=True), 0.0)
    weight = tl.div_rn(weight, _sum_of_lanes(weight, lane))
    scale = tl.load(scale_ptr + ids, mask=inside, other=0.0).to(tl.float32)
    tl.store(ids_ptr + row * TOP_K + lane, ids.to(tl.int64), mask=inside)
    tl.store(weights_ptr + row * TOP_K + lane, weight * scale, mask=inside)


def select_experts_launch(
    logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, num_experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        _select_kernel[(tokens,)](
            logits, per_expert_scale, ids, weights, logits.stride(0),
            E=num_experts, E_BLOCK=max(triton.next_power_of_2(num_experts), LANES.value), TOP_K=top_k,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return ids, weights


_select_experts = define(
    "select_experts(Tensor logits, Tensor per_expert_scale, int top_k) -> (Tensor, Tensor)",
    check=check_select_experts, reference=select_experts_reference, launch=select_experts_launch,
)  # fmt: skip
