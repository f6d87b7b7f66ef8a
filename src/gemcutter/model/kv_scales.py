"""The scales of an FP8 cache, from the weights of a model."""

import torch

from gemcutter.model.weights import Weights
from gemcutter.ops.attention.kv_fp8 import kv_scales
from gemcutter.spec import ModelSpec


def scales_of(spec: ModelSpec, weights: Weights) -> dict[int, torch.Tensor]:
    """[2, kv_heads] by the index of each layer that owns K/V."""
    return {
        layer.index: kv_scales(weights.layers[layer.index].k_norm, layer.num_kv_heads)
        for layer in spec.layers
        if layer.owns_kv
    }
