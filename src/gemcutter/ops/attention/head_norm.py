"""What the kernels of attention heads share: a tile of heads of any tokens, normed in registers.

A head is held as its two halves: rope pairs dim i with i + D/2, and so both stand in one thread. In bfloat16 a head
lies within one warp, and its norm needs no shared memory. A head is normed by itself, so tiles do not change bits.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_rows
from gemcutter.ops.mean_square import mean_square_of_parts


def check_heads(name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """x [T, heads, D], dense heads any distance apart; T, D, dtype and device as in `like`, where it is given."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: [tokens, heads, head dim] is needed; view it so")
    check_rows(name, x)
    if like is None:
        return
    if x.dtype != like.dtype or x.device != like.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}: {like.dtype} on {like.device} is needed")
    if x.shape[0] != like.shape[0] or x.shape[2] != like.shape[2]:
        got, want = f"{x.shape[0]} tokens of head dim {x.shape[2]}", f"{like.shape[0]} and {like.shape[2]}"
        raise ValueError(f"{name} has {got}: {want} are needed")


def head_tile(heads: int, head_dim: int) -> dict[str, int]:
    """Launch settings for so many heads of all tokens.

    A card starts 0.8 programs a ns, so that many heads want wide ones. Up to 2^21 dims in all a warp takes 256 of
    them (a head of 512 whole), 4 or 8 warps a program. Beyond, it takes 512, and of 256-wide heads four where there
    are many: more loads are under way and share what a thread reads of the weight. Measured on an H200.
    """
    dims = heads * head_dim
    if dims <= 2**21:
        a_warp, num_warps = max(256, head_dim), 4 if dims <= 2**20 else 8
    else:
        a_warp, num_warps = 1024 if head_dim == 256 and dims > 2**22 else 512, 4
    tile = dict(ROWS=a_warp * num_warps // head_dim, num_warps=num_warps)
    # No fused multiply-add: PyTorch rounds a product before it is added.
    return tile | dict(enable_fp_fusion=False)


@triton.jit
def heads_of(block, num_tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Rows of tile `block`: token (int64) and head of each, and whether there is such a row; [ROWS, 1] each.

    Rows are counted in int32: 2^31 heads of 32 dims, read and written, would not fit a GPU's memory.
    """
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    return (row // HEADS).to(tl.int64), row % HEADS, row < num_tokens * HEADS


@triton.jit
def load_halves(ptr, mask, D: tl.constexpr):
    """Heads at ptr [rows, 1] as two [rows, D/2] float32."""
    dims = tl.arange(0, D // 2)[None, :]
    low = tl.load(ptr + dims, mask=mask, other=0.0)
    high = tl.load(ptr + D // 2 + dims, mask=mask, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def load_weight(ptr, ROWS: tl.constexpr, D: tl.constexpr):
    """The same of a weight [D], in every row.

    A [1, D/2] tile would be laid out over all warps, and the products moved there and back through shared memory.
    """
    dims = tl.broadcast_to(tl.arange(0, D // 2)[None, :], [ROWS, D // 2])
    return tl.load(ptr + dims).to(tl.float32), tl.load(ptr + D // 2 + dims).to(tl.float32)


@triton.jit
def store_halves(ptr, low, high, mask, D: tl.constexpr):
    dims = tl.arange(0, D // 2)[None, :]
    dtype = ptr.dtype.element_ty
    tl.store(ptr + dims, low.to(dtype), mask=mask)
    tl.store(ptr + D // 2 + dims, high.to(dtype), mask=mask)


@triton.jit
def norm_halves(low, high, eps, D: tl.constexpr):
    """Without weight, not rounded."""
    scale = tl.rsqrt(mean_square_of_parts((low, high), D) + eps)  # PyTorch's pow(-0.5) is rsqrt, on CPU and GPU
    return low * scale, high * scale
