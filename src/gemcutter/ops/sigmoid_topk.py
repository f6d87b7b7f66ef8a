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

from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define

LANES = tl.constexpr(32)
MAX_EXPERTS, MAX_TOP_K = 1024, 32
HALF_WAVE = 2048  # programs of a warp, of which a multiprocessor holds 32
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
    check_matrix("logits", logits)
    experts = logits.shape[1]
    if experts > MAX_EXPERTS:
        raise ValueError(f"logits have {experts} experts: up to {MAX_EXPERTS} are taken")
    if not 1 <= top_k <= min(experts, MAX_TOP_K):
        raise ValueError(f"top_k is {top_k} of {experts} experts: 1 to {min(experts, MAX_TOP_K)} are taken")
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
def _as_ordered(x):
    """Floats as integers that order like them, -0.0 below 0.0; every NaN is the same, above all numbers."""
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
        left += (tl.where(expert < E, _as_ordered(score + corrections[i]), -0x80000000),)

    ids, weights = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.float32)
    for place in tl.static_range(TOP_K):
        best = left[0]
        for i in tl.static_range(1, PARTS):
            best = tl.maximum(best, left[i])
        best = tl.max(best, axis=0)
        candidate = tl.full([LANES], E, tl.int32)
        for i in tl.static_range(PARTS - 1, -1, -1):
            candidate = tl.where(left[i] == best, lane + i * LANES, candidate)
        chosen = tl.min(candidate, axis=0)
        rest = ()
        for i in tl.static_range(PARTS):
            rest += (tl.where(lane + i * LANES == chosen, -0x80000000, left[i]),)
        left = rest
        ids = tl.where(lane == place, chosen, ids)
    for i in tl.static_range(PARTS):
        weights = tl.where(ids // LANES == i, tl.gather(scores[i], ids % LANES, 0), weights)
    inside = lane < TOP_K
    weights = tl.where(inside, weights, 0.0)
    if RENORMALISE:
        total = weights
        for log_distance in tl.static_range(4, -1, -1):
            if (1 << log_distance) < WIDTH:
                total += tl.gather(total, lane ^ (1 << log_distance), 0)
        weights = tl.div_rn(weights, total + least)
    tl.store(ids_ptr + row * TOP_K + lane, ids.to(tl.int64), mask=inside)
    tl.store(weights_ptr + row * TOP_K + lane, weights * scale, mask=inside)


def sigmoid_topk_launch(logits, correction, top_k, renormalise, scale) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, num_experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    # Where two kernels do not fit on the card, the programs that wait for the first one slow it.
    chain = chained(logits) if tokens <= HALF_WAVE else {"CHAINED": False}
    if tokens:
        _sigmoid_topk_kernel[(tokens,)](
            logits, correction, ids, weights, logits.stride(0), LEAST, scale,
            E=num_experts, TOP_K=top_k, WIDTH=triton.next_power_of_2(top_k), RENORMALISE=renormalise,
            num_warps=1, enable_fp_fusion=False, **chain,
        )  # fmt: skip
    return ids, weights


_sigmoid_topk = define(
    "sigmoid_topk(Tensor logits, Tensor correction, int top_k, bool renormalise, float scale) -> (Tensor, Tensor)",
    check=check_sigmoid_topk, reference=sigmoid_topk_reference, launch=sigmoid_topk_launch,
)  # fmt: skip
