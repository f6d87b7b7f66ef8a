"""SwiGLU: the reference against HF's own activation, the kernel against the reference."""

import pytest
import torch
from interpreter import interpret
from transformers.activations import ACT2FN

from gemcutter.ops.activations.swiglu import swiglu, swiglu_launch, swiglu_reference
from gemcutter.verify.compare import count_differing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (1, 1536), (9, 12288), (4, 96)], ids=str)
def test_swiglu_is_hf(shape, dtype):
    gate, up = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    assert torch.equal(swiglu(torch.cat([gate, up], -1)), ACT2FN["silu"](gate) * up)
    exact = (gate.double() / (1 + (-gate.double()).exp()) * up.double()).float()
    torch.testing.assert_close(swiglu(torch.cat([gate, up], -1)).float(), exact, rtol=2e-2, atol=1e-5)


def test_refusals():
    x = randn(4, 64)
    for wrong, error, message in (
        (x.double(), TypeError, "gate_up is torch.float64"),
        (x[:, :63], ValueError, "63 columns"),
        (x.T, ValueError, "contiguous"),
        (x[0], ValueError, "two dims"),
    ):
        with pytest.raises(error, match=message):
            swiglu(wrong)


def test_opcheck():
    for x in (randn(4, 64), randn(4, 64, dtype=torch.bfloat16), randn(4, 100)[:, :64]):
        torch.library.opcheck(torch.ops.gemcutter.swiglu.default, (x,))


def test_kernel_in_the_interpreter():
    done = interpret(__file__)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def check_kernel() -> None:
    from gemcutter.verify import cuda_arithmetic

    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -90.0, 100.0, 3e38])
    for dtype in DTYPES:
        wide = randn(3, 2 * 1100 + 5, dtype=dtype)
        wide[0, : len(special)] = wide[0, 1100 : 1100 + len(special)] = special.to(dtype)
        for x in (wide[:, : 2 * 1100], wide[:, :62], wide[:, :256], wide[:0, :8]):
            got, want = swiglu_launch(x), cuda_arithmetic.swiglu(x)
            assert count_differing(got, want) == 0, (dtype, x.shape, count_differing(got, want))
            torch.testing.assert_close(got, swiglu_reference(x), rtol=1e-2, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_swiglu(dtype):
    bits = torch.arange(2**16)
    if dtype == torch.float32:
        bits = torch.randint(0, 2**32, (2**18,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    gate = bits.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype).cuda()
    for up in (torch.ones_like(gate), randn(len(gate), dtype=dtype, seed=1, device="cuda")):
        x = torch.cat([gate, up])[None]
        assert count_differing(swiglu(x), swiglu_reference(x)) == 0
    for rows, width in ((0, 1536), (1, 1536), (300, 12288), (5, 33)):
        x = randn(rows, 2 * width, dtype=dtype, device="cuda")
        assert count_differing(swiglu(x), swiglu_reference(x)) == 0
        assert count_differing(swiglu(x[3:4]), swiglu(x)[3:4]) == 0


if __name__ == "__main__":
    check_kernel()
    print("passed")
