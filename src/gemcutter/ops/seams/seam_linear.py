"""From one branch of a layer to the next one's product: `layer_seam`, and `linear` of the row it hands on.

That is its normed residual, for the next layer's projection; or the residual itself, where the per-layer input of
E2B and E4B comes next, whose gate then goes through `gelu_mul`. The bits are those of these ops. One token in
bfloat16 or float16, by a weight of that dtype or in FP8, takes one launch on Hopper.
"""

import torch

from gemcutter.ops.activations.geglu import gelu_mul_launch, gelu_mul_reference
from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.library import define
from gemcutter.ops.linears.linear import check_linear, linear_launch, linear_reference
from gemcutter.ops.linears.linear_fp8 import check_linear_fp8, linear_fp8_launch, linear_fp8_reference
from gemcutter.ops.linears.row_stream_hopper import streams_behind_seam
from gemcutter.ops.quantize_fp8 import Quantized, pair_of, read_as_pair
from gemcutter.ops.seams.layer_seam import Routed, check_layer_seam, layer_seam_launch, layer_seam_reference
from gemcutter.ops.seams.seam_linear_hopper import stream_seam_linear


def seam_linear(
    out: torch.Tensor,
    residual: torch.Tensor,
    post: torch.Tensor,
    eps: float,
    weight: torch.Tensor | Quantized,
    scalar: torch.Tensor | None = None,
    next_norm: torch.Tensor | None = None,
    routed: Routed | None = None,
    factor: torch.Tensor | None = None,
    settled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Close a branch, and begin what reads it.

    Args:
        out, residual, post, eps, scalar, next_norm, routed: as for `layer_seam`.
        weight: [N, H], as for `linear`.
        factor: [T, N], or None; the product is then gelu_tanh(product) * factor.
        settled: routed's ids and weights, and factor, are (`chain.py`): read before the kernels ahead are done.

    Returns:
        hidden [T, H]; the product [T, N].

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    given = out, residual, post, eps, *pair_of(weight), scalar, next_norm, *(routed or (None,) * 5), factor, settled
    return _seam_linear(*given)


def check_seam_linear(
    out, residual, post, eps, weight, weight_scale, scalar, next_norm, routed, dense_post, expert_post, ids,
    weights, factor, settled,
) -> None:  # fmt: skip
    check_layer_seam(out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post, ids, weights)
    if weight_scale is None:
        check_linear(out, weight)
    else:
        check_linear_fp8(out, None, weight, weight_scale, None)
    if factor is not None:
        check_matrix("factor", factor, len(weight))
        if len(factor) != len(out) or factor.dtype != out.dtype or factor.device != out.device:
            got, want = (f"{len(x)} rows of {x.dtype} on {x.device}" for x in (factor, out))
            raise ValueError(f"factor has {got}: {want} are needed")


def seam_linear_reference(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return _one_by_one(layer_seam_reference, linear_reference, linear_fp8_reference, gelu_mul_reference, *arguments)


def _one_by_one(
    seam, product, product_fp8, gate, out, residual, post, eps, weight, weight_scale, scalar, next_norm, routed,
    dense_post, expert_post, ids, weights, factor, settled,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    reader = weight if weight_scale is None else Quantized(weight, weight_scale)
    fp8 = next_norm is not None and read_as_pair(reader, out.dtype)
    hidden, *rows = seam(
        out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post, ids, weights, fp8
    )
    x, *scale = rows or [hidden]
    if weight_scale is None:
        y = product(x, weight)
    else:
        y = product_fp8(x, *(scale or [None]), weight, weight_scale, None)
    return hidden, y if factor is None else gate(y, factor)


def seam_linear_launch(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    out, weight, routed, ids = (arguments[i] for i in (0, 4, 8, 11))
    if (routed is not None and ids is None) or not streams_behind_seam(out, weight, slots=ids is not None):
        return _one_by_one(layer_seam_launch, linear_launch, linear_fp8_launch, gelu_mul_launch, *arguments)
    hidden, product = seam_linear_fake(*arguments)
    stream_seam_linear(*arguments, hidden, product)
    return hidden, product


def seam_linear_fake(out, residual, post, eps, weight, *others) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(out, memory_format=torch.contiguous_format), out.new_empty(len(out), len(weight))


_seam_linear = define(
    "seam_linear(Tensor out, Tensor residual, Tensor post, float eps, Tensor weight, Tensor? weight_scale,"
    " Tensor? scalar, Tensor? next_norm, Tensor? routed, Tensor? dense_post, Tensor? expert_post, Tensor? ids,"
    " Tensor? weights, Tensor? factor, bool settled) -> (Tensor, Tensor)",
    check=check_seam_linear, reference=seam_linear_reference, launch=seam_linear_launch, fake=seam_linear_fake,
)  # fmt: skip
