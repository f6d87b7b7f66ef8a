"""A row of the residual stream in the registers of four warps, in Gluon, and from there in shared memory for wgmma.

Parts of 1024 columns, 8 a thread, as tuples that `row.py`'s functions take.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemcutter.ops.row_fp8 import quantised

PART = gl.constexpr(1024)
LANES = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [1, 4], [1, 0]))
memory = gl.shared_memory_descriptor
view = getattr(memory, "reinterpret", None) or memory._reinterpret
# Triton 3.9 lets no view reach past the part that was indexed, 3.6 no slice have a length that is no power of two.
SLICED = gl.constexpr(hasattr(memory, "reinterpret"))


@gluon.jit
def load_row(ptr, H: gl.constexpr):
    """[1, PART] each; zeros past column H."""
    col = gl.arange(0, PART, gl.SliceLayout(0, LANES))[None, :]
    xs = ()
    for part in gl.static_range((H + PART - 1) // PART):
        if part * PART + PART > H:
            xs += (gl.load(ptr + part * PART + col, mask=col < H - part * PART, other=0.0),)
        else:
            xs += (gl.load(ptr + part * PART + col),)
    return xs


@gluon.jit
def store_row(ptr, xs, H: gl.constexpr):
    col = gl.arange(0, PART, gl.SliceLayout(0, LANES))[None, :]
    for part in gl.static_range(len(xs)):
        if part * PART + PART > H:
            gl.store(ptr + part * PART + col, xs[part], mask=col < H - part * PART)
        else:
            gl.store(ptr + part * PART + col, xs[part])


@gluon.jit
def store_quantised_row(ptr, scale_ptr, xs, H: gl.constexpr):
    qs, scale = quantised(xs, gl.arange(0, PART, gl.SliceLayout(0, LANES))[None, :], H)
    store_row(ptr, qs, H)
    gl.store(scale_ptr, scale)


@gluon.jit
def chunks(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr):
    """Shared memory for COUNT tiles of ROWS rows by 128 bytes, as wgmma reads them."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    tile: gl.constexpr = gl.NVMMASharedLayout(128, BITS, 2)
    return gl.allocate_shared_memory(dtype, [COUNT, ROWS, 1024 // BITS], tile)


@gluon.jit
def chunks_of(memory, dtype: gl.constexpr):
    """The same tiles for another dtype."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    tile: gl.constexpr = gl.NVMMASharedLayout(128, BITS, 2)
    return view(memory, dtype, [memory.shape[0], memory.shape[1], 1024 // BITS], tile)


@gluon.jit
def put_line(line, xs, H: gl.constexpr):
    """A row that is not quantised yet, as e4m3 in steps one behind the other; its scale."""
    qs, scale = quantised(xs, gl.arange(0, PART, gl.SliceLayout(0, LANES))[None, :], H)
    parts = view(line, line.dtype, [len(qs), 1, PART], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for part in gl.static_range(len(qs)):
        parts.index(part).store(qs[part].to(line.dtype, bitcast=True))
    return scale


@gluon.jit
def put_step(x_chunks, line, step, to, CHUNKS: gl.constexpr):
    """A step of a line, to the first of the 8 rows of the chunks of a step."""
    COLS: gl.constexpr = x_chunks.shape[2]
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    steps = view(x_chunks, x_chunks.dtype, [x_chunks.shape[0] // CHUNKS, CHUNKS, 8, COLS], flat)
    x = line.index(step).load(gl.BlockedLayout([2], [32], [4], [0]))
    steps.index(to).slice(0, 1, dim=1).store(x.reshape([CHUNKS, 1, COLS]))


@gluon.jit
def put_row(x_chunks, xs, H: gl.constexpr):
    """Into the first of the 8 rows of chunks, where the swizzle moves nothing; the other rows stay as they are.

    What wgmma makes of them nobody reads. Where the chunks are e4m3 and xs not yet, it quantises, and returns the
    scale.
    """
    COLS: gl.constexpr = x_chunks.shape[2]
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    parts = view(x_chunks, x_chunks.dtype, [x_chunks.shape[0] * COLS // PART, PART // COLS, 8, COLS], flat)
    scale = None
    if x_chunks.dtype.primitive_bitwidth < xs[0].dtype.primitive_bitwidth:
        xs, scale = quantised(xs, gl.arange(0, PART, gl.SliceLayout(0, LANES))[None, :], H)
    for part in gl.static_range(len(xs)):
        x = xs[part].to(x_chunks.dtype, bitcast=True)
        parts.index(part).slice(0, 1, dim=1).store(x.reshape([PART // COLS, 1, COLS]))
    return scale


@gluon.jit
def ring(dtype: gl.constexpr, CHUNKS: gl.constexpr, ROWS: gl.constexpr):
    """Shared memory for chunks of 64 rows; of fewer in groups of 8 rows, with what a `window` reads past them."""
    if ROWS == 64:
        tiles = chunks(dtype, CHUNKS, 64)
    else:
        tiles = chunks(dtype, (CHUNKS - 1) * (ROWS // 8) + 8, 8)
    return tiles


@gluon.jit
def window(tiles, stage, chunk: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr):
    """64 rows, the fewest that wgmma takes, from a stage's chunk on; in a `ring` of fewer the next chunks' too."""
    if tiles.shape[1] == 64:
        rows = tiles.index(stage * CHUNKS + chunk)
    else:
        EIGHTS: gl.constexpr = (tiles.shape[0] - 8) // (STAGES * CHUNKS - 1)
        COLS: gl.constexpr = tiles.shape[2]
        if SLICED:
            EACH: gl.constexpr = CHUNKS * EIGHTS // 8
            COUNT: gl.constexpr = (STAGES - 1) * EACH + 1
            groups = tiles.slice(chunk * EIGHTS, COUNT * 8)
            rows = view(groups, tiles.dtype, [COUNT, 64, COLS], tiles.layout).index(stage * EACH)
        else:
            rows = view(tiles.index((stage * CHUNKS + chunk) * EIGHTS), tiles.dtype, [64, COLS], tiles.layout)
    return rows
