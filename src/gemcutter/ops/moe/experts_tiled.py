"""The grouped matrix products of `experts` in Triton, for any card and dtype: a program a tile.

A tile is up to BLOCK_M rows of one expert by BLOCK_N columns of its weights, K upwards in one accumulator.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.activations.activation import activate
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.moe.experts_table import Tile


@triton.jit
def find_rows(starts_ptr, tile, E: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert and rows [begin, end) of the order that this tile covers; expert >= E past the last tile."""
    lane = tl.arange(0, E_BLOCK)
    starts = tl.load(starts_ptr + lane, mask=lane < E, other=0)
    ends = tl.load(starts_ptr + lane + 1, mask=lane < E, other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, axis=0)
    expert = tl.sum((last <= tile).to(tl.int32), axis=0)
    chosen = lane == expert
    begin = tl.sum(tl.where(chosen, starts + (tile - last + tiles) * BLOCK_M, 0), axis=0)
    end = tl.sum(tl.where(chosen, ends, 0), axis=0)
    return expert, begin, end


@triton.jit
def _up_kernel(
    x_ptr, order_ptr, starts_ptr, gate_up_ptr, hidden_ptr, x_stride,
    E: tl.constexpr, E_BLOCK: tl.constexpr, TOP_K: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """hidden[row] = activation(gate) * up of x[order[row] // TOP_K] @ gate_up[expert].T, rows in sorted order."""
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
    col = pid % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = col < N
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * x_stride + k[None, :]
    gate_at = gate_up_ptr + expert.to(tl.int64) * (2 * N * H) + col[None, :] * H + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin_k in range(0, H, BLOCK_K):
        k_in = k < H - begin_k
        x = tl.load(x_at + begin_k, mask=row_in[:, None] & k_in[None, :], other=0.0)
        w_gate = tl.load(gate_at + begin_k, mask=col_in[None, :] & k_in[:, None], other=0.0)
        w_up = tl.load(gate_at + N * H + begin_k, mask=col_in[None, :] & k_in[:, None], other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
    dtype = hidden_ptr.dtype.element_ty
    activated = activate(gate.to(dtype), ACTIVATION).to(tl.float32)
    out = (activated * up.to(dtype).to(tl.float32)).to(dtype)
    at = hidden_ptr + row[:, None].to(tl.int64) * N + col[None, :]
    tl.store(at, out, mask=row_in[:, None] & col_in[None, :])


@triton.jit
def _down_kernel(
    hidden_ptr, order_ptr, starts_ptr, down_ptr, out_ptr,
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
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden_ptr + row[:, None].to(tl.int64) * N + k[None, :]
    down_at = down_ptr + expert.to(tl.int64) * (H * N) + col[None, :] * N + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin_k in range(0, N, BLOCK_K):
        k_in = k < N - begin_k
        hidden = tl.load(hidden_at + begin_k, mask=row_in[:, None] & k_in[None, :], other=0.0)
        w = tl.load(down_at + begin_k, mask=col_in[None, :] & k_in[:, None], other=0.0)
        acc = tl.dot(hidden, w, acc, input_precision="ieee")
    slot = tl.load(order_ptr + row, mask=row_in, other=0).to(tl.int64)
    at = out_ptr + slot[:, None] * H + col[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=row_in[:, None] & col_in[None, :])


def tiled_experts(
    x: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    tiles: tuple[Tile, Tile],
    activation: str,
) -> torch.Tensor:
    """Each slot's expert MLP, before its weight: as `grouped_experts`, by these tiles of up and of down."""
    num_slots, (num_experts, hidden, width) = len(order), down.shape
    activated = torch.empty(num_slots, width, dtype=x.dtype, device=x.device)
    slots = torch.empty(num_slots, hidden, dtype=x.dtype, device=x.device)
    shape = dict(E=num_experts, E_BLOCK=triton.next_power_of_2(num_experts), H=hidden, N=width)
    up_tile, down_tile = tiles
    _up_kernel[tile_grid(up_tile, num_slots, num_experts, width)](
        x, order, starts, gate_up, activated, x.stride(0),
        TOP_K=top_k, ACTIVATION=str(activation), **shape, **tile_options(up_tile), **chained(x),
    )  # fmt: skip
    _down_kernel[tile_grid(down_tile, num_slots, num_experts, hidden)](
        activated, order, starts, down, slots, **shape, **tile_options(down_tile), **chained(x)
    )
    return slots


def tile_grid(tile: Tile, num_slots: int, num_experts: int, columns: int) -> tuple[int]:
    """Every hit expert ends in at most one partly filled tile."""
    row_tiles = (num_slots + min(num_experts, num_slots) * (tile.block_m - 1)) // tile.block_m
    return (row_tiles * triton.cdiv(columns, tile.block_n),)


def tile_options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
