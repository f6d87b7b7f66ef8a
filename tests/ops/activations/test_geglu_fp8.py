"""GeGLU to FP8: the bits of GeGLU, then quantisation, each held to HF and brute force elsewhere."""

import pytest
import torch
from fp8_cases import DTYPES, fp8_rows, same_bits
from interpreter import interpret
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextMLP

from gemcutter.ops.activations.geglu import geglu_launch
from gemcutter.ops.activations.geglu_fp8 import geglu_fp8, geglu_fp8_launch, geglu_fp8_reference
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8, quantize_fp8_launch

WIDTHS = [70, 704, 2112, 6144]
WIDE = [10240, 15360, 21504]


def gate_up_of(width: int, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    """[16, 2 * width]: rows of every kind in both halves, a wider stride apart."""
    x = fp8_rows(2 * width, dtype, width, device)
    x[0, :width] = -10.0  # the gelu is -0 or nearly
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_hf_then_quantised(dtype):
    config = Gemma4TextConfig(hidden_size=16, intermediate_size=96, num_kv_shared_layers=0)
    mlp = Gemma4TextMLP(config, layer_idx=0)
    x = gate_up_of(96, dtype)
    gate, up = (half.contiguous() for half in x.chunk(2, -1))
    found = geglu_fp8(x)
    assert isinstance(found, Quantized)
    same_bits(found, quantize_fp8(mlp.act_fn(gate) * up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(dtype):
    found = geglu_fp8(torch.empty(0, 2 * 704, dtype=dtype))
    assert found.q.shape == (0, 704) and found.q.dtype == torch.float8_e4m3fn
    assert found.scale.shape == (0, 1) and found.scale.dtype == torch.float32
    plain = found.dequantize(torch.bfloat16)
    assert plain.shape == (0, 704) and plain.dtype == torch.bfloat16


def test_alone_as_in_a_crowd():
    x = gate_up_of(704, torch.bfloat16)
    q, scale = geglu_fp8(x)
    for row in range(16):
        same_bits(geglu_fp8(x[row : row + 1]), (q[row : row + 1], scale[row : row + 1]))


def test_opcheck():
    for x in (torch.randn(5, 64), torch.randn(5, 140).bfloat16()[:, :64], torch.randn(0, 64)):
        torch.library.opcheck(torch.ops.gemcutter.geglu_fp8.default, (x,))


def test_refusals():
    with pytest.raises(TypeError, match="gate_up is torch.int64"):
        geglu_fp8(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="even number"):
        geglu_fp8(torch.ones(2, 7))
    with pytest.raises(ValueError, match="two dims"):
        geglu_fp8(torch.ones(8))
    with pytest.raises(ValueError, match="contiguous"):
        geglu_fp8(torch.ones(8, 2).T)
    with pytest.raises(ValueError, match="up to 65536"):
        geglu_fp8(torch.ones(1, 131_074))


def check_rows(device: str, widths: list[int], dtypes=DTYPES) -> None:
    """Against the two kernels in turn, which share its gelu: on a CPU PyTorch's has other bits."""
    for dtype in dtypes:
        for width in widths:
            x = gate_up_of(width, dtype, device)
            got = geglu_fp8_launch(x)
            same_bits(got, quantize_fp8_launch(geglu_launch(x)))
            same_bits(geglu_fp8_launch(x[7:8]), [out[7:8] for out in got])
            same_bits(geglu_fp8_launch(x[:0]), geglu_fp8_reference(x[:0]))


def test_interpreted():
    done = interpret(__file__)
    assert done.returncode == 0 and "rows passed" in done.stdout, (done.stdout + done.stderr)[-4000:]


@pytest.mark.gpu
def test_gpu_rows():
    check_rows("cuda", WIDTHS + WIDE)
    for dtype in (torch.bfloat16, torch.float16):
        for width in WIDTHS + WIDE:
            x = gate_up_of(width, dtype, "cuda")
            same_bits(geglu_fp8(x), geglu_fp8_reference(x))


if __name__ == "__main__":
    # Poisoned, so that an unwritten output cannot pass for one of zeros.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    check_rows("cpu", [70, 704])
    check_rows("cpu", [21504], [torch.bfloat16])
    print("rows passed")
