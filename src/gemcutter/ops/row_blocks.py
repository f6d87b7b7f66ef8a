"""Matrix products of 16 rows at a time, for references on a CPU.

The libraries choose kernel and order of summation by the number of rows there (seen: float32 below 16 rows, bf16 up
to 200 at some widths). Always 16 rows, filled up with zeros, leave them nothing to choose by.
"""

import torch
import torch.nn.functional as F

ROWS = 16  # a tile of AMX, where 16 rows of bf16 cost what one does


def linear_in_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias by products of one shape and one alignment."""
    rows = len(x)
    padded = x.new_zeros(-(-rows // ROWS) * ROWS, x.shape[1])
    padded[:rows] = x
    out = [F.linear(block, weight, bias) for block in padded.split(ROWS)]
    return out[0][:rows] if len(out) == 1 else torch.cat(out)[:rows]
