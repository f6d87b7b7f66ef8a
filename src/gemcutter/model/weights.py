"""Weights: the tensors of a Gemma 4 model as the forward pass wants them, merged where one GEMM serves several.

H hidden, D head_dim, I MLP width, E experts, N expert width, P per-layer embedding width, L layers, V vocab.
A linear's weight is [out, in], as in HF, of the model's dtype or in FP8; layers and their parts may differ in that.
"""

from dataclasses import dataclass

import torch

from gemcutter.ops.quantize_fp8 import Quantized

# In FP8 scales are [out, 1], of experts [E, out, 1]: what was merged keeps those of its parts, one below the other.
Linear = torch.Tensor | Quantized


@dataclass
class ExpertWeights:
    """Router and experts, and the three norms that only MoE layers have."""

    router: torch.Tensor  # [E, H]
    router_scale: torch.Tensor  # [H]
    per_expert_scale: torch.Tensor  # [E]
    gate_up: Linear  # [E, 2N, H]: gate rows, then up rows
    down: Linear  # [E, H, N]
    pre_norm: torch.Tensor  # [H] pre_feedforward_layernorm_2
    post_norm: torch.Tensor  # [H] post_feedforward_layernorm_2
    dense_post_norm: torch.Tensor  # [H] post_feedforward_layernorm_1


@dataclass
class PerLayerInputWeights:
    """Injection of the per-layer embedding (E2B, E4B)."""

    gate: Linear  # [P, H]
    projection: Linear  # [H, P]
    post_norm: torch.Tensor  # [H]


@dataclass
class LayerWeights:
    """One decoder layer."""

    input_norm: torch.Tensor  # [H]
    post_attention_norm: torch.Tensor  # [H]
    pre_feedforward_norm: torch.Tensor  # [H]
    post_feedforward_norm: torch.Tensor  # [H]
    qkv: Linear  # [LayerSpec.qkv_width, H]: q | k | v, as far as the layer has them
    q_norm: torch.Tensor  # [D]
    k_norm: torch.Tensor | None  # [D]; None where K/V are another layer's
    o: Linear  # [H, heads * D]
    gate_up: Linear  # [2I, H]: gate rows, then up rows
    down: Linear  # [H, I]
    scalar: torch.Tensor  # [1]
    experts: ExpertWeights | None
    per_layer_input: PerLayerInputWeights | None


@dataclass
class PerLayerEmbeddingWeights:
    """The table of per-layer embeddings and the projection of the token embedding onto all layers."""

    embed: torch.Tensor  # [ple vocab, L * P]
    projection: Linear  # [L * P, H]
    projection_norm: torch.Tensor  # [P]


@dataclass
class Weights:
    """The whole text model."""

    embed: torch.Tensor  # [V, H]
    head: torch.Tensor  # [V, H]; the same tensor as embed where the head is tied
    norm: torch.Tensor  # [H]
    layers: list[LayerWeights]
    per_layer: PerLayerEmbeddingWeights | None
