"""From GLM's merged projection to attention: norms of q's and k's heads, rotary embedding of their first dims, and
K/V into their cache slots.

q = rope(norm(q)), K = rope(norm(k)), V = v; the norms are `t5_norm.py`'s, or left out. Rope rounds each product and
the sum; dim i of the first 2 * angles turns with dim i + angles, the dims behind them stay as they are.
Source: HF `Glm4MoeAttention`, whose biases `linear` has added.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from gemcutter.ops.arguments import check_matrix, check_weight
from gemcutter.ops.attention.head_norm import heads_of
from gemcutter.ops.attention.rope import rotate_reference
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define
from gemcutter.ops.mean_square import mean_square_of_parts
from gemcutter.ops.norms.t5_norm import t5_norm_launch, t5_norm_reference


def rope_store(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Norm and rotate q; norm, rotate and store k; store v.

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * D] of float32, bfloat16 or float16, columns q | k | v; rows dense,
            any distance apart. T may be 0. One launch where angles is a power of two that divides D.
        q_norm, k_norm: [D] of qkv's dtype, dense, or None together.
        cos, sin: [context, angles] of qkv's dtype, dense, from `rope_table`; 2 * angles is at most D.
        positions: [T] int64, dense, below context, which is not checked.
        eps: added to the mean squares.
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, D] of qkv's dtype, dense, written in place.
        slots: [T] int64, dense: page id * page_size + offset, inside the cache, which is not checked. Of several
            rows with one slot, any may win.

    Returns:
        q: [T, num_heads, D] of qkv's dtype, contiguous.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _rope_store(qkv, q_norm, k_norm, cos, sin, positions, eps, k_cache, v_cache, slots)


def check_rope_store(qkv, q_norm, k_norm, cos, sin, positions, eps, k_cache, v_cache, slots) -> None:
    check_matrix("qkv", qkv)
    for name, cache in dict(k_cache=k_cache, v_cache=v_cache).items():
        _check_like(name, cache, qkv)
        if cache.ndim != 4 or cache.shape != k_cache.shape or not cache.is_contiguous() or cache.shape[3] < 1:
            got = f"shape {tuple(cache.shape)}, strides {cache.stride()}"
            raise ValueError(f"{name} has {got}: dense [pages, kv heads, page size, D], both alike, is needed")
    num_kv_heads, _, head_dim = k_cache.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    if qkv.shape[1] % head_dim or num_heads < 1:
        what = f"2 x {num_kv_heads} K/V heads of {head_dim} and some of q's"
        raise ValueError(f"qkv has rows of {qkv.shape[1]}: {what} are needed")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm come together: one of them is None")
    if q_norm is not None:
        check_weight("q_norm", q_norm, head_dim, qkv)
        check_weight("k_norm", k_norm, head_dim, qkv)
    for name, table in dict(cos=cos, sin=sin).items():
        _check_like(name, table, qkv)
        if table.ndim != 2 or table.shape != cos.shape or not table.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: dense [context, angles], both alike, is needed"
            )
        if not 0 < 2 * table.shape[1] <= head_dim:
            raise ValueError(f"{name} has {table.shape[1]} angles: 1 to {head_dim // 2}, half a head, are needed")
    for name, ids in dict(positions=positions, slots=slots).items():
        if ids.dtype != torch.int64 or ids.device != qkv.device:
            raise TypeError(f"{name} is {ids.dtype} on {ids.device}: torch.int64 on {qkv.device} is needed")
        if ids.shape != qkv.shape[:1] or not ids.is_contiguous():
            got = f"shape {tuple(ids.shape)}, strides {ids.stride()}"
            raise ValueError(f"{name} has {got}: one dense number for each of {qkv.shape[0]} rows is needed")


def _check_like(name: str, x: torch.Tensor, qkv: torch.Tensor) -> None:
    if x.dtype != qkv.dtype or x.device != qkv.device:
        raise TypeError(f"{name} is {x.dtype} on {x.device}: {qkv.dtype} on {qkv.device} is needed")


def rope_store_reference(
    qkv, q_norm, k_norm, cos, sin, positions, eps, k_cache, v_cache, slots
) -> torch.Tensor:  # fmt: skip
    return _unfused(t5_norm_reference, qkv, q_norm, k_norm, cos, sin, positions, eps, k_cache, v_cache, slots)


def _unfused(
    norm: Callable, qkv, q_norm, k_norm, cos, sin, positions, eps, k_cache, v_cache, slots
) -> torch.Tensor:  # fmt: skip
    num_kv_heads, page_size, head_dim = k_cache.shape[1:]
    heads = qkv.unflatten(1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], 1)
    if q_norm is not None:
        q, k = norm(q, q_norm, eps), norm(k, k_norm, eps)
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    page, offset = slots // page_size, slots % page_size
    k_cache[page, :, offset] = _turned(k, cos, sin)
    v_cache[page, :, offset] = v
    return _turned(q, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turns = 2 * cos.shape[-1]
    return torch.cat([rotate_reference(x[..., :turns], cos, sin), x[..., turns:]], -1)


@triton.jit
def _load_head(ptr, real, D: tl.constexpr, PART: tl.constexpr):
    """Heads at ptr [rows, 1] as a tuple of [rows, PART]."""
    dims = tl.arange(0, PART)[None, :]
    xs = ()
    for part in tl.static_range(D // PART):
        xs += (tl.load(ptr + part * PART + dims, mask=real, other=0.0),)
    return xs


@triton.jit
def _store_head(ptr, xs, real, PART: tl.constexpr):
    dims = tl.arange(0, PART)[None, :]
    for part in tl.static_range(len(xs)):
        tl.store(ptr + part * PART + dims, xs[part], mask=real)


@triton.jit
def _load_norm(ptr, ROWS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr):
    """A weight [D], in every row: of one row its layout would be another, and the products moved there and back."""
    dims = tl.broadcast_to(tl.arange(0, PART)[None, :], [ROWS, PART])
    ws = ()
    for part in tl.static_range(D // PART):
        ws += (tl.load(ptr + part * PART + dims).to(tl.float32),)
    return ws


@triton.jit
def _norm_turn(xs, weights, cos, sin, eps, D: tl.constexpr):
    """weights: float32, or None for no norm."""
    dtype: tl.constexpr = xs[0].dtype
    if weights is not None:
        factor = tl.rsqrt(mean_square_of_parts(xs, D) + eps)
        ys = ()
        for part in tl.static_range(len(xs)):
            y = (xs[part].to(tl.float32) * factor).to(dtype).to(tl.float32)
            ys += ((y * weights[part]).to(dtype),)
        xs = ys
    low, high = xs[0].to(tl.float32), xs[1].to(tl.float32)
    # Triton negates as 0 - x, which loses the sign of 0: HF's sum with a negated product is a difference here.
    left = (low * cos).to(dtype).to(tl.float32) - (high * sin).to(dtype).to(tl.float32)
    right = (high * cos).to(dtype).to(tl.float32) + (low * sin).to(dtype).to(tl.float32)
    turned = (left.to(dtype), right.to(dtype))
    for part in tl.static_range(2, len(xs)):
        turned += (xs[part],)
    return turned


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_store_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
    slots_ptr, num_tokens, row_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, ANGLES: tl.constexpr,
    NORMS: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Tiles run over q's heads, then k's, then v's; a head is held in parts as wide as what turns together."""
    release(CHAINED)
    block = tl.program_id(0)
    q_blocks = tl.cdiv(num_tokens * HEADS, ROWS)
    kv_blocks = tl.cdiv(num_tokens * KV_HEADS, ROWS)
    angle = tl.arange(0, ANGLES)[None, :]
    weights = None
    if block < q_blocks:
        token, head, real = heads_of(block, num_tokens, HEADS, ROWS)
        if NORMS:
            weights = _load_norm(q_norm_ptr, ROWS, D, ANGLES)
        join(CHAINED)
        position = tl.load(positions_ptr + token, mask=real, other=0)
        xs = _load_head(qkv_ptr + token * row_stride + head * D, real, D, ANGLES)
        cos = tl.load(cos_ptr + position * ANGLES + angle).to(tl.float32)
        sin = tl.load(sin_ptr + position * ANGLES + angle).to(tl.float32)
        xs = _norm_turn(xs, weights, cos, sin, eps, D)
        _store_head(q_ptr + (token * HEADS + head) * D, xs, real, ANGLES)
    else:
        is_key = block < q_blocks + kv_blocks
        first = q_blocks + tl.where(is_key, 0, kv_blocks)
        token, head, real = heads_of(block - first, num_tokens, KV_HEADS, ROWS)
        column = (HEADS + tl.where(is_key, 0, KV_HEADS) + head) * D
        join(CHAINED)
        slot = tl.load(slots_ptr + token, mask=real, other=0)
        target = ((slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE) * D
        xs = _load_head(qkv_ptr + token * row_stride + column, real, D, ANGLES)
        if is_key:
            position = tl.load(positions_ptr + token, mask=real, other=0)
            if NORMS:
                weights = _load_norm(k_norm_ptr, ROWS, D, ANGLES)
            cos = tl.load(cos_ptr + position * ANGLES + angle).to(tl.float32)
            sin = tl.load(sin_ptr + position * ANGLES + angle).to(tl.float32)
            _store_head(k_cache_ptr + target, _norm_turn(xs, weights, cos, sin, eps, D), real, ANGLES)
        else:
            _store_head(v_cache_ptr + target, xs, real, ANGLES)


def rope_store_launch(qkv, q_norm, k_norm, cos, sin, positions, eps, k_cache, v_cache, slots) -> torch.Tensor:
    num_tokens, angles = qkv.shape[0], cos.shape[1]
    num_kv_heads, page_size, head_dim = k_cache.shape[1:]
    if head_dim % angles or angles & (angles - 1) or angles < 8:  # squares are added by eights
        return _unfused(t5_norm_launch, qkv, q_norm, k_norm, cos, sin, positions, eps, k_cache, v_cache, slots)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        tile = rope_tile(num_tokens * (num_heads + 2 * num_kv_heads), angles)
        q_blocks, kv_blocks = (triton.cdiv(num_tokens * n, tile["ROWS"]) for n in (num_heads, num_kv_heads))
        _rope_store_kernel[(q_blocks + 2 * kv_blocks,)](
            qkv, q_norm, k_norm, cos, sin, positions, q, k_cache, v_cache, slots, num_tokens, qkv.stride(0), eps,
            HEADS=num_heads, KV_HEADS=num_kv_heads, PAGE=page_size, D=head_dim, ANGLES=angles,
            NORMS=q_norm is not None, **tile, **chained(qkv),
        )  # fmt: skip
    return q


def rope_tile(heads: int, angles: int) -> dict[str, int]:
    """Launch settings for so many heads of all tokens: 8 dims of each part a thread, one warp or, of many, four."""
    warps = 1 if heads <= 2**12 else 4
    # No fused multiply-add: PyTorch rounds a product before it is added.
    return dict(ROWS=max(1, 256 * warps // angles), num_warps=warps, enable_fp_fusion=False)


_rope_store = define(
    "rope_store(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor positions, float eps,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> Tensor",
    check=check_rope_store, reference=rope_store_reference, launch=rope_store_launch,
)  # fmt: skip
