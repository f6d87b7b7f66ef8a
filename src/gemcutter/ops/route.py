"""Router: which experts each token takes, and with what weight.

From the un-normed residual, each line rounded to the dtype but the float ones:
n = rms_norm(x) without weight; n * scale; * H^-0.5; logits = linear; then in float softmax over all experts,
top k, divided by their sum, times per_expert_scale[id].
Source: HF `Gemma4TextRouter`, whose torch operations these are, one by one, so that the bits are its bits on
either device up to the GPU's norm (`ops/rms_norm.py`).

Ties are common in bf16 (of 8192 random tokens, 7% tie exactly at the last place) and go as `torch.topk` takes
them: on a GPU the lowest ids are chosen; on a CPU, where it is a partial quicksort, the choice follows from
the row's own values alone but by no simple rule. So CPU and GPU may part on a tied token, as HF does.
"""

import torch
import torch.nn.functional as F

from gemcutter.ops.rms_norm import rms_norm


def route(
    x: torch.Tensor,
    router: torch.Tensor,
    scale: torch.Tensor,
    per_expert_scale: torch.Tensor,
    top_k: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts.

    Args:
        x: [T, H] residual, un-normed, of the model's dtype.
        router: [E, H] projection.
        scale: [H], before the projection.
        per_expert_scale: [E], on the weights.

    Returns:
        ids: [T, top_k] int64, distinct within a row, by descending probability.
        weights: [T, top_k] float32.
    """
    normed = rms_norm(x, None, eps) * scale * x.shape[-1] ** -0.5
    probabilities = torch.softmax(F.linear(normed, router), -1, dtype=torch.float32)
    weights, ids = torch.topk(probabilities, top_k, -1)
    weights /= weights.sum(-1, keepdim=True)
    return ids, weights * per_expert_scale[ids]
