"""K and V in one byte: what an FP8 cache holds, what it stands for, and by which scales.

stored = e4m3(x / scale): of x as the model's dtype has it, beyond +-448 clamped, to the nearest (ties to even)
read = stored * scale
A scale is a power of two, one for the keys and one for the values of each KV head. So the division is exact, the
product in the model's dtype too, and a factor of the scores or sums does for one of every key or value: attention
over an FP8 cache is attention over what it stands for, bit for bit. e4m3 has three bits of mantissa at any size, so
all that a scale decides is that nothing overflows and little lies below the normal numbers.

Nothing overflows, as a head is normed before it is stored: |v| <= sqrt(D), and |k| <= sqrt(D) * max|w|, which rope
keeps. With the smallest power of two that takes such a bound to 448 or less, a usual element (sqrt(D) below it)
is 2^9 times e4m3's smallest normal number or more.

A NaN is stored as e4m3's, 0x7F, but read as the 480 that these bits would be without it: whatever memory held
before, attention finds finite numbers, and what no query sees may be multiplied with 0.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from gemcutter.ops.quantize_fp8 import LARGEST, e4m3_bits
from gemcutter.ops.tanh import INTERPRETED

# Powers of two with which every e4m3 times the scale is a float16, the narrowest dtype that reads them.
SMALLEST_POWER, LARGEST_POWER = -15, 7


def kv_scale_above(bound: float) -> float:
    """The smallest scale with which magnitudes up to `bound` are not clamped."""
    power = math.ceil(math.log2(bound / LARGEST.value)) if bound > 0 else 0
    return 2.0 ** min(max(power, SMALLEST_POWER), LARGEST_POWER)


def kv_scales(k_norm: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[2, num_kv_heads] float32: of the keys under a norm with weight k_norm [D], and of the values."""
    root = math.sqrt(k_norm.shape[0])
    scales = [kv_scale_above(root * k_norm.abs().max().item()), kv_scale_above(root)]
    return torch.tensor(scales, device=k_norm.device)[:, None].repeat(1, num_kv_heads)


def check_kv_cache(
    name: str, x: torch.Tensor, num_kv_heads: int, head_dim: int, like: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """x [pages, num_kv_heads, page size, head_dim], dense: of the dtype of `like`, or e4m3 with kv_scales."""
    fits = torch.float8_e4m3fn if scales is not None else like.dtype
    if x.dtype != fits or x.device != like.device:
        which = "without" if scales is None else "with"
        raise TypeError(f"{name} is {x.dtype} on {x.device}: {which} kv_scales {fits} on {like.device} is needed")
    if x.ndim != 4 or x.shape[1] != num_kv_heads or x.shape[3] != head_dim or not x.is_contiguous():
        got = f"shape {tuple(x.shape)}, strides {x.stride()}"
        raise ValueError(f"{name} has {got}: dense [pages, {num_kv_heads}, page size, {head_dim}] is needed")
    if scales is None:
        return
    if scales.dtype != torch.float32 or scales.device != like.device:
        got, want = f"{scales.dtype} on {scales.device}", f"torch.float32 on {like.device}"
        raise TypeError(f"kv_scales is {got}: {want} is needed")
    if scales.shape != (2, num_kv_heads) or not scales.is_contiguous():
        got = f"shape {tuple(scales.shape)}, strides {scales.stride()}"
        raise ValueError(f"kv_scales has {got}: dense [2, {num_kv_heads}], for the keys and the values, is needed")


def kv_bytes(*caches: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The caches as kernels and PyTorch's indexing take them: e4m3 as its bits."""
    return tuple(x.view(torch.uint8) if x is not None and x.dtype == torch.float8_e4m3fn else x for x in caches)


def kv_to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., heads, D] as e4m3, scale [heads]."""
    quotient = (x.float() / scale[:, None]).clamp(-LARGEST.value, LARGEST.value)
    return quotient.to(torch.float8_e4m3fn)


def kv_from_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What x [heads, n, D] stands for, exactly."""
    wide = x.float()
    wide = torch.where(wide.isnan(), torch.full_like(wide, 480.0).copysign(wide), wide)
    return (wide * scale[:, None, None]).to(dtype)


@triton.jit
def kv_bits(x, scale):
    """float32 -> uint8, the bits of e4m3(x / scale)."""
    quotient = x * tl.div_rn(1.0, scale)  # exact
    if INTERPRETED or not cuda_capability_geq(9, 0):
        return tl.where(quotient == quotient, e4m3_bits(quotient), 0x7F)
    else:
        return quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def kv_load(ptrs, dtype: tl.constexpr):
    """Keys or values as they are, or of bits of e4m3 what these stand for, but for the scale.

    By arithmetic, as not every card has an instruction: e4m3's exponent in the place of float32's makes a number
    2^120 too small, also of a denormal.
    """
    x = tl.load(ptrs)
    if x.dtype == tl.uint8:
        bits = x.to(tl.int32)
        value = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True)
        x = (value * 1.329227995784916e36).to(dtype)
    return x
