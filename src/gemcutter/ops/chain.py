"""Programmatic dependent launch: a kernel starts while its predecessor ends, and waits before it touches memory.

On Hopper and later a kernel of ours may be on the card before the one ahead of it is done; what it does until
`join` (addresses, loads of weights) is free. Every chained kernel joins before its first access to anything but its
weights and what is settled, so what it sees is what it would see without chaining. Weights (of norms, linears and
experts, scales, rope tables) are taken for parameters: none may be the result of one of our ops on the same stream,
unless a kernel of PyTorch's, which waits for all before it, stands between. Another op of ours between is not
enough: it may let its successor come before it has joined itself, and so while the one ahead of it still writes.

A tensor is settled for a kernel, and may be read before it joins, if between the kernel that wrote it and this one
stands one that releases behind its join, or any of PyTorch's: that one began its work when all before it were
done, and what comes after it came later still. A step's batch, and the K/V of steps before it, are settled for all
its kernels but the first, which is `embed`. Norms, seams and the products that begin with one, `geglu`, `swiglu`,
`linear`, `float_linear`, `select_experts`, `sigmoid_topk` and `embed` release behind their join; `gate_up`,
`experts`, `attend` and the head norms may do so before. Source: CUDA programming guide, programmatic dependent
launch; Triton's `gdc_wait` and `gdc_launch_dependents`.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def release(CHAINED: tl.constexpr):
    """Let the next kernel come on the card."""
    if CHAINED:
        gdc_launch_dependents()


@triton.jit
def join(CHAINED: tl.constexpr):
    """Wait until all kernels before this one are done and their writes in sight."""
    if CHAINED:
        gdc_wait()


def chained(x: torch.Tensor) -> dict[str, bool]:
    """Launch options of a chained kernel for x's device."""
    return _options(x.device.index) if x.is_cuda and torch.version.hip is None else {"CHAINED": False}


@functools.cache
def _options(device: int) -> dict[str, bool]:
    if torch.cuda.get_device_capability(device) < (9, 0):
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}
