"""The products of `experts` for few tokens on Hopper, in Gluon: a hit expert's weights are streamed once, unsorted.

A program belongs to a slot and 64 rows of its expert's weight. The first slot of an expert leads: its program
multiplies with all tokens of the step, and keeps what belongs to a slot of that expert; the others leave at once.
So there is no sort, and tokens of one expert share its bytes. K runs from its beginning to its end in one
accumulator, as everywhere (`linear.py` says why that gives the same bits).

What hides the latencies is that both kernels ask for weights before they join the chain (`chain.py`): `down` knows
its experts since `up` was let on, and `up` does where the caller says that x and ids are settled. Then it
multiplies beside the kernel ahead of it and joins before its first store. On one H200, 26B-A4B, from the o
projection to the experts' last product, one token: 53.7 µs a layer, 58.4 with unsettled ids, 62.7 through the sort
and Triton's tiles; eight tokens 168 and 181, sixteen 255 and 266.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.activations.activation import Activation, activate
from gemcutter.ops.hopper import descriptor, load_tile, loads_by_tma, stage_barriers
from gemcutter.ops.linears.linear_fp8 import dtype_of
from gemcutter.ops.moe.experts_stream_rows import place_one_quantized, place_quantized_rows, place_rows
from gemcutter.ops.quantize_fp8 import Quantized, pair_of

MOST_STREAMED = 16  # tokens; with 32, whose rows of x fill shared memory, 424 µs against 317 for Triton's tiles
COLS = 32
ROWS = 64
WIDEST_HELD = 2048  # columns of the rows that `down` in FP8 keeps in registers: 1536 of 16 tokens take 228 a thread
activate_gate = gluon.jit(activate.fn)


@gluon.jit
def _members(
    ids_ptr, slot, tokens, TOP_K: gl.constexpr, K_BLOCK: gl.constexpr, BLOCK_T: gl.constexpr
):  # fmt: skip
    """The slot's expert; whether its program computes; each token's slot that it computes, or -1.

    An expert that a token names again, which no router does, is computed for that slot alone.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, K_BLOCK], [32, 1], [gl.num_warps(), 1], [1, 0])
    token = gl.arange(0, BLOCK_T, gl.SliceLayout(1, layout))
    i = gl.arange(0, K_BLOCK, gl.SliceLayout(0, layout))[None, :]
    at = token[:, None] * TOP_K + i
    ids = gl.load(ids_ptr + at, mask=(token < tokens)[:, None] & (i < TOP_K), other=-1).to(gl.int32)
    expert = gl.load(ids_ptr + slot).to(gl.int32)
    first = gl.min(gl.where(ids == expert, at, 1 << 30), 1)
    mine = token == slot // TOP_K
    again = gl.max((mine & (first < slot)).to(gl.int32), 0) == 1
    slots = gl.where(first < (1 << 30), first, -1)
    return expert, again | (gl.min(first, 0) == slot), gl.where(again, gl.where(mine, slot, -1), slots)


