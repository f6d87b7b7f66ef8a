"""From attention to the MLP's last product: `attention_seam`, and `gate_up` of what it hands out.

The bits are those of the two ops. One token in bfloat16 or float16 takes one launch on Hopper.
"""

import torch

from gemcutter.ops.attention_seam import (
    attention_seam,
    attention_seam_launch,
    attention_seam_reference,
    check_attention_seam,
)
from gemcutter.ops.gate_up import check_gate_up, gate_up, gate_up_launch, gate_up_reference
from gemcutter.ops.library import define
from gemcutter.ops.quantize_fp8 import Quantized
from gemcutter.ops.seam_gate_up_hopper import stream_seam_gate_up, streams_seam_gate_up


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
    if any(isinstance(each, Quantized) for each in (weight, reader, expert_reader)):
        hidden, mlp_in, expert_in, router_in = attention_seam(
            attended, residual, post, pre, eps, expert_pre, router_scale, weight, expert_reader
        )
        activated, logits = gate_up(mlp_in, weight, router_in, router, reader)
        return hidden, activated, expert_in, logits
    outs = _seam_gate_up(attended, residual, post, pre, eps, weight, expert_pre, router_scale, router)
    return *outs, *[None] * (4 - len(outs))


def check_seam_gate_up(attended, residual, post, pre, eps, weight, expert_pre, router_scale, router) -> None:
    check_attention_seam(attended, residual, post, pre, eps, expert_pre, router_scale)
    if (expert_pre is None) != (router is None):
        raise ValueError("expert_pre and router come together: one of them is None")
    check_gate_up(attended, weight, None if router is None else attended, router)


def seam_gate_up_reference(*arguments) -> list[torch.Tensor]:
    return _one_by_one(attention_seam_reference, gate_up_reference, *arguments)


def _one_by_one(
    seam, product, attended, residual, post, pre, eps, weight, expert_pre, router_scale, router
) -> list[torch.Tensor]:
    hidden, mlp_in, *more = seam(attended, residual, post, pre, eps, expert_pre, router_scale)
    expert_in, router_in = more or (None, None)
    activated, *logits = product(mlp_in, weight, router_in, router)
    return [hidden, activated] if router is None else [hidden, activated, expert_in, *logits]


def seam_gate_up_launch(
    attended, residual, post, pre, eps, weight, expert_pre, router_scale, router
) -> list[torch.Tensor]:
    arguments = attended, residual, post, pre, eps, weight, expert_pre, router_scale, router
    if not streams_seam_gate_up(attended, weight, router):
        return _one_by_one(attention_seam_launch, gate_up_launch, *arguments)
    outs = seam_gate_up_fake(*arguments)
    stream_seam_gate_up(*arguments, outs)
    return outs


def seam_gate_up_fake(
    attended, residual, post, pre, eps, weight, expert_pre, router_scale, router
) -> list[torch.Tensor]:
    tokens, width = attended.shape
    outs = [attended.new_empty(tokens, columns) for columns in (width, len(weight) // 2)]
    if router is not None:
        outs += [attended.new_empty(tokens, width), attended.new_empty(tokens, len(router))]
    return outs


_seam_gate_up = define(
    "seam_gate_up(Tensor attended, Tensor residual, Tensor post, Tensor pre, float eps, Tensor weight,"
    " Tensor? expert_pre, Tensor? router_scale, Tensor? router) -> Tensor[]",
    check=check_seam_gate_up, reference=seam_gate_up_reference, launch=seam_gate_up_launch, fake=seam_gate_up_fake,
)  # fmt: skip
