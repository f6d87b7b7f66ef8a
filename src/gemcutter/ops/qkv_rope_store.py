"""From the merged projection to attention: per-head norms, rotary embedding, and K/V into their cache slots.

One launch where eager PyTorch needs about twenty. HF's rounding is kept step by step: a norm is fp32 with one
rounding after the weight; rope rounds each product and the sum.
"""

from enum import Enum

import torch
import triton
import triton.language as tl

from gemcutter.ops.mean_square import mean_square_of_halves
from gemcutter.ops.rms_norm import rms_norm_reference
from gemcutter.spec import LayerSpec


class QkvMode(Enum):
    """What a row of the projection holds, and what goes into the cache."""

    QKV = "qkv"  # q | k | v: K = rope(norm(k) * w), V = norm(v) without weight
    Q_KEQV = "q_keqv"  # q | k: V is the weightless norm of the raw k, so K and V still differ
    Q_ONLY = "q_only"  # q: K/V are another layer's, nothing is stored


def mode_of(layer: LayerSpec) -> QkvMode:
    if not layer.owns_kv:
        return QkvMode.Q_ONLY
    return QkvMode.Q_KEQV if layer.k_eq_v else QkvMode.QKV


def qkv_rope_store(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slots: torch.Tensor | None,
    mode: QkvMode,
) -> torch.Tensor:
    """Norm and rotate q; norm, rotate and store k; norm and store v.

    Args:
        qkv: [T, LayerSpec.qkv_width]; rows may be further apart than their width. T may be 0.
        q_norm, k_norm: [D]; on a GPU D is a power of two from 32 to 512.
        cos, sin: [context, angles] of qkv's dtype, from `rope_table`.
        positions: [T] int64, below context.
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, D], written in place.
        slots: [T] int64, page id * page_size + offset. Of several rows with one slot, any may win.
        mode: in Q_ONLY, k_norm, the caches and slots are left alone and may be None.

    Returns:
        q: [T, num_heads, D] of qkv's dtype.
    """
    head_dim = q_norm.shape[0]
    kv_parts = {QkvMode.QKV: 2, QkvMode.Q_KEQV: 1, QkvMode.Q_ONLY: 0}[mode]
    width = (num_heads + kv_parts * num_kv_heads) * head_dim
    assert qkv.shape[1] == width, f"{mode} needs rows of {width}, got {qkv.shape[1]}"
    assert cos.dtype == sin.dtype == qkv.dtype, f"rope tables are {cos.dtype}, activations {qkv.dtype}"
    if mode is QkvMode.Q_ONLY:
        k_norm = k_cache = v_cache = slots = None
    run = launch if qkv.is_cuda else qkv_rope_store_reference
    return run(
        qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots, mode
    )


