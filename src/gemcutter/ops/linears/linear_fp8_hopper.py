"""FP8 products of one row on Hopper, in Gluon: weights stream by TMA, the row waits whole in shared memory.

A program owns 64 rows of the weight. It asks for the first stages of them, joins the chain, and brings the row to
shared memory by itself: in the queue of the TMA unit it would stand behind the weights (`gate_up_hopper.py`). A row
that is not quantised yet is quantised by every program for itself, all threads at work on it. Eight rows, of which
one is used, would fill the memory if it is long; it then lies there as it is, and a step's part of it goes where
wgmma reads it two steps ahead. Measured on one H200, the four products of a layer of 26B-A4B with norms between
them: 26.8 µs, against 30.3 with `linear_hopper.py` and a launch for each quantisation, and 36.0 in bfloat16. Eight
rows at once that way cost 31.0 against 30.5.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.hopper import descriptor, loads_by_tma, stage_barriers
from gemcutter.ops.linears.row_hopper import PART, chunks, load_row, put_line, put_row, put_step
from gemcutter.ops.linears.row_stream_hopper import (
    COLUMNS,
    RING,
    ROWS,
    SHARED,
    ask,
    barrier,
    stages_of,
    walk,
    x_bytes,
)

DEEPEST = 22 * 1024  # columns of a row that is quantised in registers; more were not tried


@gluon.jit
def _row_kernel(
    desc, x_ptr, scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, N: gl.constexpr, K: gl.constexpr,
    STAGES: gl.constexpr, CHUNKS: gl.constexpr, LONG: gl.constexpr,
):  # fmt: skip
    """scale_ptr: None of a row that is not quantised yet, which LONG ones are."""
    first = gl.program_id(0) * 64
    X: gl.constexpr = RING * CHUNKS * 128 if LONG else (K + PART - 1) // PART * PART
    x_chunks = chunks(desc.dtype, X // 128, 8)
    tiles = chunks(desc.dtype, STAGES * CHUNKS, 64)
    ready = stage_barriers(STAGES)
    for stage in gl.static_range(STAGES):
        ask(desc, tiles, ready, stage, first, CHUNKS)
    gdc_wait()
    gdc_launch_dependents()  # not before: what the kernel ahead wrote is settled for those behind, see chain.py
    line = None
    if LONG:
        STEP: gl.constexpr = CHUNKS * 128
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        line = gl.allocate_shared_memory(desc.dtype, [(K + PART - 1) // PART * (PART // STEP), STEP], flat)
        scale = put_line(line, load_row(x_ptr, K), K)
        barrier()
        put_step(x_chunks, line, 0, 0, CHUNKS)
        put_step(x_chunks, line, 1, 1, CHUNKS)
    else:
        scale = put_row(x_chunks, load_row(x_ptr, K), K)
    if scale_ptr is not None:
        scale = gl.load(scale_ptr)
    fence_async_shared()
    barrier()
    acc = walk(desc, tiles, x_chunks, ready, first, K, CHUNKS, line)
    column = first + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))[:, None]
    held = (column < N) & (gl.arange(0, 8, gl.SliceLayout(0, acc.type.layout)) == 0)[None, :]
    acc *= gl.load(weight_scale_ptr + column, mask=held, other=0.0)
    acc *= scale
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + column, mask=held, other=0.0).to(gl.float32)
    gl.store(out_ptr + column + gl.zeros_like(acc).to(gl.int32), acc.to(out_ptr.dtype.element_ty), mask=held)


def stream_row(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """x [1, K] of 16 bits an element, or e4m3 with its scale; weight [N, K], weight_scale [N, 1] -> out [1, N]."""
    columns, depth = weight.shape
    _row_kernel[(triton.cdiv(columns, ROWS),)](
        descriptor(weight, [ROWS, 128]), x, scale, weight_scale, bias, out,
        N=columns, K=depth, STAGES=row_stages(columns, depth), CHUNKS=COLUMNS // 128, LONG=is_long(depth),
        num_warps=4, launch_pdl=True, enable_fp_fusion=False,
    )  # fmt: skip


def streams_row(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these: a row of 16 bits an element, or one of e4m3 that is not long."""
    depth = weight.shape[1]
    taken = x.itemsize == 2 and depth <= DEEPEST or x.itemsize == 1 and not is_long(depth)
    return len(x) == 1 and taken and loads_by_tma(weight, x)


def is_long(depth: int) -> bool:
    """Whether a row as wgmma reads it leaves less than four stages."""
    return x_bytes(depth, 1) > SHARED - 4 * ROWS * COLUMNS


def row_stages(columns: int, depth: int) -> int:
    x = x_bytes(depth, 1)
    if is_long(depth):
        x = x // 8 + RING.value * COLUMNS * 8
    return stages_of(depth, 1, x, triton.cdiv(columns, ROWS))
