"""The grouped matrix products of FP8 experts in Triton: a program a tile, as in `experts_tiled.py`.

Weights are the M operand of the tensor cores, at least 64 rows of them, so that 16 tokens fill an instruction and
it is wgmma whatever the tile: mma.sync, which fewer rows would take, is other arithmetic on Hopper, where e4m3 goes
through it as float16 (docs/kernels.md, "Products in FP8"). Between the products a row is quantised as a whole.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.activations.activation import activate
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.moe.experts_table import Tile
from gemcutter.ops.moe.experts_tiled import find_rows, tile_grid, tile_options
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8_launch


@triton.jit
def _up_fp8_kernel(
    x_ptr, x_scale_ptr, order_ptr, starts_ptr, gate_up_ptr, gate_up_scale_ptr, hidden_ptr,
    E: tl.constexpr, E_BLOCK: tl.constexpr, TOP_K: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """hidden[row] = activation(gate) * up of x[order[row] // TOP_K] @ gate_up[expert].T, not quantised yet."""
    release(CHAINED)
    join(CHAINED)
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert, begin, end = find_rows(starts_ptr, pid // column_tiles, E, E_BLOCK, BLOCK_M)
    if expert >= E:
        return
    row = begin + tl.arange(0, BLOCK_M)
    row_in = row < end
    token = tl.load(order_ptr + row, mask=row_in, other=0).to(tl.int64) // TOP_K
    first_col = pid % column_tiles * BLOCK_N
    lane = tl.arange(0, 2 * BLOCK_N)  # gate's channels, then up's
    col_in = first_col + lane % BLOCK_N < N
    channel = expert.to(tl.int64) * (2 * N) + first_col + lane % BLOCK_N + lane // BLOCK_N * N
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[None, :] * H + k[:, None]
    weight_at = gate_up_ptr + channel[:, None] * H + k[None, :]
    acc = tl.zeros([2 * BLOCK_N, BLOCK_M], tl.float32)
    for begin_k in range(0, H, BLOCK_K):
        k_in = k < H - begin_k
        weight = tl.load(weight_at + begin_k, mask=col_in[:, None] & k_in[None, :], other=0.0)
        x = tl.load(x_at + begin_k, mask=row_in[None, :] & k_in[:, None], other=0.0)
        acc = tl.dot(weight, x, acc)
    x_scale = tl.load(x_scale_ptr + token, mask=row_in, other=0.0)
    weight_scale = tl.load(gate_up_scale_ptr + channel, mask=col_in, other=0.0)
    acc = acc * x_scale[None, :] * weight_scale[:, None]
    gate, up = acc.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0).split()
    dtype = hidden_ptr.dtype.element_ty
    activated = activate(gate.to(dtype), ACTIVATION).to(tl.float32)
    out = (activated * up.to(dtype).to(tl.float32)).to(dtype)
    col = first_col + tl.arange(0, BLOCK_N)
    at = hidden_ptr + row[None, :].to(tl.int64) * N + col[:, None]
    tl.store(at, out, mask=row_in[None, :] & (col < N)[:, None])


@triton.jit
def _down_fp8_kernel(
    hidden_ptr, hidden_scale_ptr, order_ptr, starts_ptr, down_ptr, down_scale_ptr, out_ptr,
    E: tl.constexpr, E_BLOCK: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """out[order[row]] = hidden[row] @ down[expert].T: back from sorted rows to slots."""
    release(CHAINED)
    join(CHAINED)
    column_tiles: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert, begin, end = find_rows(starts_ptr, pid // column_tiles, E, E_BLOCK, BLOCK_M)
    if expert >= E:
        return
    row = begin + tl.arange(0, BLOCK_M)
    row_in = row < end
    col = pid % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = col < H
    channel = expert.to(tl.int64) * H + col
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden_ptr + row[None, :].to(tl.int64) * N + k[:, None]
    weight_at = down_ptr + channel[:, None] * N + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for begin_k in range(0, N, BLOCK_K):
        k_in = k < N - begin_k
        weight = tl.load(weight_at + begin_k, mask=col_in[:, None] & k_in[None, :], other=0.0)
        hidden = tl.load(hidden_at + begin_k, mask=row_in[None, :] & k_in[:, None], other=0.0)
        acc = tl.dot(weight, hidden, acc)
    hidden_scale = tl.load(hidden_scale_ptr + row, mask=row_in, other=0.0)
    weight_scale = tl.load(down_scale_ptr + channel, mask=col_in, other=0.0)
    out = (acc * hidden_scale[None, :] * weight_scale[:, None]).to(out_ptr.dtype.element_ty)
    slot = tl.load(order_ptr + row, mask=row_in, other=0).to(tl.int64)
    at = out_ptr + slot[None, :] * H + col[:, None]
    tl.store(at, out, mask=row_in[None, :] & col_in[:, None])


def tiled_experts_fp8(
    x: Quantized,
    order: torch.Tensor,
    starts: torch.Tensor,
    gate_up: Quantized,
    down: Quantized,
    top_k: int,
    tiles: tuple[Tile, Tile],
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Each slot's expert MLP of dtype, before its weight: as `tiled_experts`."""
    num_slots, (num_experts, hidden, width) = len(order), down.q.shape
    activated = torch.empty(num_slots, width, dtype=dtype, device=order.device)
    slots = torch.empty(num_slots, hidden, dtype=dtype, device=order.device)
    shape = dict(E=num_experts, E_BLOCK=triton.next_power_of_2(num_experts), H=hidden, N=width)
    options = dict(enable_fp_fusion=False, **chained(order))
    up_tile, down_tile = tiles
    _up_fp8_kernel[tile_grid(up_tile, num_slots, num_experts, width)](
        *x,
        order,
        starts,
        *gate_up,
        activated,
        TOP_K=top_k,
        ACTIVATION=str(activation),
        **shape,
        **tile_options(up_tile),
        **options,
    )
    _down_fp8_kernel[tile_grid(down_tile, num_slots, num_experts, hidden)](
        *quantize_fp8_launch(activated), order, starts, *down, slots, **shape, **tile_options(down_tile), **options
    )
    return slots
