"""Loads that are to be under way together.

ptxas moves a load down to the first use of its values, past the arithmetic on those of another: one waits for the
other's latency, which is most of a small kernel's time. Neither a barrier nor a jump keeps it from that.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from gemcutter.ops.tanh import INTERPRETED


@triton.jit
def after(x, loaded, count):
    """x, not to be used before what `loaded` was mixed of has been loaded.

    count: an int32 argument of the kernel, not negative, which the compiler does not know: it sees
    x ^ (loaded & mask).
    """
    if INTERPRETED or not is_cuda():
        return x
    else:
        mask = count >> 31
        if x.dtype.primitive_bitwidth == 16:
            mask = mask.to(tl.int16)
        return _bitwise("lop3.b32 $0, $1, $2, $3, 0x78;", x, loaded, mask)


@triton.jit
def mixed(x, y, z):
    """Bits that depend on all three."""
    if INTERPRETED or not is_cuda():
        return x
    else:
        return _bitwise("lop3.b32 $0, $1, $2, $3, 0x1e;", x, y, z)


@triton.jit
def _bitwise(INSTRUCTION: tl.constexpr, x, y, z):
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=r,r,r,r", [x, y, z], dtype=x.dtype, is_pure=True, pack=32 // x.dtype.primitive_bitwidth
    )
