"""K and V of one byte in Gluon's kernels: words of two e4m3 each become bfloat16, exactly."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def halves(words):
    """Words of 16 bits -> bfloat16 of their low and of their high bytes.

    e4m3's exponent in the place of bfloat16's makes a number 2^120 too small, also of a denormal; its NaN is 480.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 size, sign, power;
        mov.b32 power, 0x7B807B80;
        shl.b32 size, $2, 4;
        shl.b32 sign, $2, 8;
        and.b32 size, size, 0x07F007F0;
        and.b32 sign, sign, 0x80008000;
        or.b32 size, size, sign;
        mul.rn.bf16x2 $0, size, power;
        shr.b32 size, $2, 4;
        and.b32 size, size, 0x07F007F0;
        and.b32 sign, $2, 0x80008000;
        or.b32 size, size, sign;
        mul.rn.bf16x2 $1, size, power;
        }""",
        "=r,=r,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def apart(x):
    """[N, D] with each 16 columns in the order 0, 2, ... 14, 1, 3, ... 15."""
    N: gl.constexpr = x.shape[0]
    D: gl.constexpr = x.shape[1]
    return x.reshape([N, D // 16, 8, 2]).permute((0, 1, 3, 2)).reshape([N, D])


@gluon.jit
def keys_of(words, LAYOUT: gl.constexpr):
    """[D // 2, N] words of keys -> [D, N] bfloat16 with rows as `apart` has columns."""
    W: gl.constexpr = words.shape[0]
    N: gl.constexpr = words.shape[1]
    low, high = halves(words)
    both = gl.join(low, high).reshape([W // 8, 8, N, 2]).permute((0, 3, 1, 2)).reshape([2 * W, N])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)
