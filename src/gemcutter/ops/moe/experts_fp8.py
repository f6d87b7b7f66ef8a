"""Mixture of experts with FP8 weights (W8A8): `experts` of pairs of e4m3 values and scales.

Per slot (token, expert), an output channel of a weight with a scale of its own:

x = quantize_fp8(x), where it is no pair yet
gate, up = x.q * weight.q summed in float32, * x's scale, * the channel's, each product rounded to float32; to x's
    dtype, bfloat16 of a pair
activated = activation(gate) * up, as `activation.py` has it; quantised by the same rule, a scale each slot
down = likewise, of what is left of that

Source: compressed-tensors' float-quantized scheme, channel weights and dynamic tokens; `experts.py` else.

On a GPU the same three kinds of kernels as of halves, by the same plan. On Hopper a sum is one chain of wgmma's
whatever the tile (docs/kernels.md, "Products in FP8"), so that a row's bits are its own there too.
"""

import torch

from gemcutter.ops.activations.activation import REFERENCES, check_activation
from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.library import define
from gemcutter.ops.linears.linear_fp8 import dtype_of
from gemcutter.ops.moe.expert_slots import expert_slots
from gemcutter.ops.moe.experts_tiles import plan_for
from gemcutter.ops.moe.sort_by_expert import check_sort_by_expert
from gemcutter.ops.quantize_fp8 import (
    Quantized,
    check_quantized,
    check_quantized_width,
    pair_of,
    quantize_fp8_launch,
    quantize_fp8_reference,
)
from gemcutter.ops.row_blocks import linear_in_blocks


def experts_fp8(
    x: torch.Tensor | Quantized,
    ids: torch.Tensor,
    gate_up: Quantized,
    down: Quantized,
    settled: bool,
    activation: str,
) -> torch.Tensor:
    """`experts`, which has the contract, where weights are quantised."""
    return _experts_fp8(*pair_of(x), ids, *gate_up, *down, settled, activation)


def check_experts_fp8(x, x_scale, ids, gate_up, gate_up_scale, down, down_scale, settled, activation) -> None:
    check_activation(activation)
    if x.ndim != 2 or down.ndim != 3 or not down.numel():
        got = f"x {tuple(x.shape)}, down {tuple(down.shape)}"
        raise ValueError(f"{got}: rows of x [T, H] and down's q [E, H, N] are needed")
    (tokens, hidden), (num_experts, _, width) = x.shape, down.shape
    if x_scale is None:
        check_matrix("x", x)
        check_quantized_width("x", hidden)
    else:
        check_quantized("x", x, x_scale, (tokens, hidden), x.device)
    check_quantized_width("gate_up", width)
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
    q, scale = (x, x_scale) if x_scale is not None else quantize_fp8_reference(x)
    for expert in ids.unique().tolist():
        slot, token = torch.where(ids.T == expert)
        both = _product(q[token], scale[token], gate_up[expert], gate_up_scale[expert], out.dtype)
        activated = quantize_fp8_reference(REFERENCES[activation](both))
        out[token, slot] = _product(*activated, down[expert], down_scale[expert], out.dtype)
    return out


def _product(q, scale, weight, weight_scale, dtype: torch.dtype) -> torch.Tensor:
    return (linear_in_blocks(q.float(), weight.float()) * scale * weight_scale.T).to(dtype)


def experts_fp8_launch(
    x, x_scale, ids, gate_up, gate_up_scale, down, down_scale, settled, activation
) -> torch.Tensor:
    (tokens, top_k), dtype = ids.shape, dtype_of(x)
    if tokens == 0:
        return experts_fp8_fake(x, x_scale, ids, gate_up, gate_up_scale, down, down_scale, settled, activation)
    if x_scale is None:
        x, x_scale = quantize_fp8_launch(x)
        settled = False  # by the kernel just ahead
    pairs = Quantized(x, x_scale), ids, Quantized(gate_up, gate_up_scale), Quantized(down, down_scale)
    slots = expert_slots(plan_for(x, top_k, gate_up, down), *pairs, settled, activation, dtype)
    return slots.view(tokens, top_k, x.shape[1])


def experts_fp8_fake(
    x, x_scale, ids, gate_up, gate_up_scale, down, down_scale, settled, activation
) -> torch.Tensor:
    return x.new_empty(*ids.shape, x.shape[1], dtype=dtype_of(x))


_experts_fp8 = define(
    "experts_fp8(Tensor x, Tensor? x_scale, Tensor ids, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
    "Tensor down_scale, bool settled, str activation) -> Tensor",
    check=check_experts_fp8, reference=experts_fp8_reference, launch=experts_fp8_launch, fake=experts_fp8_fake,
)  # fmt: skip
