"""Weights of a GLM-4 MoE model as the forward pass wants them, as `weights.py` has Gemma's.

H hidden, D head_dim, I MLP width, E experts, N expert width, V vocab. A linear's weight is [out, in], as in HF, of
the model's dtype or in FP8; layers and their parts may differ in that.
"""

from dataclasses import dataclass

import torch

from gemcutter.model.weights import Linear


@dataclass
class Glm4MoeExpertWeights:
    """Router and experts."""

    router: torch.Tensor  # [E, H]
    correction: torch.Tensor  # [E] float32: on the choice alone
    gate_up: Linear  # [E, 2N, H]: gate rows, then up rows
    down: Linear  # [E, H, N]


@dataclass
class Glm4MoeLayerWeights:
    """One decoder layer."""

    input_norm: torch.Tensor  # [H]
    post_attention_norm: torch.Tensor  # [H], which the MLP reads through
    qkv: Linear  # [LayerSpec.qkv_width, H]: q | k | v
    qkv_bias: torch.Tensor | None  # [LayerSpec.qkv_width]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    o: Linear  # [H, heads * D]
    gate_up: Linear  # [2I, H]: gate rows, then up rows; in a layer with experts the shared expert's
    down: Linear  # [H, I]
    experts: Glm4MoeExpertWeights | None


@dataclass
class Glm4MoeWeights:
    """The whole model."""

    embed: torch.Tensor  # [V, H]
    head: torch.Tensor  # [V, H]; the same tensor as embed where the head is tied
    norm: torch.Tensor  # [H]
    layers: list[Glm4MoeLayerWeights]