def qkv_rope_store_reference(
    qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots, mode
) -> torch.Tensor:
    """The same in plain PyTorch, any device and dtype; HF's `Gemma4TextAttention` up to its cache update."""
    heads = qkv.unflatten(1, (-1, q_norm.shape[0]))
    q, kv = heads[:, :num_heads], heads[:, num_heads:]
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    if mode is not QkvMode.Q_ONLY:
        k, v = kv[:, :num_kv_heads], kv[:, -num_kv_heads:]  # the same heads where K = V
        page_size = k_cache.shape[2]
        page, offset = slots // page_size, slots % page_size
        k_cache[page, :, offset] = _rotate(rms_norm_reference(k, k_norm, eps), cos, sin)
        v_cache[page, :, offset] = rms_norm_reference(v, None, eps)
    return _rotate(rms_norm_reference(q, q_norm, eps), cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """HF's `apply_rotary_pos_emb`; pairs beyond the table keep their values, as cos 1 and sin 0 would."""
    half, angles = x.shape[-1] // 2, cos.shape[-1]
    out = x.clone()
    low, high = x[..., :angles], x[..., half : half + angles]
    out[..., :angles] = low * cos + -high * sin
    out[..., half : half + angles] = high * cos + low * sin
    return out


@triton.jit
def _rms_scale(low, high, eps, D: tl.constexpr):
    return tl.rsqrt(mean_square_of_halves(low, high, D) + eps)  # torch's pow(-0.5) is rsqrt too, on CPU and GPU


@triton.jit
def _rotate_store(ptr, low, high, cos, sin, dims, mask, HALF: tl.constexpr):
    dtype = ptr.dtype.element_ty
    left = (low * cos).to(dtype).to(tl.float32) + (-high * sin).to(dtype).to(tl.float32)
    right = (high * cos).to(dtype).to(tl.float32) + (low * sin).to(dtype).to(tl.float32)
    tl.store(ptr + dims, left.to(dtype), mask)
    tl.store(ptr + dims + HALF, right.to(dtype), mask)


@triton.jit(do_not_specialize=["num_q_blocks", "num_kv_blocks"])
def _qkv_rope_store_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
    slots_ptr, row_stride, eps, num_q_blocks, num_kv_blocks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, ANGLES: tl.constexpr,
    STORES: tl.constexpr, K_EQ_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (t, b): BLOCK_H heads of token t. Blocks run over the q heads, then k's, then v's.

    A head is held as its two halves, so that a dim and its rope partner meet in one thread.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    pair = tl.arange(0, HALF)
    dims = pair[None, :]
    row_ptr = qkv_ptr + token * row_stride
    position = tl.load(positions_ptr + token)
    turns = pair < ANGLES
    cos = tl.load(cos_ptr + position * ANGLES + pair, mask=turns, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * ANGLES + pair, mask=turns, other=0.0).to(tl.float32)[None, :]
    dtype = q_ptr.dtype.element_ty

    if block < num_q_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        mask = (head < HEADS) & (dims < HALF)
        low = tl.load(row_ptr + head * D + dims, mask, other=0.0).to(tl.float32)
        high = tl.load(row_ptr + head * D + dims + HALF, mask, other=0.0).to(tl.float32)
        scale = _rms_scale(low, high, eps, D)
        w_low = tl.load(q_norm_ptr + dims).to(tl.float32)
        w_high = tl.load(q_norm_ptr + dims + HALF).to(tl.float32)
        low = (low * scale * w_low).to(dtype).to(tl.float32)
        high = (high * scale * w_high).to(dtype).to(tl.float32)
        _rotate_store(q_ptr + (token * HEADS + head) * D, low, high, cos, sin, dims, mask, HALF)
    elif STORES:
        is_key = block < num_q_blocks + num_kv_blocks
        first = tl.where(is_key, block - num_q_blocks, block - num_q_blocks - num_kv_blocks) * BLOCK_H
        head = first + tl.arange(0, BLOCK_H)[:, None]
        mask = (head < KV_HEADS) & (dims < HALF)
        column = (head + HEADS + tl.where(is_key, 0, KV_HEADS)) * D
        low = tl.load(row_ptr + column + dims, mask, other=0.0).to(tl.float32)
        high = tl.load(row_ptr + column + dims + HALF, mask, other=0.0).to(tl.float32)
        scale = _rms_scale(low, high, eps, D)
        low = low * scale
        high = high * scale
        slot = tl.load(slots_ptr + token)
        target = ((slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE) * D
        if K_EQ_V or not is_key:
            tl.store(v_cache_ptr + target + dims, low.to(dtype), mask)
            tl.store(v_cache_ptr + target + dims + HALF, high.to(dtype), mask)
        if is_key:
            w_low = tl.load(k_norm_ptr + dims).to(tl.float32)
            w_high = tl.load(k_norm_ptr + dims + HALF).to(tl.float32)
            low = (low * w_low).to(dtype).to(tl.float32)
            high = (high * w_high).to(dtype).to(tl.float32)
            _rotate_store(k_cache_ptr + target, low, high, cos, sin, dims, mask, HALF)


BLOCK_HEADS = 4  # of one program: 4 x 512 elements are 16 a thread; token count must not change the tiles


def launch(
    qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots, mode
) -> torch.Tensor:
    num_tokens, head_dim = qkv.shape[0], q_norm.shape[0]
    assert head_dim & (head_dim - 1) == 0 and 32 <= head_dim <= 512, f"no kernel for head_dim {head_dim}"
    assert qkv.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous(), "rows must be dense"
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    q_blocks = triton.cdiv(num_heads, BLOCK_HEADS)
    kv_blocks = triton.cdiv(num_kv_heads, BLOCK_HEADS)
    kv_parts = {QkvMode.QKV: 2, QkvMode.Q_KEQV: 1, QkvMode.Q_ONLY: 0}[mode]
    if mode is not QkvMode.Q_ONLY:
        assert k_cache.is_contiguous() and v_cache.is_contiguous(), "the cache must be dense"
    _qkv_rope_store_kernel[(num_tokens, q_blocks + kv_parts * kv_blocks)](
        qkv, q_norm, k_norm, cos, sin, positions, q, k_cache, v_cache, slots,
        qkv.stride(0), eps, q_blocks, kv_blocks,
        HEADS=num_heads, KV_HEADS=num_kv_heads, PAGE=1 if k_cache is None else k_cache.shape[2],
        D=head_dim, ANGLES=cos.shape[1],
        STORES=mode is not QkvMode.Q_ONLY, K_EQ_V=mode is QkvMode.Q_KEQV, BLOCK_H=BLOCK_HEADS,
        num_warps=4,
        enable_fp_fusion=False,  # torch rounds a product before it is added; an FMA would not
    )  # fmt: skip
    return q
