"""Mean square of a row, in float, the same bits in any order of summation.

A float sum depends on how a device splits it, and PyTorch's own splits differ with the number of rows. Here eight
adjacent squares are added in float by halves (each with its neighbour, three times), which a thread does by itself,
and the sums of eight become integers, whose sum has no order: a power of two brings the row's largest into [1, 2),
each is cut to a multiple of 2^-40, and the exact total is rounded to float once. That is closer to the true value
than a float sum; like one it overflows to inf, and inf and NaN come through.

Rows of up to 2^16 elements: 2^13 integers below 2^42 sum up below 2^55.
"""

import torch
import triton
import triton.language as tl

ONE = tl.constexpr(2.0**40)  # a scaled sum of 1, as an integer
# Bounds of the scale's exponent: it and its reciprocal are normal.
LOW, HIGH = tl.constexpr(-126), tl.constexpr(126)


def mean_square_reference(wide: torch.Tensor) -> torch.Tensor:
    """[..., H] float32 -> [..., 1] float32."""
    sums = torch.nn.functional.pad(wide * wide, (0, -wide.shape[-1] % 8))
    for _ in range(3):
        sums = sums[..., 0::2] + sums[..., 1::2]
    peak = sums.amax(-1, keepdim=True)
    shift = ((peak.view(torch.int32) >> 23) - 127).clamp(LOW.value, HIGH.value)
    total = (sums * _power(-shift) * ONE.value).to(torch.int64).sum(-1, keepdim=True)
    mean = total.to(torch.float32) * (1.0 / ONE.value) * _power(shift) * (1.0 / wide.shape[-1])
    return torch.where(peak.isfinite(), mean, peak)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent of int32 from -126 to 127, as the float with these bits."""
    return ((exponent + 127) << 23).view(torch.float32)


@triton.jit
def mean_square(x, H: tl.constexpr):
    """[rows, B] float32, zeros past column H -> [rows, 1] float32, a scalar of one row."""
    return mean_square_of_parts((x,), H)


@triton.jit
def mean_square_of_parts(xs, H: tl.constexpr):
    """The same of rows held in tiles of one shape, side by side, powers of two from 8 wide, of any float dtype.

    One row's is a scalar: as a tensor of one it would take the layout of its sum, and whole rows would be moved to
    meet it there.
    """
    sums = _sums(xs)
    if xs[0].shape[0] == 1:
        peak = tl.max(_peak(sums))
        total = _sum_of_int64(_total(sums, peak))
    else:
        peak = tl.max(_peak(sums), 1, keep_dims=True)
        total = tl.sum(_total(sums, peak), 1, keep_dims=True)
    return _mean(peak, total, H)


@triton.jit
def mean_squares_of_rows(xs, ys, H: tl.constexpr):
    """Scalars of two rows, which wait for each other's threads together."""
    x_sums, y_sums = _sums(xs), _sums(ys)
    peaks = tl.max(tl.join(_peak(x_sums), _peak(y_sums)), 1)
    x_peak, y_peak = _two_scalars(peaks)
    x_total, y_total = _sums_of_int64(_total(x_sums, x_peak), _total(y_sums, y_peak))
    return _mean(x_peak, x_total, H), _mean(y_peak, y_total, H)


@triton.jit
def _sums(xs):
    """Of eight adjacent squares each."""
    sums = ()
    for part in tl.static_range(len(xs)):
        x = xs[part].to(tl.float32)
        sums += (_sums_of_two(_sums_of_two(_sums_of_two(x * x))),)
    return sums


@triton.jit
def _sums_of_two(x):
    rows: tl.constexpr = x.shape[0]
    pairs: tl.constexpr = x.shape[1] // 2
    if pairs > 0:
        x = tl.sum(tl.reshape(x, [rows, pairs, 2]), 2)
    return x


@triton.jit
def _peak(sums):
    """Bits of the largest in each column; as integers they order like the floats, with NaN on top."""
    peak = sums[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for part in tl.static_range(1, len(sums)):
        peak = tl.maximum(peak, sums[part].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return peak


@triton.jit
def _total(sums, peak):
    """int64, of each column."""
    scale = _power_of_two(-_shift(peak))
    total = (sums[0] * scale * ONE).to(tl.int64)
    for part in tl.static_range(1, len(sums)):
        total += (sums[part] * scale * ONE).to(tl.int64)
    return total


@triton.jit
def _sum_of_int64(x):
    """[1, C] of numbers below 2^45 -> scalar.

    Up to 256 columns, halves of 23 bits add up in int32, which a warp does in one instruction.
    """
    if x.shape[1] > 256:
        return tl.sum(x)
    halves = tl.sum(tl.join(_low(x), _high(x)), 1)
    low, high = _two_scalars(halves)
    return _whole(low, high)


@triton.jit
def _sums_of_int64(x, y):
    """Of both at once."""
    if x.shape[1] > 256:
        return _two_scalars(tl.sum(tl.join(x, y), 1))
    lows = tl.join(_low(x), _low(y))
    highs = tl.join(_high(x), _high(y))
    lows, highs = tl.split(tl.sum(tl.join(lows, highs), 1))
    x_low, y_low = _two_scalars(lows)
    x_high, y_high = _two_scalars(highs)
    return _whole(x_low, x_high), _whole(y_low, y_high)


@triton.jit
def _two_scalars(pair):
    """[1, 2] -> its elements. The maximum of one costs nothing, and is a scalar in Gluon too."""
    first, second = tl.split(pair)
    return tl.max(first, 0), tl.max(second, 0)


@triton.jit
def _low(x):
    return (x & 0x7FFFFF).to(tl.int32)


@triton.jit
def _high(x):
    return (x >> 23).to(tl.int32)


@triton.jit
def _whole(low, high):
    return (high.to(tl.int64) << 23) + low


@triton.jit
def _shift(peak):
    return tl.minimum(tl.maximum((peak >> 23) - 127, LOW), HIGH)


@triton.jit
def _mean(peak, total, H: tl.constexpr):
    mean = total.to(tl.float32) * (1.0 / ONE) * _power_of_two(_shift(peak)) * (1.0 / H)
    return tl.where(peak < 0x7F800000, mean, peak.to(tl.float32, bitcast=True))


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
