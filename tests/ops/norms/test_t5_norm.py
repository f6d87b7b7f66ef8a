"""The norm that rounds twice: the reference against HF's module, the kernel against the reference."""

import pytest
import torch
from interpreter import interpret
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm

from gemcutter.ops.mean_square import mean_square_reference
from gemcutter.ops.norms.rms_norm import rms_norm
from gemcutter.ops.norms.t5_norm import t5_norm, t5_norm_launch, t5_norm_reference
from gemcutter.verify.compare import count_differing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 64), (1, 1), (5, 5120), (3, 4, 128), (7, 33)]


def randn(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def hf_norm(x, weight, eps=1e-5):
    """HF's forward with our sum of squares: what remains is every other operation and rounding."""
    norm = Glm4MoeRMSNorm(len(weight), eps=eps).to(x.dtype)
    norm.weight.data = weight
    whole = torch.Tensor.mean
    try:
        torch.Tensor.mean = lambda squares, *args, **kwargs: mean_square_reference(x.float())
        return norm(x).detach()
    finally:
        torch.Tensor.mean = whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_hf(shape, dtype):
    weight = randn(shape[-1], dtype=dtype, seed=1) + 1
    for scale in (1e-3, 1.0, 300.0):
        x = randn(*shape, dtype=dtype) * scale
        assert torch.equal(t5_norm(x, weight, 1e-5), hf_norm(x, weight))
        truth = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        # Two roundings of half an ulp; in float32 the factor has some of its own.
        bound = torch.finfo(dtype).eps * (3.0 if dtype == torch.float32 else 1.1) * truth.abs() + 1e-7
        assert ((t5_norm(x, weight, 1e-5).double() - truth).abs() <= bound).all()


def test_rounds_before_the_weight():
    x, weight = randn(50, 5120, dtype=torch.bfloat16), randn(5120, dtype=torch.bfloat16, seed=1) + 1
    differing = (t5_norm(x, weight, 1e-5) != rms_norm(x, weight, 1e-5)).float().mean()
    assert 0.1 < differing < 0.5


def test_refusals_and_opcheck():
    x, weight = randn(4, 64), randn(64)
    for args, error, message in (
        ((x.double(), weight, 1e-5), TypeError, "x is torch.float64"),
        ((x, weight[:63], 1e-5), ValueError, "weight has shape"),
        ((x, weight.half(), 1e-5), TypeError, "weight is torch.float16"),
        ((x.T, randn(4), 1e-5), ValueError, "contiguous"),
    ):
        with pytest.raises(error, match=message):
            t5_norm(*args)
    torch.library.opcheck(torch.ops.gemcutter.t5_norm.default, (x, weight, 1e-5))


def test_kernel_in_the_interpreter():
    done = interpret(__file__)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [128, 5120, 33])
def test_gpu_kernel(width, dtype):
    weight = randn(width, dtype=dtype, seed=1, device="cuda") + 1
    for rows in (0, 1, 700):
        wide = randn(rows, 2, width + 8, dtype=dtype, device="cuda") * 5
        for x in (wide[:, :, :width], wide[:, 1, :width]):
            assert count_differing(t5_norm(x, weight, 1e-5), t5_norm_reference(x, weight, 1e-5)) == 0


if __name__ == "__main__":
    for dtype in DTYPES:
        for shape in SHAPES:
            x, weight = randn(*shape, dtype=dtype) * 30, randn(shape[-1], dtype=dtype, seed=1) + 1
            x.view(-1)[:5:2] = float("inf")
            assert count_differing(t5_norm_launch(x, weight, 1e-5), t5_norm_reference(x, weight, 1e-5)) == 0
    print("passed")
