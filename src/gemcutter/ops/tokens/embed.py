"""Scaled embedding: row gather times sqrt(width).

The scale itself is rounded to the table's dtype first (sqrt(2816) is 53.0 in bf16), then the product is.
Source: HF `Gemma4TextScaledWordEmbedding`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.tile import elementwise_tile, tile_at


def embed(token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows of the table, scaled, in one launch on a GPU.

    Args:
        token_ids: [T] int64, dense, in [0, V), which the caller checks: a look at the values would wait for the
            device. T may be 0.
        table: [V, W] of float32, bfloat16 or float16; dense rows, row stride free, past 2^31 elements too.
        scale: sqrt(W); rounded here.

    Returns:
        [T, W] of the table's dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _embed(token_ids, table, scale)


def check_embed(token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> None:
    check_matrix("table", table)
    check_token_ids(token_ids, table)


def check_token_ids(token_ids: torch.Tensor, table: torch.Tensor) -> None:
    if token_ids.dtype != torch.int64 or token_ids.device != table.device:
        raise TypeError(f"token_ids are {token_ids.dtype} on {token_ids.device}: int64 on {table.device} is needed")
    if token_ids.ndim != 1 or not token_ids.is_contiguous():
        got = f"shape {tuple(token_ids.shape)}, strides {token_ids.stride()}"
        raise ValueError(f"token_ids have {got}: one dense dim is needed; flatten them")


def embed_reference(token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    return F.embedding(token_ids, table) * rounded(scale, table.dtype)


def rounded(scale: float, dtype: torch.dtype) -> float:
    """The scale as HF's buffer holds it: float32, then the dtype."""
    return torch.tensor(scale, dtype=torch.float32, device="cpu").to(dtype).item()


@triton.jit(do_not_specialize=["tokens"])
def _embed_kernel(
    ids_ptr, table_ptr, out_ptr, table_stride, tokens, scale,
    W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row, col = tile_at(tl.program_id(0), W, ROWS, COLS)
    inside = (row < tokens) & (col < W)
    join(CHAINED)
    release(CHAINED)
    token_id = tl.load(ids_ptr + row, mask=row < tokens, other=0)
    x = tl.load(table_ptr + token_id * table_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * W + col, (x * scale).to(out_ptr.dtype.element_ty), mask=inside)


def embed_launch(token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    tokens, width = len(token_ids), table.shape[1]
    out = torch.empty(tokens, width, dtype=table.dtype, device=table.device)
    if tokens:
        tile = elementwise_tile(width, 2048)
        _embed_kernel[(triton.cdiv(tokens, tile["ROWS"]) * triton.cdiv(width, tile["COLS"]),)](
            token_ids, table, out, table.stride(0), tokens, rounded(scale, table.dtype), W=width, **tile,
            **chained(table),
        )  # fmt: skip
    return out


_embed = define(
    "embed(Tensor token_ids, Tensor table, float scale) -> Tensor",
    check=check_embed, reference=embed_reference, launch=embed_launch,
)  # fmt: skip
