"""Linear in float: against float64, and a row alone against the row in a crowd."""

import pytest
import torch
import torch.nn.functional as F

from gemcutter.ops.linears.float_linear import float_linear
from gemcutter.ops.linears.linear import MOST_STREAMED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(rows, columns, depth, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, depth, generator=generator) for n in (rows, columns))
    return x.to(device, dtype), (weight * depth**-0.5).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_is_hfs_float_linear(rows, dtype):
    x, weight = case(rows, 32, 192, dtype)
    got, want = float_linear(x, weight), x.double() @ weight.double().T
    assert got.dtype == torch.float32 and got.shape == (rows, 32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(got, F.linear(x.float(), weight.float()), rtol=1e-5, atol=3e-6)
    for some in (1, 3, 16, 17):
        assert torch.equal(float_linear(x[-some:], weight), got[-some:])
    if rows:
        strided = x.repeat(1, 2)[:, :192]
        torch.library.opcheck(torch.ops.gemcutter.float_linear.default, (strided, weight))


def test_refusals():
    x, weight = case(3, 16, 32, torch.bfloat16)
    for arguments, error, message in (
        ((x.double(), weight), TypeError, "x is torch.float64"),
        ((x, weight[:, :24]), ValueError, "weight has rows of 24: 32 are needed"),
        ((x, weight.float()), TypeError, "both must agree"),
    ):
        with pytest.raises(error, match=message):
            float_linear(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(160, 5120), (128, 4096), (33, 72)], ids=str)
def test_gpu_rows_do_not_know_each_other_and_are_exact(shape):
    x, weight = case(2048, *shape, torch.bfloat16, "cuda")
    crowd, want = float_linear(x, weight), x.double() @ weight.double().T
    float_error = (F.linear(x.float(), weight.float()).double() - want).norm() / want.norm()
    error = (crowd.double() - want).norm() / want.norm()
    print(f"{shape}: relative error {error:.2e}, in float {float_error:.2e}")
    assert error < 1e-5
    for rows in (1, 2, 16, 17, 33, MOST_STREAMED, MOST_STREAMED + 1, 256, 1000):
        assert torch.equal(float_linear(x[-rows:], weight), crowd[-rows:]), rows
