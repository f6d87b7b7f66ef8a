"""Linear layer in FP8: rows of e4m3 with a scale each by weights of e4m3 with a scale for each output channel.

out = (sum over K of q * weight.q) * weight.scale * scale + bias, products and sum in float, each scale in turn,
rounded to the dtype once. A row that is not quantised yet is quantised by the rule of `quantize_fp8.py`, so both
forms of x give the same bits.
Source: compressed-tensors' W8A8 scheme, channel weights and dynamic tokens.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.hopper import loads_by_tma
from gemcutter.ops.library import define
from gemcutter.ops.linears.linear_fp8_hopper import stream_row, streams_row
from gemcutter.ops.linears.linear_hopper import stream
from gemcutter.ops.quantize_fp8 import (
    Quantized,
    check_quantized,
    check_quantized_width,
    quantize_fp8_launch,
    quantize_fp8_reference,
)
from gemcutter.ops.row_blocks import linear_in_blocks
from gemcutter.ops.tanh import INTERPRETED

FULL_ROWS = 16  # of which PyTorch's product takes multiples


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
    total = _chain(q, weight) if q.is_cuda else linear_in_blocks(q.float(), weight.float())
    out = total * weight_scale.T * scale
    return (out if bias is None else out + bias.float()).to(dtype_of(x))


def _chain(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, N] float32, each the sum that tensor cores make. (With one scale for all, cuBLASLt may split K.)"""
    one = torch.ones(max(len(q), len(weight)), 1, device=q.device)
    out = torch.empty(len(q), len(weight), device=q.device)
    if len(q) and whole_tiles(weight):
        return library_product(q, one[: len(q)], weight, one[: len(weight)], torch.float32)
    if len(q):
        _launch_plain(q, one, weight, one, None, out)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _linear_fp8_kernel(
    q_ptr, scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, tokens,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (n, t): 64 rows of the weight, the M operand, so that Hopper takes wgmma, by BLOCK_T tokens."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    weight_at = weight_ptr + tl.minimum(column, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    q_at = q_ptr + token[:, None].to(tl.int64) * K + k[None, :]
    weight_scale = tl.load(weight_scale_ptr + tl.minimum(column, N - 1))
    held = token < tokens
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    join(CHAINED)
    release(CHAINED)
    for begin in range(0, K, BLOCK_K):
        inside = (k < K - begin)[None, :]
        w = tl.load(weight_at + begin, mask=inside, other=0.0)
        q = tl.load(q_at + begin, mask=inside & held[:, None], other=0.0)
        if INTERPRETED:
            w, q = w.to(tl.float32), q.to(tl.float32)
        acc = tl.dot(w, tl.trans(q), acc)
    acc = acc * weight_scale[:, None] * tl.load(scale_ptr + token, mask=held, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + token[None, :].to(tl.int64) * N + column[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=held[None, :] & (column < N)[:, None])


def linear_fp8_launch(x, scale, weight, weight_scale, bias) -> torch.Tensor:
    out = linear_fp8_fake(x, scale, weight, weight_scale, bias)
    if scale is None and not (x.itemsize == 2 and streams_row(x, weight)):
        x, scale = quantize_fp8_launch(x)
    if streams_row(x, weight):
        stream_row(x, scale, weight, weight_scale, bias, out)
    elif len(x) > most_streamed(len(weight)) and bias is None and whole_tiles(weight):
        return library_product(x, scale, weight, weight_scale, out.dtype)
    elif len(x) and loads_by_tma(x, weight):
        stream(x, weight, out, bias, scale, weight_scale)
    elif len(x):
        _launch_plain(x, scale, weight, weight_scale, bias, out)
    return out


def most_streamed(columns: int) -> int:
    """Rows beyond which PyTorch's product is as fast or faster: it needs 9 to 24 µs at any number of them."""
    return 256 if columns <= 4224 else 128 if columns <= 16896 else 64


def library_product(q, scale, weight, weight_scale, dtype: torch.dtype) -> torch.Tensor:
    """Into bfloat16 or float32, the dtypes that it has, then `dtype`. With other rows than a multiple of 16
    cuBLASLt refuses (seen: 129 rows), so zeros come behind them; a row's bits are its own.
    """
    rows, given = len(q), dtype if dtype == torch.bfloat16 else torch.float32
    if more := -rows % FULL_ROWS:
        q = F.pad(q.view(torch.uint8), (0, 0, 0, more)).view(q.dtype)
        scale = F.pad(scale, (0, 0, 0, more))
    out = torch._scaled_mm(q, weight.t(), scale, weight_scale.t(), out_dtype=given, use_fast_accum=True)
    return out[:rows].to(dtype)


def whole_tiles(weight: torch.Tensor) -> bool:
    """Whether PyTorch's product takes the weight, which has one for each row's scale only on a few cards."""
    return weight.shape[0] % 16 == weight.shape[1] % 16 == 0 and loads_by_tma(weight)


def _launch_plain(q, scale, weight, weight_scale, bias, out: torch.Tensor) -> None:
    tokens, columns = out.shape
    tile = dict(BLOCK_N=64, BLOCK_T=16 if tokens <= 16 else 64, BLOCK_K=128, num_warps=4, num_stages=4)
    grid = triton.cdiv(columns, tile["BLOCK_N"]), triton.cdiv(tokens, tile["BLOCK_T"])
    _linear_fp8_kernel[grid](
        q, scale, weight, weight_scale, bias, out, tokens,
        N=columns, K=weight.shape[1], **tile, enable_fp_fusion=False, **chained(q),
    )  # fmt: skip


def linear_fp8_fake(x, scale, weight, weight_scale, bias) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype_of(x))


def dtype_of(x: torch.Tensor) -> torch.dtype:
    """Of the products of x, or of a pair's q."""
    return torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype


_linear_fp8 = define(
    "linear_fp8(Tensor x, Tensor? scale, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    check=check_linear_fp8, reference=linear_fp8_reference, launch=linear_fp8_launch, fake=linear_fp8_fake,
)  # fmt: skip
