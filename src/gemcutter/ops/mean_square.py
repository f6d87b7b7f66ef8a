"""Mean square of a row, in float, the same bits in any order of summation.

A float sum depends on how a device splits it, and PyTorch's own splits differ with the number of rows. Here the
squares become integers, whose sum has no order: a power of two brings the row's largest element into [1, 2), each
square is cut to a multiple of 2^-40, and the exact total is rounded to float once. That is closer to the true value
than a float sum; like one it overflows to inf, and inf and NaN come through.

Rows of up to 2^16 elements: squares below 2^6, cut at 2^-40, sum up below 2^62.
"""

import torch
import triton
import triton.language as tl

ONE = tl.constexpr(2.0**40)  # a scaled square of 1, as an integer
HALF_BITS = tl.constexpr(20)  # of ONE: its root, taken off twice so that nothing underflows on the way
LOW, HIGH = tl.constexpr(-100), tl.constexpr(125)  # bounds of the scale's exponent: its reciprocal stays normal


def mean_square_reference(wide: torch.Tensor) -> torch.Tensor:
    """[..., H] float32 -> [..., 1] float32."""
    peak = wide.abs().amax(-1, keepdim=True)
    shift = ((peak.view(torch.int32) >> 23) - 127).clamp(LOW.value, HIGH.value)
    scaled = wide * _power(-shift)
    total = (scaled * scaled * ONE.value).to(torch.int64).sum(-1, keepdim=True)
    half = _power(shift - HALF_BITS.value)
    mean = total.to(torch.float32) * half * half * (1.0 / wide.shape[-1])
    return torch.where(peak.isfinite(), mean, peak * peak)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent of int32 from -126 to 127, as the float with these bits."""
    return ((exponent + 127) << 23).view(torch.float32)


@triton.jit
def mean_square(x, H: tl.constexpr):
    """[rows, B] float32, zeros past column H -> [rows, 1] float32."""
    peak = tl.max(_magnitudes(x), 1, keep_dims=True)
    return _mean(peak, tl.sum(_squares(x, peak), 1, keep_dims=True), H)


@triton.jit
def mean_square_of_halves(low, high, H: tl.constexpr):
    """The same of rows held as two halves, [rows, H/2] each."""
    peak = tl.max(tl.maximum(_magnitudes(low), _magnitudes(high)), 1, keep_dims=True)
    return _mean(peak, tl.sum(_squares(low, peak) + _squares(high, peak), 1, keep_dims=True), H)


@triton.jit
def _magnitudes(x):
    """Bits of |x|: as integers they order like the floats, with NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _shift(peak):
    return tl.minimum(tl.maximum((peak >> 23) - 127, LOW), HIGH)


@triton.jit
def _squares(x, peak):
    scaled = x * _power_of_two(-_shift(peak) + HALF_BITS)  # so that squares come out times ONE
    return (scaled * scaled).to(tl.int64)


@triton.jit
def _mean(peak, total, H: tl.constexpr):
    half = _power_of_two(_shift(peak) - HALF_BITS)
    mean = total.to(tl.float32) * half * half * (1.0 / H)
    value = peak.to(tl.float32, bitcast=True)
    return tl.where(peak < 0x7F800000, mean, value * value)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
