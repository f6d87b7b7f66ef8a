"""The grouped matrix products of `experts` for many tokens on Hopper, in Gluon.

Rows of x are first gathered in the order of their experts, so that both operands come by TMA; a table says which
expert and which rows each tile has. A tile is BLOCK_M rows by 128 columns of weights, K in steps of 64 from its
beginning to its end in one accumulator, as everywhere (`linear.py` says why that gives the same bits).
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gemcutter.ops.geglu import gelu_tanh
from gemcutter.ops.linear_hopper import descriptor, load_tile, loads_by_tma

# Two programs of 96 KiB share an SM, and one computes while the other stores. With 256 columns or rows, or more
# stages, there is room for one only: 8 to 20 % slower at 8192 tokens.
BLOCK_M, BLOCK_N, BLOCK_K, STAGES = 128, 128, 64, 3
activate = gluon.jit(gelu_tanh.fn)


@triton.jit(do_not_specialize=["tiles"])
def _tiles_kernel(starts_ptr, table_ptr, tiles, E: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """table[t] = expert, first row, end of its rows; expert E past the last tile."""
    expert = tl.arange(0, E_BLOCK)
    start = tl.load(starts_ptr + expert, mask=expert < E, other=0)
    end = tl.load(starts_ptr + expert + 1, mask=expert < E, other=0)
    count = (end - start + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(count, axis=0) - count
    used = tl.sum(count, axis=0)
    for begin in range(0, tiles, E_BLOCK):
        tile = begin + expert
        tl.store(table_ptr + tile * 3, E, mask=(tile >= used) & (tile < tiles))
    for i in range(0, tl.max(count, axis=0)):
        at = table_ptr + (first + i) * 3
        tl.store(at, expert, mask=i < count)
        tl.store(at + 1, start + i * BLOCK_M, mask=i < count)
        tl.store(at + 2, end, mask=i < count)


@triton.jit
def _gather_kernel(x_ptr, order_ptr, out_ptr, x_stride, TOP_K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = (tl.load(order_ptr + row) // TOP_K).to(tl.int64)
    for begin in tl.static_range(0, H, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        inside = col < H
        tl.store(out_ptr + row * H + col, tl.load(x_ptr + token * x_stride + col, mask=inside), mask=inside)


@gluon.jit
def _grouped_kernel(
    x_desc, weight_desc, table_ptr, order_ptr, out_ptr, E: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    UP: gl.constexpr,
):  # fmt: skip
    """UP: out[row] = geglu(x[row] @ weight[expert].T), weight [E, 2N, K]: half a tile is gate, half is up.

    Otherwise out[order[row]] = x[row] @ weight[expert].T, weight [E, N, K].
    """
    COLS: gl.constexpr = BLOCK_N // 2 if UP else BLOCK_N  # of out
    column_tiles: gl.constexpr = (N + COLS - 1) // COLS
    tile = gl.program_id(0) // column_tiles
    first_col = gl.program_id(0) % column_tiles * COLS
    expert = gl.load(table_ptr + tile * 3)
    if expert < E:
        first_row = gl.load(table_ptr + tile * 3 + 1)
        end = gl.load(table_ptr + tile * 3 + 2)
        dtype: gl.constexpr = x_desc.dtype
        x_stages = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
        w_stages = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(ready.index(stage), count=1)
        fence_async_shared()

        weight_row = expert * (2 * N if UP else N) + first_col
        STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
        BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * 2
        for stage in gl.static_range(STAGES):
            if stage < STEPS:
                at = stage * BLOCK_K
                mbarrier.expect(ready.index(stage), BYTES)
                load_tile(x_desc, [first_row, at], ready.index(stage), x_stages.index(stage))
                if UP:
                    halves = w_stages.index(stage)
                    load_tile(weight_desc, [weight_row, at], ready.index(stage), halves.slice(0, COLS))
                    load_tile(weight_desc, [weight_row + N, at], ready.index(stage), halves.slice(COLS, COLS))
                else:
                    load_tile(weight_desc, [weight_row, at], ready.index(stage), w_stages.index(stage))

        WARPS: gl.constexpr = gl.num_warps()
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        for step in range(STEPS):
            now = step % STAGES
            mbarrier.wait(ready.index(now), (step // STAGES) & 1)
            acc = warpgroup_mma(x_stages.index(now), w_stages.index(now).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The product before this one is done: its stage is free for the load that comes STAGES later.
            coming = step - 1 + STAGES
            free = coming % STAGES
            more = (step > 0) & (coming < STEPS)
            k = coming * BLOCK_K
            mbarrier.expect(ready.index(free), BYTES, pred=more)
            load_tile(x_desc, [first_row, k], ready.index(free), x_stages.index(free), pred=more)
            if UP:
                refill = w_stages.index(free)
                load_tile(weight_desc, [weight_row, k], ready.index(free), refill.slice(0, COLS), pred=more)
                load_tile(weight_desc, [weight_row + N, k], ready.index(free), refill.slice(COLS, COLS), pred=more)
            else:
                load_tile(weight_desc, [weight_row, k], ready.index(free), w_stages.index(free), pred=more)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        for stage in gl.static_range(STAGES):
            mbarrier.invalidate(ready.index(stage))

        rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # 16 bytes a thread
        if UP:
            gate, up = acc.reshape([BLOCK_M, 2, COLS]).permute((0, 2, 1)).split()
            activated = activate(gate.to(dtype).to(gl.float32)).to(dtype).to(gl.float32)
            result = gl.convert_layout((activated * up.to(dtype).to(gl.float32)).to(dtype), rows)
        else:
            result = gl.convert_layout(acc.to(dtype), rows)
        row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, rows))
        col = first_col + gl.arange(0, COLS, gl.SliceLayout(0, rows))
        target = row if UP else gl.load(order_ptr + row, mask=row < end, other=0)
        at = out_ptr + target[:, None].to(gl.int64) * N + col[None, :]
        gl.store(at, result, mask=(row < end)[:, None] & (col < N)[None, :])


def grouped_experts(
    x: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Each slot's expert MLP, before its weight.

    Args:
        x: [T, H]; order: [T * top_k] and starts: [E + 1], from `sort_by_expert`.
        gate_up: [E, 2N, H]; down: [E, H, N].

    Returns:
        [T * top_k, H], by slot.
    """
    num_slots, (num_experts, hidden, width) = len(order), down.shape
    tiles = (num_slots + num_experts * (BLOCK_M - 1)) // BLOCK_M  # an expert's last tile may be mostly empty
    table = torch.empty(tiles, 3, dtype=torch.int32, device=x.device)
    experts = triton.next_power_of_2(num_experts)
    _tiles_kernel[(1,)](starts, table, tiles, E=num_experts, E_BLOCK=experts, BLOCK_M=BLOCK_M, num_warps=4)
    gathered = torch.empty(num_slots, hidden, dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(hidden), 1024)
    _gather_kernel[(num_slots,)](x, order, gathered, x.stride(0), TOP_K=top_k, H=hidden, BLOCK=block, num_warps=4)
    activated = torch.empty(num_slots, width, dtype=x.dtype, device=x.device)
    slots = torch.empty(num_slots, hidden, dtype=x.dtype, device=x.device)
    for a, weight, out, up in ((gathered, gate_up, activated, True), (activated, down, slots, False)):
        columns = BLOCK_N // 2 if up else BLOCK_N
        _grouped_kernel[(tiles * triton.cdiv(out.shape[1], columns),)](
            descriptor(a, [BLOCK_M, BLOCK_K]), descriptor(weight.flatten(0, 1), [columns, BLOCK_K]),
            table, order, out, E=num_experts, N=out.shape[1], K=a.shape[1],
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, STAGES=STAGES, UP=up, num_warps=8,
            enable_fp_fusion=False,  # said outright: the default is an environment variable's
        )  # fmt: skip
    return slots


def groups(gate_up: torch.Tensor, down: torch.Tensor, num_slots: int) -> bool:
    """Whether these kernels take such weights, and pay: over 64 rows an expert.

    At 64 rows (1024 tokens of 26B-A4B) the tiles of `experts.py` take 482 µs and these 560; at 94, 754 and 654.
    """
    return num_slots > 64 * len(down) and loads_by_tma(gate_up, down)
