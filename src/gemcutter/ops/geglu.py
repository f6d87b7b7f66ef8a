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
from triton.language.extra import libdevice

from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.library import define
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

    The fused multiply-add is nvcc's there, and written out here so that no launch option moves it. libdevice's tanh
    flushes denormals, which does not show: 1 swallows them.
    """
    inner = 0.7978845608028654 * tl.fma(x * x * x, 0.044715, x)
    # The accurate tanh, as PyTorch's: the fast one is off by bf16 ulps where 1 + tanh cancels.
    return 0.5 * x * (1.0 + libdevice.tanh(inner))


@triton.jit(do_not_specialize=["rows"])
def _gelu_mul_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, rows, I: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row, col = tile_at(tl.program_id(0), I, ROWS, COLS)
    inside = (row < rows) & (col < I)
    row = row.to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    out = gelu_tanh(gate).to(dtype).to(tl.float32) * up
    tl.store(out_ptr + row * I + col, out.to(dtype), mask=inside)


def geglu_launch(gate_up: torch.Tensor) -> torch.Tensor:
    return gelu_mul_launch(*gate_up.chunk(2, -1))


def gelu_mul_launch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    if rows:
        tile = elementwise_tile(width)
        _gelu_mul_kernel[(triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(width, tile["COLS"]),)](
            gate, up, out, gate.stride(0), up.stride(0), rows, I=width, **tile
        )
    return out


_geglu = define(
    "geglu(Tensor gate_up) -> Tensor", check=check_geglu, reference=geglu_reference, launch=geglu_launch
)
_gelu_mul = define(
    "gelu_mul(Tensor gate, Tensor up) -> Tensor",
    check=check_gelu_mul, reference=gelu_mul_reference, launch=gelu_mul_launch,
)  # fmt: skip
