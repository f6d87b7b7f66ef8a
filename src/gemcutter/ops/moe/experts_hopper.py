"""The grouped matrix products of `experts` for many tokens on Hopper, in Gluon.

A program stays on its SM and takes one tile after the other: up to 128 rows of one expert by 128 columns of its
weights, K in steps of 64 from its beginning to its end in one accumulator, as everywhere (`linear.py` says why that
gives the same bits). Its warps have three offices: loaders fill a ring of stages (`experts_loaders.py`), and two
groups of four warps multiply in turn, a tile each. While one writes its tile, the other has the tensor cores.

On one H200 at 8192 tokens of 26B-A4B up takes 818 µs and down 413, where programs without offices took 884 and 499,
and 159 more to gather the rows first. Tiles of 256 rows or columns, which both groups multiply together, and of 192
rows a group are slower; so are 64 x 128 in rings of 8.
"""

import functools

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

from gemcutter.ops.activations.activation import Activation, activate
from gemcutter.ops.hopper import PROCESSORS, descriptor, loads_by_tma
from gemcutter.ops.linears.linear_fp8 import dtype_of
from gemcutter.ops.moe.experts_loaders import load_rows, load_scattered_rows, tile_at
from gemcutter.ops.moe.experts_results import channel_scales, places, row_scales, rows_layout_of
from gemcutter.ops.moe.experts_weave import rows_of, unwoven, weaves, woven
from gemcutter.ops.quantize_fp8 import Quantized, pair_of, quantize_fp8_launch

# One program an SM: 6 stages of 32 KiB. Half a tile of rows is a box of TMA, and what an expert's last tile may be.
BLOCK_M, BLOCK_N, STAGE_BYTES, STAGES = 128, 128, 128, 6  # bytes of K a row in a stage
HALF = BLOCK_M // 2
activate_gate = gluon.jit(activate.fn)


