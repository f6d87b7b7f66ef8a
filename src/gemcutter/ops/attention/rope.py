"""Rotary tables: cos and sin of every position, computed once, so that kernels gather instead of computing.

The maths, dtypes and order of operations are HF's `Gemma4TextRotaryEmbedding` and `apply_rotary_pos_emb`, so the
bits are their bits.
"""

import torch
import torch.nn.functional as F

from gemcutter.spec import RopeSpec


def rope_table(
    rope: RopeSpec, head_dim: int, context_length: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta^(-2i / head_dim) for i < rope.angles.

    Returns:
        cos, sin: [context_length, rope.angles] of `dtype`, the model's. Pairs from rope.angles on do not turn
        and have no columns.
    """
    assert 0 < rope.angles <= head_dim // 2, f"{rope.angles} angles do not fit head_dim {head_dim}"
    # On the CPU, where HF makes its buffer too: a GPU's pow may differ in the last bit.
    exponent = torch.arange(0, 2 * rope.angles, 2, dtype=torch.float) / head_dim
    inv_freq = (1.0 / (rope.theta**exponent)).to(device)
    cos = torch.empty(context_length, rope.angles, dtype=dtype, device=device)
    sin = torch.empty_like(cos)
    # In pieces: at 262144 positions the fp32 angles, cos and sin of one go would hold 400 MB at start-up.
    for begin in range(0, context_length, 16384):
        rows = slice(begin, min(begin + 16384, context_length))
        angle = torch.arange(rows.start, rows.stop, device=device).float()[:, None] * inv_freq
        cos[rows] = angle.cos()
        sin[rows] = angle.sin()
    return cos, sin


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (i, i + D/2) of x [..., D] by cos, sin [..., angles]; each product is rounded, then the sum.

    Pairs from angles on are multiplied by cos 1 and sin 0, as in HF, and not copied: an infinity makes its
    partner NaN, and -0.0 may come out as 0.0.
    """
    low, high = x.chunk(2, -1)
    still = (0, low.shape[-1] - cos.shape[-1])
    cos, sin = F.pad(cos, still, value=1.0), F.pad(sin, still, value=0.0)
    return torch.cat([low * cos + -high * sin, high * cos + low * sin], -1)
