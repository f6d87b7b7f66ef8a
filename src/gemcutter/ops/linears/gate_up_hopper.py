"""gelu(gate) * up of few tokens in one launch on Hopper, and a router's logits beside it, in Gluon.

A program owns 32 rows of gate and the same of up, together the M of wgmma. One warp asks for their weights by TMA,
from before the kernel ahead is done until all are there; four multiply. x is copied by these, in windows, two of
them ahead: behind tens of KiB of weights in the TMA unit's queue it came up to 2.5 µs late. The first programs may
belong to a router, which has another x of the same depth; alone its product takes 4 µs, nearly all of it latency.

Measured on one H200, one token, chained as in the model: a layer of 26B-A4B without its attention takes 68.3 µs for
72.6 with the ops one by one, with 8 tokens 190 for 196, with 16 283 for 286; gate and up of 31B 105.5 µs for 108.9
(bytes: 105.3), with 16 tokens 111.5 for 110.8.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.activations.geglu import gelu_tanh
from gemcutter.ops.hopper import barrier, load_tile, loads_by_tma

MOST_TOKENS = 16
ROWS = 64  # of weights a program, half of them gate
CHUNKS = 4  # of 64 columns a step
WINDOWS = 3  # of x in shared memory
SHARED = 226 * 1024  # bytes of a program; its barriers have the 227th KiB
activate = gluon.jit(gelu_tanh.fn)
# Triton 3.9 renamed these.
copy_tile = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
memory = gl.shared_memory_descriptor
view = getattr(memory, "reinterpret", None) or memory._reinterpret


@gluon.jit
def _load_weights(
    desc, stages, ready, free, first, STEPS: gl.constexpr, BYTES: gl.constexpr, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    for stage in gl.static_range(STAGES):
        mbarrier.expect(ready.index(stage), BYTES)
        load_tile(desc, [stage * CHUNKS, 0, first, 0], ready.index(stage), stages.index(stage))
    if STAGES < STEPS:
        for step in range(STAGES, STEPS):
            at = step % STAGES
            mbarrier.wait(free.index(at), (step // STAGES - 1) & 1)
            mbarrier.expect(ready.index(at), BYTES)
            load_tile(desc, [step * CHUNKS, 0, first, 0], ready.index(at), stages.index(at))


@gluon.jit
def _load(
    desc, router_desc, stages, ready, free, first, program, ROUTERS: gl.constexpr, STEPS: gl.constexpr,
    BYTES: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    if program >= ROUTERS:
        _load_weights(desc, stages, ready, free, first, STEPS, BYTES, CHUNKS, STAGES)
    else:
        _load_weights(router_desc, stages, ready, free, first, STEPS, BYTES, CHUNKS, STAGES)


@gluon.jit
def _copy_window(
    x_ptr, window, stages, tokens, eighths, K: gl.constexpr, X_ROWS: gl.constexpr, CHUNKS: gl.constexpr,
    WINDOW: gl.constexpr, WINDOWS: gl.constexpr,
):  # fmt: skip
    """x's columns of WINDOW steps; zeros past its rows and its depth."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [gl.num_warps(), 1, 1], [2, 1, 0])
    chunk = gl.arange(0, CHUNKS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    row = gl.arange(0, X_ROWS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    col = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    at = x_ptr + row.to(gl.int64) * eighths * 8 + chunk * 64 + col
    for part in gl.static_range(WINDOW):
        step = window * WINDOW + part
        held = (row < tokens) & (step * CHUNKS + chunk < K // 64) & (col < 64)
        stage = stages.index(window % WINDOWS * WINDOW + part)
        copy_tile(stage, at + step * (CHUNKS * 64), mask=held)
    async_copy.commit_group()


@gluon.jit
def _multiply(
    w_stages, x_stages, ready, free, first, x_ptr, router_x_ptr, out_ptr, logits_ptr, tokens, eighths,
    router_eighths, program, ROUTERS: gl.constexpr, I: gl.constexpr, E: gl.constexpr, K: gl.constexpr,
    STEPS: gl.constexpr, ROWS: gl.constexpr, X_ROWS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    WINDOW: gl.constexpr, WINDOWS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = w_stages.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    w_chunks = view(w_stages, dtype, [STAGES * CHUNKS, ROWS, 64], swizzled)
    x_chunks = view(x_stages, dtype, [WINDOW * WINDOWS * CHUNKS, X_ROWS, 64], swizzled)
    if program < ROUTERS:
        x_ptr = router_x_ptr
        eighths = router_eighths
    gdc_wait()
    for window in gl.static_range(WINDOWS):
        _copy_window(x_ptr, window, x_stages, tokens, eighths, K, X_ROWS, CHUNKS, WINDOW, WINDOWS)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, X_ROWS, 16])
    acc = gl.zeros([ROWS, X_ROWS], gl.float32, layout)
    for step in range(STEPS):
        if step % WINDOW == 0:
            # All windows but the one that was asked for last are there, so this one is.
            if WINDOWS * WINDOW < STEPS:
                async_copy.wait_group(WINDOWS - 2)
            else:
                async_copy.wait_group(0)
            fence_async_shared()
            barrier()
        w_now = step % STAGES
        mbarrier.wait(ready.index(w_now), (step // STAGES) & 1)
        for chunk in gl.static_range(CHUNKS):
            x = x_chunks.index(step % (WINDOW * WINDOWS) * CHUNKS + chunk)
            w = w_chunks.index(w_now * CHUNKS + chunk)
            acc = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
        # The products of the step before are done, its stage is free; so is its window if this step began one.
        acc = warpgroup_mma_wait(CHUNKS, deps=(acc,))
        barrier()
        if STAGES < STEPS:
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        if WINDOWS * WINDOW < STEPS:
            if (step % WINDOW == 0) & (step > 0):
                coming = step // WINDOW - 1 + WINDOWS
                _copy_window(x_ptr, coming, x_stages, tokens, eighths, K, X_ROWS, CHUNKS, WINDOW, WINDOWS)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    # A gate and its up lie with different warps: through shared memory to one thread.
    pairs: gl.constexpr = gl.BlockedLayout([2, 1, 1], [1, 8, 4], [1, 4, 1], [0, 1, 2])
    gate, up = gl.convert_layout(acc.reshape([2, ROWS // 2, X_ROWS]), pairs).permute((1, 2, 0)).split()
    column = first + gl.arange(0, ROWS // 2, gl.SliceLayout(1, gate.type.layout))[:, None]
    token = gl.arange(0, X_ROWS, gl.SliceLayout(0, gate.type.layout))[None, :]
    token_at = token.to(gl.int64)
    if program >= ROUTERS:
        activated = activate(gate.to(dtype).to(gl.float32)).to(dtype).to(gl.float32)
        hidden = (activated * up.to(dtype).to(gl.float32)).to(dtype)
        gl.store(out_ptr + token_at * I + column, hidden, mask=(token < tokens) & (column < I))
    else:
        held = (token < tokens) & (column < E // 2)
        gl.store(logits_ptr + token_at * E + column, gate.to(dtype), mask=held)
        gl.store(logits_ptr + token_at * E + E // 2 + column, up.to(dtype), mask=held)


@gluon.jit(do_not_specialize=["tokens"])
def _gate_up_kernel(
    desc, x_ptr, out_ptr, router_desc, router_x_ptr, logits_ptr, tokens, eighths, router_eighths,
    I: gl.constexpr, E: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, X_ROWS: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr, WINDOWS: gl.constexpr,
):  # fmt: skip
    """The first programs: E logits of the router; the others: I columns of out. Strides of x are in eighths."""
    gdc_launch_dependents()
    program = gl.program_id(0)
    ROUTERS: gl.constexpr = (E + ROWS - 1) // ROWS
    STEPS: gl.constexpr = (K + 64 * CHUNKS - 1) // (64 * CHUNKS)
    first = gl.where(program >= ROUTERS, program - ROUTERS, program) * (ROWS // 2)
    dtype: gl.constexpr = desc.dtype
    x_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    x_stages = gl.allocate_shared_memory(dtype, [WINDOW * WINDOWS, CHUNKS, X_ROWS, 64], x_layout)
    w_stages = gl.allocate_shared_memory(dtype, [STAGES, CHUNKS, 2, ROWS // 2, 64], desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    BYTES: gl.constexpr = ROWS * CHUNKS * 128
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    w_stages, x_stages, ready, free, first, x_ptr, router_x_ptr, out_ptr, logits_ptr, tokens,
                    eighths, router_eighths, program, ROUTERS, I, E, K, STEPS, ROWS, X_ROWS, CHUNKS, STAGES,
                    WINDOW, WINDOWS,
                ),
            ),
            (
                _load,
                (desc, router_desc, w_stages, ready, free, first, program, ROUTERS, STEPS, BYTES, CHUNKS, STAGES),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


def stream_gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    router_x: torch.Tensor | None,
    router: torch.Tensor | None,
    out: torch.Tensor,
    logits: torch.Tensor | None,
) -> None:
    """x [T, K] of 1 to MOST_TOKENS rows, weight [2I, K] -> out [T, I]; router_x [T, K], router [E, K] -> logits."""
    (tokens, depth), width = x.shape, out.shape[1]
    experts = 0 if router is None else len(router)
    if router is None:
        router_x, router, logits = x, weight, out  # which no program looks at
    _gate_up_kernel[(triton.cdiv(width, ROWS // 2) + triton.cdiv(experts, ROWS),)](
        _halves(weight), x, out, _halves(router), router_x, logits, tokens,
        x.stride(0) // 8, router_x.stride(0) // 8,
        I=width, E=experts, K=depth, ROWS=ROWS, CHUNKS=CHUNKS, **gate_up_tile(tokens, depth),
        num_warps=4, launch_pdl=True, maxnreg=64,
    )  # fmt: skip


def streams_gate_up(x: torch.Tensor, weight: torch.Tensor, router_x=None, router=None) -> bool:
    """Whether the kernel takes these: few tokens, whole chunks of 64 columns, an even number of experts."""
    pairs = (x, weight) if router is None else (x, weight, router_x, router)
    few = 0 < len(x) <= MOST_TOKENS and x.shape[1] % 64 == 0 and (router is None or len(router) % 2 == 0)
    return few and loads_by_tma(*pairs) and gate_up_tile(*x.shape)["STAGES"] > 1


def gate_up_tile(tokens: int, depth: int) -> dict[str, int]:
    """Stages of weights fill what x leaves; a window of x is the fewest steps from 3 on that divide all."""
    x_rows = 8 if tokens <= 8 else 16
    steps = triton.cdiv(depth, 64 * CHUNKS)
    window = next(length for length in range(min(3, steps), steps + 1) if steps % length == 0)
    windows = min(steps // window, WINDOWS)
    left = SHARED - (window * windows * CHUNKS * 128 + ROWS * 4) * x_rows  # x, and the sums on their way to pairs
    return dict(X_ROWS=x_rows, STAGES=min(steps, left // (ROWS * CHUNKS * 128)), WINDOW=window, WINDOWS=windows)


def _halves(weight: torch.Tensor) -> TensorDescriptor:
    """For loads of the same ROWS / 2 rows of both halves, in chunks of 64 columns."""
    rows, depth = weight.shape
    block = [CHUNKS, 2, ROWS // 2, 64]
    layout = gl.NVMMASharedLayout(128, 16, len(block))
    return TensorDescriptor(
        weight, [depth // 64, 2, rows // 2, 64], [64, rows // 2 * depth, depth, 1], block, layout
    )
