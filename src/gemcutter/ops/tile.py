"""The tile of a kernel that reads each element once and mixes no two: rows times columns."""

import triton


def elementwise_tile(width: int) -> dict[str, int]:
    """Launch settings for rows of `width` elements: 1024 a program, in 16-byte loads on 4 warps.

    COLS divides the width where a power of two from 64 does (704 and 2112 are multiples of 64, all wider MLPs of
    1024), so that no lane idles: 1024 columns of 2112 would leave a third of them without work.
    """
    divisor = width & -width
    cols = min(divisor, 1024) if divisor >= 64 else min(triton.next_power_of_2(width), 1024)
    return dict(ROWS=1024 // cols, COLS=cols, num_warps=4, enable_fp_fusion=False)
