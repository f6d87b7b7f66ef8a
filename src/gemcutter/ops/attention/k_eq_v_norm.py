"""Where K = V: one projection's heads give K's and V's norms.

k_normed = norm(k) * w, v = norm(k), each rounded once; one mean square a head serves both. Source: HF
`Gemma4TextAttention` with `attention_k_eq_v` (k_norm and v_norm of the raw k; rope comes after).
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_weight
from gemcutter.ops.attention.head_norm import (
    check_heads,
    head_tile,
    heads_of,
    load_halves,
    load_weight,
    norm_halves,
    store_halves,
)
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.fused import heads_fuse
from gemcutter.ops.library import define
from gemcutter.ops.norms.rms_norm import rms_norm_launch, rms_norm_reference


def k_eq_v_norm(k: torch.Tensor, k_weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of raw k.

    Args:
        k: [T, kv_heads, D] of float32, bfloat16 or float16: a slice of the projection's output, say. Heads are
            dense, tokens and heads any distance apart. T may be 0. One launch for each D that `heads_fuse` names,
            two otherwise.
        k_weight: [D], dense.
        eps: added to the mean square.

    Returns:
        k_normed, before rope, and v: [T, kv_heads, D] of k's dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _k_eq_v_norm(k, k_weight, eps)


def check_k_eq_v_norm(k: torch.Tensor, k_weight: torch.Tensor, eps: float) -> None:
    check_heads("k", k)
    check_weight("k_weight", k_weight, k.shape[2], k)


def k_eq_v_norm_reference(k: torch.Tensor, k_weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm_reference(k, k_weight, eps).contiguous(), rms_norm_reference(k, None, eps).contiguous()


@triton.jit(do_not_specialize=["num_tokens"])
def _k_eq_v_norm_kernel(
    k_ptr, weight_ptr, k_normed_ptr, v_ptr, num_tokens, token_stride, head_stride, eps,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    release(CHAINED)
    token, head, real = heads_of(tl.program_id(0), num_tokens, HEADS, ROWS)
    w_low, w_high = load_weight(weight_ptr, ROWS, D)
    join(CHAINED)
    low, high = load_halves(k_ptr + token * token_stride + head.to(tl.int64) * head_stride, real, D)
    low, high = norm_halves(low, high, eps, D)
    out = (token * HEADS + head) * D
    store_halves(v_ptr + out, low, high, real, D)
    store_halves(k_normed_ptr + out, low * w_low, high * w_high, real, D)


def k_eq_v_norm_launch(k: torch.Tensor, k_weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, heads, head_dim = k.shape
    if not heads_fuse(head_dim):
        return rms_norm_launch(k, k_weight, eps), rms_norm_launch(k, None, eps)
    k_normed, v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if k.numel():
        tile = head_tile(num_tokens * heads, head_dim)
        _k_eq_v_norm_kernel[(triton.cdiv(num_tokens * heads, tile["ROWS"]),)](
            k, k_weight, k_normed, v, num_tokens, k.stride(0), k.stride(1), eps,
            HEADS=heads, D=head_dim, **tile, **chained(k),
        )  # fmt: skip
    return k_normed, v


_k_eq_v_norm = define(
    "k_eq_v_norm(Tensor k, Tensor k_weight, float eps) -> (Tensor, Tensor)",
    check=check_k_eq_v_norm, reference=k_eq_v_norm_reference, launch=k_eq_v_norm_launch,
)  # fmt: skip
