"""A row of the residual stream in the registers of four warps, in Gluon, and from there in shared memory for wgmma.

Parts of 1024 columns, 8 a thread, as tuples that `row.py`'s functions take.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

PART = gl.constexpr(1024)
LANES = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [1, 4], [1, 0]))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # of 64 columns, as wgmma reads them
memory = gl.shared_memory_descriptor
view = getattr(memory, "reinterpret", None) or memory._reinterpret


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
def put_row(chunks, xs):
    """Into the first of the 8 rows of chunks of 64 columns, [chunks, 8, 64], where the swizzle moves nothing.

    The other rows stay as they are: what wgmma makes of them nobody reads.
    """
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    parts = view(chunks, chunks.dtype, [len(xs), PART // 64, 8, 64], flat)
    for part in gl.static_range(len(xs)):
        parts.index(part).slice(0, 1, dim=1).store(xs[part].reshape([PART // 64, 1, 64]))
