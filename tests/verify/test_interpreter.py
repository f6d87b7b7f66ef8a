"""The interpreter's casts and functions against PyTorch's."""

import numpy as np
import pytest
import torch
from interpreter import interpret

from gemcutter.verify.floats import bfloat16_bits
from gemcutter.verify.interpreter import install


def hard_values() -> torch.Tensor:
    """float32: every bfloat16 with what lies around it, halfway too; NaN payloads, denormals, random bits."""
    top = torch.arange(1 << 16, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).int()
    return torch.cat([(top[:, None] | low).ravel(), random]).view(torch.float32)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    equal = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
    return bool(equal.all())


def test_rounds_to_bfloat16_as_pytorch():
    x = hard_values()
    got = torch.from_numpy(bfloat16_bits(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert same_bits(got, x.bfloat16())
    assert got[x == 0].view(torch.int16).unique().tolist() == [-0x8000, 0]  # signs of zeros stay


def test_truncation_would_be_seen():
    x = hard_values()
    truncated = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert not same_bits(truncated, x.bfloat16())


def test_needs_an_interpreter():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        install()


def test_in_the_interpreter():
    done = interpret(__file__)
    assert done.returncode == 0 and "all casts" in done.stdout, (done.stdout + done.stderr)[-4000:]


def check_casts(x: torch.Tensor) -> None:
    blocks = len(x) // 4096
    x = x[: blocks * 4096]
    got, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    cast_kernel[(blocks,)](x, got, back, BLOCK=4096)
    assert same_bits(got, x.bfloat16())
    assert torch.equal(back.view(torch.int32)[~x.isnan()], x.bfloat16().float().view(torch.int32)[~x.isnan()])
    assert back[x.isnan()].isnan().all()


def check_functions(x: torch.Tensor) -> None:
    x = torch.cat([x[:: len(x) // 4000], torch.randn(100)])[:4001]  # not a whole number of vectors
    for name in ("exp", "tanh"):
        got = torch.empty_like(x)
        function_kernel[(1,)](x, got, len(x), NAME=name, BLOCK=4096)
        padded = torch.cat([x, torch.zeros(63)])
        want = getattr(torch, name)(padded)[: len(x)]
        assert torch.equal(got[~want.isnan()], want[~want.isnan()]) and got[want.isnan()].isnan().all(), name


def check_products(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16).to(dtype)
    got = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, got)
    torch.testing.assert_close(got, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def check_fma(x: torch.Tensor) -> None:
    """x * x - round(x * x): what one rounding cuts off, and nothing where there are two."""
    got = torch.empty_like(x)
    fma_kernel[(1,)](x, got, BLOCK=len(x))
    exact = x.double() * x.double() - (x * x).double()
    assert torch.equal(got, exact.float()) and got.count_nonzero() > len(x) / 2


if __name__ == "__main__":
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    @triton.jit
    def cast_kernel(x_ptr, out_ptr, back_ptr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        rounded = tl.load(x_ptr + at).to(tl.bfloat16)
        tl.store(out_ptr + at, rounded)
        tl.store(back_ptr + at, rounded.to(tl.float32))

    @triton.jit
    def function_kernel(x_ptr, out_ptr, size, NAME: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0)
        y = libdevice.exp(x) if NAME == "exp" else libdevice.tanh(x)
        tl.store(out_ptr + at, y, mask=at < size)

    @triton.jit
    def dot_kernel(a_ptr, b_ptr, out_ptr):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))

    @triton.jit
    def fma_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at)
        tl.store(out_ptr + at, tl.fma(x, x, -(x * x)))

    install()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_products(dtype)
    check_fma(torch.randn(256))
    check_casts(hard_values())
    check_functions(hard_values())
    print("all casts")
