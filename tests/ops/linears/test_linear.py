"""Linear: rows that do not know each other, whatever kernel they go through."""

import pytest
import torch
import torch.nn.functional as F

from gemcutter.ops.hopper import loads_by_tma
from gemcutter.ops.linears.linear import (
    MOST_STREAMED,
    goes_to_library,
    linear,
    linear_launch,
    linear_reference,
    with_library_rows,
)
from gemcutter.ops.linears.linear_row_hopper import streams_row
from gemcutter.ops.row_blocks import linear_in_blocks

# Weights [N, K] of released layers: qkv, o, gate and up, down, router; the longest sums; odd ones of small models.
SHAPES = [(8192, 2816), (2816, 8192), (4224, 2816), (2816, 2112), (128, 2816), (5376, 21504), (2560, 10240)]
SMALL = [(576, 192), (256, 256), (70, 100), (33, 24)]


def case(rows: int, columns: int, depth: int, dtype, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator, device=device).to(dtype)
    return x, (torch.randn(columns, depth, generator=generator, device=device) * depth**-0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_is_a_linear_layer(rows, dtype):
    x, weight = case(rows, 70, 96, dtype)
    want = x.double() @ weight.double().T
    torch.testing.assert_close(
        linear(x, weight).double(), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2
    )
    strided = x.repeat(1, 2)[:, :96] if rows else x  # opcheck cannot copy an empty strided tensor
    torch.library.opcheck(torch.ops.gemcutter.linear.default, (strided, weight, None))
    torch.library.opcheck(torch.ops.gemcutter.linear.default, (strided, weight, weight[:, 0].contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_bias_is_added_before_the_rounding(rows, dtype):
    x, weight = case(rows, 70, 96, dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, want = linear(x, weight, bias), x.double() @ weight.double().T + bias.double()
    assert torch.equal(got, linear_in_blocks(x, weight, bias)) and got.dtype == dtype
    # Half an ulp of the result; a product rounded before the sum is off by up to an ulp of the product more.
    eps = torch.finfo(dtype).eps
    assert ((got.double() - want).abs() <= 0.51 * eps * want.abs().clamp(min=1e-3) + 3e-6).all()
    if rows:
        assert torch.equal(linear(x[-1:], weight, bias), got[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SMALL, (192, 768), (256, 1024), (2112, 2816)], ids=str)
def test_rows_do_not_know_each_other(shape, dtype):
    """On a CPU: alone, among others, at any place in the block, as a slice of wider rows."""
    x, weight = case(100, *shape, dtype)
    crowd = linear(x, weight)
    for rows in (1, 2, 3, 8, 15, 16, 17, 33, 64):
        assert torch.equal(linear(x[-rows:], weight), crowd[-rows:]), rows
    assert torch.equal(linear(torch.cat([x, x], 1)[:, : x.shape[1]], weight), crowd)
    assert torch.equal(torch.cat([linear(row[None], weight) for row in x[::7]]), crowd[::7])


@pytest.mark.parametrize("columns", [7, 64, 128, 130, 2112, 4224, 4225, 9216])
def test_library_gets_rows_that_it_gets_in_an_engine(columns):
    for rows in (0, 1, 40, 64, 65, 100, 300, 2112, 2113, 5000):
        x = torch.ones(rows, 2)
        filled = with_library_rows(x, columns)
        assert goes_to_library(len(filled), columns) and torch.equal(filled[:rows], x) and not filled[rows:].any()
        assert (filled is x) == goes_to_library(rows, columns)
    assert goes_to_library(65, 4225) and not goes_to_library(64, 9216) and not goes_to_library(2112, 128)


def test_refusals():
    x, weight = case(3, 16, 32, torch.bfloat16)
    for arguments, error, message in (
        ((x.double(), weight), TypeError, "x is torch.float64"),
        ((x[0], weight), ValueError, "two dims"),
        ((x, weight[:, :24]), ValueError, "weight has rows of 24: 32 are needed"),
        ((x, weight.float()), TypeError, "both must agree"),
        ((x, weight.repeat(1, 2)[:, :32]), ValueError, "must be dense"),
        ((x, weight, weight[:, 0].float()), TypeError, "bias is torch.float32"),
        ((x, weight, weight[:15, 0].contiguous()), ValueError, "bias has shape"),
    ):
        with pytest.raises(error, match=message):
            linear(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_rows_do_not_know_each_other(shape):
    """The kernel of few rows, cuBLASLt for many: one row's bits, alone and among up to 2048."""
    x, weight = case(2048, *shape, torch.bfloat16, "cuda")
    crowd = linear(x, weight)
    want = (x.double() @ weight.double().T).to(torch.bfloat16)
    assert (crowd.float() - want.float()).norm() <= 3e-3 * want.float().norm()
    for rows in (1, 2, 3, 16, 17, 32, 33, MOST_STREAMED, MOST_STREAMED + 1, 100, 255, 256, 257, 1000):
        begin = 2048 - rows
        wrong = (linear(x[begin:], weight) != crowd[begin:]).sum().item()
        assert not wrong, f"{wrong} elements of {rows} rows depend on their company"
    alone = torch.cat([linear(x[i : i + 1], weight) for i in range(0, 2048, 97)])
    assert torch.equal(alone, crowd[::97])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(14336, 5120), (1152, 256)], ids=str)
def test_gpu_bias_has_the_same_bits_in_any_crowd(shape):
    """GLM-4.7's q/k/v, by the kernel of few rows, by the plain one and by cuBLASLt."""
    x, weight = case(300, *shape, torch.bfloat16, "cuda")
    bias = torch.randn(shape[0], device="cuda").bfloat16() * 4
    crowd = linear(x, weight, bias)
    for rows in (1, 5, 16, 17, 33, 64, 65, 200):
        assert torch.equal(linear(x[:rows], weight, bias), crowd[:rows]), rows
    odd = torch.empty(64, shape[1] + 1, dtype=x.dtype, device="cuda")[:, : shape[1]].copy_(x[:64])
    assert not loads_by_tma(odd, weight) and torch.equal(linear(odd, weight, bias), crowd[:64])
    assert rounded_once(crowd, x, weight, bias)


def rounded_once(got, x, weight, bias) -> bool:
    """Half an ulp of the sum off, and what the accumulator loses of its terms: cut at 2^-24 in each step of 16, so
    2^-20 of their magnitudes is plenty at K = 5120. A product rounded by itself is off by 2^-9 of it.
    """
    want = x.double() @ weight.double().T + bias.double()
    lost = 2**-20 * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    return bool(((got.double() - want).abs() <= 0.5 * torch.finfo(got.dtype).eps * want.abs() + lost).all())


def test_a_product_rounded_before_the_bias_would_be_seen():
    x, weight = case(20, 300, 5120, torch.bfloat16)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(1)).bfloat16() * 4
    assert rounded_once(linear(x, weight, bias), x, weight, bias)
    assert not rounded_once(linear(x, weight) + bias, x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_gpu_small_and_odd_shapes(shape, dtype):
    """Where TMA cannot load, the plain kernel streams; float32 always goes through it."""
    x, weight = case(300, *shape, dtype, "cuda")
    crowd = linear(x, weight)
    want = x.double() @ weight.double().T
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert (crowd.double() - want).norm() <= bound * want.norm()
    for rows in (0, 1, 5, 20, 64, 65, 128):
        assert torch.equal(linear(x[:rows], weight), crowd[:rows]), rows
    wide = torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : shape[1]]
    assert torch.equal(linear(wide[:9], weight), crowd[:9])


@pytest.mark.gpu
def test_gpu_both_kernels_have_the_bits_of_cublas_without_a_split():
    x, weight = case(64, 2816, 4096, torch.bfloat16, "cuda")
    assert torch.cuda.get_device_capability() != (9, 0) or loads_by_tma(x, weight)
    odd = torch.empty(64, 4097, dtype=x.dtype, device="cuda")[:, :4096].copy_(x)  # rows that TMA does not take
    assert not loads_by_tma(odd, weight)
    want = linear_reference(x, weight)
    assert torch.equal(linear_launch(x, weight), want) and torch.equal(linear_launch(odd, weight), want)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 2816), (128, 1088), (130, 1088), (7, 320), (65, 321)], ids=str)
