"""Linear layer whose rows do not know each other: x @ weight.T (+ bias) with one order of summation.

The sum over K runs in ascending steps of 16, the depth of one tensor core instruction, into one float32
accumulator from beginning to end; nothing splits it. Hopper's tensor cores then give the same bits whatever the
tile, the instruction (mma or wgmma) and the number of rows. So few rows go to a kernel of ours that streams the
weights and many to cuBLASLt, forbidden to split K, and a row does not tell which of the two it went through.
A bias is added to the accumulator, before the one rounding. For narrow weights and few rows, which never go there,
cuBLASLt has other bits all the same (seen: 3 elements of 1 to 40 rows of a router of 128 columns), so the reference
on a GPU fills rows up to as many as do. And so it has where rows do not begin at multiples of 16 bytes (1 element
of 40 rows by a weight of 7 columns and 320 deep), which are copied to where they do.

On a CPU the reference multiplies 16 rows at a time (`row_blocks.py`). Weights in FP8 are `linear_fp8.py`'s.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.hopper import loads_by_tma
from gemcutter.ops.library import define
from gemcutter.ops.linears.linear_fp8 import linear_fp8
from gemcutter.ops.linears.linear_hopper import ROWS, stream
from gemcutter.ops.linears.linear_row_hopper import stream_row, streams_row
from gemcutter.ops.quantize_fp8 import Quantized
from gemcutter.ops.row_blocks import linear_in_blocks

# Rows; beyond, the weights are read once for several tiles, and cuBLASLt is as fast or faster. But not where
# programs of 64 rows by 64 columns leave half the card idle: for a router (2816 to 128) cuBLASLt, which has
# no kernel for that without split-K, takes 61 to 64 µs at 72 to 768 rows, and streaming 6.
MOST_STREAMED = 64
FEW_PROGRAMS = 66


def linear(
    x: torch.Tensor | Quantized, weight: torch.Tensor | Quantized, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply each row by the transposed weight.

    Args:
        x: [T, K] of float32, bfloat16 or float16; dense rows, row stride free. T may be 0. For a weight in FP8 also
            its `quantize_fp8`, which gives the same bits.
        weight: [N, K] of x's dtype, dense; or in FP8, q [N, K] and scale [N, 1], one for each output channel.
        bias: [N] of the result's dtype, dense, or None.

    Returns:
        [T, N] of x's dtype, bfloat16 of a pair's; a row's bits a function of that row alone. On a CPU also of the
        number of threads, by which wide products are cut (seen in float32 from K = 1000 on).

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    if isinstance(weight, Quantized):
        return linear_fp8(x, weight, bias)
    if isinstance(x, Quantized):
        raise TypeError(f"x is quantised, weight is {weight.dtype}: give x as it was, or a quantised weight")
    return _linear(x, weight, bias)


def check_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    check_matrix("x", x)
    check_matrix("weight", weight, width=x.shape[1])
    if weight.dtype != x.dtype or weight.device != x.device:
        raise TypeError(f"weight is {weight.dtype} on {weight.device}, x {x.dtype} on {x.device}: both must agree")
    if not weight.is_contiguous():
        raise ValueError(f"weight has strides {weight.stride()}: it must be dense; call .contiguous()")
    if bias is not None:
        check_weight("bias", bias, len(weight), x)


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not x.is_cuda:
        return linear_in_blocks(x, weight, bias)
    if x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    before = torch.backends.cuda.preferred_blas_library()
    half = torch.backends.cuda.matmul
    name = f"allow_{'bf16' if x.dtype == torch.bfloat16 else 'fp16'}_reduced_precision_reduction"
    allowed = getattr(half, name)
    try:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        setattr(half, name, (False, False))
        padded = _in_eights(with_library_rows(x, len(weight)), weight, bias)
        return F.linear(*padded)[: len(x), : len(weight)].contiguous()
    finally:
        setattr(half, name, allowed)
        torch.backends.cuda.preferred_blas_library(before)


def _in_eights(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same with zeros behind, if need be, so that all rows begin at multiples of 16 bytes, the result's too."""
    columns, depth = -len(weight) % 8, -x.shape[1] % 8
    if columns or depth:
        weight = F.pad(weight, (0, depth, 0, columns))
        bias = None if bias is None else F.pad(bias, (0, columns))
    if depth or x.stride(0) % 8 or x.data_ptr() % 16:
        x = F.pad(x, (0, depth)) if depth else x.clone(memory_format=torch.contiguous_format)
    return x, weight if weight.data_ptr() % 16 == 0 else weight.clone(), bias


def with_library_rows(x: torch.Tensor, columns: int) -> torch.Tensor:
    """x, with zero rows behind it if `linear_launch` would not send so few to cuBLASLt."""
    if goes_to_library(len(x), columns):
        return x
    rows = MOST_STREAMED * max(2, FEW_PROGRAMS // triton.cdiv(columns, ROWS) + 1)
    return F.pad(x, (0, 0, 0, rows - len(x)))


def goes_to_library(tokens: int, columns: int) -> bool:
    programs = triton.cdiv(columns, ROWS) * triton.cdiv(tokens, MOST_STREAMED)
    return tokens > MOST_STREAMED and programs > FEW_PROGRAMS


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, x_stride,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (n, t): BLOCK_N rows of the weight, the M operand of the tensor cores, by BLOCK_T tokens."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    held = (token < tokens)[:, None]
    weight_at = weight_ptr + tl.minimum(column, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    x_at = x_ptr + token[:, None].to(tl.int64) * x_stride + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    join(CHAINED)
    release(CHAINED)
    for begin in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            w = tl.load(weight_at + begin)
            x = tl.load(x_at + begin, mask=held, other=0.0)
        else:
            inside = (k < K - begin)[None, :]
            w = tl.load(weight_at + begin, mask=inside, other=0.0)
            x = tl.load(x_at + begin, mask=inside & held, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + token[None, :].to(tl.int64) * N + column[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(token < tokens)[None, :] & (column < N)[:, None])


def linear_launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if goes_to_library(len(x), len(weight)) and x.dtype != torch.float32:
        return linear_reference(x, weight, bias)
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    launch_kernel(x, weight, bias, out)
    return out


def launch_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """One of our kernels, whatever the number of rows; out may be of another float dtype than x."""
    (tokens, depth), columns = x.shape, weight.shape[0]
    if streams_row(x, weight):
        stream_row(x, weight, bias, out)
    elif tokens and loads_by_tma(x, weight):
        stream(x, weight, out, bias)
    elif tokens:
        tile = linear_tile(x.dtype, tokens)
        grid = triton.cdiv(columns, tile["BLOCK_N"]), triton.cdiv(tokens, tile["BLOCK_T"])
        _linear_kernel[grid](
            x, weight, bias, out, tokens, x.stride(0), N=columns, K=depth, **tile, **chained(x)
        )  # fmt: skip


def linear_tile(dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Tile and launch sizes. The bits do not depend on them, see above."""
    if dtype == torch.float32:  # FMA instead of tensor cores; the order of the sum is the same in any tile
        return dict(BLOCK_N=32, BLOCK_T=16, BLOCK_K=32, num_warps=4, num_stages=2)
    if tokens <= 16:
        return dict(BLOCK_N=64, BLOCK_T=16, BLOCK_K=128, num_warps=4, num_stages=8)
    return dict(BLOCK_N=64, BLOCK_T=32 if tokens <= 32 else 64, BLOCK_K=128, num_warps=4, num_stages=6)


def linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    check=check_linear, reference=linear_reference, launch=linear_launch, fake=linear_fake,
)  # fmt: skip
