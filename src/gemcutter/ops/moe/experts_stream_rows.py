"""What `down` of `experts_stream_hopper.py` multiplies with: rows of x in shared memory, as they are or quantised.

Each program of a slot's quantises the row for itself, which it has loaded whole anyhow: a launch less. x_tiles
[STEPS, BLOCK_T, BLOCK_K]: a step of K each, a row for each token; those of tokens that take no part are not read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemcutter.ops.quantize_fp8 import magnitudes, quantized_bits, scale_of

sizes_of, e4m3_of, scale_of_peak = (gluon.jit(each.fn) for each in (magnitudes, quantized_bits, scale_of))


@gluon.jit
def place_rows(x_ptr, slots, x_tiles, K: gl.constexpr):
    """Rows `slots` of x [slots, K], -1: none."""
    STEPS: gl.constexpr = x_tiles.shape[0]
    x = _load_rows(x_ptr, slots, x_tiles, K)
    for step in gl.static_range(STEPS):
        x_tiles.index(step).store(x[step])


@gluon.jit
def place_quantized_rows(x_ptr, slots, x_tiles, K: gl.constexpr):
    """The same, quantised. Returns their scales."""
    SHORT: gl.constexpr = x_ptr.dtype.element_ty != gl.float32
    STEPS: gl.constexpr = x_tiles.shape[0]
    x = _load_rows(x_ptr, slots, x_tiles, K)
    largest = sizes_of(x[0].to(gl.float32))
    for step in gl.static_range(1, STEPS):
        largest = gl.maximum(largest, sizes_of(x[step].to(gl.float32)))
    peak = gl.max(largest, 1)
    for step in gl.static_range(STEPS):
        q = e4m3_of(x[step].to(gl.float32), peak[:, None], SHORT)
        x_tiles.index(step).store(q.to(x_tiles.dtype, bitcast=True))
    return scale_of_peak(peak)


@gluon.jit
def _load_rows(x_ptr, slots, x_tiles, K: gl.constexpr):
    STEPS: gl.constexpr = x_tiles.shape[0]
    BLOCK_K: gl.constexpr = x_tiles.shape[2]
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [gl.num_warps(), 1], [1, 0])
    source = gl.convert_layout(slots, gl.SliceLayout(1, across))[:, None]
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, across))[None, :]
    x_at = x_ptr + source.to(gl.int64) * K + k
    x = ()
    for step in gl.static_range(STEPS):
        begin = step * BLOCK_K
        x += (gl.load(x_at + begin, mask=(source >= 0) & (k < K - begin), other=0.0),)
    return x


@gluon.jit
def place_one_quantized(x_ptr, slot, x_tiles, K: gl.constexpr):
    """Row `slot` alone, in the place of every token, by each warp: an eighth of the work and no waiting for others.

    Returns its scale.
    """
    SHORT: gl.constexpr = x_ptr.dtype.element_ty != gl.float32
    STEPS: gl.constexpr = x_tiles.shape[0]
    BLOCK_T: gl.constexpr = x_tiles.shape[1]
    BLOCK_K: gl.constexpr = x_tiles.shape[2]
    across: gl.constexpr = gl.BlockedLayout([1, BLOCK_K // 32], [1, 32], [gl.num_warps(), 1], [1, 0])
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, across))
    x_at = x_ptr + slot.to(gl.int64) * K + k
    x = ()
    for step in gl.static_range(STEPS):
        x += (gl.load(x_at + step * BLOCK_K, mask=k < K - step * BLOCK_K, other=0.0),)
    largest = sizes_of(x[0].to(gl.float32))
    for step in gl.static_range(1, STEPS):
        largest = gl.maximum(largest, sizes_of(x[step].to(gl.float32)))
    peak = gl.max(largest, 0)
    every = gl.zeros([BLOCK_T, BLOCK_K], gl.uint8, across)
    for step in gl.static_range(STEPS):
        q = e4m3_of(x[step].to(gl.float32), peak, SHORT)
        x_tiles.index(step).store((q[None, :] | every).to(x_tiles.dtype, bitcast=True))
    return scale_of_peak(peak)
