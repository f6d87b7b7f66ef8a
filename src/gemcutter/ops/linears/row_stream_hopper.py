"""One row of x times weights that stream in: what the kernels that begin with such a row, or a seam, share.

Every program makes x for itself. A seam of its own would be one more kernel in the chain: 1 to 2 µs until its
reader hears of it, and more until x comes through a memory that the reader's weights have filled.
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

from gemcutter.ops.hopper import PROCESSORS, barrier, load_tile, loads_by_tma
from gemcutter.ops.linears.row_hopper import PART, put_step, view, window
from gemcutter.ops.load_order import after, mixed

COLUMNS = 256  # of weights a step
ROWS = 64  # of weights a program
SHARED = 226 * 1024  # bytes for x and the stages of weights
# Stages that are asked for before the join, while the kernel ahead still needs the memory: with all five a layer of
# E4B takes 67.2 µs in place of 66.4, with none 26B-A4B's o projection is no faster and the next kernel slower. Of
# FP8's, half as large, four are better where a program has an SM for itself: a step of 26B-A4B takes 1.93 ms with
# 4, 1.96 with 1, 1.94 with all. Where two share it, one is: 12 layers of 31B take 2.25 ms with 1, 2.30 with 4.
EARLY, EARLY_FP8 = 1, 4
WIDEST, WIDEST_FP8 = 3072, 5376  # rows that were measured; half as many bytes leave room for twice the columns
RING = gl.constexpr(4)  # steps of a long row: two that are multiplied, and two to come


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
def ask(desc, tiles, ready, step, first, CHUNKS: gl.constexpr):
    """A step's weights, from row `first` on: a box of all of them, or of each chunk's.

    tiles: CHUNKS for each stage, of 64 rows, or a `ring` for the box's, of the weights' dtype.
    """
    STAGES: gl.constexpr = ready.shape[0]
    at = step % STAGES
    if len(desc.block_shape) > 2:
        boxes = view(tiles, desc.dtype, [STAGES] + desc.block_shape, desc.layout)
        mbarrier.expect(ready.index(at), desc.block_type.nbytes)
        begin = [step * CHUNKS, 0, first, 0] if len(desc.block_shape) == 4 else [step * CHUNKS, first, 0]
        load_tile(desc, begin, ready.index(at), boxes.index(at))
    else:
        ROWS: gl.constexpr = desc.block_shape[0]
        COLS: gl.constexpr = desc.block_shape[1]
        mbarrier.expect(ready.index(at), CHUNKS * ROWS * 128)
        for chunk in gl.static_range(CHUNKS):
            box = tiles.index(at * CHUNKS + chunk).slice(0, ROWS)
            load_tile(desc, [first, (step * CHUNKS + chunk) * COLS], ready.index(at), box)


@gluon.jit
def walk(desc, tiles, x_chunks, ready, first, H: gl.constexpr, CHUNKS: gl.constexpr, line=None):
    """[64, 8]: rows of the weight by rows of x, of which the first counts; of the former those that were asked for.

    The product takes 64 rows whatever there are, and nobody reads what the others give. line: the row, where it is
    too long for x_chunks, which then hold RING steps of it; the first two are there.
    """
    STAGES: gl.constexpr = ready.shape[0]
    COLS: gl.constexpr = tiles.shape[2]
    STEPS: gl.constexpr = (H + CHUNKS * COLS - 1) // (CHUNKS * COLS)
    DEPTH: gl.constexpr = 256 // tiles.dtype.primitive_bitwidth
    acc = gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, DEPTH]))
    for step in range(STEPS):
        at = step % STAGES
        mbarrier.wait(ready.index(at), (step // STAGES) & 1)
        for chunk in gl.static_range(CHUNKS):
            x_at = step if line is None else step % RING
            x = x_chunks.index(x_at * CHUNKS + chunk).permute((1, 0))
            acc = warpgroup_mma(window(tiles, at, chunk, STAGES, CHUNKS), x, acc, is_async=True)
        acc = warpgroup_mma_wait(CHUNKS, deps=(acc,))
        if STAGES < STEPS:
            barrier()  # all warps' products of the step before are done, its stage is free
            if (step > 0) & (step - 1 + STAGES < STEPS):
                ask(desc, tiles, ready, step - 1 + STAGES, first, CHUNKS)
        if line is not None:
            if step + 2 < STEPS:
                put_step(x_chunks, line, step + 2, (step + 2) % RING, CHUNKS)
                fence_async_shared()
    return warpgroup_mma_wait(0, deps=(acc,))


def x_bytes(depth: int, itemsize: int) -> int:
    """Of shared memory, for a row: wgmma takes eight, of which one is used."""
    return triton.cdiv(depth, PART.value) * PART.value * 8 * itemsize


def stages_of(depth: int, itemsize: int, x_bytes: int, programs: int) -> int:
    """As many as x leaves room for; in FP8, where programs are more than SMs and it allows, of half of it."""
    steps = triton.cdiv(depth, COLUMNS)
    in_all, in_half = ((shared - x_bytes) // (ROWS * COLUMNS * itemsize) for shared in (SHARED, SHARED // 2))
    halved = itemsize == 1 and programs > PROCESSORS and in_half >= min(4, steps)
    return min(steps, in_half if halved else in_all)


def early_of(stages: int, itemsize: int, programs: int) -> int:
    return min(stages, EARLY_FP8 if itemsize == 1 and programs <= PROCESSORS else EARLY)


def streams_behind_seam(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor, slots: bool = False) -> bool:
    """Whether such kernels take x [T, H] and weights [.., H]: one token, for which they were measured to pay.

    slots: of experts, which fill a thread's registers, are added up.
    """
    widest = WIDEST_FP8 if weight.itemsize == 1 and not slots else WIDEST
    fits = x.itemsize == 2 and x.shape[1] % COLUMNS == 0 and x.shape[1] <= widest
    return len(x) == 1 and fits and loads_by_tma(weight) and loads_by_tma(x, *others)


def boxes_of(weight: torch.Tensor, parts: int = 1, rows: int = ROWS, columns: int = COLUMNS) -> TensorDescriptor:
    """For loads of so many rows in all, the same of each of the parts that the weight is made of, by columns."""
    (count, depth), wide = weight.shape, 128 // weight.itemsize
    block = [columns // wide, parts, rows // parts, wide]
    shape, strides = [depth // wide, parts, count // parts, wide], [wide, count // parts * depth, depth, 1]
    layout = gl.NVMMASharedLayout(128, 8 * weight.itemsize, len(block))
    return TensorDescriptor(weight, shape, strides, block, layout)
