"""The tile of a kernel that reads each element once and mixes no two: rows times columns."""

import triton
import triton.language as tl


def elementwise_tile(width: int, elements: int) -> dict[str, int]:
    """Launch settings for rows of `width`: so many elements a program, in 16-byte loads on 4 warps.

    elements: as many as to move 6 KiB or more: an H200 starts 0.8 chained programs a ns, and could have moved 5 KiB
    each in that time. COLS divides the width where a power of two from 64 does (704 and 2112 are multiples of 64,
    all wider MLPs of 1024), so that no lane idles: 1024 columns of 2112 would leave a third of them without work.
    """
    divisor = width & -width
    cols = min(divisor, elements) if divisor >= 64 else min(triton.next_power_of_2(width), elements)
    return dict(ROWS=elements // cols, COLS=cols, num_warps=4, enable_fp_fusion=False)


@triton.jit
def tile_at(number, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, COLS] of a tile; tiles are numbered along the rows, as memory lies."""
    across: tl.constexpr = (W + COLS - 1) // COLS
    row = number // across * ROWS + tl.arange(0, ROWS)
    col = number % across * COLS + tl.arange(0, COLS)
    return row[:, None], col[None, :]
