"""GeGLU: gelu_tanh(gate) * up, of two tensors or of both in one.

The gelu is rounded to the dtype before the product, and the product again.
Source: HF `Gemma4TextMLP`, and the gate of a per-layer input in `Gemma4TextDecoderLayer` (`gelu_pytorch_tanh`, not
the erf GELU); on a CPU the bits are HF's on one thread and where I is a multiple of the vector width (32 does, and
holds for every Gemma 4): PyTorch's scalar tail has another tanh, and several threads cut rows of a strided view
where they do not cut HF's dense one.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.load_order import after
from gemcutter.ops.tanh import INTERPRETED, tanh
from gemcutter.ops.tile import elementwise_tile, tile_at


def geglu(gate_up: torch.Tensor) -> torch.Tensor:
    """The MLP's activation, from the one projection that makes both of its inputs.

    Args:
        gate_up: [T, 2I] of float32, bfloat16 or float16, columns gate then up; dense rows, row stride free. T may
            be 0.

    Returns:
        [T, I] of the same dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _geglu(gate_up)


def gelu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The same of two tensors, which may be slices of others: the gate of a per-layer input.

    Args:
        gate: [T, I] of float32, bfloat16 or float16; dense rows, row stride free. T may be 0.
        up: [T, I], likewise.

    Returns:
        [T, I] of the same dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _gelu_mul(gate, up)


def check_geglu(gate_up: torch.Tensor) -> None:
    check_matrix("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns: gate and up are its halves, so an even number")


def check_gelu_mul(gate: torch.Tensor, up: torch.Tensor) -> None:
    check_matrix("gate", gate)
    check_matrix("up", up, like=gate)


def geglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    return gelu_mul_reference(*gate_up.chunk(2, -1))


def gelu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) in float, in the order of PyTorch's CUDA kernel.

    The fused multiply-add is nvcc's there, and written out here so that no launch option moves it.
    """
    inner = 0.7978845608028654 * tl.fma(x * x * x, 0.044715, x)
    # The accurate tanh, as PyTorch's: the fast one is off by bf16 ulps where 1 + tanh cancels.
    return 0.5 * x * (1.0 + tanh(inner))


@triton.jit
def gelu(x):
    """Of any float dtype -> the same, rounded as PyTorch's CUDA kernel rounds it."""
    if x.dtype != tl.bfloat16 or INTERPRETED or not cuda_capability_geq(9, 0) or cuda_capability_geq(10, 0):
        return gelu_tanh(x.to(tl.float32)).to(x.dtype)
    else:
        # h - |h| (2 / (e^2|inner| + 1) - 1), h = x / 2, takes 11 instructions, not 27, and comes out the same for
        # each of the 65536 values; in float16 three differ. The sign is for zeros: h - |h| is not -0.
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 x<2>, power<2>, rest<2>;
            .reg .b32 pair;
            shl.b32 pair, $1, 16;
            mov.b32 x0, pair;
            and.b32 pair, $1, 0xFFFF0000;
            mov.b32 x1, pair;
            mul.rn.f32 power0, x0, x0;
            mul.rn.f32 power1, x1, x1;
            fma.rn.f32 power0, power0, 0f3DD2D3E8, 0f40135761;
            fma.rn.f32 power1, power1, 0f3DD2D3E8, 0f40135761;
            mul.rn.f32 power0, power0, x0;
            mul.rn.f32 power1, power1, x1;
            abs.f32 power0, power0;
            abs.f32 power1, power1;
            ex2.approx.ftz.f32 power0, power0;
            ex2.approx.ftz.f32 power1, power1;
            add.rn.f32 power0, power0, 0f3F800000;
            add.rn.f32 power1, power1, 0f3F800000;
            rcp.approx.ftz.f32 power0, power0;
            rcp.approx.ftz.f32 power1, power1;
            fma.rn.f32 rest0, power0, 0f40000000, 0fBF800000;
            fma.rn.f32 rest1, power1, 0f40000000, 0fBF800000;
            mul.rn.f32 x0, x0, 0f3F000000;
            mul.rn.f32 x1, x1, 0f3F000000;
            abs.f32 power0, x0;
            abs.f32 power1, x1;
            neg.f32 power0, power0;
            neg.f32 power1, power1;
            fma.rn.f32 x0, power0, rest0, x0;
            fma.rn.f32 x1, power1, rest1, x1;
            cvt.rn.bf16x2.f32 pair, x1, x0;
            lop3.b32 $0, pair, $1, 0x80008000, 0xF8;
            }""",
            "=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )


@triton.jit(do_not_specialize=["rows"])
def _gelu_mul_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, rows,
    I: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row, col = tile_at(tl.program_id(0), I, ROWS, COLS)
    inside = ((row < rows) | (ROWS == 1)) & ((col < I) | (I % COLS == 0))
    row = row.to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    join(CHAINED)
    release(CHAINED)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + col, mask=inside, other=0.0)
    out = gelu(after(gate, up, rows)).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * I + col, out.to(dtype), mask=inside)


def geglu_launch(gate_up: torch.Tensor) -> torch.Tensor:
    return gelu_mul_launch(*gate_up.chunk(2, -1))


def gelu_mul_launch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    if rows:
        tile = elementwise_tile(width, 1024)
        _gelu_mul_kernel[(triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(width, tile["COLS"]),)](
            gate, up, out, gate.stride(0), up.stride(0), rows, I=width, **tile, **chained(gate)
        )
    return out


_geglu = define(
    "geglu(Tensor gate_up) -> Tensor", check=check_geglu, reference=geglu_reference, launch=geglu_launch
)
_gelu_mul = define(
    "gelu_mul(Tensor gate, Tensor up) -> Tensor",
    check=check_gelu_mul, reference=gelu_mul_reference, launch=gelu_mul_launch,
)  # fmt: skip
