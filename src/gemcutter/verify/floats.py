"""Float operations of a GPU, on a CPU."""

from collections.abc import Callable

import numpy as np
import torch


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16 of the same shape: to nearest, ties to even, overflow to inf, any NaN to a quiet one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # past 2^32 with NaN only
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint32(0x7FC0), rounded).astype(np.uint16)


def fma(x: torch.Tensor, y: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """x * y + z of float32, rounded once.

    The product is exact in double. The sum is rounded to odd there (whatever was cut off sets the last bit), so
    that the second rounding cannot fall on a tie that the first has made.
    """
    z = z.double()
    product = x.double() * torch.as_tensor(y, dtype=torch.float32).double()
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    bits = total.view(torch.int64)
    cut = (bits & 1 == 0) & (error != 0) & total.isfinite()
    away = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(cut, bits + away, bits).view(torch.float64).float()


def whole_vectors(function: Callable, x: torch.Tensor) -> torch.Tensor:
    """function of each element; PyTorch's scalar code, for what its vectors leave over, has other bits."""
    flat = torch.nn.functional.pad(x.ravel(), (0, -x.numel() % 64))
    return function(flat)[: x.numel()].view(x.shape)
