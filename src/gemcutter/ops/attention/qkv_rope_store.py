"""From the merged projection to attention: per-head norms, rotary embedding, and K/V into their cache slots.

One launch where eager PyTorch needs about twenty. HF's rounding is kept step by step: a norm is fp32 with one
rounding after the weight; rope rounds each product and the sum.
"""

from collections.abc import Callable
from enum import Enum

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.attention.head_norm import (
    head_tile,
    heads_of,
    load_halves,
    load_weight,
    norm_halves,
    store_halves,
)
from gemcutter.ops.attention.kv_fp8 import check_kv_cache, kv_bits, kv_bytes, kv_to_fp8
from gemcutter.ops.attention.rope import rotate_reference
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.fused import heads_fuse
from gemcutter.ops.library import define
from gemcutter.ops.norms.rms_norm import rms_norm_launch, rms_norm_reference
from gemcutter.spec import LayerSpec


class QkvMode(Enum):
    """What a row of the projection holds, and what goes into the cache."""

    QKV = "qkv"  # q | k | v: K = rope(norm(k) * w), V = norm(v) without weight
    Q_KEQV = "q_keqv"  # q | k: V is the weightless norm of the raw k, so K and V still differ
    Q_ONLY = "q_only"  # q: K/V are another layer's, nothing is stored


# Besides q, how many parts of kv heads each a row of the projection holds.
KV_PARTS = {QkvMode.QKV: 2, QkvMode.Q_KEQV: 1, QkvMode.Q_ONLY: 0}


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
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm and rotate q; norm, rotate and store k; norm and store v.

    Args:
        qkv: [T, LayerSpec.qkv_width] of float32, bfloat16 or float16; rows dense, any distance apart. T may be 0.
        q_norm, k_norm: [D] of qkv's dtype, dense; D even. One launch for each D that `heads_fuse` names.
        cos, sin: [context, angles] of qkv's dtype, dense, from `rope_table`.
        positions: [T] int64, dense, below context, which is not checked.
        eps: added to the mean squares.
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, D] of qkv's dtype, or float8_e4m3fn with kv_scales;
            dense, written in place.
        slots: [T] int64, dense: page id * page_size + offset, inside the cache, which is not checked. Of several
            rows with one slot, any may win.
        mode: in Q_ONLY, k_norm, the caches, slots and kv_scales are left alone and may be None.
        kv_scales: [2, num_kv_heads] float32, powers of two, dense: what the keys and the values are divided by
            before an FP8 cache takes them (`kv_fp8.py`).

    Returns:
        q: [T, num_heads, D] of qkv's dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    if mode is QkvMode.Q_ONLY:
        k_norm = k_cache = v_cache = slots = kv_scales = None
    return _qkv_rope_store(
        qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots, mode.value,
        kv_scales,
    )  # fmt: skip


def check_qkv_rope_store(
    qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots, mode, kv_scales
) -> None:
    mode, head_dim = QkvMode(mode), q_norm.shape[-1]
    if head_dim % 2:
        raise ValueError(f"q_norm has {head_dim} elements: rope turns pairs, an even head dim is needed")
    parts = KV_PARTS[mode]
    if num_heads < 1 or (parts and num_kv_heads < 1):
        raise ValueError(f"num_heads {num_heads}, num_kv_heads {num_kv_heads}: at least 1 is needed")
    check_matrix("qkv", qkv)
    width = (num_heads + parts * num_kv_heads) * head_dim
    if qkv.shape[1] != width:
        what = f"{num_heads} heads and {parts} x {num_kv_heads} K/V heads of {head_dim}"
        raise ValueError(f"qkv has rows of {qkv.shape[1]}: mode {mode.value} with {what} needs {width}")
    check_weight("q_norm", q_norm, head_dim, qkv)
    _check_table("cos", cos, head_dim, qkv)
    _check_table("sin", sin, head_dim, qkv)
    if cos.shape != sin.shape:
        raise ValueError(f"cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}: they are of one table")
    _check_ids("positions", positions, qkv)
    stored = dict(k_norm=k_norm, k_cache=k_cache, v_cache=v_cache, slots=slots)
    wrong = [name for name, x in stored.items() if (x is None) != (parts == 0)]
    if kv_scales is not None and parts == 0:
        wrong.append("kv_scales")
    if wrong:
        needed = "nothing is stored, None is" if parts == 0 else "they are"
        raise ValueError(f"{', '.join(wrong)}: in mode {mode.value} {needed} needed")
    if parts:
        check_weight("k_norm", k_norm, head_dim, qkv)
        check_kv_cache("k_cache", k_cache, num_kv_heads, head_dim, qkv, kv_scales)
        check_kv_cache("v_cache", v_cache, num_kv_heads, head_dim, qkv, kv_scales)
        if k_cache.shape != v_cache.shape:
            got, want = tuple(v_cache.shape), tuple(k_cache.shape)
            raise ValueError(f"v_cache has shape {got}: {want}, k_cache's, is needed")
        _check_ids("slots", slots, qkv)


