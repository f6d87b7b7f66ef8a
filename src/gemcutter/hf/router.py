"""HF's `Gemma4TextRouter` on `select_experts`."""

import torch

from gemcutter.hf.guards import takes_ops
from gemcutter.ops import select_experts
from gemcutter.ops.moe.select_experts import MAX_EXPERTS, MAX_TOP_K


class Router:
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities of all experts, for HF's recorder of router logits; weights and ids of the chosen."""
        if not (takes_ops(self, hidden_states) and self.selects()):
            return super().forward(hidden_states)
        scores = self.proj(self.norm(hidden_states) * self.scale * self.scalar_root_size)
        ids, weights = self.select(scores)
        return torch.softmax(scores, -1, dtype=torch.float32), weights, ids

    def selects(self) -> bool:
        """Whether `select_experts` takes so many experts, so many chosen, and their scales."""
        scale = self.per_expert_scale
        return (
            len(scale) <= MAX_EXPERTS and self.config.top_k_experts <= MAX_TOP_K
            and scale.is_contiguous() and scale.device == self.scale.device
        )  # fmt: skip

    def select(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and weights of the chosen experts: [T, k] each."""
        return select_experts(scores, self.per_expert_scale, self.config.top_k_experts)
