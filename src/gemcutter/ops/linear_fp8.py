"""Linear layer in FP8: rows of e4m3 with a scale each by weights of e4m3 with a scale for each output channel.

out = (sum over K of q * weight.q) * weight.scale * scale + bias, products and sum in float, each scale in turn,
rounded to the dtype once. A row that is not quantised yet is quantised by the rule of `quantize_fp8.py`, so both
forms of x give the same bits.
Source: compressed-tensors' W8A8 scheme, channel weights and dynamic tokens.
"""

import torch

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.library import define
from gemcutter.ops.quantize_fp8 import (
    Quantized,
    check_quantized,
    check_quantized_width,
    quantize_fp8_launch,
    quantize_fp8_reference,
)
from gemcutter.ops.row_blocks import linear_in_blocks


def linear_fp8(x: torch.Tensor | Quantized, weight: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear`, whose contract this fulfils for such weights."""
    if isinstance(x, Quantized):
        return _linear_fp8(*x, *weight, bias)
    return _linear_fp8(x, None, *weight, bias)


def check_linear_fp8(x, scale, weight, weight_scale, bias) -> None:
    if x.ndim != 2 or weight.ndim != 2:
        got = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{got}: two dims each are needed, [tokens, columns] and [out, columns]")
    if scale is None:
        check_matrix("x", x)
        check_quantized_width("x", x.shape[1])
    else:
        check_quantized("x", x, scale, x.shape, x.device)
    check_quantized("weight", weight, weight_scale, (len(weight), x.shape[1]), x.device)
    if bias is not None:
        check_weight("bias", bias, len(weight), x.new_empty(0, dtype=dtype_of(x)))


def linear_fp8_reference(x, scale, weight, weight_scale, bias) -> torch.Tensor:
    q, scale = (x, scale) if scale is not None else quantize_fp8_reference(x)
    # e4m3 has 4 bits of mantissa, so every product is exact in float.
    total = linear_in_blocks(q.float(), weight.float())
    return _scaled(total, scale, weight_scale, bias).to(dtype_of(x))


def linear_fp8_launch(x, scale, weight, weight_scale, bias) -> torch.Tensor:
    q, scale = (x, scale) if scale is not None else quantize_fp8_launch(x)
    return _scaled(_sums(q, weight), scale, weight_scale, bias).to(dtype_of(x))


def _scaled(total, scale, weight_scale, bias) -> torch.Tensor:
    """float32"""
    out = total * weight_scale.T * scale
    return out if bias is None else out + bias.float()


def _sums(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, N] float32, one chain of tensor core instructions each."""
    if len(q) == 0 or weight.shape[0] % 16 or weight.shape[1] % 16:
        return linear_in_blocks(q.float(), weight.float())
    one = torch.ones((), device=q.device)
    return torch._scaled_mm(q, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)


def linear_fp8_fake(x, scale, weight, weight_scale, bias) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype_of(x))


def dtype_of(x: torch.Tensor) -> torch.dtype:
    """Of the products of x, or of a pair's q."""
    return torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype


_linear_fp8 = define(
    "linear_fp8(Tensor x, Tensor? scale, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    check=check_linear_fp8, reference=linear_fp8_reference, launch=linear_fp8_launch, fake=linear_fp8_fake,
)  # fmt: skip
