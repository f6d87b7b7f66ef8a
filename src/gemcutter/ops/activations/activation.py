"""The activations between an MLP's gate and its up, for ops and kernels that take either."""

from enum import StrEnum

import triton
import triton.language as tl

from gemcutter.ops.activations.geglu import geglu_reference, gelu
from gemcutter.ops.activations.swiglu import silu, swiglu_reference


class Activation(StrEnum):
    """What the gate goes through; the value is a constant of kernels."""

    GELU_TANH = "gelu_tanh"
    SILU = "silu"


# Of [T, 2I], gate then up: [T, I].
REFERENCES = {Activation.GELU_TANH: geglu_reference, Activation.SILU: swiglu_reference}


def check_activation(activation: str) -> None:
    if activation not in tuple(Activation):
        raise ValueError(f"activation is {activation!r}: one of {', '.join(Activation)} is needed")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Of any float dtype -> the same, rounded from float."""
    if ACTIVATION == "silu":
        return silu(x.to(tl.float32)).to(x.dtype)
    else:
        return gelu(x)
