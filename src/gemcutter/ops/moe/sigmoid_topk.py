"""Selection of experts by sigmoid: top k of a router's scores with a correction, and their weights without it.

In float: score = sigmoid(logit); the k experts of highest score + correction, equal ones by id; their scores, which
may be divided by their sum + 1e-20; times a scale.
Source: HF `Glm4MoeTopkRouter` with one group of experts. HF's order among equal sums is a device's own. Here it is
that of the ids, and the sum of k scores is halved (first i and i + half, filled up with zeros), on every device.

A NaN among the sums is above all numbers: its expert is chosen, and where weights are divided all are NaN.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import libdevice

from gemcutter.ops.chain import join, release
from gemcutter.ops.library import define
from gemcutter.ops.moe.select_experts import (
    LANES,
    as_ordered,
    at_experts,
    chained_rows,
    check_choice,
    sum_of_lanes,
    take_greatest,
)

LEAST = 1e-20  # added to a sum of scores


def sigmoid_topk(
    logits: torch.Tensor, correction: torch.Tensor, top_k: int, renormalise: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from the router's logits.

    Args:
        logits: [T, E] float32, E up to 1024; dense rows, row stride free. T may be 0.
        correction: [E] float32, dense, on the choice alone.
        top_k: from 1 to E, up to 32.
        renormalise: divide the weights by their sum.
        scale: on the weights.

    Returns:
        ids: [T, top_k] int64, distinct within a row, by descending score + correction.
        weights: [T, top_k] float32.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _sigmoid_topk(logits, correction, top_k, renormalise, scale)


def check_sigmoid_topk(logits, correction, top_k, renormalise, scale) -> None:
    experts = check_choice(logits, top_k)
    for name, x in dict(logits=logits, correction=correction).items():
        if x.dtype != torch.float32 or x.device != logits.device:
            raise TypeError(f"{name} is {x.dtype} on {x.device}: float32 on {logits.device} is needed")
    if correction.shape != (experts,) or not correction.is_contiguous():
        got = f"shape {tuple(correction.shape)}, strides {correction.stride()}"
        raise ValueError(f"correction has {got}: one dense number for each of {experts} experts is needed")


def sigmoid_topk_reference(logits, correction, top_k, renormalise, scale) -> tuple[torch.Tensor, torch.Tensor]:
    return choose(torch.sigmoid(logits), correction, top_k, renormalise, scale)


def choose(scores, correction, top_k, renormalise, scale) -> tuple[torch.Tensor, torch.Tensor]:
    ids = (scores + correction).sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / (_sum_by_halves(weights) + LEAST)
    return ids, weights * scale


def _sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """[T, k] -> [T, 1]"""
    x = F.pad(x, (0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))
    while x.shape[1] > 1:
        low, high = x.chunk(2, 1)
        x = low + high
    return x


@triton.jit
def _sigmoid_topk_kernel(
    logits_ptr, correction_ptr, ids_ptr, weights_ptr, row_stride, least, scale,
    E: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, RENORMALISE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One row a program, on one warp. Part i of the row holds experts 32 i + lane."""
    PARTS: tl.constexpr = (E + LANES - 1) // LANES
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    corrections = ()
    for i in tl.static_range(PARTS):
        corrections += (tl.load(correction_ptr + lane + i * LANES, mask=lane + i * LANES < E, other=0.0),)
    join(CHAINED)
    release(CHAINED)
    scores, left = (), ()
    for i in tl.static_range(PARTS):
        expert = lane + i * LANES
        x = tl.load(logits_ptr + row * row_stride + expert, mask=expert < E, other=0.0)
        # As PyTorch's CUDA kernel has it.
        score = tl.div_rn(tl.full([LANES], 1.0, tl.float32), 1.0 + libdevice.exp(0.0 - x))
        scores += (score,)
        total = score + corrections[i]
        bits = tl.where(total == total, total.to(tl.int32, bitcast=True), 0x7FC00000)  # all NaN are one value
        left += (tl.where(expert < E, as_ordered(bits), -0x80000000),)

    ids = tl.zeros([LANES], tl.int32)
    for place in tl.static_range(TOP_K):
        _, chosen, left = take_greatest(left, lane, -0x80000000, E, PARTS)
        ids = tl.where(lane == place, chosen, ids)
    inside = lane < TOP_K
    weights = tl.where(inside, at_experts(scores, ids, PARTS), 0.0)
    if RENORMALISE:
        weights = tl.div_rn(weights, sum_of_lanes(weights, lane, WIDTH) + least)
    tl.store(ids_ptr + row * TOP_K + lane, ids.to(tl.int64), mask=inside)
    tl.store(weights_ptr + row * TOP_K + lane, weights * scale, mask=inside)


def sigmoid_topk_launch(logits, correction, top_k, renormalise, scale) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, num_experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        _sigmoid_topk_kernel[(tokens,)](
            logits, correction, ids, weights, logits.stride(0), LEAST, scale,
            E=num_experts, TOP_K=top_k, WIDTH=triton.next_power_of_2(top_k), RENORMALISE=renormalise,
            num_warps=1, enable_fp_fusion=False, **chained_rows(logits),
        )  # fmt: skip
    return ids, weights


_sigmoid_topk = define(
    "sigmoid_topk(Tensor logits, Tensor correction, int top_k, bool renormalise, float scale) -> (Tensor, Tensor)",
    check=check_sigmoid_topk, reference=sigmoid_topk_reference, launch=sigmoid_topk_launch,
)  # fmt: skip
