"""Per-layer embeddings of E2B and E4B: what the token is, plus what its embedding projects to, for every layer.

identity = table[token] * sqrt(P)
context = norm(projected * H^-0.5) * weight, over the P columns of each layer
out = (context + identity) * 2^-0.5

Rounded to the dtype after every product, norm and sum; sqrt(P) itself is rounded first (16 is exact).
Source: HF `Gemma4TextModel.get_per_layer_inputs` and `project_per_layer_inputs`.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.mean_square import mean_square
from gemcutter.ops.norms.rms_norm import rms_norm_reference
from gemcutter.ops.tokens.embed import check_token_ids, embed_reference, rounded


def per_layer_inputs(
    projected: torch.Tensor,
    token_ids: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """One launch on a GPU, from the raw projection.

    Args:
        projected: [T, L * P] of float32, bfloat16 or float16, the token embeddings times the projection; dense
            rows, row stride free. T may be 0.
        token_ids: [T] int64, dense, in [0, V), which the caller checks.
        table: [V, L * P] of projected's dtype; dense rows, row stride free, past 2^31 elements too.
        weight: [P] of the norm, dense.
        scale: on projected: H^-0.5.
        eps: added to the mean square.

    Returns:
        [T, L, P] of the same dtype, contiguous; layer i reads [:, i].

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _per_layer_inputs(projected, token_ids, table, weight, scale, eps)


def check_per_layer_inputs(projected, token_ids, table, weight, scale, eps) -> None:
    check_matrix("projected", projected)
    check_matrix("table", table, projected.shape[1])
    if table.dtype != projected.dtype or table.device != projected.device:
        got, want = f"{table.dtype} on {table.device}", f"{projected.dtype} on {projected.device}"
        raise TypeError(f"table is {got}: {want} is needed, as projected")
    check_token_ids(token_ids, table)
    if len(token_ids) != len(projected):
        raise ValueError(f"{len(token_ids)} token_ids for {len(projected)} rows of projected: one a row is needed")
    check_weight("weight", weight, weight.numel(), projected)
    if projected.shape[1] % max(weight.numel(), 1) or not weight.numel():
        raise ValueError(f"projected has {projected.shape[1]} columns: a multiple of weight's {weight.numel()}")


def per_layer_inputs_reference(projected, token_ids, table, weight, scale, eps) -> torch.Tensor:
    width = len(weight)
    shape = (len(token_ids), projected.shape[1] // width, width)
    identity = embed_reference(token_ids, table, width**0.5).view(shape)
    context = rms_norm_reference((projected * scale).view(shape), weight, eps)
    return (context + identity) * 2.0**-0.5


@triton.jit(do_not_specialize=["rows"])
def _per_layer_inputs_kernel(
    projected_ptr, ids_ptr, table_ptr, weight_ptr, out_ptr, projected_stride, table_stride, rows, scale, root, half,
    eps, L: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """A row is one layer of one token."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    present = row < rows
    inside = present & (col < P)
    dtype = out_ptr.dtype.element_ty
    token, layer = row // L, row % L
    at = layer * P + col
    weight = tl.load(weight_ptr + col, mask=col < P, other=0.0).to(tl.float32)
    join(CHAINED)
    release(CHAINED)
    token_id = tl.load(ids_ptr + token, mask=present, other=0)
    identity = tl.load(table_ptr + token_id * table_stride + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(projected_ptr + token * projected_stride + at, mask=inside, other=0.0).to(tl.float32)
    identity = (identity * root).to(dtype).to(tl.float32)
    x = (x * scale).to(dtype).to(tl.float32)
    x = (x * tl.rsqrt(mean_square(x, P) + eps) * weight).to(dtype).to(tl.float32)
    out = (x + identity).to(dtype).to(tl.float32) * half
    tl.store(out_ptr + row * P + col, out.to(dtype), mask=inside)


def per_layer_inputs_launch(projected, token_ids, table, weight, scale, eps) -> torch.Tensor:
    width = len(weight)
    tokens, layers = len(token_ids), projected.shape[1] // width
    out = torch.empty(tokens, layers, width, dtype=projected.dtype, device=projected.device)
    if tokens:
        block = triton.next_power_of_2(width)
        rows = max(1, 1024 // block)  # of 256 elements, two a warp
        _per_layer_inputs_kernel[(triton.cdiv(tokens * layers, rows),)](
            projected, token_ids, table, weight, out, projected.stride(0), table.stride(0), tokens * layers, scale,
            rounded(width**0.5, table.dtype), 2.0**-0.5, eps,
            L=layers, P=width, ROWS=rows, BLOCK=block, num_warps=2, enable_fp_fusion=False,
            **chained(projected),
        )  # fmt: skip
    return out


_per_layer_inputs = define(
    "per_layer_inputs(Tensor projected, Tensor token_ids, Tensor table, Tensor weight, float scale, float eps)"
    " -> Tensor",
    check=check_per_layer_inputs, reference=per_layer_inputs_reference, launch=per_layer_inputs_launch,
)  # fmt: skip
