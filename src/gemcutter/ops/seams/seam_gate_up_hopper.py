"""`seam_gate_up` of one token in one launch on Hopper, in Gluon: each program makes the MLP's input for itself.

As in `gate_up_hopper.py` a program owns 32 rows of gate and the same of up. The first programs belong to a router,
16 rows each, since they are done soon and one of them writes the residual, another the experts' input. Weights in
FP8 take their input quantised, which each program does for itself, too; the router's stay as they are.
One H200, one token, a layer in a chain: 26B-A4B 70.6 µs for 72.1 with the ops one by one.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.hopper import descriptor, stage_barriers
from gemcutter.ops.linears.gate_up_hopper import activate
from gemcutter.ops.linears.row_hopper import (
    PART,
    chunks,
    chunks_of,
    load_row,
    put_row,
    store_quantised_row,
    store_row,
)
from gemcutter.ops.linears.row_stream_hopper import (
    COLUMNS,
    ROWS,
    ask,
    barrier,
    boxes_of,
    early_of,
    stages_of,
    streams_behind_seam,
    together,
    walk,
    x_bytes,
)
from gemcutter.ops.row import added, norm_factor, normed
from gemcutter.ops.row_fp8 import pointers
from gemcutter.ops.seams.attention_seam import router_rows

ROUTER_ROWS = 16  # a program


@gluon.jit(do_not_specialize=["count"])
def _seam_gate_up_kernel(
    desc, weight_scale_ptr, router_desc, attended_ptr, residual_ptr, post_ptr, pre_ptr, expert_pre_ptr,
    router_scale_ptr, hidden_ptr, out_ptr, expert_in_ptr, expert_scale_ptr, logits_ptr, eps, root, count,
    I: gl.constexpr, E: gl.constexpr, H: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """The first programs: logits of the router; the others: 32 columns of out. count: of tokens, 1.

    weight_scale_ptr, expert_scale_ptr: of what is in FP8, else None.
    """
    program = gl.program_id(0)
    NARROW: gl.constexpr = router_desc.block_shape[0] if E else 1
    ROUTERS: gl.constexpr = E // NARROW
    is_router = program < ROUTERS
    first = gl.where(is_router, program * NARROW, (program - ROUTERS) * 32)
    dtype: gl.constexpr = hidden_ptr.dtype.element_ty
    BYTES: gl.constexpr = desc.dtype.primitive_bitwidth // 8
    X_BYTES: gl.constexpr = 2 if E else BYTES
    x_all = chunks(dtype if E else desc.dtype, (H + PART - 1) // PART * (PART * X_BYTES // 128), 8)
    CHUNKS: gl.constexpr = COLUMNS * BYTES // 128
    tiles = chunks(desc.dtype, STAGES * CHUNKS, 64)
    x_chunks, router_tiles = chunks_of(x_all, desc.dtype), chunks_of(tiles, dtype)
    ready = stage_barriers(STAGES)
    _ask_between(desc, router_desc, is_router, tiles, router_tiles, ready, first, 0, EARLY, CHUNKS)
    post = load_row(post_ptr, H)
    if E > 0:
        if is_router:
            pre_ptr = router_scale_ptr
    pre = load_row(pre_ptr, H)
    gdc_wait()
    gdc_launch_dependents()
    x, residual = together((load_row(attended_ptr, H), load_row(residual_ptr, H)), count)
    _ask_between(desc, router_desc, is_router, tiles, router_tiles, ready, first, EARLY, STAGES, CHUNKS)
    hidden = added(residual, normed(x, norm_factor(x, eps, H), post))
    factor = norm_factor(hidden, eps, H)
    if is_router:
        if E > 0:
            put_row(x_all, router_rows(hidden, factor, pre, root), H)
            fence_async_shared()
            barrier()
            if program == 0:
                store_row(hidden_ptr, hidden, H)
            if program == 1:
                expert_in = normed(hidden, factor, load_row(expert_pre_ptr, H))
                if expert_scale_ptr is None:
                    store_row(expert_in_ptr, expert_in, H)
                else:
                    store_quantised_row(expert_in_ptr, expert_scale_ptr, expert_in, H)
            logits = walk(router_desc, router_tiles, x_all, ready, first, H, CHUNKS)
            _store_logits(logits_ptr, logits, first, NARROW)
    else:
        scale = put_row(x_chunks, normed(hidden, factor, pre), H)
        fence_async_shared()
        barrier()
        if E == 0:
            if program == 0:
                store_row(hidden_ptr, hidden, H)
        acc = walk(desc, tiles, x_chunks, ready, first, H, CHUNKS)
        if scale is not None:
            row = gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
            column = first + row % 32
            acc *= gl.load(weight_scale_ptr + column + row // 32 * I, mask=column < I, other=0.0)[:, None]
            acc *= scale
        _store_activated(out_ptr, acc.to(dtype), first, I)


@gluon.jit
def _ask_between(
    desc, router_desc, is_router, tiles, router_tiles, ready, first, BEGIN: gl.constexpr, END: gl.constexpr,
    CHUNKS: gl.constexpr,
):  # fmt: skip
    for stage in gl.static_range(BEGIN, END):
        if is_router:
            if router_desc is not None:
                ask(router_desc, router_tiles, ready, stage, first, CHUNKS)
        else:
            ask(desc, tiles, ready, stage, first, CHUNKS)


@gluon.jit
def _store_logits(logits_ptr, acc, first, NARROW: gl.constexpr):
    row = gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))[:, None]
    col = gl.arange(0, 8, gl.SliceLayout(0, acc.type.layout))[None, :]
    at = logits_ptr + first + row + col * 0
    gl.store(at, acc.to(logits_ptr.dtype.element_ty), mask=(row < NARROW) & (col == 0))


@gluon.jit
def _store_activated(out_ptr, acc, first, I: gl.constexpr):
    # A gate and its up lie with different warps: through shared memory to one thread.
    HALF: gl.constexpr = acc.shape[0] // 2
    pairs: gl.constexpr = gl.BlockedLayout([2, 1, 1], [1, 8, 4], [1, 4, 1], [0, 1, 2])
    gate, up = gl.convert_layout(acc.reshape([2, HALF, 8]), pairs).permute((1, 2, 0)).split()
    column = first + gl.arange(0, HALF, gl.SliceLayout(1, gate.type.layout))[:, None]
    col = gl.arange(0, 8, gl.SliceLayout(0, gate.type.layout))[None, :]
    activated = activate(gate.to(gl.float32)).to(acc.dtype).to(gl.float32)
    out = (activated * up.to(gl.float32)).to(acc.dtype)
    gl.store(out_ptr + column + col * 0, out, mask=(col == 0) & (column < I))


def stream_seam_gate_up(
    attended, residual, post, pre, eps, weight, weight_scale, expert_pre, router_scale, router,
    hidden: torch.Tensor, activated: torch.Tensor, expert_in: list[torch.Tensor], logits: torch.Tensor | None,
) -> None:  # fmt: skip
    """One row, into hidden [1, H] and activated [1, I]; the experts' input, one tensor or two of a pair, and the
    logits with a router alone.
    """
    depth, width, experts = attended.shape[1], activated.shape[1], 0 if router is None else len(router)
    size, programs = weight.itemsize, experts // ROUTER_ROWS + triton.cdiv(width, ROWS // 2)
    stages = stages_of(depth, size, x_bytes(depth, 2 if experts else size), programs)
    _seam_gate_up_kernel[(programs,)](
        boxes_of(weight, parts=2), weight_scale,
        None if router is None else descriptor(router, [ROUTER_ROWS, 128 // router.itemsize]),
        attended, residual, post, pre, expert_pre, router_scale, hidden, activated,
        *(pointers(expert_in) if expert_in else (None, None)), logits, eps, depth**-0.5, 1,
        I=width, E=experts, H=depth, COLUMNS=COLUMNS, STAGES=stages,
        EARLY=early_of(stages, size, programs),
        num_warps=4, launch_pdl=True, enable_fp_fusion=False,
    )  # fmt: skip


def streams_seam_gate_up(attended: torch.Tensor, weight: torch.Tensor, router: torch.Tensor | None) -> bool:
    """Whether the kernel takes these."""
    whole = router is None or (len(router) % ROUTER_ROWS == 0 and len(router) > ROUTER_ROWS)
    return whole and streams_behind_seam(attended, weight, *([] if router is None else [router]))
