"""`seam_gate_up` of one token in one launch on Hopper, in Gluon: each program makes the MLP's input for itself.

As in `gate_up_hopper.py` a program owns 32 rows of gate and the same of up. The first programs belong to a router,
16 rows each, since they are done soon and one of them writes the residual, another the experts' input.
One H200, one token, a layer in a chain: 26B-A4B 70.6 µs for 72.1 with the ops one by one.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.attention_seam import router_rows
from gemcutter.ops.gate_up_hopper import activate
from gemcutter.ops.linear_hopper import descriptor
from gemcutter.ops.row import added, norm_factor, normed
from gemcutter.ops.row_hopper import PART, TILE, load_row, put_row, store_row
from gemcutter.ops.seam_stream_hopper import (
    ACC,
    CHUNKS,
    EARLY,
    ROWS,
    ask,
    barrier,
    boxes_of,
    stages_of,
    streams_behind_seam,
    together,
    walk,
)

ROUTER_ROWS = 16  # a program


@gluon.jit(do_not_specialize=["count"])
def _seam_gate_up_kernel(
    desc, router_desc, attended_ptr, residual_ptr, post_ptr, pre_ptr, expert_pre_ptr, router_scale_ptr,
    hidden_ptr, expert_in_ptr, out_ptr, logits_ptr, eps, root, count,
    I: gl.constexpr, E: gl.constexpr, H: gl.constexpr, CHUNKS: gl.constexpr, NARROW: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The first E / NARROW programs: logits of the router; the others: 32 columns of out. count: of tokens, 1."""
    program = gl.program_id(0)
    ROUTERS: gl.constexpr = E // NARROW
    is_router = program < ROUTERS
    first = gl.where(is_router, program * NARROW, (program - ROUTERS) * 32)
    dtype: gl.constexpr = desc.dtype
    x_chunks = gl.allocate_shared_memory(dtype, [(H + PART - 1) // PART * (PART // 64), 8, 64], TILE)
    tiles = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 64, 64], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    for stage in gl.static_range(EARLY):
        ask(desc, router_desc, is_router, tiles, ready, stage, first, CHUNKS, NARROW, STAGES)
    post = load_row(post_ptr, H)
    if E > 0:
        if is_router:
            pre_ptr = router_scale_ptr
    pre = load_row(pre_ptr, H)
    gdc_wait()
    gdc_launch_dependents()
    x, residual = together((load_row(attended_ptr, H), load_row(residual_ptr, H)), count)
    for stage in gl.static_range(EARLY, STAGES):
        ask(desc, router_desc, is_router, tiles, ready, stage, first, CHUNKS, NARROW, STAGES)
    hidden = added(residual, normed(x, norm_factor(x, eps, H), post))
    factor = norm_factor(hidden, eps, H)
    if E > 0:
        if is_router:
            put_row(x_chunks, router_rows(hidden, factor, pre, root))
        else:
            put_row(x_chunks, normed(hidden, factor, pre))
    else:
        put_row(x_chunks, normed(hidden, factor, pre))
    fence_async_shared()
    barrier()
    if program == 0:
        store_row(hidden_ptr, hidden, H)
    if E > 0:
        if program == 1:
            store_row(expert_in_ptr, normed(hidden, factor, load_row(expert_pre_ptr, H)), H)

    STEPS: gl.constexpr = H // (64 * CHUNKS)
    acc = walk(desc, router_desc, is_router, tiles, x_chunks, ready, first, STEPS, CHUNKS, NARROW, STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    if E > 0:
        if is_router:
            row = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None]
            col = gl.arange(0, 8, gl.SliceLayout(0, ACC))[None, :]
            gl.store(logits_ptr + first + row + col * 0, acc.to(dtype), mask=(row < NARROW) & (col == 0))
        else:
            _store_activated(out_ptr, acc, first, I, dtype)
    else:
        _store_activated(out_ptr, acc, first, I, dtype)


@gluon.jit
def _store_activated(out_ptr, acc, first, I: gl.constexpr, dtype: gl.constexpr):
    # A gate and its up lie with different warps: through shared memory to one thread.
    HALF: gl.constexpr = acc.shape[0] // 2
    pairs: gl.constexpr = gl.BlockedLayout([2, 1, 1], [1, 8, 4], [1, 4, 1], [0, 1, 2])
    gate, up = gl.convert_layout(acc.reshape([2, HALF, 8]), pairs).permute((1, 2, 0)).split()
    column = first + gl.arange(0, HALF, gl.SliceLayout(1, gate.type.layout))[:, None]
    col = gl.arange(0, 8, gl.SliceLayout(0, gate.type.layout))[None, :]
    activated = activate(gate.to(dtype).to(gl.float32)).to(dtype).to(gl.float32)
    out = (activated * up.to(dtype).to(gl.float32)).to(dtype)
    gl.store(out_ptr + column + col * 0, out, mask=(col == 0) & (column < I))


def stream_seam_gate_up(
    attended, residual, post, pre, eps, weight, expert_pre, router_scale, router, outs: list[torch.Tensor]
) -> None:
    """One row. outs: hidden [1, H] and activated [1, I]; with a router also the experts' input and the logits."""
    depth, (hidden, activated, expert_in, logits) = attended.shape[1], [*outs, None, None][:4]
    width, experts = activated.shape[1], 0 if router is None else len(router)
    _seam_gate_up_kernel[(experts // ROUTER_ROWS + triton.cdiv(width, ROWS // 2),)](
        boxes_of(weight, parts=2), None if router is None else descriptor(router, [ROUTER_ROWS, 64]),
        attended, residual, post, pre, expert_pre, router_scale, hidden, expert_in, activated, logits,
        eps, depth**-0.5, 1, I=width, E=experts, H=depth, CHUNKS=CHUNKS, NARROW=ROUTER_ROWS,
        STAGES=stages_of(depth), EARLY=EARLY, num_warps=4, launch_pdl=True, enable_fp_fusion=False,
    )  # fmt: skip


def streams_seam_gate_up(attended: torch.Tensor, weight: torch.Tensor, router: torch.Tensor | None) -> bool:
    """Whether the kernel takes these."""
    whole = router is None or (len(router) % ROUTER_ROWS == 0 and len(router) > ROUTER_ROWS)
    return whole and streams_behind_seam(attended, weight, *([] if router is None else [router]))
