"""Logits: vocabulary projection, then soft cap.

linear, / cap, tanh, * cap, each rounded to the dtype. In bf16 that makes ties; see `ops/sample.py`.
Source: HF `Gemma4ForCausalLM.forward`; on a CPU the bits are its bits.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from gemcutter.ops.arguments import FLOATS
from gemcutter.ops.library import define
from gemcutter.ops.linear import linear


def logits(hidden: torch.Tensor, head: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """hidden [R, H] after the final norm, head [V, H], both of one float dtype -> [R, V] of that dtype."""
    out = linear(hidden, head)
    if softcap is not None:
        softcap_(out, softcap)
    return out


def softcap_(x: torch.Tensor, cap: float) -> None:
    """tanh(x / cap) * cap in place: one pass over memory on a GPU, instead of three.

    Args:
        x: any shape, dense, of float32, bfloat16 or float16; past 2^31 elements too.
        cap: positive.

    Raises:
        TypeError, ValueError: on other dtypes, strides and caps.
    """
    _softcap_(x, cap)


def check_softcap_(x: torch.Tensor, cap: float) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}: float32, bfloat16 or float16 are taken; cast it")
    if not x.is_contiguous():
        raise ValueError(
            f"x has strides {x.stride()}: it is changed in place and must be dense; cap the whole tensor"
        )
    if not 0 < cap < float("inf"):
        raise ValueError(f"cap is {cap}: a positive number is needed")


def softcap_reference_(x: torch.Tensor, cap: float) -> None:
    x.copy_(torch.tanh(x / cap) * cap)


@triton.jit
def _softcap_kernel(x_ptr, size, inverse_cap, cap, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = (x * inverse_cap).to(dtype).to(tl.float32)
    # libdevice's tanh flushes denormals, PyTorch's does not; below 2^-13 tanh(x) rounds to x.
    x = tl.where(tl.abs(x) < 1e-30, x, libdevice.tanh(x)).to(dtype).to(tl.float32)
    tl.store(x_ptr + at, (x * cap).to(dtype), mask=inside)


def softcap_launch_(x: torch.Tensor, cap: float) -> None:
    if x.numel():
        block = 2048
        # PyTorch on a GPU divides by a scalar as a product with its float inverse; so do we, for its bits.
        inverse = (torch.ones((), device="cpu") / cap).item()
        _softcap_kernel[(triton.cdiv(x.numel(), block),)](
            x, x.numel(), inverse, cap, BLOCK=block, num_warps=4, enable_fp_fusion=False
        )


_softcap_ = define(
    "softcap_(Tensor(a!) x, float cap) -> ()",
    check=check_softcap_, reference=softcap_reference_, launch=softcap_launch_,
)  # fmt: skip
