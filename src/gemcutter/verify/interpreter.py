"""Triton's interpreter with the arithmetic of a GPU, for kernels that run where there is none.

As it comes (3.6 to 3.9) it truncates float32 to bfloat16, so that half of all casts differ from PyTorch's and from
the card's; it multiplies matrices of bfloat16 as integers and has no libdevice; in 3.6 a fused multiply-add rounds
twice.
"""

import functools
import warnings
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

from gemcutter.verify import floats


def install() -> None:
    """Mend the interpreter of this process, which must have been started with TRITON_INTERPRET=1."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are not interpreted: set TRITON_INTERPRET=1 before triton is imported")
    if not hasattr(interpreter._convert_float, "__wrapped__"):
        interpreter._convert_float = _with_right_bfloat16(interpreter._convert_float)
        builder = interpreter.InterpreterBuilder
        builder.create_fma = _fma
        builder.create_dot = _of_bfloat16_values(builder.create_dot)
        for name in ("exp", "tanh"):
            setattr(libdevice, name, _by_torch(getattr(torch, name)))
        # Kernels are given inf, NaN and what overflows on purpose.
        np.seterr(all="ignore")
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)


def _with_right_bfloat16(convert: Callable) -> Callable:
    @functools.wraps(convert)
    def wrapper(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16 and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return floats.bfloat16_bits(data).reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << 16).reshape(data.shape)
        return convert(data, source, target, rounding)

    return wrapper


def _of_bfloat16_values(dot: Callable) -> Callable:
    """Products of the bfloat16 numbers, where the interpreter would multiply their bits as integers."""

    def wrapper(builder, a, b, *more):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (builder.cast_impl(part, tl.float32) for part in (a, b))
        return dot(builder, a, b, *more)

    return wrapper


def _fma(builder, x, y, z):
    assert x.dtype.scalar == tl.float32, f"fma of {x.dtype}"
    wide = (torch.from_numpy(part.data.copy()) for part in (x, y, z))
    return interpreter.TensorHandle(floats.fma(*wide).numpy(), x.dtype.scalar)


def _by_torch(function: Callable) -> Callable:
    """A libdevice function of float32 that has the bits of PyTorch's on this CPU."""

    def call(x: tl.tensor) -> tl.tensor:
        assert x.dtype == tl.float32, f"{function.__name__} of {x.dtype}"
        data = floats.whole_vectors(function, torch.from_numpy(x.handle.data.copy())).numpy()
        return tl.core.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

    return call