def test_gpu_narrow_weights_have_the_bits_of_the_reference(shape):
    """Of few rows cuBLASLt, asked for no more, differs in one element of thousands; so it does of
    any number of rows that do not begin at multiples of 16 bytes.
    """
    for seed in range(40):
        generator = torch.Generator("cuda").manual_seed(seed)
        x, weight = (
            torch.randn(n, shape[1], generator=generator, device="cuda").bfloat16() for n in (40, shape[0])
        )
        for rows in (1, 2, 7, 8, 9, 16, 17, 40):
            wrong = (linear(x[:rows], weight) != linear_reference(x[:rows], weight)).sum().item()
            assert not wrong, f"{wrong} elements of {rows} rows, seed {seed}"
        crowd = with_library_rows(x, len(weight))
        assert torch.equal(linear(crowd, weight)[:40], linear(x, weight)), seed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2560, 10240), (70, 256), (8448, 1088), (100, 64), (4225, 2112), (33, 22 * 1024)], ids=str
)
def test_gpu_one_row_has_the_bits_of_many(shape, dtype):
    """Tiles of 32 and of 64 rows, the last one cut, and K that fills neither its last step nor its last part."""
    x, weight = case(3, *shape, dtype, "cuda")
    assert torch.cuda.get_device_capability() != (9, 0) or streams_row(x[:1], weight)
    bias = weight[:, 0].contiguous()
    x[1, :9] = torch.tensor([3e4, -3e4, 1e-6, -0.0, 0.0, 1e-40, 5.0, -7.0, 2.0])
    for given in (None, bias):
        crowd = linear(x, weight, given)
        for row in range(3):
            assert torch.equal(linear(x[row : row + 1], weight, given), crowd[row : row + 1]), (row, given is None)
    x[2, 5] = float("nan")
    assert linear(x[2:], weight).isnan().all()


@pytest.mark.gpu
def test_gpu_leaves_pytorchs_settings_as_they_were():
    x, weight = case(200, 128, 256, torch.bfloat16, "cuda")
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, torch.backends.cuda.preferred_blas_library()
    linear(x, weight)
    assert before == (matmul.allow_bf16_reduced_precision_reduction, torch.backends.cuda.preferred_blas_library())
    assert F.linear(x, weight).shape == (200, 128)
