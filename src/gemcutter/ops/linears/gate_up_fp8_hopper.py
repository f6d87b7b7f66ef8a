"""gelu(gate) * up of few tokens in FP8 in one launch on Hopper, and a router's logits beside it, in Gluon.

A program owns 32 rows of gate and the same of up, together the M of wgmma, asks for the first stages of them, joins
the chain and copies x, which comes quantised, to shared memory, as in `linear_fp8_hopper.py`, whose loops these
are. The first programs may belong to a router, whose weights and x are of 16 bits: half the columns a stage.
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

from gemcutter.ops.hopper import PROCESSORS, barrier, descriptor, load_tile, loads_by_tma, stage_barriers
from gemcutter.ops.linears.gate_up_hopper import activate, view
from gemcutter.ops.linears.row_stream_hopper import SHARED

MOST_TOKENS = 16
HALF = 32  # rows of weights in a box of TMA, of which a program has two
BLOCK_K = 256
TOGETHER = gl.constexpr(8)  # steps of x on their way to shared memory at once; more cost registers


@gluon.jit
def _ask(desc, stages, ready, stage, first, second, step, pred=True):
    """Two boxes of weights, the rows from `first` and those from `second` on, to one stage."""
    HALF: gl.constexpr = desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = desc.block_type.shape[1]
    BYTES: gl.constexpr = 2 * desc.block_type.nbytes
    mbarrier.expect(ready.index(stage), BYTES, pred=pred)
    halves = stages.index(stage)
    load_tile(desc, [first, step * BLOCK_K], ready.index(stage), halves.slice(0, HALF), pred=pred)
    load_tile(desc, [second, step * BLOCK_K], ready.index(stage), halves.slice(HALF, HALF), pred=pred)


@gluon.jit
def _multiply(desc, stages, ready, x_tiles, first, second, STEPS: gl.constexpr):
    """[rows of weights, rows of x]: all K in one chain. The first stages were asked for."""
    STAGES: gl.constexpr = stages.shape[0]
    BITS: gl.constexpr = desc.dtype.primitive_bitwidth
    ROWS: gl.constexpr = stages.shape[1]
    X_ROWS: gl.constexpr = x_tiles.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, X_ROWS, 256 // BITS])
    acc = gl.zeros([ROWS, X_ROWS], gl.float32, layout)
    for step in range(STEPS):
        now = step % STAGES
        mbarrier.wait(ready.index(now), (step // STAGES) & 1)
        acc = warpgroup_mma(stages.index(now), x_tiles.index(step).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if STAGES < STEPS:
            # The product before this one is done: its stage is free for the weights of STAGES steps later.
            coming = step - 1 + STAGES
            more = (step > 0) & (coming < STEPS)
            _ask(desc, stages, ready, coming % STAGES, first, second, coming, more)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def _copy(x_ptr, tiles, tokens, sixteenths, K: gl.constexpr, STEPS: gl.constexpr):
    """x to shared memory; zeros past its rows and its depth. sixteenths: of a row's stride, in bytes."""
    X_ROWS: gl.constexpr = tiles.shape[1]
    COLS: gl.constexpr = tiles.shape[2]
    WIDE: gl.constexpr = 128 // tiles.dtype.primitive_bitwidth
    across: gl.constexpr = gl.BlockedLayout([1, WIDE], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, X_ROWS, gl.SliceLayout(1, across))[:, None]
    k = gl.arange(0, COLS, gl.SliceLayout(0, across))[None, :]
    at = x_ptr + row.to(gl.int64) * sixteenths * WIDE + k
    for batch in gl.static_range((STEPS + TOGETHER - 1) // TOGETHER):
        x = ()
        for i in gl.static_range(TOGETHER):
            if batch * TOGETHER + i < STEPS:
                held = (row < tokens) & (k < K - (batch * TOGETHER + i) * COLS)
                x += (gl.load(at + (batch * TOGETHER + i) * COLS, mask=held, other=0.0),)
        for i in gl.static_range(TOGETHER):
            if batch * TOGETHER + i < STEPS:
                tiles.index(batch * TOGETHER + i).store(x[i])


@gluon.jit
def _product(
    desc, stages, tiles, ready, x_ptr, tokens, sixteenths, first, second, K: gl.constexpr, STEPS: gl.constexpr
):  # fmt: skip
    """[rows of weights, rows of x], of the rows from `first` and from `second` on."""
    STAGES: gl.constexpr = stages.shape[0]
    for stage in gl.static_range(STAGES):
        _ask(desc, stages, ready, stage, first, second, stage)
    gdc_wait()
    gdc_launch_dependents()
    _copy(x_ptr, tiles, tokens, sixteenths, K, STEPS)
    fence_async_shared()
    barrier()
    return _multiply(desc, stages, ready, tiles, first, second, STEPS)


@gluon.jit
def _gate_up(
    desc, stages, tiles, ready, x_ptr, scale_ptr, weight_scale_ptr, out_ptr, tokens, sixteenths, first,
    I: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = desc.block_type.shape[0]
    X_ROWS: gl.constexpr = tiles.shape[1]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    acc = _product(desc, stages, tiles, ready, x_ptr, tokens, sixteenths, first, first + I, K, STEPS)
    token = gl.arange(0, X_ROWS, gl.SliceLayout(0, acc.type.layout))
    row = gl.arange(0, 2 * HALF, gl.SliceLayout(1, acc.type.layout))
    column = first + row % HALF
    acc *= gl.load(weight_scale_ptr + column + row // HALF * I, mask=column < I, other=0.0)[:, None]
    acc *= gl.load(scale_ptr + token, mask=token < tokens, other=0.0)[None, :]
    # A gate and its up lie with different warps: through shared memory to one thread.
    pairs: gl.constexpr = gl.BlockedLayout([2, 1, 1], [1, 8, 4], [1, 4, 1], [0, 1, 2])
    both = gl.convert_layout(acc.to(dtype).reshape([2, HALF, X_ROWS]), pairs)
    gate, up = both.permute((1, 2, 0)).split()
    activated = activate(gate.to(gl.float32)).to(dtype).to(gl.float32)
    column = first + gl.arange(0, HALF, gl.SliceLayout(1, gate.type.layout))[:, None]
    token = gl.arange(0, X_ROWS, gl.SliceLayout(0, gate.type.layout))[None, :]
    at = out_ptr + token.to(gl.int64) * I + column
    gl.store(at, (activated * up.to(gl.float32)).to(dtype), mask=(token < tokens) & (column < I))


@gluon.jit
def _router(
    desc, stages, tiles, ready, x_ptr, logits_ptr, tokens, sixteenths, first,
    E: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = desc.block_type.shape[0]
    COLS: gl.constexpr = desc.block_type.shape[1]
    STAGES: gl.constexpr = stages.shape[0]
    X_ROWS: gl.constexpr = tiles.shape[1]
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([X_ROWS, COLS], desc.dtype)
    wide_stages = view(stages, desc.dtype, [STAGES, 2 * HALF, COLS], desc.layout)
    wide_tiles = view(tiles, desc.dtype, [tiles.shape[0], X_ROWS, COLS], x_layout)
    acc = _product(desc, wide_stages, wide_tiles, ready, x_ptr, tokens, sixteenths, first, first + HALF, K, STEPS)
    token = gl.arange(0, X_ROWS, gl.SliceLayout(0, acc.type.layout))[None, :]
    column = first + gl.arange(0, 2 * HALF, gl.SliceLayout(1, acc.type.layout))[:, None]
    at = logits_ptr + token.to(gl.int64) * E + column
    gl.store(at, acc.to(desc.dtype), mask=(token < tokens) & (column < E))


@gluon.jit(do_not_specialize=["tokens"])
def _gate_up_fp8_kernel(
    desc, x_ptr, scale_ptr, weight_scale_ptr, out_ptr, router_desc, router_x_ptr, logits_ptr, tokens, sixteenths,
    router_sixteenths, I: gl.constexpr, E: gl.constexpr, K: gl.constexpr, X_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The first programs: E logits of the router; the others: I columns of out."""
    HALF: gl.constexpr = desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = desc.block_type.shape[1]
    ROUTERS: gl.constexpr = (E + 2 * HALF - 1) // (2 * HALF)
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    ROUTER_STEPS: gl.constexpr = (K + BLOCK_K // 2 - 1) // (BLOCK_K // 2)
    TILES: gl.constexpr = ROUTER_STEPS if E else STEPS
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([X_ROWS, BLOCK_K], desc.dtype)
    stages = gl.allocate_shared_memory(desc.dtype, [STAGES, 2 * HALF, BLOCK_K], desc.layout)
    tiles = gl.allocate_shared_memory(desc.dtype, [TILES, X_ROWS, BLOCK_K], x_layout)
    ready = stage_barriers(STAGES)
    program = gl.program_id(0)
    if program >= ROUTERS:
        _gate_up(
            desc, stages, tiles, ready, x_ptr, scale_ptr, weight_scale_ptr, out_ptr, tokens, sixteenths,
            (program - ROUTERS) * HALF, I, K, STEPS,
        )  # fmt: skip
    elif E > 0:
        _router(
            router_desc, stages, tiles, ready, router_x_ptr, logits_ptr, tokens, router_sixteenths,
            program * (2 * HALF), E, K, ROUTER_STEPS,
        )  # fmt: skip


def stream_gate_up_fp8(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    router_x: torch.Tensor | None,
    router: torch.Tensor | None,
    out: torch.Tensor,
    logits: torch.Tensor | None,
) -> None:
    """x [T, K] of 1 to MOST_TOKENS rows, weight [2I, K] -> out [T, I]; router_x [T, K], router [E, K] -> logits."""
    (tokens, depth), width = x.shape, out.shape[1]
    experts = 0 if router is None else len(router)
    half, router_half = descriptor(weight, [HALF, BLOCK_K]), None
    if router is not None:
        router_half = descriptor(router, [HALF, BLOCK_K // 2])
    _gate_up_fp8_kernel[(triton.cdiv(width, HALF) + triton.cdiv(experts, 2 * HALF),)](
        half, x, scale, weight_scale, out, router_half, router_x, logits, tokens, x.stride(0) // 16,
        0 if router is None else router_x.stride(0) // 8,
        I=width, E=experts, K=depth, **gate_up_fp8_tile(tokens, width, depth, experts),
        num_warps=4, launch_pdl=True, enable_fp_fusion=False,
    )  # fmt: skip


def streams_gate_up_fp8(x: torch.Tensor, weight: torch.Tensor, router_x=None, router=None) -> bool:
    """Whether the kernel takes these: few tokens, e4m3, a router of 16 bits an element or none."""
    given = (x, weight) if router is None else (x, weight, router_x, router)
    if not 0 < len(x) <= MOST_TOKENS or not all(loads_by_tma(each) for each in given):
        return False
    tile = gate_up_fp8_tile(len(x), len(weight) // 2, x.shape[1], 0 if router is None else len(router))
    return x.itemsize == 1 and (router is None or router.itemsize == 2) and tile["STAGES"] >= 4


def gate_up_fp8_tile(tokens: int, width: int, depth: int, experts: int) -> dict[str, int]:
    """Stages of weights fill what x leaves; where programs are more than SMs and it allows, of half of it."""
    x_rows = 8 if tokens <= 8 else 16
    steps = triton.cdiv(depth, BLOCK_K // 2 if experts else BLOCK_K)
    result = 2 * HALF * x_rows * 2  # on its way to pairs
    in_all, in_half = (
        (shared - x_rows * steps * BLOCK_K - result) // (2 * HALF * BLOCK_K) for shared in (SHARED, SHARED // 2)
    )
    stages = in_half if width > PROCESSORS * HALF and in_half >= 4 else in_all
    return dict(X_ROWS=x_rows, STAGES=min(triton.cdiv(depth, BLOCK_K), stages))
