"""HF's `Gemma4RMSNorm` on `rms_norm`."""

import torch

from gemcutter.hf.guards import is_dense_like, stands_for, takes_ops
from gemcutter.ops import rms_norm


class Norm:
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.with_scale else None
        if not takes_ops(self, hidden_states, weight):
            return super().forward(hidden_states)
        rows = hidden_states if hidden_states.ndim <= 3 else hidden_states.flatten(0, -3)
        return rms_norm(rows, weight, self.eps).view(hidden_states.shape)


def fusable(x: torch.Tensor, *norms: torch.nn.Module) -> bool:
    """Whether ops may compute these norms: untouched, of one eps, weights dense and like x."""
    return all(
        stands_for(norm, Norm)
        and norm.eps == norms[0].eps
        and (not norm.with_scale or is_dense_like(norm.weight, x))
        for norm in norms
    )