def _check_table(name: str, x: torch.Tensor, head_dim: int, qkv: torch.Tensor) -> None:
    check_matrix(name, x)
    if x.dtype != qkv.dtype or x.device != qkv.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}: {qkv.dtype} on {qkv.device} is needed")
    if x.shape[1] > head_dim // 2 or not x.is_contiguous():
        got = f"shape {tuple(x.shape)}, strides {x.stride()}"
        raise ValueError(f"{name} has {got}: a dense table of up to {head_dim // 2} angles is needed")


def _check_ids(name: str, x: torch.Tensor, qkv: torch.Tensor) -> None:
    if x.dtype != torch.int64 or x.device != qkv.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}: torch.int64 on {qkv.device} is needed")
    if x.shape != qkv.shape[:1] or not x.is_contiguous():
        got = f"shape {tuple(x.shape)}, strides {x.stride()}"
        raise ValueError(f"{name} has {got}: one dense number for each of {qkv.shape[0]} rows is needed")


def qkv_rope_store_reference(
    qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots, mode, kv_scales
) -> torch.Tensor:
    """HF's `Gemma4TextAttention` up to its cache update."""
    return _unfused(
        rms_norm_reference,
        qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots,
        kv_scales,
    )  # fmt: skip


def _unfused(
    norm: Callable,
    qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots,
    kv_scales,
) -> torch.Tensor:  # fmt: skip
    heads = qkv.unflatten(1, (-1, q_norm.shape[0]))
    q, kv = heads[:, :num_heads], heads[:, num_heads:]
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    if slots is not None:
        k, v = kv[:, :num_kv_heads], kv[:, -num_kv_heads:]  # the same heads where K = V
        page_size = k_cache.shape[2]
        page, offset = slots // page_size, slots % page_size
        parts = [rotate_reference(norm(k, k_norm, eps), cos, sin), norm(v, None, eps)]
        if kv_scales is not None:
            parts = [kv_to_fp8(part, scale) for part, scale in zip(parts, kv_scales, strict=True)]
        for cache, part in zip(kv_bytes(k_cache, v_cache), kv_bytes(*parts), strict=True):
            cache[page, :, offset] = part
    return rotate_reference(norm(q, q_norm, eps), cos, sin)


