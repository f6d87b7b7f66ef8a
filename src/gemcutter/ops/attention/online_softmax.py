"""Online softmax: fold one tile of scores and values after another into a running weighted sum.

Source: Milakov and Gimelshein 2018; the tiles are those of FlashAttention (Dao et al. 2022).
"""

import triton
import triton.language as tl

from gemcutter.ops.attention.kv_fp8 import kv_load

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1e30)  # the maximum of no scores: below each, and x - x is 0 where -inf would give NaN


@triton.jit
def fold(acc, top, total, scores, v_ptrs, dtype: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """(acc [M, D], top [M], total [M]), all float32, after N more keys: scores [M, N], -inf where hidden.

    SCALE, of the scores, comes with the exponentials: top is one of scores as they are.
    v_ptrs [N, D] is loaded here, as dtype, behind the exponentials; every value must be finite.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Subtracted first, exactly: s * LOG2E - m * LOG2E would fuse into an FMA in one copy of a loop and not in
    # another, and a key's weight would depend on the run of tiles it falls into.
    weight = tl.exp2((scores - new_top[:, None]) * (LOG2E * SCALE))
    fade = tl.exp2((top - new_top) * (LOG2E * SCALE))
    total = total * fade + tl.sum(weight, 1)
    v = kv_load(v_ptrs, dtype)
    acc = tl.dot(weight.to(dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_top, total
