"""`linear` of one row on Hopper, in Gluon: x comes through registers, and few programs become twice as many.

A program owns 64 rows of the weight, or 32. A wgmma takes 64 whatever there are; past 32 it reads other data, whose
sums nobody reads. In tiles of 64 E4B's down (2560 x 10240) is 40 programs, and one SM loads some 90 bytes a ns at
most; x, in the TMA unit's queue, would stand behind the weights. One H200, µs, each in a chain of its own, by
`linear_hopper.py` and so: E4B's down 19.7 and 17.9, 26B-A4B's o 10.3 and 9.3 and down 6.4 and 5.6, 12B's down 33.3
and 31.2, 31B's o and down, in tiles of 64, 28.0 and 27.5, 70.4 and 69.5.
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

from gemcutter.ops.hopper import PROCESSORS, barrier, loads_by_tma, stage_barriers
from gemcutter.ops.linears.row_hopper import PART, load_row, ring, view, window
from gemcutter.ops.linears.row_stream_hopper import ask, together

CHUNKS = 4  # of 64 columns a step
STAGED = 160 * 1024  # bytes of weights under way
DEEPEST = 22 * 1024  # columns of x: 84 registers a thread hold 21,504; more were not tried
HALVES = gl.constexpr(2)  # parts of x in shared memory: one that is multiplied, and the next
_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # of 64 columns, as wgmma reads them
_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@gluon.jit(do_not_specialize=["count"])
def _linear_row_kernel(
    desc, x_ptr, bias_ptr, out_ptr, count, N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """count: of rows of x, 1."""
    dtype: gl.constexpr = desc.dtype
    CHUNKS: gl.constexpr = desc.block_shape[0]
    ROWS: gl.constexpr = desc.block_shape[1]
    STEPS: gl.constexpr = (K + 64 * CHUNKS - 1) // (64 * CHUNKS)
    EACH: gl.constexpr = PART // (64 * CHUNKS)  # steps of a part
    first = gl.program_id(0) * ROWS
    halves = gl.allocate_shared_memory(dtype, [HALVES * PART // 64, 8, 64], _TILE)
    tiles = ring(dtype, STAGES * CHUNKS, ROWS)
    ready = stage_barriers(STAGES)
    for stage in gl.static_range(STAGES):
        ask(desc, tiles, ready, stage, first, CHUNKS)
    gdc_wait()
    gdc_launch_dependents()  # not before: what the kernel ahead wrote is settled for those behind, see chain.py
    x = load_row(x_ptr, K)
    if len(x) > 1:
        x = together((x,), count)[0]

    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    rooms = view(halves, dtype, [HALVES, PART // 64, 8, 64], flat)
    acc = gl.zeros([64, 8], gl.float32, _ACC)
    for part in gl.static_range(len(x)):
        # Nothing reads the part before last any more: only products of the last step may be under way. The other 7
        # rows stay as they are.
        rooms.index(part % HALVES).slice(0, 1, dim=1).store(x[part].reshape([PART // 64, 1, 64]))
        fence_async_shared()
        barrier()
        for sub in range(EACH if part * EACH + EACH <= STEPS else STEPS - part * EACH):
            step = part * EACH + sub
            at = step % STAGES
            mbarrier.wait(ready.index(at), (step // STAGES) & 1)
            for chunk in gl.static_range(CHUNKS):
                w = window(tiles, at, chunk, STAGES, CHUNKS)
                x_now = halves.index(part % HALVES * (PART // 64) + sub * CHUNKS + chunk)
                acc = warpgroup_mma(w, x_now.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(CHUNKS, deps=(acc,))
            if STAGES < STEPS:
                barrier()  # all warps' products of the step before are done, its stage is free
                if (step > 0) & (step - 1 + STAGES < STEPS):
                    ask(desc, tiles, ready, step - 1 + STAGES, first, CHUNKS)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    row = gl.arange(0, 64, gl.SliceLayout(1, _ACC))[:, None]
    col = gl.arange(0, 8, gl.SliceLayout(0, _ACC))[None, :]
    at = first + row + col * 0
    held = (col == 0) & (row < ROWS) & (at < N)
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + at, mask=held, other=0.0).to(gl.float32)
    gl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=held)


def stream_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """x [1, K], weight [N, K], bias [N] -> out [1, N], of any float dtype."""
    columns, depth = weight.shape
    rows = 32 if triton.cdiv(columns, 64) <= PROCESSORS // 2 else 64
    layout = gl.NVMMASharedLayout(128, 16, 3)
    desc = TensorDescriptor(weight, [depth // 64, columns, 64], [64, depth, 1], [CHUNKS, rows, 64], layout)
    stages = min(STAGED // (CHUNKS * rows * 128), triton.cdiv(depth, 64 * CHUNKS))
    _linear_row_kernel[(triton.cdiv(columns, rows),)](
        desc, x, bias, out, 1, N=columns, K=depth, STAGES=stages,
        num_warps=4, launch_pdl=True, enable_fp_fusion=False,
    )  # fmt: skip


def streams_row(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these: one row, whole chunks of 64 columns, and no more programs than SMs.

    Wider weights than that, of which the head is one, were not measured.
    """
    columns, depth = weight.shape
    fits = depth % 64 == 0 and depth <= DEEPEST and triton.cdiv(columns, 64) <= PROCESSORS
    return len(x) == 1 and fits and loads_by_tma(x, weight) and x.itemsize == 2
