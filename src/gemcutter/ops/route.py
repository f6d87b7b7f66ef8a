"""Router: which experts each token takes, and with what weight.

logits = linear(x) in the dtype; then in float softmax over all experts, top k, divided by their sum, times
per_expert_scale[id]. Source: HF `Gemma4TextRouter`, whose torch operations these are, one by one; what comes before
them there is `attention_seam`'s router_in.

Ties are common in bf16 (of 8192 random tokens, 7% tie exactly at the last place) and go as `torch.topk` takes
them: on a GPU the lowest ids are chosen; on a CPU, where it is a partial quicksort, the choice follows from
the row's own values alone but by no simple rule. So CPU and GPU may part on a tied token, as HF does.
"""

import torch
import torch.nn.functional as F


def route(
    x: torch.Tensor, router: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts.

    Args:
        x: [T, H], router_in of the seam before.
        router: [E, H] projection.
        per_expert_scale: [E], on the weights.

    Returns:
        ids: [T, top_k] int64, distinct within a row, by descending probability.
        weights: [T, top_k] float32.
    """
    probabilities = torch.softmax(F.linear(x, router), -1, dtype=torch.float32)
    weights, ids = torch.topk(probabilities, top_k, -1)
    weights /= weights.sum(-1, keepdim=True)
    return ids, weights * per_expert_scale[ids]
