"""Random weights, for speed measurements without a checkpoint."""

import torch

from gemcutter.checkpoint.table import TEXT_ONLY, empty_weights, pieces
from gemcutter.model.weights import Weights
from gemcutter.spec import ModelSpec

CHUNK = 2**28  # elements drawn at once; bounds the generator's temporaries


def dummy_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int) -> Weights:
    """Matrices N(0, 0.02) from a seed per tensor, vectors and scalars 1; drawn on the device, in `dtype`.

    Vectors are 1 because a layer_scalar near 0 would let hidden states vanish: then every token picks the same
    experts, and batched MoE looks twice as fast as it is.
    """
    weights = empty_weights(spec, device, dtype)
    generator = torch.Generator(device=device)
    for index, view in enumerate(pieces(spec, weights, TEXT_ONLY).values()):
        if view.dim() < 2:
            view.fill_(1.0)
            continue
        generator.manual_seed((seed + index) % 2**63)
        for chunk in view.view(-1).split(CHUNK):
            chunk.normal_(0.0, 0.02, generator=generator)
    return weights
