"""Mixture of experts with FP8 weights (W8A8): `experts` of pairs of e4m3 values and scales.

Per slot (token, expert), x quantised by `quantize_fp8`, and an output channel of a weight with a scale of its own:

gate, up = x.q * weight.q summed in float32, * x's scale, * the channel's, each product rounded to float32; bfloat16
activated = activation(gate) * up, as `ops/activation.py` has it; quantised by the same rule, a scale each slot
down = likewise, of what is left of that -> bfloat16

Source: compressed-tensors' float-quantized scheme, channel weights and dynamic tokens; `experts.py` else.
"""

import torch

from gemcutter.ops.activation import REFERENCES, check_activation
from gemcutter.ops.library import define
from gemcutter.ops.linear import linear_reference
from gemcutter.ops.quantize_fp8 import Quantized, check_quantized, quantize_fp8, quantize_fp8_reference
from gemcutter.ops.sort_by_expert import check_sort_by_expert


def experts_fp8(
    x: torch.Tensor | Quantized,
    ids: torch.Tensor,
    gate_up: Quantized,
    down: Quantized,
    settled: bool,
    activation: str,
) -> torch.Tensor:
    """`experts`, which has the contract, where weights are quantised."""
    if not isinstance(x, Quantized):
        if x.dtype != torch.bfloat16:
            raise TypeError(
                f"x is {x.dtype}: FP8 experts take bfloat16 or what `quantize_fp8` makes of rows; cast it"
            )
        x, settled = quantize_fp8(x), False  # made by the kernel just ahead
    return _experts_fp8(*x, ids, *gate_up, *down, settled, activation)


def check_experts_fp8(x, x_scale, ids, gate_up, gate_up_scale, down, down_scale, settled, activation) -> None:
    check_activation(activation)
    if x.ndim != 2 or down.ndim != 3 or not down.numel():
        raise ValueError(
            f"x {tuple(x.shape)}, down {tuple(down.shape)}: x.q [T, H] and down.q [E, H, N] are needed"
        )
    (tokens, hidden), (num_experts, _, width) = x.shape, down.shape
    check_quantized("x", x, x_scale, (tokens, hidden), x.device)
    check_quantized("gate_up", gate_up, gate_up_scale, (num_experts, 2 * width, hidden), x.device)
    check_quantized("down", down, down_scale, (num_experts, hidden, width), x.device)
    check_sort_by_expert(ids, num_experts)
    if len(ids) != tokens or ids.device != x.device or not ids.shape[1]:
        got = f"shape {tuple(ids.shape)} on {ids.device}"
        raise ValueError(f"ids have {got}: some for each of {tokens} tokens on {x.device} are needed")


def experts_fp8_reference(
    x, x_scale, ids, gate_up, gate_up_scale, down, down_scale, settled, activation
) -> torch.Tensor:
    out = experts_fp8_fake(x, x_scale, ids, gate_up, gate_up_scale, down, down_scale, settled, activation)
    for expert in ids.unique().tolist():
        slot, token = torch.where(ids.T == expert)
        both = _product(x[token], x_scale[token], gate_up[expert], gate_up_scale[expert])
        activated, scale = quantize_fp8_reference(REFERENCES[activation](both))
        out[token, slot] = _product(activated, scale, down[expert], down_scale[expert])
    return out


def _product(x, x_scale, weight, weight_scale) -> torch.Tensor:
    sums = linear_reference(x.float(), weight.float())
    return (sums * x_scale * weight_scale.T).to(torch.bfloat16)


def experts_fp8_fake(
    x, x_scale, ids, gate_up, gate_up_scale, down, down_scale, settled, activation
) -> torch.Tensor:
    return x.new_empty(*ids.shape, x.shape[1], dtype=torch.bfloat16)


_experts_fp8 = define(
    "experts_fp8(Tensor x, Tensor x_scale, Tensor ids, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
    "Tensor down_scale, bool settled, str activation) -> Tensor",
    check=check_experts_fp8, reference=experts_fp8_reference, launch=experts_fp8_reference, fake=experts_fp8_fake,
)  # fmt: skip
