"""What PyTorch's CUDA kernels compute, written out for a CPU, where its own arithmetic has other bits.

The CPU's GELU has another tanh and other contractions, its softmax and sums another order, its top-k another rule
for ties, and it divides where a GPU multiplies by the inverse. That these are CUDA's is shown on a GPU, where
verify holds the same kernels to PyTorch itself.
"""

import numpy as np
import torch

from gemcutter.ops.moe.sigmoid_topk import choose
from gemcutter.ops.quantize_fp8 import quantize_fp8_reference
from gemcutter.verify.floats import fma, whole_vectors


def gelu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    x = gate.float()
    inner = 0.7978845608028654 * fma(x * x * x, 0.044715, x)
    return (0.5 * x * (1.0 + whole_vectors(torch.tanh, inner))).to(gate.dtype) * up


def geglu(gate_up: torch.Tensor) -> torch.Tensor:
    return gelu_mul(*gate_up.chunk(2, -1))


def geglu_fp8(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_fp8_reference(geglu(gate_up))


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    x = gate.float()
    return (x / (1.0 + whole_vectors(torch.exp, -x))).to(gate.dtype) * up


def sigmoid_topk(
    logits: torch.Tensor, correction: torch.Tensor, top_k: int, renormalise: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = 1.0 / (1.0 + whole_vectors(torch.exp, -logits))
    return choose(scores, correction, top_k, renormalise, scale)


def softcap_(x: torch.Tensor, cap: float) -> None:
    scaled = (x.float() * (torch.ones(()) / cap)).to(x.dtype).float()
    x.copy_((whole_vectors(torch.tanh, scaled).to(x.dtype).float() * cap).to(x.dtype))


def select_experts(
    logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax, top-k, sum, division and product of HF's router, row by row and thread by thread."""
    shape = len(logits), top_k
    ids, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    scale = per_expert_scale.float().numpy()
    with np.errstate(all="ignore"):
        for i, row in enumerate(logits.float()):
            p = softmax_of_warps(row)
            ids[i] = topk_of_blocks(p, top_k)
            weights[i] = p[ids[i]] / sum_halving(p[ids[i]]) * scale[ids[i]]
    return torch.from_numpy(ids), torch.from_numpy(weights)


def softmax_of_warps(x: torch.Tensor) -> np.ndarray:
    """[E] float32: a warp's lanes take every 32nd expert, then exchange across 16, 8, 4, 2, 1."""
    width = min(1 << (len(x) - 1).bit_length(), 32)
    powers = whole_vectors(torch.exp, x - x.max()).numpy()
    sums = [np.float32(0)] * width
    for i, power in enumerate(powers):
        sums[i % width] += power
    distance = width // 2
    while distance:
        sums = [sums[lane] + sums[lane ^ distance] for lane in range(width)]
        distance //= 2
    return powers / sums[0]


def topk_of_blocks(p: np.ndarray, k: int) -> list[int]:
    """Ids: those above the k-th value by id, then those at it by id, through a bitonic network of 32 places."""
    order = np.where(np.isnan(p), np.float32(np.inf), p)
    last = np.sort(order)[-k]
    ids = [i for i in range(len(p)) if order[i] > last]
    ids += [i for i in range(len(p)) if order[i] == last][: k - len(ids)]
    if k == 1:
        return ids
    places = [(order[i], i, True) for i in ids] + [(np.float32(0), -1, False)] * (32 - k)

    def swap(a: int, b: int, flag: bool) -> None:
        (key_a, _, valid_a), (key_b, _, valid_b) = places[a], places[b]
        if ((key_a > key_b and valid_a) or not valid_b) == flag:
            places[a], places[b] = places[b], places[a]

    size = 2
    while size <= 32:
        stride = size // 2
        while stride:
            for thread in range(16):
                at = 2 * thread - (thread & (stride - 1))
                swap(at, at + stride, size < 32 and thread & (size // 2) != 0)
            stride //= 2
        size *= 2
    return [i for _, i, _ in places[:k]]


def sum_halving(v: np.ndarray) -> np.float32:
    """[k] float32 as `torch.sum` adds it: i and i + the largest power of two, then halves."""
    width = 1 << (len(v).bit_length() - 1)
    sums = [v[i] + v[i + width] if i + width < len(v) else v[i] for i in range(width)]
    while width > 1:
        width //= 2
        sums = [sums[i] + sums[i + width] for i in range(width)]
    return sums[0]
