"""A row in registers: a tuple of equal tiles side by side, 8 columns a thread each.

A tile's sides are powers of two, so one tile of 4096 leaves a third of its lanes idle at 2816; three of 1024 leave
a twelfth.
"""

import triton
import triton.language as tl

from gemcutter.ops.mean_square import mean_square_of_parts, mean_squares_of_rows


@triton.jit
def columns(PART: tl.constexpr):
    """[1, PART]; a thread is to store what it loaded: for 16 bytes a store it would exchange them first."""
    return tl.max_contiguous(tl.arange(0, PART), 8)[None, :]


@triton.jit
def load_row(ptr, real, H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """Rows at ptr, one or [rows, 1], as [rows, PART] each; zeros past column H.

    real: [rows, 1], which are there at all; the others are zeros. None: all.
    """
    col = columns(PART)
    xs = ()
    for part in tl.static_range(PARTS):
        at = ptr + part * PART + col
        if real is not None:
            xs += (tl.load(at, mask=real & (col < H - part * PART), other=0.0),)
        elif part * PART + PART > H:
            xs += (tl.load(at, mask=col < H - part * PART, other=0.0),)
        else:
            xs += (tl.load(at),)
    return xs


@triton.jit
def store_row(ptr, xs, real, H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """Rounded to what ptr points to."""
    col = columns(PART)
    for part in tl.static_range(PARTS):
        at, x = ptr + part * PART + col, xs[part].to(ptr.dtype.element_ty)
        if real is not None:
            tl.store(at, x, mask=real & (col < H - part * PART))
        elif part * PART + PART > H:
            tl.store(at, x, mask=col < H - part * PART)
        else:
            tl.store(at, x)


@triton.jit
def late(xs, ptr, H: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """A weight that was loaded, or is now."""
    if xs is not None:
        return xs
    return load_row(ptr, None, H, PARTS, PART)


@triton.jit
def norm_factor(xs, eps, H: tl.constexpr):
    """What a row's norm multiplies it by, in float."""
    return tl.rsqrt(mean_square_of_parts(xs, H) + eps)  # PyTorch's pow(-0.5) is rsqrt, on CPU and GPU


@triton.jit
def norm_factors(xs, ys, eps, H: tl.constexpr):
    """Of two rows, which wait for each other's threads together."""
    of_x, of_y = mean_squares_of_rows(xs, ys, H)
    return tl.rsqrt(of_x + eps), tl.rsqrt(of_y + eps)


@triton.jit
def normed(xs, factor, weights):
    """x * factor * weight in float, rounded to x's dtype once; weights None: x * factor."""
    ys = ()
    for part in tl.static_range(len(xs)):
        y = xs[part].to(tl.float32) * factor
        if weights is not None:
            y *= weights[part].to(tl.float32)
        ys += (y.to(xs[part].dtype),)
    return ys


@triton.jit
def normed_twice(xs, factor, weights):
    """x * factor rounded to x's dtype, * weight rounded again."""
    ys = normed(xs, factor, None)
    zs = ()
    for part in tl.static_range(len(xs)):
        zs += ((ys[part].to(tl.float32) * weights[part].to(tl.float32)).to(xs[part].dtype),)
    return zs


@triton.jit
def added(xs, ys):
    zs = ()
    for part in tl.static_range(len(xs)):
        zs += ((xs[part].to(tl.float32) + ys[part].to(tl.float32)).to(xs[part].dtype),)
    return zs


def row_tile(width: int) -> dict[str, int]:
    """Launch settings of a kernel that holds one row a program.

    As few warps as hold the row with 40 elements a lane, since each waits for all: 8192 rows of 26B-A4B's layer
    seam take 84 µs with 4 warps and 115 with 8. 16 at most, a block's limit on gfx942. No fused multiply-add:
    PyTorch rounds a product before it is added.
    """
    warps = min(16, triton.next_power_of_2(triton.cdiv(width, 1280)))
    part = min(256 * warps, max(8, triton.next_power_of_2(width)))
    return dict(PARTS=triton.cdiv(width, part), PART=part, num_warps=warps, enable_fp_fusion=False)


def seam_tile(width: int, rows: int, experts: bool) -> dict[str, int]:
    """EARLY: weights come before the join, so that nobody waits for them: 1.7 µs for 2.4 at one row of 26B-A4B. For
    many rows they lie in the cache, and without registers for them more programs have room: 67 µs for 84 at 8192.
    """
    few = 1024 if experts or width <= 2048 else 2048
    return row_tile(width) | dict(EARLY=rows < few)
