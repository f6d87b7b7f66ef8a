"""Linear layer in float, x.float() @ weight.float().T: router logits, where a rounding would choose other experts.

A product of two bfloat16 or float16 numbers is exact in float, so the tensor cores take them as they are, and add
in the order that `linear.py` describes; a row does not tell how many there are.
Source: HF `Glm4MoeTopkRouter`.
"""

import torch

from gemcutter.ops.library import define
from gemcutter.ops.linears.linear import check_linear, launch_kernel
from gemcutter.ops.row_blocks import linear_in_blocks


def float_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply each row by the transposed weight.

    Args:
        x: [T, K] of float32, bfloat16 or float16; dense rows, row stride free. T may be 0.
        weight: [N, K] of x's dtype, dense.

    Returns:
        [T, N] float32, contiguous, a row's bits a function of that row alone.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _float_linear(x, weight)


def float_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_in_blocks(x.float(), weight.float())


def float_linear_launch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = float_linear_fake(x, weight)
    launch_kernel(x, weight, None, out)
    return out


def float_linear_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


_float_linear = define(
    "float_linear(Tensor x, Tensor weight) -> Tensor",
    check=check_linear, reference=float_linear_reference, launch=float_linear_launch, fake=float_linear_fake,
)  # fmt: skip
