"""Logits: vocabulary projection, then soft cap.

linear, / cap, tanh, * cap, each rounded to the dtype. In bf16 that makes ties; see `ops/tokens/sample.py`.
Source: HF `Gemma4ForCausalLM.forward`; on a CPU the bits are its bits.
"""

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from gemcutter.ops.arguments import FLOATS
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.tanh import INTERPRETED, tanh


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
def _softcap_kernel(x_ptr, size, inverse_cap, cap, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    join(CHAINED)
    release(CHAINED)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = _rounded(x.to(tl.float32) * inverse_cap, x.dtype)
    y = _rounded(tanh(y), x.dtype)
    tl.store(x_ptr + at, (y * cap).to(x.dtype), mask=inside)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 -> float32"""
    if dtype != tl.bfloat16 or INTERPRETED or not cuda_capability_geq(9, 0):
        return x.to(dtype).to(tl.float32)
    else:
        # Two at a time: one by one a conversion takes the unit of ex2 and rcp, which bounds this kernel.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 pair;
            cvt.rn.bf16x2.f32 pair, $3, $2;
            shl.b32 $0, pair, 16;
            and.b32 $1, pair, 0xFFFF0000;
            }""",
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


def softcap_launch_(x: torch.Tensor, cap: float) -> None:
    size = x.numel()
    if size:
        # Few elements need many threads, many need programs that move more than it takes to start them.
        block, warps = (1024, 8) if size <= 2**20 else (2048, 8) if size <= 2**22 else (4096, 4)
        # PyTorch on a GPU divides by a scalar as a product with its float inverse; so do we, for its bits.
        inverse = (torch.ones((), device="cpu") / cap).item()
        _softcap_kernel[(triton.cdiv(size, block),)](
            x, size, inverse, cap, BLOCK=block, num_warps=warps, enable_fp_fusion=False, **chained(x)
        )


_softcap_ = define(
    "softcap_(Tensor(a!) x, float cap) -> ()",
    check=check_softcap_, reference=softcap_reference_, launch=softcap_launch_,
)  # fmt: skip
