"""`seam_gate_up` of one token and a wide MLP without experts, on Hopper, in Gluon: one program an SM, to the end.

In tiles of 64 rows E4B's gate and up (20,480 x 2560) are 320 programs for 132 SMs: the last wave has 56, that start
when others end, make the row again, and have too little under way. Here 128 programs own five units each, of 16
rows of gate and the same of up, whose weights stream through one ring. A warp of its own asks for them. One H200,
one token, a layer in a chain, `linear_row_hopper.py` behind it: gate and up 25.9 µs for 28.6 (bytes: 23.9).
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.hopper import PROCESSORS, load_tile
from gemcutter.ops.linears.gate_up_hopper import activate
from gemcutter.ops.linears.row_hopper import PART, chunks, load_row, put_row, ring, store_row, view, window
from gemcutter.ops.linears.row_stream_hopper import (
    COLUMNS,
    ROWS,
    SHARED,
    barrier,
    streams_behind_seam,
    together,
    x_bytes,
)
from gemcutter.ops.row import added, norm_factor, normed

UNIT = gl.constexpr(16)  # columns of out; twice as many rows of weights
CHUNKS = gl.constexpr(4)  # of 64 columns a granule, which is what a unit takes of weights in a step
GRANULE = 2 * UNIT.value * COLUMNS * 2  # bytes
MOST_UNITS = 8  # a program, with 4 registers each; E2B's widest layers have 6
# Granules asked for before the join: a layer of E4B takes 62.2 µs with 4, 62.8 to 63.5 with 2, 63.2 with 1; with
# all 10, and an o projection that lets this kernel come before it has joined itself, 63.4.
EARLY = 4


@gluon.jit
def _ask(desc, tiles, ready, granule, first, UNITS: gl.constexpr):
    STAGES: gl.constexpr = ready.shape[0]
    at = granule % STAGES
    boxes = view(tiles, desc.dtype, [STAGES] + desc.block_shape, desc.layout)
    mbarrier.expect(ready.index(at), desc.block_type.nbytes)
    eighth = first // 8 + granule % UNITS * (UNIT // 8)
    load_tile(desc, [granule // UNITS * CHUNKS, eighth, 0, 0, 0], ready.index(at), boxes.index(at))


@gluon.jit
def _feed(desc, tiles, ready, free, go, first, UNITS: gl.constexpr, GRANULES: gl.constexpr, EARLY: gl.constexpr):
    """go: the row is in registers. Its loads, behind those of weights, would come late."""
    STAGES: gl.constexpr = ready.shape[0]
    for granule in gl.static_range(EARLY):
        _ask(desc, tiles, ready, granule, first, UNITS)
    mbarrier.wait(go, 0)
    for granule in range(EARLY, STAGES):
        _ask(desc, tiles, ready, granule, first, UNITS)
    for granule in range(STAGES, GRANULES):
        mbarrier.wait(free.index(granule % STAGES), (granule // STAGES - 1) & 1)
        _ask(desc, tiles, ready, granule, first, UNITS)


@gluon.jit
def _multiply(
    tiles, x_chunks, ready, free, go, attended_ptr, residual_ptr, post_ptr, pre_ptr, hidden_ptr, out_ptr, eps,
    count, first, I: gl.constexpr, H: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ready.shape[0]
    post = load_row(post_ptr, H)
    pre = load_row(pre_ptr, H)
    gdc_wait()
    gdc_launch_dependents()
    x, residual = together((load_row(attended_ptr, H), load_row(residual_ptr, H)), count)
    mbarrier.arrive(go, count=1)
    hidden = added(residual, normed(x, norm_factor(x, eps, H), post))
    put_row(x_chunks, normed(hidden, norm_factor(hidden, eps, H), pre), H)
    fence_async_shared()
    barrier()
    if first == 0:
        store_row(hidden_ptr, hidden, H)

    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    accs = ()
    for _ in gl.static_range(UNITS):
        accs += (gl.zeros([64, 8], gl.float32, layout),)
    for step in range(H // (64 * CHUNKS)):
        for unit in gl.static_range(UNITS):
            granule = step * UNITS + unit
            at = granule % STAGES
            mbarrier.wait(ready.index(at), (granule // STAGES) & 1)
            acc = accs[unit]
            for chunk in gl.static_range(CHUNKS):
                w = window(tiles, at, chunk, STAGES, CHUNKS)
                acc = warpgroup_mma(w, x_chunks.index(step * CHUNKS + chunk).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            accs = accs[:unit] + (acc,) + accs[unit + 1 :]
            barrier()
            mbarrier.arrive(free.index(at), count=1)
    for unit in gl.static_range(UNITS):
        _store_activated(out_ptr, accs[unit].to(tiles.dtype), first + unit * UNIT, I)


@gluon.jit
def _store_activated(out_ptr, acc, first, I: gl.constexpr):
    """Eight rows of gate, eight of up, and again; the other 32 are other units'. A thread has a gate and its up."""
    gate, up = acc.reshape([4, 2, 8, 8]).permute((0, 2, 3, 1)).split()
    layout: gl.constexpr = gate.type.layout
    eighth = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    row = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    col = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    column = eighth * 8 + row + col * 0
    activated = activate(gate.to(gl.float32)).to(acc.dtype).to(gl.float32)
    out = (activated * up.to(gl.float32)).to(acc.dtype)
    gl.store(out_ptr + first + column, out, mask=(column < UNIT) & (col == 0) & (first + column < I))


