"""Counterparts of the attention entry, from the merged projection to the cache, and of its parts.

The engines project K a second time where K = V, so their v comes out of the projection there; it is put beside q
and k beforehand and costs them nothing here.
"""

import torch

from gemcutter.bench.peers.packages import sgl_kernel, sglang_gemma4, sglang_jit, vllm_ops
from gemcutter.bench.peers.peer import Peer

FUSED_HEAD_DIMS = (64, 128, 256)  # of vLLM's fused_qk_norm_rope


class _Entry:
    """The op's arguments as engines hold them."""

    def __init__(
        self,
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        positions,
        eps,
        heads,
        kv_heads,
        k_cache,
        v_cache,
        slots,
        mode,
        kv_scales,
    ):
        assert kv_scales is None, "no peer stores FP8 here"
        mode = getattr(mode, "value", mode)
        self.head_dim = len(q_norm)
        self.heads, self.kv_heads, self.stores = heads, kv_heads, mode != "q_only"
        self.q_norm, self.k_norm, self.eps = q_norm, k_norm, eps
        self.positions, self.slots = positions, slots
        if mode == "q_keqv":
            qkv = torch.cat([qkv, qkv[:, heads * self.head_dim :]], 1)
        self.qkv = qkv
        parts = qkv.unflatten(1, (-1, self.head_dim))
        self.q = parts[:, :heads]
        self.table = self._table(cos, sin)
        if self.stores:
            self.k, self.v = parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]
            # Tokens outside heads, as both engines have it. Cloned: with one head `contiguous` would be a view.
            self.k_cache, self.v_cache = (
                x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (k_cache, v_cache)
            )

    def _table(self, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[context, head_dim]: cos of all pairs, then sin; pairs that do not turn by an angle of 0."""
        still = cos.new_ones(len(cos), self.head_dim // 2 - cos.shape[1])
        return torch.cat([cos, still, sin, torch.zeros_like(still)], 1)

    def results(self, q: torch.Tensor) -> list[torch.Tensor]:
        if not self.stores:
            return [q]
        return [q, self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2)]


def _sglang_norms(entry: _Entry) -> None:
    k, v = (entry.k, entry.v) if entry.stores else (None, None)
    sglang_gemma4().gemma_qkv_rmsnorm(
        entry.q, k, v, entry.q_norm, entry.k_norm if entry.stores else None,
        entry.heads, entry.kv_heads, entry.head_dim, entry.eps,
    )  # fmt: skip


def _sglang_entry(*args):
    entry = _Entry(*args)
    rope = sglang_jit("attention.rope")
    table = entry.table.float()
    flat = [x.flatten(0, 1).flatten(1) for x in (entry.k_cache, entry.v_cache)] if entry.stores else []
    no_k = torch.zeros_like(entry.q[:, :1])  # the kernel wants one; SGLang makes it anew in every layer

    def call():
        _sglang_norms(entry)
        if entry.stores:
            rope.apply_rope_inplace_with_kvcache(
                entry.q, entry.k, entry.v, *flat, table, entry.positions, entry.slots, is_neox=True
            )
        else:
            rope.apply_rope_inplace(entry.q, no_k, table, entry.positions, is_neox=True)
        return entry.results(entry.q)

    return call


def _vllm_store(entry: _Entry, k: torch.Tensor, v: torch.Tensor, one: torch.Tensor) -> None:
    caches = entry.k_cache, entry.v_cache
    vllm_ops()[2].reshape_and_cache_flash(k, v, *caches, entry.slots, "auto", one, one)


def _vllm_entry(*args):
    entry = _Entry(*args)
    ops = vllm_ops()[0]
    one = torch.ones(1, device=entry.q.device)

    def normed(x, weight):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ops.rms_norm(out, x, weight, entry.eps)
        return out

    def call():
        q = normed(entry.q, entry.q_norm)
        k = normed(entry.k, entry.k_norm) if entry.stores else None
        ops.rotary_embedding(entry.positions, q, k, entry.head_dim, entry.table, True)
        if entry.stores:
            _vllm_store(entry, k, normed(entry.v, None), one)
        return entry.results(q)

    return call


def _vllm_fused_entry(*args):
    entry = _Entry(*args)
    if not entry.stores or entry.head_dim not in FUSED_HEAD_DIMS:
        return None
    ops = vllm_ops()[0]
    one = torch.ones(1, device=entry.q.device)
    qkv = entry.qkv.contiguous()
    parts = qkv.unflatten(1, (-1, entry.head_dim)).split([entry.heads, entry.kv_heads, entry.kv_heads], 1)

    def call():
        ops.fused_qk_norm_rope(
            qkv, entry.heads, entry.kv_heads, entry.kv_heads, entry.head_dim, entry.eps,
            entry.q_norm, entry.k_norm, entry.table, True, entry.positions, -1,
        )  # fmt: skip
        v = torch.empty(parts[2].shape, dtype=qkv.dtype, device=qkv.device)
        ops.rms_norm(v, parts[2], None, entry.eps)
        _vllm_store(entry, parts[1], v, one)
        return entry.results(parts[0])

    return call


def _sglang_qkv_norm(q, k, v, q_weight, k_weight, eps):
    def call():
        kv_heads = 0 if k is None else k.shape[1]
        sglang_gemma4().gemma_qkv_rmsnorm(q, k, v, q_weight, k_weight, q.shape[1], kv_heads, q.shape[2], eps)
        return [x for x in (q, k, v) if x is not None]

    return call


def _sgl_k_eq_v_norm(k, k_weight, eps):
    none = torch.ones_like(k_weight)

    def call():
        rows = k.contiguous().view(-1, k.shape[2])
        outs = torch.empty_like(rows), torch.empty_like(rows)
        for out, weight in zip(outs, (k_weight, none), strict=True):
            sgl_kernel().rmsnorm(out, rows, weight, eps, True)
        return [out.view(k.shape) for out in outs]

    return call


def _vllm_k_eq_v_norm(k, k_weight, eps):
    def call():
        outs = [torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2)]
        for out, weight in zip(outs, (k_weight, None), strict=True):
            vllm_ops()[0].rms_norm(out, k, weight, eps)
        return outs

    return call


ATTENTION = {
    "qkv_rope_store": [
        Peer("SGLang qkv_rmsnorm, rope with kvcache", ("sglang", "sglang-jit"), _sglang_entry),
        Peer("vLLM fused_qk_norm_rope, rms_norm, reshape_and_cache_flash", ("vllm",), _vllm_fused_entry),
        Peer("vLLM rms_norm each, rotary_embedding, reshape_and_cache_flash", ("vllm",), _vllm_entry),
    ],
    "qkv_norm_": [Peer("SGLang qkv_rmsnorm", ("sglang",), _sglang_qkv_norm)],
    "k_eq_v_norm": [
        Peer("torch contiguous, sgl_kernel rmsnorm twice", ("sgl_kernel",), _sgl_k_eq_v_norm),
        Peer("vLLM rms_norm twice", ("vllm",), _vllm_k_eq_v_norm),
    ],
}  # fmt: skip
