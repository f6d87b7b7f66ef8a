"""Logits: vocabulary projection, then soft cap.

linear, / cap, tanh, * cap, each rounded to the dtype. In bf16 that makes ties; see `ops/sample.py`.
Source: HF `Gemma4ForCausalLM.forward`; on a CPU the bits are its bits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import libdevice


def logits(hidden: torch.Tensor, head: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """hidden [R, H] after the final norm, head [V, H], both of one float dtype -> [R, V] of that dtype."""
    out = F.linear(hidden, head)
    if softcap is None:
        return out
    return softcap_reference(out, softcap) if out.is_cpu else softcap_launch_(out, softcap)


def softcap_reference(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap


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


def softcap_launch_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """In place, one pass over memory instead of three; x contiguous."""
    assert x.is_contiguous(), f"logits must be contiguous, got strides {x.stride()}"
    if x.numel():
        block = 2048
        # PyTorch on a GPU divides by a scalar as a product with its float inverse; so do we, for its bits.
        inverse = (torch.ones(()) / cap).item()
        grid = (triton.cdiv(x.numel(), block),)
        _softcap_kernel[grid](x, x.numel(), inverse, float(cap), BLOCK=block, num_warps=4)
    return x
