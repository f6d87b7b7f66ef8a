"""The three norms of an attention's heads in one launch, in place: q and k with a weight each, v without.

x = norm(x) * w, rounded once, head by head. Source: HF `Gemma4TextAttention` (q_norm, k_norm, v_norm).
"""

from collections.abc import Callable

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


def qkv_norm_(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Norm every head in place. Where K = V, k_eq_v_norm makes both from k, and this one norms q.

    Args:
        q: [T, heads, D] of float32, bfloat16 or float16: a slice of the qkv buffer, say. Heads are dense, tokens
            and heads any distance apart, without sharing memory. T may be 0. One launch for each D that
            `heads_fuse` names, one for each tensor otherwise.
        k, v: [T, kv_heads, D], likewise; None together where the layer has no K/V of its own.
        q_weight, k_weight: [D], dense; k_weight None where k is.
        eps: added to the mean square.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    _qkv_norm(q, k, v, q_weight, k_weight, eps)


def check_qkv_norm(q, k, v, q_weight, k_weight, eps) -> None:
    if not (k is None) == (v is None) == (k_weight is None):
        given = ", ".join(name for name, x in dict(k=k, v=v, k_weight=k_weight).items() if x is not None)
        raise ValueError(f"k, v and k_weight come together: only {given} given")
    check_heads("q", q)
    check_weight("q_weight", q_weight, q.shape[2], q)
    if k is not None:
        check_heads("k", k, like=q)
        check_heads("v", v, like=q)
        if k.shape != v.shape:
            raise ValueError(f"v has {v.shape[1]} heads: {k.shape[1]}, k's, are needed")
        check_weight("k_weight", k_weight, q.shape[2], q)
    for name, x in dict(q=q, k=k, v=v).items():
        if x is not None:
            _check_apart(name, x)


def _check_apart(name: str, x: torch.Tensor) -> None:
    reach = x.shape[2]
    for stride, size in sorted((x.stride(i), x.shape[i]) for i in range(2) if x.shape[i] > 1):
        if stride < reach:
            raise ValueError(f"{name} has strides {x.stride()}: its heads share memory, and are written; clone it")
        reach += stride * (size - 1)


def qkv_norm_reference(q, k, v, q_weight, k_weight, eps) -> None:
    _each(rms_norm_reference, q, k, v, q_weight, k_weight, eps)


def _each(norm: Callable, q, k, v, q_weight, k_weight, eps) -> None:
    q.copy_(norm(q, q_weight, eps))
    if k is not None:
        k.copy_(norm(k, k_weight, eps))
        v.copy_(norm(v, None, eps))


@triton.jit(do_not_specialize=["num_tokens"])
def _qkv_norm_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, num_tokens,
    q_token, q_head, k_token, k_head, v_token, v_head, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Tiles run over q's heads, then k's, then v's. x_token, x_head: strides."""
    release(CHAINED)
    block = tl.program_id(0)
    q_blocks = tl.cdiv(num_tokens * HEADS, ROWS)
    if block < q_blocks:
        token, head, real = heads_of(block, num_tokens, HEADS, ROWS)
        _norm_tile(q_ptr + token * q_token + head.to(tl.int64) * q_head, real, q_weight_ptr, eps, ROWS, D, CHAINED)
    elif KV_HEADS > 0:
        kv_blocks = tl.cdiv(num_tokens * KV_HEADS, ROWS)
        if block < q_blocks + kv_blocks:
            token, head, real = heads_of(block - q_blocks, num_tokens, KV_HEADS, ROWS)
            _norm_tile(
                k_ptr + token * k_token + head.to(tl.int64) * k_head, real, k_weight_ptr, eps, ROWS, D, CHAINED
            )
        else:
            token, head, real = heads_of(block - q_blocks - kv_blocks, num_tokens, KV_HEADS, ROWS)
            _norm_tile(v_ptr + token * v_token + head.to(tl.int64) * v_head, real, None, eps, ROWS, D, CHAINED)


@triton.jit
def _norm_tile(ptr, real, weight_ptr, eps, ROWS: tl.constexpr, D: tl.constexpr, CHAINED: tl.constexpr):
    if weight_ptr is not None:
        w_low, w_high = load_weight(weight_ptr, ROWS, D)
    join(CHAINED)
    low, high = load_halves(ptr, real, D)
    low, high = norm_halves(low, high, eps, D)
    if weight_ptr is not None:
        low, high = low * w_low, high * w_high
    store_halves(ptr, low, high, real, D)


def qkv_norm_launch(q, k, v, q_weight, k_weight, eps) -> None:
    num_tokens, heads, head_dim = q.shape
    if not heads_fuse(head_dim):
        return _each(rms_norm_launch, q, k, v, q_weight, k_weight, eps)
    kv_heads = 0 if k is None else k.shape[1]
    tile = head_tile(num_tokens * (heads + 2 * kv_heads), head_dim)
    blocks = [triton.cdiv(num_tokens * n, tile["ROWS"]) for n in (heads, kv_heads, kv_heads)]
    if sum(blocks) == 0:
        return None
    strides = [stride for x in (q, k, v) for stride in ((0, 0) if x is None else x.stride()[:2])]
    _qkv_norm_kernel[(sum(blocks),)](
        q, k, v, q_weight, k_weight, num_tokens, *strides, eps,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, **tile, **chained(q),
    )  # fmt: skip
    return None


_qkv_norm = define(
    "qkv_norm_(Tensor(a!) q, Tensor(b!)? k, Tensor(c!)? v, Tensor q_weight, Tensor? k_weight, float eps) -> ()",
    check=check_qkv_norm, reference=qkv_norm_reference, launch=qkv_norm_launch,
)  # fmt: skip
