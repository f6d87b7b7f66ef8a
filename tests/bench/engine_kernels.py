"""SGLang's and vLLM's kernels by their signatures, in plain PyTorch, so that calls can be tried without them."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from gemcutter.ops.quantize_fp8 import quantize_fp8_reference


def _norm(x, weight, eps):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide if weight is None else wide * weight.float()


def _put(target, value):
    assert target.shape == value.shape, f"{tuple(value.shape)} into {tuple(target.shape)}"
    target.copy_(value)


def _add_norm(x, residual, weight, eps):
    residual += x
    _put(x, _norm(residual, weight, eps))


def _activate(out, x):
    assert x.is_contiguous() and out.is_contiguous()
    gate, up = x.float().chunk(2, -1)
    _put(out, F.gelu(gate, approximate="tanh") * up)


def _silu(out, x):
    assert x.is_contiguous() and out.is_contiguous()
    gate, up = x.float().chunk(2, -1)
    _put(out, F.silu(gate) * up)


def _quantize(x, q, scale):
    for target, value in zip((q, scale), quantize_fp8_reference(x), strict=True):
        _put(target, value)


def _norm_quantize(q, x, weight, scale, eps, bound, residual):
    if residual is not None:
        residual += x
        x = residual
    _quantize(_norm(x, weight, eps).to(x.dtype), q, scale)


def _topk_softmax(weights, ids, logits, renormalize, softcap, bias):
    assert renormalize and not softcap and bias is None
    values, chosen = logits.float().softmax(-1).topk(weights.shape[1])
    _put(weights, values / values.sum(-1, keepdim=True))
    _put(ids, chosen)


def _align(ids, experts, block, order, block_experts, total, *_):
    """Checks the room: every expert's slots, padded to whole blocks."""
    counts = ids.flatten().bincount(minlength=experts)
    padded = ((counts + block - 1) // block * block).sum().item()
    assert ids.dtype == torch.int32 and padded <= len(order) and padded <= len(block_experts) * block
    assert len(total) == 1


def _rotate(x, table, positions):
    cos, sin = table[positions].float()[:, None].chunk(2, -1)
    low, high = x.float().chunk(2, -1)
    x.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], -1))


def _rotary_embedding(positions, q, k, head_dim, table, neox):
    assert neox and q.shape[-1] == head_dim == table.shape[1] and table.dtype == q.dtype
    for x in (q, k):
        if x is not None:
            _rotate(x, table, positions)


def _fused_qk_norm_rope(
    qkv, q_heads, k_heads, v_heads, dim, eps, q_weight, k_weight, table, neox, positions, warps
):
    assert qkv.is_contiguous() and neox and qkv.shape[1] == (q_heads + k_heads + v_heads) * dim
    q, k, _ = qkv.unflatten(1, (-1, dim)).split([q_heads, k_heads, v_heads], 1)
    for x, weight in ((q, q_weight), (k, k_weight)):
        x.copy_(_norm(x, weight, eps))
        _rotate(x, table, positions)


def _store_pages(k, v, k_cache, v_cache, slots, kind, k_scale, v_scale):
    page = k_cache.shape[1]
    assert kind == "auto"
    for x, cache in ((k, k_cache), (v, v_cache)):
        cache[slots // page, slots % page] = x


def _qkv_norm(q, k, v, q_weight, k_weight, heads, kv_heads, dim, eps):
    assert q.shape[1:] == (heads, dim) and (k is None or k.shape[1:] == (kv_heads, dim))
    for x, weight in ((q, q_weight), (k, k_weight), (v, None)):
        if x is not None:
            assert x.stride()[1:] == (dim, 1), "a head follows a head"
            x.copy_(_norm(x, weight, eps))


def _rope(q, k, table, positions, is_neox):
    assert is_neox and table.dtype == torch.float32 and table.shape[1] == q.shape[2] == k.shape[2]
    _rotate(q, table, positions)
    _rotate(k, table, positions)


def _rope_store(q, k, v, k_cache, v_cache, table, positions, slots, is_neox):
    assert slots.dtype == positions.dtype
    _rope(q, k, table, positions, is_neox)
    k_cache[slots], v_cache[slots] = k.flatten(1), v.flatten(1)


def _closing(x, weight, residual, scalar, eps):
    return ((_norm(x, weight, eps) + residual) * scalar).to(x.dtype)


def _dual_closing(x, w1, routed, w2, w3, residual, scalar, *eps):
    return _closing((_norm(x, w1, eps[0]) + _norm(routed, w2, eps[1])).to(x.dtype), w3, residual, scalar, eps[2])


def _route(logits, scale, top_k):
    values, ids = logits.float().topk(top_k)
    return values.softmax(-1) * scale[ids], ids.to(torch.int32)


SGL_KERNEL = SimpleNamespace(
    rmsnorm=lambda out, x, w, eps, pdl: _put(out, _norm(x, w, eps)),
    fused_add_rmsnorm=lambda x, residual, w, eps, pdl: _add_norm(x, residual, w, eps),
    gelu_tanh_and_mul=_activate,
    silu_and_mul=_silu,
    sgl_per_token_quant_fp8=_quantize,
    topk_softmax=_topk_softmax,
    moe_align_block_size=_align,
    moe_sum_reduce=lambda slots, out, factor: _put(out, slots.float().sum(1) * factor),
)
VLLM = (
    SimpleNamespace(
        rms_norm=lambda out, x, w, eps: _put(out, _norm(x, w, eps)),
        fused_add_rms_norm=_add_norm,
        gelu_tanh_and_mul=_activate,
        silu_and_mul=_silu,
        rotary_embedding=_rotary_embedding,
        fused_qk_norm_rope=_fused_qk_norm_rope,
        dynamic_per_token_scaled_fp8_quant=lambda q, x, scale, bound: _quantize(x, q, scale),
        rms_norm_dynamic_per_token_quant=_norm_quantize,
    ),
    SimpleNamespace(moe_align_block_size=_align, moe_sum=lambda slots, out: _put(out, slots.float().sum(1))),
    SimpleNamespace(reshape_and_cache_flash=_store_pages),
)
GEMMA4 = SimpleNamespace(
    gemma_qkv_rmsnorm=_qkv_norm,
    gemma_rmsnorm_residual_scalar=_closing,
    gemma_dual_rmsnorm_residual_scalar=_dual_closing,
    gemma4_fused_routing=_route,
)
ROPE = SimpleNamespace(apply_rope_inplace=_rope, apply_rope_inplace_with_kvcache=_rope_store)
ACTIVATION = SimpleNamespace(
    gelu_tanh_and_mul=lambda x: F.gelu(x.chunk(2, -1)[0], approximate="tanh") * x.chunk(2, -1)[1]
)
SOFTCAP = SimpleNamespace(softcap_inplace_logits=lambda x, cap: x.copy_(torch.tanh(x.float() / cap) * cap))