@triton.jit
def _load_turns(cos_ptr, sin_ptr, position, ANGLES: tl.constexpr, D: tl.constexpr):
    """cos and sin of positions [rows, 1] as [rows, D/2] float32; pairs beyond the table get 1 and 0."""
    pair = tl.arange(0, D // 2)[None, :]
    at = position * ANGLES + pair
    cos = tl.load(cos_ptr + at, mask=pair < ANGLES, other=1.0)
    sin = tl.load(sin_ptr + at, mask=pair < ANGLES, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def _weigh_rotate(low, high, w_low, w_high, cos, sin, dtype: tl.constexpr):
    low = (low * w_low).to(dtype).to(tl.float32)
    high = (high * w_high).to(dtype).to(tl.float32)
    # Triton negates as 0 - x, which loses the sign of 0: HF's sum with a negated product is a difference here.
    left = (low * cos).to(dtype).to(tl.float32) - (high * sin).to(dtype).to(tl.float32)
    right = (high * cos).to(dtype).to(tl.float32) + (low * sin).to(dtype).to(tl.float32)
    return left, right


@triton.jit
def _store_kv(ptr, low, high, real, scales_ptr, number, dtype: tl.constexpr, D: tl.constexpr):
    """Heads as dtype holds them, or quantised of that by the scale of that number."""
    if ptr.dtype.element_ty == tl.uint8:
        scale = tl.load(scales_ptr + number, mask=real, other=1.0)
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        store_halves(ptr, kv_bits(low, scale), kv_bits(high, scale), real, D)
    else:
        store_halves(ptr, low, high, real, D)


@triton.jit(do_not_specialize=["num_tokens"])
def _qkv_rope_store_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
    slots_ptr, scales_ptr, num_tokens, row_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, ANGLES: tl.constexpr,
    STORES: tl.constexpr, K_EQ_V: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Tiles run over q's heads, then k's, then v's. All loads of a tile are issued before its reduction."""
    release(CHAINED)
    block = tl.program_id(0)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q_blocks = tl.cdiv(num_tokens * HEADS, ROWS)
    if block < q_blocks:
        token, head, real = heads_of(block, num_tokens, HEADS, ROWS)
        w_low, w_high = load_weight(q_norm_ptr, ROWS, D)
        join(CHAINED)
        position = tl.load(positions_ptr + token, mask=real, other=0)
        low, high = load_halves(qkv_ptr + token * row_stride + head * D, real, D)
        cos, sin = _load_turns(cos_ptr, sin_ptr, position, ANGLES, D)
        low, high = norm_halves(low, high, eps, D)
        low, high = _weigh_rotate(low, high, w_low, w_high, cos, sin, dtype)
        store_halves(q_ptr + (token * HEADS + head) * D, low, high, real, D)
    elif STORES:
        kv_blocks = tl.cdiv(num_tokens * KV_HEADS, ROWS)
        is_key = block < q_blocks + kv_blocks
        first = q_blocks + tl.where(is_key, 0, kv_blocks)
        token, head, real = heads_of(block - first, num_tokens, KV_HEADS, ROWS)
        join(CHAINED)
        slot = tl.load(slots_ptr + token, mask=real, other=0)
        target = ((slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE) * D
        column = (HEADS + tl.where(is_key, 0, KV_HEADS) + head) * D
        low, high = load_halves(qkv_ptr + token * row_stride + column, real, D)
        if is_key:
            position = tl.load(positions_ptr + token, mask=real, other=0)
            w_low, w_high = load_weight(k_norm_ptr, ROWS, D)
            cos, sin = _load_turns(cos_ptr, sin_ptr, position, ANGLES, D)
            low, high = norm_halves(low, high, eps, D)
            if K_EQ_V:
                _store_kv(v_cache_ptr + target, low, high, real, scales_ptr, KV_HEADS + head, dtype, D)
            low, high = _weigh_rotate(low, high, w_low, w_high, cos, sin, dtype)
            _store_kv(k_cache_ptr + target, low, high, real, scales_ptr, head, dtype, D)
        else:
            low, high = norm_halves(low, high, eps, D)
            _store_kv(v_cache_ptr + target, low, high, real, scales_ptr, KV_HEADS + head, dtype, D)


def qkv_rope_store_launch(
    qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots, mode, kv_scales
) -> torch.Tensor:
    num_tokens, head_dim = qkv.shape[0], q_norm.shape[0]
    if not heads_fuse(head_dim):
        return _unfused(
            rms_norm_launch,
            qkv, q_norm, k_norm, cos, sin, positions, eps, num_heads, num_kv_heads, k_cache, v_cache, slots,
            kv_scales,
        )  # fmt: skip
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    mode = QkvMode(mode)
    parts = KV_PARTS[mode]
    tile = head_tile(num_tokens * (num_heads + parts * num_kv_heads), head_dim)
    q_blocks, kv_blocks = (triton.cdiv(num_tokens * heads, tile["ROWS"]) for heads in (num_heads, num_kv_heads))
    _qkv_rope_store_kernel[(q_blocks + parts * kv_blocks,)](
        qkv, q_norm, k_norm, cos, sin, positions, q, *kv_bytes(k_cache, v_cache), slots, kv_scales, num_tokens,
        qkv.stride(0), eps,
        HEADS=num_heads, KV_HEADS=num_kv_heads, PAGE=1 if k_cache is None else k_cache.shape[2],
        D=head_dim, ANGLES=cos.shape[1], STORES=parts > 0, K_EQ_V=mode is QkvMode.Q_KEQV,
        **tile, **chained(qkv),
    )  # fmt: skip
    return q


_qkv_rope_store = define(  # no argument may be called `mode`: PyTorch's own dispatch of changed arguments has one
    "qkv_rope_store(Tensor qkv, Tensor q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor positions, float eps,"
    " int num_heads, int num_kv_heads, Tensor(a!)? k_cache, Tensor(b!)? v_cache, Tensor? slots, str qkv_mode,"
    " Tensor? kv_scales) -> Tensor",
    check=check_qkv_rope_store, reference=qkv_rope_store_reference, launch=qkv_rope_store_launch,
)  # fmt: skip