@triton.jit
def _tiles_kernel(starts_ptr, table_ptr, E: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """table[0, 0] = how many tiles there are; table[1 + t] = expert, first row, end of the expert's rows."""
    expert = tl.arange(0, E_BLOCK)
    start = tl.load(starts_ptr + expert, mask=expert < E, other=0)
    end = tl.load(starts_ptr + expert + 1, mask=expert < E, other=0)
    count = (end - start + BLOCK_M - 1) // BLOCK_M
    first = 1 + tl.cumsum(count, axis=0) - count
    tl.store(table_ptr, tl.sum(count, axis=0))
    for i in range(0, tl.max(count, axis=0)):
        at = table_ptr + (first + i) * 3
        tl.store(at, expert, mask=i < count)
        tl.store(at + 1, start + i * BLOCK_M, mask=i < count)
        tl.store(at + 2, end, mask=i < count)


@gluon.jit
def _multiply(
    turn: gl.constexpr, turns, ring, table_ptr, results, tiles,
    N: gl.constexpr, K: gl.constexpr, COLS: gl.constexpr, TOP_K: gl.constexpr, UP: gl.constexpr,
    ACTIVATION: gl.constexpr, WHOLE: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Office of four warps: every second tile of the program, from its tile `turn` on."""
    BLOCK_K: gl.constexpr = ring[0].shape[2]
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    first = gl.program_id(0) + turn * gl.num_programs(0)
    used = turn * STEPS  # stages that are spent when this tile begins
    tiles_done = 0
    expert, row, end, col = tile_at(table_ptr, gl.minimum(first, tiles - 1), N, COLS)
    for tile in range(first, tiles, 2 * gl.num_programs(0)):
        # Asked for a tile ahead: what it takes to come would keep the tensor cores waiting.
        coming = gl.minimum(tile + 2 * gl.num_programs(0), tiles - 1)
        next_expert, next_row, next_end, next_col = tile_at(table_ptr, coming, N, COLS)
        phase = (tiles_done + 1 - turn) & 1
        if end - row > PART.shape[0]:
            _one_tile(
                turn, turns, phase, ring, results, used, expert, row, end, col,
                STEPS, N, COLS, TOP_K, UP, ACTIVATION, WHOLE,
            )  # fmt: skip
        else:
            _one_tile(
                turn, turns, phase, ring, results, used, expert, row, end, col,
                STEPS, N, COLS, TOP_K, UP, ACTIVATION, PART,
            )  # fmt: skip
        used += 2 * STEPS
        tiles_done += 1
        expert = next_expert
        row = next_row
        end = next_end
        col = next_col


@gluon.jit
def _one_tile(
    turn: gl.constexpr, turns, phase, ring, results, used, expert, row, end, col,
    STEPS: gl.constexpr, N: gl.constexpr, COLS: gl.constexpr, TOP_K: gl.constexpr, UP: gl.constexpr,
    ACTIVATION: gl.constexpr, rows_layout: gl.constexpr,
):  # fmt: skip
    """rows_layout: of the result; its shape says how many rows the tile has."""
    x_stages, w_stages, ready, free = ring
    x_scale_ptr, weight_scale_ptr, order_ptr, out_ptr = results
    STAGES: gl.constexpr = x_stages.shape[0]
    BLOCK_N: gl.constexpr = 2 * COLS if UP else COLS
    ROWS: gl.constexpr = rows_layout.shape[0]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    depth: gl.constexpr = 256 // x_stages.dtype.primitive_bitwidth  # of an instruction
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, depth])
    # What the results need comes while the other group multiplies, but not the channels' scales of `up`, for which
    # there are no registers: its last lines have time, since K is long.
    target = places(order_ptr, row, end, UP, rows_layout)
    scaled: gl.constexpr = weight_scale_ptr is not None
    row_scale, channel_scale = 1.0, 1.0
    if scaled:
        row_scale = row_scales(x_scale_ptr, order_ptr, row, end, TOP_K, UP, rows_layout)
        if not UP:
            channel_scale = channel_scales(weight_scale_ptr, expert * N + col, col, N, COLS, rows_layout)
    # Its own stages' phases can be told from earlier ones only when the other group has seen all of its stages.
    mbarrier.wait(turns.index(turn), phase)
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    for step in range(STEPS):
        now = (used + step) % STAGES
        mbarrier.wait(ready.index(now), ((used + step) // STAGES) & 1)
        if UP:
            fence_async_shared()  # rows came by plain copies, which wgmma sees behind a fence
        x = x_stages.index(now).slice(0, ROWS)
        acc = warpgroup_mma(x, rows_of(w_stages.index(now)).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(free.index((used + step + STAGES - 1) % STAGES), pred=step > 0)
    mbarrier.arrive(turns.index(1 - turn))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(free.index((used + STEPS - 1) % STAGES))
    if UP:
        both = acc.reshape([ROWS, 2, COLS]).permute((0, 2, 1)).split()
        gate, up = unwoven(both[0], rows_layout), unwoven(both[1], rows_layout)
        if scaled:
            channel = expert * (2 * N) + col
            gate *= row_scale[:, None]
            gate *= channel_scales(weight_scale_ptr, channel, col, N, COLS, rows_layout)[None, :]
            up *= row_scale[:, None]
            up *= channel_scales(weight_scale_ptr, channel + N, col, N, COLS, rows_layout)[None, :]
        activated = activate_gate(gate.to(dtype), ACTIVATION).to(gl.float32)
        result = (activated * up.to(dtype).to(gl.float32)).to(dtype)
    else:
        acc = unwoven(acc, rows_layout)
        if scaled:
            acc = acc * row_scale[:, None] * channel_scale[None, :]
        result = acc.to(dtype)
    row += gl.arange(0, ROWS, gl.SliceLayout(1, rows_layout))
    col += gl.arange(0, COLS, gl.SliceLayout(0, rows_layout))
    at = out_ptr + target[:, None].to(gl.int64) * N + col[None, :]
    gl.store(at, result, mask=(row < end)[:, None] & (col < N)[None, :])


@gluon.jit
def _grouped_kernel(
    x, x_scale_ptr, x_stride, weight_desc, weight_scale_ptr, table_ptr, order_ptr, out_ptr,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    UP: gl.constexpr, ACTIVATION: gl.constexpr, WHOLE: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """UP: out[row] = activation(gate) * up of x[order[row] // TOP_K] @ weight[expert].T, weight [E, 2N, K].

    Otherwise out[order[row]] = x[row] @ weight[expert].T, weight [E, N, K]. x: a pointer for UP, else a descriptor.
    The scales are those of rows of FP8, or None.
    """
    COLS: gl.constexpr = BLOCK_N // 2 if UP else BLOCK_N  # of out
    tiles = gl.load(table_ptr) * ((N + COLS - 1) // COLS)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], weight_desc.dtype)
    x_stages = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], layout)
    w_stages = gl.allocate_shared_memory(
        weight_desc.dtype, [STAGES, BLOCK_N // 32, 4, 4, 2, BLOCK_K], weight_desc.layout
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1 + 128 * UP)  # TMA, and each loading thread's own copies
        mbarrier.init(free.index(stage), count=1)
    for turn in gl.static_range(2):
        mbarrier.init(turns.index(turn), count=1)
    fence_async_shared()
    ring, results = (x_stages, w_stages, ready, free), (x_scale_ptr, weight_scale_ptr, order_ptr, out_ptr)
    # Registers a thread: 504 for the three groups together, in which a loader of one warp counts as four.
    if UP:
        gl.warp_specialize(
            [
                (_multiply, (
                    0, turns, ring, table_ptr, results, tiles, N, K, COLS, TOP_K, UP, ACTIVATION, WHOLE, PART,
                )),
                (_multiply, (
                    1, turns, ring, table_ptr, results, tiles, N, K, COLS, TOP_K, UP, ACTIVATION, WHOLE, PART,
                )),
                (
                    load_scattered_rows,
                    (x, x_stride, weight_desc, ring, table_ptr, order_ptr, tiles, N, K, COLS, TOP_K),
                ),
            ],
            [4, 4], [224, 56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    0, turns, ring, table_ptr, results, tiles, N, K, COLS, TOP_K, UP, ACTIVATION, WHOLE, PART,
                )),
                (_multiply, (
                    1, turns, ring, table_ptr, results, tiles, N, K, COLS, TOP_K, UP, ACTIVATION, WHOLE, PART,
                )),
                (load_rows, (x, weight_desc, ring, table_ptr, tiles, N, K, COLS)),
            ],
            [4, 1], [232, 40],
        )  # fmt: skip


def grouped_experts(
    x: torch.Tensor | Quantized,
    order: torch.Tensor,
    starts: torch.Tensor,
    gate_up: torch.Tensor | Quantized,
    down: torch.Tensor | Quantized,
    top_k: int,
    activation: str = Activation.GELU_TANH,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Each slot's expert MLP, before its weight.

    Args:
        x: [T, H]; order: [T * top_k] and starts: [E + 1], from `sort_by_expert`.
        gate_up: [E, 2N, H]; down: [E, H, N].
        dtype: of the result; None: x's, or bfloat16 of a pair.

    Returns:
        [T * top_k, H], by slot.
    """
    (x, x_scale), (gate_up, gate_up_scale), (down, down_scale) = (pair_of(each) for each in (x, gate_up, down))
    num_slots, (num_experts, hidden, width), dtype = len(order), down.shape, dtype or dtype_of(x)
    most = (num_slots + num_experts * (BLOCK_M - 1)) // BLOCK_M  # an expert's last tile may be mostly empty
    table = torch.empty(1 + most, 3, dtype=torch.int32, device=x.device)
    experts = triton.next_power_of_2(num_experts)
    _tiles_kernel[(1,)](starts, table, E=num_experts, E_BLOCK=experts, BLOCK_M=BLOCK_M, num_warps=4)
    pack = 16 // x.itemsize
    if x.stride(0) % pack or x.data_ptr() % 16:  # copies of 16 bytes need rows that begin at their multiples
        x = x.clone(memory_format=torch.contiguous_format)
    block_k = STAGE_BYTES // x.itemsize
    activated = torch.empty(num_slots, width, dtype=dtype, device=x.device)
    slots = torch.empty(num_slots, hidden, dtype=dtype, device=x.device)

    def multiply(x, x_scale, stride, weight, weight_scale, out, up):
        columns = BLOCK_N // 2 if up else BLOCK_N
        programs = min(_processors(out.device), most * triton.cdiv(out.shape[1], columns))
        _grouped_kernel[(programs,)](
            x, x_scale, stride, woven(weight, columns, block_k), weight_scale,
            table, order, out, N=out.shape[1], K=weight.shape[2], TOP_K=top_k,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=block_k, STAGES=STAGES, UP=up, ACTIVATION=str(activation),
            WHOLE=rows_layout_of(BLOCK_M, columns), PART=rows_layout_of(HALF, columns), num_warps=4,
            enable_fp_fusion=False,  # said outright: the default is an environment variable's
        )  # fmt: skip

    multiply(x, x_scale, x.stride(0) // pack, gate_up, gate_up_scale, activated, True)
    rows, rows_scale = (activated, None) if down_scale is None else quantize_fp8_launch(activated)
    multiply(descriptor(rows, [HALF, block_k]), rows_scale, 0, down, down_scale, slots, False)
    return slots


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def groups(gate_up: torch.Tensor, down: torch.Tensor, num_slots: int) -> bool:
    """Whether these kernels take such weights, and pay: over 48 rows an expert, in FP8 over 8.

    At 32 rows (512 tokens of 26B-A4B) they take as long as Triton's tiles, 0.40 ms; at 64, 0.43 for 0.45. In FP8
    at 4 rows 192 µs for 188, at 16 202 for 219.
    """
    rows = 8 if down.dtype == torch.float8_e4m3fn else 48
    return num_slots > rows * len(down) and takes_groups(gate_up, down)


def takes_groups(gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    return loads_by_tma(gate_up, down) and weaves(gate_up, down)