@gluon.jit
def _up_stream_kernel(
    weight_desc, weight_scale_ptr, x_desc, x_scale_ptr, ids_ptr, out_ptr, tokens,
    TOP_K: gl.constexpr, K_BLOCK: gl.constexpr, N: gl.constexpr, K: gl.constexpr, COLS: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
    SETTLED: gl.constexpr,
):  # fmt: skip
    """Program (slot, tile): out[slots] = activation(gate) * up of x @ weight[expert].T, COLS of its N columns.

    weight: [E, 2N, K]. The scales are those of rows of FP8, or None.
    """
    column_tiles: gl.constexpr = (N + COLS - 1) // COLS
    slot = gl.program_id(0) // column_tiles
    first_col = gl.program_id(0) % column_tiles * COLS
    dtype: gl.constexpr = x_desc.dtype
    bits: gl.constexpr = dtype.primitive_bitwidth
    out_dtype: gl.constexpr = out_ptr.dtype.element_ty
    w_stages = gl.allocate_shared_memory(dtype, [STAGES, 2 * COLS, BLOCK_K], weight_desc.layout)
    x_stages = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_K], x_desc.layout)
    ready = stage_barriers(STAGES)
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BYTES: gl.constexpr = (2 * COLS + BLOCK_T) * BLOCK_K * bits // 8
    for stage in gl.static_range(STAGES):
        if stage < STEPS:
            mbarrier.expect(ready.index(stage), BYTES)
    if not SETTLED:
        gdc_wait()
    # Behind the join or with settled ids: either way `down` may read the ids when it comes.
    gdc_launch_dependents()
    expert, computes, slots = _members(ids_ptr, slot, tokens, TOP_K, K_BLOCK, BLOCK_T)
    if computes:
        row = expert * (2 * N) + first_col
        for stage in gl.static_range(STAGES):
            if stage < STEPS:
                at = stage * BLOCK_K
                halves = w_stages.index(stage)
                load_tile(weight_desc, [row, at], ready.index(stage), halves.slice(0, COLS))
                load_tile(weight_desc, [row + N, at], ready.index(stage), halves.slice(COLS, COLS))
        for stage in gl.static_range(STAGES):
            if stage < STEPS:
                load_tile(x_desc, [0, stage * BLOCK_K], ready.index(stage), x_stages.index(stage))

        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 256 // bits])
        if weight_scale_ptr is not None:
            channel = gl.arange(0, 2 * COLS, gl.SliceLayout(1, layout))
            of_up = channel // COLS
            real = first_col + channel - of_up * COLS < N
            weight_scale = gl.load(weight_scale_ptr + row + channel + of_up * (N - COLS), mask=real, other=0.0)
            token = gl.arange(0, BLOCK_T, gl.SliceLayout(0, layout))
            x_scale = gl.load(x_scale_ptr + token, mask=token < tokens, other=0.0)
        acc = gl.zeros([2 * COLS, BLOCK_T], gl.float32, layout)
        for step in range(STEPS):
            now = step % STAGES
            mbarrier.wait(ready.index(now), (step // STAGES) & 1)
            acc = warpgroup_mma(w_stages.index(now), x_stages.index(now).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The product before this one is done: its stage is free for the load that comes STAGES later.
            coming = step - 1 + STAGES
            free = coming % STAGES
            more = (step > 0) & (coming < STEPS)
            k = coming * BLOCK_K
            refill = w_stages.index(free)
            mbarrier.expect(ready.index(free), BYTES, pred=more)
            load_tile(weight_desc, [row, k], ready.index(free), refill.slice(0, COLS), pred=more)
            load_tile(weight_desc, [row + N, k], ready.index(free), refill.slice(COLS, COLS), pred=more)
            load_tile(x_desc, [0, k], ready.index(free), x_stages.index(free), pred=more)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        for stage in gl.static_range(STAGES):
            mbarrier.invalidate(ready.index(stage))

        if weight_scale_ptr is not None:
            acc = acc * x_scale[None, :] * weight_scale[:, None]
        # A column's gate and up stand in two warps.
        both = gl.allocate_shared_memory(gl.float32, [2 * COLS, BLOCK_T], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        both.store(acc)
        columns: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, gl.num_warps()], [0, 1])
        gate = both.slice(0, COLS).load(columns).to(out_dtype)
        up = both.slice(COLS, COLS).load(columns).to(out_dtype).to(gl.float32)
        result = (activate_gate(gate, ACTIVATION).to(gl.float32) * up).to(out_dtype)
        target = gl.convert_layout(slots, gl.SliceLayout(0, columns))
        col = first_col + gl.arange(0, COLS, gl.SliceLayout(1, columns))
        at = out_ptr + target[None, :].to(gl.int64) * N + col[:, None]
        gdc_wait()
        gl.store(at, result, mask=(target >= 0)[None, :] & (col < N)[:, None])
    else:
        gdc_wait()


@gluon.jit
def _down_stream_kernel(
    weight_desc, weight_scale_ptr, x_ptr, ids_ptr, out_ptr, tokens,
    TOP_K: gl.constexpr, K_BLOCK: gl.constexpr, N: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, ALONE: gl.constexpr,
):  # fmt: skip
    """Program (slot, tile): out[slots] = x[slots] @ weight[expert].T, ROWS of its N columns; weight [E, N, K].

    Before weights of FP8, which have scales, x is quantised here. ALONE: there is one token.
    """
    gdc_launch_dependents()
    tiles: gl.constexpr = (N + ROWS - 1) // ROWS
    slot = gl.program_id(0) // tiles
    first_col = gl.program_id(0) % tiles * ROWS
    dtype: gl.constexpr = weight_desc.dtype
    bits: gl.constexpr = dtype.primitive_bitwidth
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BYTES: gl.constexpr = ROWS * BLOCK_K * bits // 8
    w_stages = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], weight_desc.layout)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, BLOCK_K], dtype)
    x_tiles = gl.allocate_shared_memory(dtype, [STEPS, BLOCK_T, BLOCK_K], x_layout)
    ready = stage_barriers(STAGES)
    for stage in gl.static_range(STAGES):
        if stage < STEPS:
            mbarrier.expect(ready.index(stage), BYTES)
    expert, computes, slots = _members(ids_ptr, slot, tokens, TOP_K, K_BLOCK, BLOCK_T)
    if computes:
        row = expert * N + first_col
        for stage in gl.static_range(STAGES):
            if stage < STEPS:
                load_tile(weight_desc, [row, stage * BLOCK_K], ready.index(stage), w_stages.index(stage))

        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 256 // bits])
        if weight_scale_ptr is not None:
            channel = first_col + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            weight_scale = gl.load(weight_scale_ptr + expert * N + channel, mask=channel < N, other=0.0)
        gdc_wait()
        if weight_scale_ptr is None:
            place_rows(x_ptr, slots, x_tiles, K)
        elif ALONE:
            x_scale = place_one_quantized(x_ptr, gl.max(slots, 0), x_tiles, K)
        else:
            x_scale = gl.convert_layout(place_quantized_rows(x_ptr, slots, x_tiles, K), gl.SliceLayout(0, layout))
        fence_async_shared()

        acc = gl.zeros([ROWS, BLOCK_T], gl.float32, layout)
        for i in range(STEPS):
            now = i % STAGES
            mbarrier.wait(ready.index(now), (i // STAGES) & 1)
            acc = warpgroup_mma(w_stages.index(now), x_tiles.index(i).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if STAGES < STEPS:
                coming = i - 1 + STAGES
                free = coming % STAGES
                more = (i > 0) & (coming < STEPS)
                mbarrier.expect(ready.index(free), BYTES, pred=more)
                load_tile(weight_desc, [row, coming * BLOCK_K], ready.index(free), w_stages.index(free), pred=more)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if weight_scale_ptr is not None:
            acc = acc * (x_scale if ALONE else x_scale[None, :]) * weight_scale[:, None]
        col = first_col + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        target = gl.convert_layout(slots, gl.SliceLayout(0, layout))
        at = out_ptr + target[None, :].to(gl.int64) * N + col[:, None]
        gl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(target >= 0)[None, :] & (col < N)[:, None])
    else:
        gdc_wait()


def streams(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether these kernels take such tensors, and pay."""
    held = down.dtype != torch.float8_e4m3fn or down.shape[2] <= WIDEST_HELD
    return held and 0 < len(x) <= MOST_STREAMED and loads_by_tma(x, gate_up, down)


def stream_experts(
    x: torch.Tensor | Quantized,
    ids: torch.Tensor,
    gate_up: torch.Tensor | Quantized,
    down: torch.Tensor | Quantized,
    settled: bool,
    activation: str = Activation.GELU_TANH,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Each slot's expert MLP, before its weight.

    Args:
        x: [T, H], T from 1 to 16; ids: [T, k]; gate_up: [E, 2N, H]; down: [E, H, N].
        settled: x and ids are, for the kernel that comes next (`chain.py`).
        dtype: of the result; None: x's, or bfloat16 of a pair.

    Returns:
        [T * k, H], by slot.
    """
    (x, x_scale), (gate_up, gate_up_scale), (down, down_scale) = (pair_of(each) for each in (x, gate_up, down))
    (tokens, top_k), (_, hidden, width) = ids.shape, down.shape
    num_slots, dtype = tokens * top_k, dtype or dtype_of(x)
    activated = torch.empty(num_slots, width, dtype=dtype, device=x.device)
    slots = torch.empty(num_slots, hidden, dtype=dtype, device=x.device)
    block_t = 8 if tokens <= 8 else 16
    (up_k, up_stages), (down_k, down_stages) = stream_tiles(x.dtype, tokens)
    shape = dict(TOP_K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK_T=block_t)
    options = dict(num_warps=4, launch_pdl=True, enable_fp_fusion=False)
    _up_stream_kernel[(num_slots * triton.cdiv(width, COLS),)](
        descriptor(gate_up.flatten(0, 1), [COLS, up_k]), gate_up_scale, descriptor(x, [block_t, up_k]), x_scale,
        ids, activated, tokens,
        N=width, K=hidden, COLS=COLS, BLOCK_K=up_k, STAGES=up_stages,
        ACTIVATION=str(activation), SETTLED=settled, **shape, **options,
    )  # fmt: skip
    _down_stream_kernel[(num_slots * triton.cdiv(hidden, ROWS),)](
        descriptor(down.flatten(0, 1), [ROWS, down_k]), down_scale, activated, ids, slots, tokens,
        N=hidden, K=width, ROWS=ROWS, BLOCK_K=down_k, STAGES=down_stages, ALONE=tokens == 1, **shape, **options,
    )  # fmt: skip
    return slots


def stream_tiles(dtype: torch.dtype, tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """K a stage, and stages, of up and of down: of 704 columns 11 steps in halves, in FP8 5 and a half.

    Three programs of `up` share an SM, with 72 KiB each or less. In FP8 that takes 3 stages for more than 8 tokens,
    and with 4 for 6 `down` finds room beside them: 16 tokens take 122 µs for 132, one 12.1 for 12.9. For 2 to 8
    tokens 6 are as fast or 1 % faster.
    """
    if dtype == torch.float8_e4m3fn:
        return (256, 4 if tokens <= 8 else 3), (128, 6 if 1 < tokens <= 8 else 4)
    return (128, 4), (64, 7 if tokens <= 8 else 5)
