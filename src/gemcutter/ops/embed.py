"""Scaled embedding: row gather times sqrt(width).

The scale itself is rounded to the table's dtype first (sqrt(2816) is 53.0 in bf16), then the product is.
Source: HF `Gemma4TextScaledWordEmbedding`. It is a gather and a multiply, so both devices run the same torch
code, and the bits are HF's on both.
"""

import torch
import torch.nn.functional as F


def embed(token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows of the table, scaled.

    Args:
        token_ids: [T] int64 in [0, V); the caller checks.
        table: [V, W] token embeddings, or per-layer embeddings with W = layers * P.
        scale: sqrt(hidden), or sqrt(P) for per-layer embeddings; rounded here.

    Returns:
        [T, W] of the table's dtype.
    """
    # Through float32, as HF's buffer goes.
    rounded = torch.tensor(scale, dtype=torch.float32).to(table.dtype).item()
    return F.embedding(token_ids, table) * rounded
