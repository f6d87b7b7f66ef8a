"""tanh with the bits of PyTorch's CUDA kernels, denormals and NaN included, without a branch.

As nvcc's tanhf: a polynomial below 0.6, above it 1 - 2 / (e^2|x| + 1). libdevice's has the same terms behind a
branch for each element, so that a warp walks both sides of eight in turn, and flushes denormals. Here both are
computed, for all elements of a thread side by side, and one is chosen; from 9.011 on the second is 1 by itself.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda

# An interpreted kernel has no instructions of a card, though there may be a card.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tanh(x):
    """float32 -> float32"""
    if INTERPRETED or not is_cuda():
        return tl.where(tl.abs(x) < 1e-30, x, libdevice.tanh(x))  # x is what it rounds to
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 size, large, square, small;
            .reg .pred is_large;
            abs.f32 size, $1;
            mul.rn.f32 large, size, 0f4038AA3B;
            ex2.approx.ftz.f32 large, large;
            add.rn.f32 large, large, 0f3F800000;
            rcp.approx.ftz.f32 large, large;
            fma.rn.f32 large, large, 0fC0000000, 0f3F800000;
            copysign.f32 large, $1, large;
            mul.rn.f32 square, $1, $1;
            fma.rn.f32 small, square, 0f3C80F082, 0fBD563CAE;
            fma.rn.f32 small, square, small, 0f3E085941;
            fma.rn.f32 small, square, small, 0fBEAAA9ED;
            fma.rn.f32 small, square, small, 0f00000000;
            fma.rn.f32 small, small, $1, $1;
            setp.ge.f32 is_large, size, 0f3F19999A;
            selp.f32 $0, large, small, is_large;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
