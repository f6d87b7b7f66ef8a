"""RMSNorm to FP8: the bits of residual add, norm and quantisation in turn, each of them held to others."""

import pytest
import torch
from fp8_cases import DTYPES, fp8_rows, same_bits
from interpreter import interpret
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemcutter.ops.norms.rms_norm import rms_norm, rms_norm_launch
from gemcutter.ops.norms.rms_norm_fp8 import rms_norm_fp8, rms_norm_fp8_launch, rms_norm_fp8_reference
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8, quantize_fp8_launch

EPS = 1e-6
WIDTHS = [70, 1536, 2816, 5120, 5376]


def weight_of(width: int, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    return (torch.randn(width, generator=torch.Generator().manual_seed(9)) * 0.5 + 1).to(device, dtype)


def residual_of(x: torch.Tensor) -> torch.Tensor:
    """Normal rows, one that cancels x, and one that overflows with it."""
    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(8)).to(x)
    residual[3], residual[14] = -x[3], x[14]
    return residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_hf_then_quantised(dtype, hf_sums_as_we_do):
    x, weight = fp8_rows(192, dtype), weight_of(192, dtype)
    residual = residual_of(x)
    norm = Gemma4RMSNorm(192, eps=EPS)
    norm.weight.data = weight
    quantized, none = rms_norm_fp8(x, weight, EPS)
    assert none is None and isinstance(quantized, Quantized)
    same_bits(quantized, quantize_fp8(norm(x)))
    quantized, hidden = rms_norm_fp8(x, weight, EPS, residual)
    same_bits([*quantized, hidden], [*quantize_fp8(norm((x + residual).contiguous())), x + residual])
    assert (hidden[3] == 0).all() and (quantized.q[3].float() == 0).all() and hidden[14].isinf().all()
    same_bits(rms_norm_fp8(x, None, EPS)[0], quantize_fp8(rms_norm(x, None, EPS)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(dtype):
    x = torch.empty(0, 5120, dtype=dtype)
    for residual in (None, x):
        quantized, hidden = rms_norm_fp8(x, weight_of(5120, dtype), EPS, residual)
        assert quantized.q.shape == (0, 5120) and quantized.q.dtype == torch.float8_e4m3fn
        assert quantized.scale.shape == (0, 1) and quantized.scale.dtype == torch.float32
        plain = quantized.dequantize(torch.bfloat16)
        assert plain.shape == (0, 5120) and plain.dtype == torch.bfloat16
        assert hidden is None if residual is None else (hidden.shape, hidden.dtype) == (x.shape, dtype)


def test_alone_as_in_a_crowd():
    x, weight = fp8_rows(704, torch.bfloat16), weight_of(704, torch.bfloat16)
    residual = residual_of(x)
    quantized, hidden = rms_norm_fp8(x, weight, EPS, residual)
    for row in range(16):
        one = slice(row, row + 1)
        got, added = rms_norm_fp8(x[one], weight, EPS, residual[one])
        same_bits([*got, added], [quantized.q[one], quantized.scale[one], hidden[one]])


def test_opcheck():
    x, weight = torch.randn(5, 70), torch.randn(70)
    for args in ((x, weight, EPS, None), (x, None, EPS, x.clone()), (x[:0], weight, EPS, x[:0])):
        torch.library.opcheck(torch.ops.gemcutter.rms_norm_fp8.default, args)


def test_refusals():
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match="x is torch.float64"):
        rms_norm_fp8(x.double(), weight.double(), EPS)
    with pytest.raises(ValueError, match="two dims"):
        rms_norm_fp8(x[None], weight, EPS)
    with pytest.raises(ValueError, match="up to 65536"):
        rms_norm_fp8(torch.ones(1, 65537), None, EPS)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm_fp8(x, weight[:4], EPS)
    with pytest.raises(TypeError, match="weight is torch.bfloat16"):
        rms_norm_fp8(x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match="residual has shape"):
        rms_norm_fp8(x, weight, EPS, x[:1])
    with pytest.raises(TypeError, match="residual is torch.float16"):
        rms_norm_fp8(x, weight, EPS, x.half())
    with pytest.raises(ValueError, match="residual has strides"):
        rms_norm_fp8(x, weight, EPS, torch.ones(8, 2).T)


def check_rows(device: str, widths: list[int], dtypes=DTYPES) -> None:
    for dtype in dtypes:
        for width in widths:
            x, weight = fp8_rows(width, dtype, width, device), weight_of(width, dtype, device)
            for residual in (None, residual_of(x)):
                for w in (weight, None):
                    got = rms_norm_fp8_launch(x, w, EPS, residual)
                    same_bits(got, rms_norm_fp8_reference(x, w, EPS, residual))
                    hidden = x if residual is None else got[2]
                    same_bits(got[:2], quantize_fp8_launch(rms_norm_launch(hidden, w, EPS)))
            # With a factor that overflows: eps 0 under a row whose squares vanish.
            same_bits(rms_norm_fp8_launch(x, weight, 0.0, None), rms_norm_fp8_reference(x, weight, 0.0, None))
            alone = rms_norm_fp8_launch(x[7:8], None, EPS, residual[7:8])
            same_bits(alone, [out[7:8] for out in got])
            none = rms_norm_fp8_launch(x[:0], weight, EPS, residual[:0])
            same_bits(none, rms_norm_fp8_reference(x[:0], weight, EPS, residual[:0]))


def test_interpreted():
    done = interpret(__file__)
    assert done.returncode == 0 and "rows passed" in done.stdout, (done.stdout + done.stderr)[-4000:]


@pytest.mark.gpu
def test_gpu_rows():
    check_rows("cuda", WIDTHS)
    for rows in (2, 257, 1024):
        x, residual = torch.randn(2, rows, 5376, device="cuda").bfloat16()
        weight = weight_of(5376, torch.bfloat16, "cuda")
        quantized, hidden = rms_norm_fp8(x, weight, EPS, residual)
        same_bits([*quantized, hidden], rms_norm_fp8_reference(x, weight, EPS, residual))


if __name__ == "__main__":
    # Poisoned, so that an unwritten output cannot pass for one of zeros.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    check_rows("cpu", [70])
    check_rows("cpu", [2816], [torch.bfloat16])
    print("rows passed")
