"""Random weights, for speed measurements without a checkpoint."""

import torch

from gemcutter.checkpoint.linears import TEXT_ONLY
from gemcutter.checkpoint.table import empty_weights, pieces
from gemcutter.model.weights import Linear, Weights
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8
from gemcutter.spec import ModelSpec

CHUNK = 2**27  # elements drawn at once; bounds the temporaries


def dummy_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int) -> Weights:
    """Matrices N(0, 0.02) from a seed per tensor, vectors and scalars 1; drawn on the device, in `dtype`.

    Those in FP8 are drawn alike, and quantised. Vectors are 1 because a layer_scalar near 0 would let hidden states
    vanish: then every token picks the same experts, and batched MoE looks twice as fast as it is.
    """
    weights = empty_weights(spec, device, dtype)
    generator = torch.Generator(device=device)
    for index, view in enumerate(pieces(spec, weights, TEXT_ONLY).values()):
        if isinstance(view, torch.Tensor) and view.dim() < 2:
            view.fill_(1.0)
            continue
        generator.manual_seed((seed + index) % 2**63)
        _draw(view, dtype, generator)
    return weights


def _draw(view: Linear, dtype: torch.dtype, generator: torch.Generator) -> None:
    whole = view.q if isinstance(view, Quantized) else view
    width = whole.shape[-1]
    rows = max(1, CHUNK // width)
    if isinstance(view, torch.Tensor):
        for chunk in view.view(-1, width).split(rows):
            chunk.normal_(0.0, 0.02, generator=generator)
        return
    for q, scale in zip(view.q.view(-1, width).split(rows), view.scale.view(-1, 1).split(rows), strict=True):
        drawn = torch.empty(q.shape, device=q.device, dtype=dtype).normal_(0.0, 0.02, generator=generator)
        quantized = quantize_fp8(drawn)
        q.copy_(quantized.q)
        scale.copy_(quantized.scale)
