"""Each slot's expert MLP on a GPU, by the kernels and tiles of a plan, in halves or FP8."""

import torch

from gemcutter.ops.activations.activation import Activation
from gemcutter.ops.moe.experts_hopper import grouped_experts
from gemcutter.ops.moe.experts_stream_hopper import stream_experts
from gemcutter.ops.moe.experts_table import Plan
from gemcutter.ops.moe.experts_tiled import tiled_experts
from gemcutter.ops.moe.experts_tiled_fp8 import tiled_experts_fp8
from gemcutter.ops.moe.sort_by_expert import sort_by_expert
from gemcutter.ops.quantize_fp8 import Quantized


def expert_slots(
    plan: Plan,
    x: torch.Tensor | Quantized,
    ids: torch.Tensor,
    gate_up: torch.Tensor | Quantized,
    down: torch.Tensor | Quantized,
    settled: bool,
    activation: str = Activation.GELU_TANH,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[T * k, H], before its weight; x and weights are pairs or none is. Plans do not show in the bits.

    dtype: of the result; None: x's, or bfloat16 of a pair.
    """
    if plan.kernel == "stream":
        return stream_experts(x, ids, gate_up, down, settled, activation, dtype)
    top_k, in_fp8 = ids.shape[1], isinstance(down, Quantized)
    order, starts = sort_by_expert(ids, len(down.q if in_fp8 else down))
    if plan.kernel == "grouped":
        return grouped_experts(x, order, starts, gate_up, down, top_k, activation, dtype)
    tiles = plan.up, plan.down
    if in_fp8:
        return tiled_experts_fp8(x, order, starts, gate_up, down, top_k, tiles, activation, dtype or torch.bfloat16)
    return tiled_experts(x, order, starts, gate_up, down, top_k, tiles, activation)