@gluon.jit(do_not_specialize=["count"])
def _seam_gate_up_wide_kernel(
    desc, attended_ptr, residual_ptr, post_ptr, pre_ptr, hidden_ptr, out_ptr, eps, count,
    I: gl.constexpr, H: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Program: UNITS of out. count: of tokens, 1."""
    first = gl.program_id(0) * (UNITS * UNIT)
    x_chunks = chunks(desc.dtype, (H + PART - 1) // PART * (PART // 64), 8)
    tiles = ring(desc.dtype, STAGES * CHUNKS, 2 * UNIT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    mbarrier.init(go, count=1)
    fence_async_shared()
    GRANULES: gl.constexpr = H // (64 * CHUNKS) * UNITS
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    tiles, x_chunks, ready, free, go, attended_ptr, residual_ptr, post_ptr, pre_ptr, hidden_ptr,
                    out_ptr, eps, count, first, I, H, UNITS,
                ),
            ),
            (_feed, (desc, tiles, ready, free, go, first, UNITS, GRANULES, EARLY)),
        ],
        [1],
        [24],
    )  # fmt: skip


def stream_seam_gate_up_wide(attended, residual, post, pre, eps, weight, hidden, activated) -> None:
    """One row, into hidden [1, H] and activated [1, I]."""
    depth, width = attended.shape[1], activated.shape[1]
    units = _units_of(width)
    stages = min(10, (SHARED - x_bytes(depth, 2)) // GRANULE, depth // COLUMNS * units)
    shape, strides = [depth // 64, width // 8, 2, 8, 64], [64, 8 * depth, width * depth, depth, 1]
    block = [CHUNKS.value, UNIT.value // 8, 2, 8, 64]
    desc = TensorDescriptor(weight, shape, strides, block, gl.NVMMASharedLayout(128, 16, len(block)))
    _seam_gate_up_wide_kernel[(triton.cdiv(width, units * UNIT.value),)](
        desc, attended, residual, post, pre, hidden, activated, eps, 1, I=width, H=depth, UNITS=units,
        STAGES=stages, EARLY=min(EARLY, stages), num_warps=4, launch_pdl=True, enable_fp_fusion=False, maxnreg=72,
    )  # fmt: skip


def _units_of(width: int) -> int:
    """A program, so that all of them find an SM."""
    return triton.cdiv(triton.cdiv(width, UNIT.value), PROCESSORS)


def is_wide(attended: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these: more tiles of 64 rows than SMs, and units that fit their registers."""
    width = len(weight) // 2
    wide = 2 * width > PROCESSORS * ROWS and _units_of(width) <= MOST_UNITS and width % 8 == 0
    return wide and weight.itemsize == 2 and streams_behind_seam(attended, weight)
