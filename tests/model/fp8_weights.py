"""A model's linears and experts in FP8, quantised as a checkpoint would be: each output channel with a scale."""

import dataclasses

import torch

from gemcutter.model.weights import LayerWeights, Weights
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8

LINEARS = ("qkv", "o", "gate_up", "down")


def quantized(weights: Weights, *, linears: tuple[str, ...] = LINEARS, experts: bool, layers=None) -> Weights:
    """The same with these linears in FP8, the per-layer inputs' among them, in these layers (None: in all)."""
    changed = [
        _layer(w, linears, experts) if layers is None or index in layers else w
        for index, w in enumerate(weights.layers)
    ]
    return dataclasses.replace(weights, layers=changed)


def _layer(w: LayerWeights, linears: tuple[str, ...], experts: bool) -> LayerWeights:
    w = dataclasses.replace(w, **{name: channels(getattr(w, name)) for name in linears})
    if (given := getattr(w, "per_layer_input", None)) is not None:
        w.per_layer_input = dataclasses.replace(
            given, gate=channels(given.gate), projection=channels(given.projection)
        )
    if experts and w.experts is not None:
        w.experts = dataclasses.replace(
            w.experts, gate_up=channels(w.experts.gate_up), down=channels(w.experts.down)
        )
    return w


def channels(weight: torch.Tensor) -> Quantized:
    """[..., out, in] -> q of that shape, scale [..., out, 1]."""
    q, scale = quantize_fp8(weight.flatten(0, -2))
    return Quantized(q.view(weight.shape), scale.view(*weight.shape[:-1], 1))
