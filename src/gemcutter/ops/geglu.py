"""GeGLU: gelu_tanh(gate) * up.

The gelu is rounded to the dtype before the product, and the product again.
Source: HF `Gemma4TextMLP` (`gelu_pytorch_tanh`, not the erf GELU); on a CPU the bits are its bits on one thread and
where I is a multiple of the vector width (32 does, and holds for every Gemma 4): PyTorch's scalar tail has another
tanh, and several threads cut rows of this strided view where they do not cut HF's dense one.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import libdevice


def geglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I] of any float dtype, columns gate then up, row stride free -> [T, I] of the same dtype."""
    if gate_up.is_cpu:
        return geglu_reference(gate_up)
    return geglu_launch(gate_up)


def geglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) in float, the operations in PyTorch's order."""
    inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
    # The accurate tanh, as PyTorch's: the fast one is off by bf16 ulps where 1 + tanh cancels.
    return 0.5 * x * (1.0 + libdevice.tanh(inner))


@triton.jit
def _geglu_kernel(gate_up_ptr, out_ptr, row_stride, I: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < I
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + row * row_stride + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + I + col, mask=inside, other=0.0).to(tl.float32)
    out = gelu_tanh(gate).to(dtype).to(tl.float32) * up
    tl.store(out_ptr + row * I + col, out.to(dtype), mask=inside)


def geglu_launch(gate_up: torch.Tensor) -> torch.Tensor:
    rows, double = gate_up.shape
    assert double % 2 == 0 and gate_up.stride(1) == 1, f"want [T, 2I], rows contiguous, got {gate_up.shape}"
    out = torch.empty(rows, double // 2, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = 1024
        _geglu_kernel[(rows, triton.cdiv(double // 2, block))](
            gate_up, out, gate_up.stride(0), I=double // 2, BLOCK=block, num_warps=4
        )
    return out
