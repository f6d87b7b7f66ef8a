"""SwiGLU: silu(gate) * up, of both in one tensor.

The silu is rounded to the dtype before the product, and the product again.
Source: HF `Glm4MoeMLP`, whose `hidden_act` is silu; on a CPU the bits are HF's where I is a multiple of the vector
width, as `geglu.py` says.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import libdevice

from gemcutter.ops.activations.geglu import check_geglu
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.load_order import after
from gemcutter.ops.tile import elementwise_tile, tile_at


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """The MLP's activation, from the one projection that makes both of its inputs.

    Args:
        gate_up: [T, 2I] of float32, bfloat16 or float16, columns gate then up; dense rows, row stride free. T may
            be 0.

    Returns:
        [T, I] of the same dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _swiglu(gate_up)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@triton.jit
def silu(x):
    """x / (1 + e^-x) in float, in the order of PyTorch's CUDA kernel."""
    return tl.div_rn(x, 1.0 + libdevice.exp(0.0 - x))


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(
    gate_ptr, up_ptr, out_ptr, row_stride, rows,
    I: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row, col = tile_at(tl.program_id(0), I, ROWS, COLS)
    inside = ((row < rows) | (ROWS == 1)) & ((col < I) | (I % COLS == 0))
    row = row.to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    join(CHAINED)
    release(CHAINED)
    gate = tl.load(gate_ptr + row * row_stride + col, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * row_stride + col, mask=inside, other=0.0)
    activated = silu(after(gate, up, rows).to(tl.float32)).to(dtype)
    out = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * I + col, out.to(dtype), mask=inside)


def swiglu_launch(gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        gate, up = gate_up.chunk(2, -1)
        tile = elementwise_tile(width, 1024)
        _swiglu_kernel[(triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(width, tile["COLS"]),)](
            gate, up, out, gate_up.stride(0), rows, I=width, **tile, **chained(gate_up)
        )
    return out


_swiglu = define(
    "swiglu(Tensor gate_up) -> Tensor", check=check_geglu, reference=swiglu_reference, launch=swiglu_launch
)
