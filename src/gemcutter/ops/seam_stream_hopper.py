"""One row of x, made by a seam in registers, times weights that stream in: what the kernels that begin so share.

Every program makes x for itself. A seam of its own would be one more kernel in the chain: 1 to 2 µs until its
reader hears of it, and more until x comes through a memory that the reader's weights have filled.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gemcutter.ops.linear_hopper import load_tile, loads_by_tma
from gemcutter.ops.load_order import after, mixed
from gemcutter.ops.row_hopper import PART, view

CHUNKS = 4  # of 64 columns a step
ROWS = 64  # of weights a program
SHARED = 216 * 1024  # bytes for x and the stages of weights
# Stages that are asked for before the join, while the kernel ahead still needs the memory: with all five a layer of
# E4B takes 67.2 µs in place of 66.4, with none 26B-A4B's o projection is no faster and the next kernel slower.
EARLY = 1
LEAST_STAGES = 5  # of 32 KiB, which rows of 3072 columns leave room for; wider ones were not measured
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def together(rows, count):
    """Rows of registers, none to be used before all have been loaded. count: as in `load_order.after`."""
    PARTS: gl.constexpr = len(rows[0])
    loaded = rows[0][0]
    for row in gl.static_range(len(rows)):
        for part in gl.static_range(PARTS):
            if row + part > 0:
                loaded = mixed(loaded, rows[row][part], rows[row][part])
    result = ()
    for row in gl.static_range(len(rows)):
        ys = ()
        for part in gl.static_range(PARTS):
            ys += (after(rows[row][part], loaded, count),)
        result += (ys,)
    return result


@gluon.jit
def ask(
    desc, narrow, is_narrow, tiles, ready, step, first, CHUNKS: gl.constexpr, NARROW: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A step's weights, from row `first` on: boxes of desc, or NARROW rows of another matrix; either may be None.

    tiles: CHUNKS a stage, of 64 rows by 64 columns, as wgmma reads them.
    """
    if narrow is None:
        _ask_wide(desc, tiles, ready, step, first, STAGES)
    elif desc is None:
        _ask_narrow(narrow, tiles, ready, step, first, CHUNKS, NARROW, STAGES)
    elif is_narrow:
        _ask_narrow(narrow, tiles, ready, step, first, CHUNKS, NARROW, STAGES)
    else:
        _ask_wide(desc, tiles, ready, step, first, STAGES)


@gluon.jit
def _ask_wide(desc, tiles, ready, step, first, STAGES: gl.constexpr):
    CHUNKS: gl.constexpr = desc.block_shape[0]
    boxes = view(tiles, desc.dtype, [STAGES] + desc.block_shape, desc.layout)
    at = step % STAGES
    mbarrier.expect(ready.index(at), CHUNKS * 64 * 128)
    load_tile(desc, [step * CHUNKS, 0, first, 0], ready.index(at), boxes.index(at))


@gluon.jit
def _ask_narrow(
    desc, tiles, ready, step, first, CHUNKS: gl.constexpr, NARROW: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    at = step % STAGES
    mbarrier.expect(ready.index(at), CHUNKS * NARROW * 128)
    for chunk in gl.static_range(CHUNKS):
        box = tiles.index(at * CHUNKS + chunk).slice(0, NARROW)
        load_tile(desc, [first, (step * CHUNKS + chunk) * 64], ready.index(at), box)


@gluon.jit
def walk(
    desc, narrow, is_narrow, tiles, x_chunks, ready, first, STEPS: gl.constexpr, CHUNKS: gl.constexpr,
    NARROW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """[64, 8]: rows of the weight by rows of x, of which the first counts; of the former those that were asked for.

    The product takes 64 rows whatever there are, and nobody reads what the others give.
    """
    acc = gl.zeros([64, 8], gl.float32, ACC)
    for step in range(STEPS):
        at = step % STAGES
        mbarrier.wait(ready.index(at), (step // STAGES) & 1)
        for chunk in gl.static_range(CHUNKS):
            x = x_chunks.index(step * CHUNKS + chunk).permute((1, 0))
            acc = warpgroup_mma(tiles.index(at * CHUNKS + chunk), x, acc, is_async=True)
        acc = warpgroup_mma_wait(CHUNKS, deps=(acc,))
        if STAGES < STEPS:
            barrier()  # all warps' products of the step before are done, its stage is free
            if (step > 0) & (step - 1 + STAGES < STEPS):
                ask(desc, narrow, is_narrow, tiles, ready, step - 1 + STAGES, first, CHUNKS, NARROW, STAGES)
    return warpgroup_mma_wait(0, deps=(acc,))


def stages_of(depth: int) -> int:
    """As many as x leaves room for: 8 rows, of which one is used."""
    x = triton.cdiv(depth, PART.value) * PART.value * 16
    return min(depth // (64 * CHUNKS), (SHARED - x) // (ROWS * CHUNKS * 128))


def streams_behind_seam(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether such kernels take x [T, H] and weights [.., H]: one token, for which they were measured to pay."""
    depth = x.shape[1]
    fits = depth % (64 * CHUNKS) == 0 and stages_of(depth) >= min(LEAST_STAGES, depth // (64 * CHUNKS))
    return len(x) == 1 and fits and loads_by_tma(*weights)


def boxes_of(weight: torch.Tensor, parts: int = 1) -> TensorDescriptor:
    """For loads of ROWS rows in all, the same of each of the parts that the weight is made of, by CHUNKS * 64."""
    count, depth = weight.shape
    block = [CHUNKS, parts, ROWS // parts, 64]
    shape, strides = [depth // 64, parts, count // parts, 64], [64, count // parts * depth, depth, 1]
    return TensorDescriptor(weight, shape, strides, block, gl.NVMMASharedLayout(128, 16, len(block)))
