"""tanh: every float on a GPU, and that no compiled kernel jumps over it."""

import re

import pytest
import torch
import triton
import triton.language as tl

from gemcutter.ops.tanh import tanh
from gemcutter.verify.compare import count_differing
from gemcutter.verify.compiles import compile_op


@triton.jit
def tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tanh(tl.load(x_ptr + at)))


@pytest.mark.gpu
def test_gpu_every_float():
    share = 2**28
    for first in range(0, 2**32, share):
        x = torch.arange(first, first + share, device="cuda").to(torch.int32).view(torch.float32)
        got = torch.full_like(x, 7)
        tanh_kernel[(share // 1024,)](x, got, BLOCK=1024, enable_fp_fusion=False)
        wrong = count_differing(got, torch.tanh(x))
        assert not wrong, f"{wrong} floats from bits {first:#x} on"


@pytest.mark.parametrize("name", ["softcap_: logits._softcap_kernel", "geglu: geglu._gelu_mul_kernel"])
def test_has_no_branch(name):
    op, kernel = name.split(": ")
    for compiled in compile_op(op, "sm_90")[kernel]:
        ptx = compiled.asm["ptx"]
        assert "ex2.approx.ftz.f32" in ptx and "rcp.approx.ftz.f32" in ptx
        assert not re.search(r"^\s*(@!?%p\d+\s+)?(bra|call)", ptx, re.M)
