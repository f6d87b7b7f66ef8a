"""Mixture of experts: each token's top k expert MLPs.

Per slot (token, expert): gate, up = linear; gelu_tanh(gate) * up (`geglu.py`) or silu(gate) * up (`swiglu.py`);
down = linear; each rounded to the dtype. Their weighted sum is a seam's (`slot_sum.py`), which reads them but once.
Source: HF `Gemma4TextExperts` with `experts_implementation="eager"`; on a CPU the bits are its bits, were its
products made 16 rows at a time (`ops/linears/linear.py`): a row then does not know how many share its expert.

On a GPU the slots are sorted by expert (`sort_by_expert.py`), a grouped GEMM makes the [slots, N] activations,
a second one the [slots, H] outputs. `experts_tiles.py` chooses by the number of tokens: tiles, or with the same
bits the products of `experts_hopper.py`, or for few tokens those of `experts_stream_hopper.py`, which need no
sort. Grids are bounded by the number of slots alone, so nothing waits for the device and a CUDA graph can hold it
all. A row's bits depend on no other row, nor on how many share its expert: every tile walks K upwards, into one
accumulator a row.
"""

import torch

from gemcutter.ops.activations.activation import REFERENCES, Activation, check_activation
from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.library import define
from gemcutter.ops.linears.linear import linear_reference
from gemcutter.ops.moe.expert_slots import expert_slots
from gemcutter.ops.moe.experts_fp8 import experts_fp8
from gemcutter.ops.moe.experts_tiles import plan_for
from gemcutter.ops.moe.sort_by_expert import check_sort_by_expert
from gemcutter.ops.quantize_fp8 import Quantized


def experts(
    x: torch.Tensor | Quantized,
    ids: torch.Tensor,
    gate_up: torch.Tensor | Quantized,
    down: torch.Tensor | Quantized,
    settled: bool = False,
    activation: Activation = Activation.GELU_TANH,
) -> torch.Tensor:
    """Apply each token's experts.

    Args:
        x: [T, H] of float32, bfloat16 or float16, normed; dense rows, row stride free. T may be 0. For
            quantised weights (`experts_fp8.py`) also its `quantize_fp8`, which gives the same bits.
        ids: [T, k] int32 or int64 in [0, E), which the caller guarantees; dense.
        gate_up: [E, 2N, H] of x's dtype, gate rows then up rows, dense; or a pair, scale [E, 2N, 1].
        down: [E, H, N] of x's dtype, dense; or a pair, scale [E, H, 1], where gate_up is one.
        settled: x and ids are, as `ops/chain.py` has it, and few tokens need not wait for the kernel ahead. Where
            they are not and this says so, the kernels may read what stood there before.
        activation: of the gates.

    Returns:
        [T, k, H] of x's dtype (bfloat16 of a pair), contiguous: a token's experts in the order of its ids, not
        weighted.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    quantized = [isinstance(weight, Quantized) for weight in (gate_up, down)]
    if all(quantized):
        return experts_fp8(x, ids, gate_up, down, settled, activation)
    if any(quantized) or isinstance(x, Quantized):
        kinds = ", ".join(
            f"{name} {type(each).__name__}" for name, each in dict(x=x, gate_up=gate_up, down=down).items()
        )
        raise TypeError(f"{kinds}: quantise both weights or neither, and x only for quantised ones")
    return _experts(x, ids, gate_up, down, settled, activation)


def check_experts(x, ids, gate_up, down, settled, activation) -> None:
    check_activation(activation)
    check_matrix("x", x)
    num_experts, _, width = down.shape if down.ndim == 3 else (0, 0, 0)
    shapes = dict(
        gate_up=(gate_up, (num_experts, 2 * width, x.shape[1])), down=(down, (num_experts, x.shape[1], width))
    )
    for name, (weight, shape) in shapes.items():
        if weight.dtype != x.dtype or weight.device != x.device:
            raise TypeError(f"{name} is {weight.dtype} on {weight.device}: {x.dtype} on {x.device} is needed")
        if weight.shape != shape or not weight.is_contiguous() or not weight.numel():
            got = f"{name} {tuple(weight.shape)}, strides {weight.stride()}"
            raise ValueError(f"{got}: dense gate_up [E, 2N, {x.shape[1]}] and down [E, {x.shape[1]}, N] are needed")
    check_sort_by_expert(ids, num_experts)
    if len(ids) != len(x) or ids.device != x.device or not ids.shape[1]:
        got = f"shape {tuple(ids.shape)} on {ids.device}"
        raise ValueError(f"ids have {got}: some for each of {len(x)} tokens on {x.device} are needed")


def experts_reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    settled: bool = False,
    activation: str = Activation.GELU_TANH,
) -> torch.Tensor:
    out = experts_fake(x, ids, gate_up, down, settled, activation)
    for expert in ids.unique().tolist():
        slot, token = torch.where(ids.T == expert)
        activated = REFERENCES[activation](linear_reference(x[token], gate_up[expert]))
        out[token, slot] = linear_reference(activated, down[expert])
    return out


def experts_launch(
    x: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    settled: bool = False,
    activation: str = Activation.GELU_TANH,
) -> torch.Tensor:
    tokens, top_k = ids.shape
    if tokens == 0:
        return experts_fake(x, ids, gate_up, down, settled, activation)
    slots = expert_slots(plan_for(x, top_k, gate_up, down), x, ids, gate_up, down, settled, activation)
    return slots.view(tokens, top_k, x.shape[1])


def experts_fake(x, ids, gate_up, down, settled, activation) -> torch.Tensor:
    return x.new_empty(*ids.shape, x.shape[1])


_experts = define(
    "experts(Tensor x, Tensor ids, Tensor gate_up, Tensor down, bool settled, str activation) -> Tensor",
    check=check_experts, reference=experts_reference, launch=experts_launch, fake=experts_fake,
)  # fmt: skip
