"""Triton's interpreter with the arithmetic of a GPU, for kernels that run where there is none.

As it comes (3.6 to 3.9) it truncates float32 to bfloat16, so that half of all casts differ from PyTorch's and from
the card's, and it has no libdevice.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter


def install() -> None:
    """Mend the interpreter of this process, which must have been started with TRITON_INTERPRET=1."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are not interpreted: set TRITON_INTERPRET=1 before triton is imported")
    if not hasattr(interpreter._convert_float, "__wrapped__"):
        interpreter._convert_float = _with_right_bfloat16(interpreter._convert_float)
        for name in ("exp", "tanh"):
            setattr(libdevice, name, _by_torch(getattr(torch, name)))
        np.seterr(all="ignore")  # kernels are given inf, NaN and what overflows on purpose


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16 of the same shape: to nearest, ties to even, overflow to inf, any NaN to a quiet one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # past 2^32 with NaN only
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint32(0x7FC0), rounded).astype(np.uint16)


def _with_right_bfloat16(convert: Callable) -> Callable:
    @functools.wraps(convert)
    def wrapper(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16 and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return bfloat16_bits(data).reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << 16).reshape(data.shape)
        return convert(data, source, target, rounding)

    return wrapper


def _by_torch(function: Callable) -> Callable:
    """A libdevice function of float32 that has the bits of PyTorch's on this CPU."""

    def call(x: tl.tensor) -> tl.tensor:
        assert x.dtype == tl.float32, f"{function.__name__} of {x.dtype}"
        flat = torch.from_numpy(x.handle.data.ravel().copy())
        # Whole vectors only: PyTorch's scalar code, for what is left over, has other bits.
        whole = torch.nn.functional.pad(flat, (0, -len(flat) % 64))
        data = function(whole)[: len(flat)].numpy().reshape(x.handle.data.shape)
        return tl.core.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

    return call
