"""HF's `Gemma4TextMLP` on `gelu_mul`: its two projections stay two, since one would need the weights once more."""

import torch
from torch import nn
from transformers.activations import GELUTanh

from gemcutter.hf.guards import stands_for, takes_ops
from gemcutter.ops import gelu_mul


class MLP:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (takes_ops(self, x) and is_gelu_tanh(self)):
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gelu_mul(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape))


def is_gelu_tanh(module: nn.Module) -> bool:
    """Whether the activation of an MLP or a layer is the one that `gelu_mul` has, untouched."""
    return module.config.hidden_activation == "gelu_pytorch_tanh" and stands_for(module.act_fn, GELUTanh)
