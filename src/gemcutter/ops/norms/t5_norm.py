"""RMSNorm that rounds twice, before its weight and after: T5's, which Llama and GLM have.

y = x * (mean(x^2) + eps)^-0.5 in float, rounded to the dtype; * w, rounded again.
Source: HF `Glm4MoeRMSNorm`, but for the order in which the squares are summed (`mean_square.py`).
"""

import torch

from gemcutter.ops.library import define
from gemcutter.ops.norms.rms_norm import check_rms_norm, launch_norm, rms_norm_reference


def t5_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise each row.

    Args:
        x: [..., H] of float32, bfloat16 or float16, up to 3 dims; rows dense, other strides free.
        weight: [H] of x's dtype, dense.
        eps: added to the mean square.

    Returns:
        [..., H] of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _t5_norm(x, weight, eps)


def t5_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * rms_norm_reference(x, None, eps)


def t5_norm_launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return launch_norm(x, weight, eps, twice=True)


_t5_norm = define(
    "t5_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    check=check_rms_norm, reference=t5_norm_reference, launch=t5_norm_launch,
)  # fmt: skip
