"""From attention to the MLP's last product: `attention_seam`, and `gate_up` of what it hands out.

The bits are those of the two ops. One token in bfloat16 or float16, by weights of that dtype or in FP8, takes one
launch on Hopper.
"""

import torch

from gemcutter.ops.library import define
from gemcutter.ops.linears.gate_up import (
    check_gate_up,
    check_gate_up_fp8,
    gate_up,
    gate_up_fp8_launch,
    gate_up_fp8_reference,
    gate_up_launch,
    gate_up_reference,
)
from gemcutter.ops.quantize_fp8 import Quantized, check_quantized_width, pair_of, read_as_pair
from gemcutter.ops.row_fp8 import empty_rows, taken
from gemcutter.ops.seams.attention_seam import (
    attention_seam,
    attention_seam_launch,
    attention_seam_reference,
    check_attention_seam,
)
from gemcutter.ops.seams.seam_gate_up_hopper import stream_seam_gate_up, streams_seam_gate_up
from gemcutter.ops.seams.seam_gate_up_wide_hopper import is_wide, stream_seam_gate_up_wide


def seam_gate_up(
    attended: torch.Tensor,
    residual: torch.Tensor,
    post: torch.Tensor,
    pre: torch.Tensor,
    eps: float,
    weight: torch.Tensor | Quantized,
    expert_pre: torch.Tensor | None = None,
    router_scale: torch.Tensor | None = None,
    router: torch.Tensor | None = None,
    reader: torch.Tensor | Quantized | None = None,
    expert_reader: torch.Tensor | Quantized | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Quantized, torch.Tensor | Quantized | None, torch.Tensor | None]:
    """Close attention, activate the MLP, score the experts.

    Args:
        attended, residual, post, pre, eps, expert_pre, router_scale: as for `attention_seam`.
        weight: [2I, H], as for `gate_up`.
        router: [E, H], with expert_pre and router_scale or not at all.
        reader, expert_reader: weights of the products that take what is activated and expert_in.

    Returns:
        hidden [T, H], activated [T, I], and with experts expert_in [T, H] and the logits [T, E], else None. Where
        bfloat16 goes to a reader in FP8, activated and expert_in are pairs.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    if len(attended) > 1 and any(isinstance(each, Quantized) for each in (weight, reader, expert_reader)):
        hidden, mlp_in, expert_in, router_in = attention_seam(
            attended, residual, post, pre, eps, expert_pre, router_scale, weight, expert_reader
        )
        activated, logits = gate_up(mlp_in, weight, router_in, router, reader)
        return hidden, activated, expert_in, logits
    expert_fp8 = expert_pre is not None and read_as_pair(expert_reader, attended.dtype)
    given = attended, residual, post, pre, eps, *pair_of(weight), expert_pre, router_scale, router, expert_fp8
    found = iter(_seam_gate_up(*given))
    hidden, activated = next(found), next(found)
    if router is None:
        return hidden, activated, None, None
    return hidden, activated, taken(found, expert_fp8), next(found)


def check_seam_gate_up(
    attended, residual, post, pre, eps, weight, weight_scale, expert_pre, router_scale, router, expert_fp8
) -> None:
    check_attention_seam(attended, residual, post, pre, eps, expert_pre, router_scale)
    if (expert_pre is None) != (router is None):
        raise ValueError("expert_pre and router come together: one of them is None")
    if expert_fp8:
        if router is None:
            raise ValueError("expert_fp8 is True, router None: there is no experts' input to quantise")
        check_quantized_width("attended", attended.shape[1])
    router_in = None if router is None else attended
    if weight_scale is None:
        check_gate_up(attended, weight, router_in, router)
    else:
        check_gate_up_fp8(attended, None, weight, weight_scale, router_in, router)


def seam_gate_up_reference(*arguments) -> list[torch.Tensor]:
    return _one_by_one(attention_seam_reference, gate_up_reference, gate_up_fp8_reference, *arguments)


def _one_by_one(
    seam, product, product_fp8, attended, residual, post, pre, eps, weight, weight_scale, expert_pre, router_scale,
    router, expert_fp8,
) -> list[torch.Tensor]:  # fmt: skip
    reader = weight if weight_scale is None else Quantized(weight, weight_scale)
    mlp_fp8 = read_as_pair(reader, attended.dtype)
    found = iter(seam(attended, residual, post, pre, eps, expert_pre, router_scale, mlp_fp8, expert_fp8))
    hidden, mlp_in, mlp_scale = next(found), next(found), next(found) if mlp_fp8 else None
    expert_in, router_in = [], None
    if router is not None:
        *expert_in, router_in = found
    if weight_scale is None:
        activated, *logits = product(mlp_in, weight, router_in, router)
    else:
        activated, *logits = product_fp8(mlp_in, mlp_scale, weight, weight_scale, router_in, router)
    return [hidden, activated, *expert_in, *logits]


def seam_gate_up_launch(*arguments) -> list[torch.Tensor]:
    attended, weight, router = (arguments[i] for i in (0, 5, 9))
    if not streams_seam_gate_up(attended, weight, router):
        return _one_by_one(attention_seam_launch, gate_up_launch, gate_up_fp8_launch, *arguments)
    outs = seam_gate_up_fake(*arguments)
    if router is None and is_wide(attended, weight):
        stream_seam_gate_up_wide(*arguments[:6], *outs)
        return outs
    stream_seam_gate_up(*arguments[:-1], outs[0], outs[1], outs[2:-1], outs[-1] if router is not None else None)
    return outs


def seam_gate_up_fake(
    attended, residual, post, pre, eps, weight, weight_scale, expert_pre, router_scale, router, expert_fp8
) -> list[torch.Tensor]:
    outs = [*empty_rows(attended, False), attended.new_empty(len(attended), len(weight) // 2)]
    if router is not None:
        outs += [*empty_rows(attended, expert_fp8), attended.new_empty(len(attended), len(router))]
    return outs


_seam_gate_up = define(
    "seam_gate_up(Tensor attended, Tensor residual, Tensor post, Tensor pre, float eps, Tensor weight,"
    " Tensor? weight_scale, Tensor? expert_pre, Tensor? router_scale, Tensor? router, bool expert_fp8) -> Tensor[]",
    check=check_seam_gate_up, reference=seam_gate_up_reference, launch=seam_gate_up_launch, fake=seam_gate_up_fake,
)  # fmt: skip
