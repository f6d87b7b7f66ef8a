"""Counterparts of the ops that GLM alone has: both engines run its norms and activation by the kernels of Llama.

Their routing returns ids that follow another order, and their rope is a launch apart from the store: left out.
"""

import torch

from gemcutter.bench.peers.activations import empty_fp8
from gemcutter.bench.peers.packages import sgl_kernel, vllm_ops
from gemcutter.bench.peers.peer import Peer


def _half(gate_up: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)


def _sgl_swiglu(gate_up):
    def call():
        out = _half(gate_up)
        sgl_kernel().silu_and_mul(out, gate_up)
        return [out]

    return call


def _vllm_swiglu(gate_up):
    def call():
        out = _half(gate_up)
        vllm_ops()[0].silu_and_mul(out, gate_up)
        return [out]

    return call


def _sgl_norm(x, weight, eps):
    def call():
        out = torch.empty_like(x)
        sgl_kernel().rmsnorm(out, x, weight, eps, True)
        return [out]

    return call


def _vllm_norm(x, weight, eps):
    def call():
        out = torch.empty_like(x)
        vllm_ops()[0].rms_norm(out, x, weight, eps)
        return [out]

    return call


def _sgl_add_norm(x, residual, weight, eps, slots, ids, weights, plain, fp8):
    """The experts' weights are in their down product."""
    weighted = None if slots is None else (slots * weights[..., None]).to(slots.dtype)

    def call():
        if weighted is not None:
            added = torch.empty_like(x)
            sgl_kernel().moe_sum_reduce(weighted, added, 1.0)
            x.add_(added)
        sgl_kernel().fused_add_rmsnorm(x, residual, weight, eps, True)
        results = [residual, x] if plain else [residual]
        if fp8:
            q, scale = empty_fp8(x)
            sgl_kernel().sgl_per_token_quant_fp8(x, q, scale)
            results += [q, scale]
        return results

    return call


def _vllm_add_norm(x, residual, weight, eps, slots, ids, weights, plain, fp8):
    weighted = None if slots is None else (slots * weights[..., None]).to(slots.dtype)

    def call():
        if weighted is not None:
            added = torch.empty_like(x)
            vllm_ops()[1].moe_sum(weighted, added)
            x.add_(added)
        if fp8 and not plain:
            q, scale = empty_fp8(x)
            vllm_ops()[0].rms_norm_dynamic_per_token_quant(q, x, weight, scale, eps, None, residual)
            return [residual, q, scale]
        vllm_ops()[0].fused_add_rms_norm(x, residual, weight, eps)
        results = [residual, x]
        if fp8:
            q, scale = empty_fp8(x)
            vllm_ops()[0].dynamic_per_token_scaled_fp8_quant(q, x, scale, None)
            results += [q, scale]
        return results

    return call


GLM = {
    "swiglu": [
        Peer("sgl_kernel silu_and_mul", ("sgl_kernel",), _sgl_swiglu),
        Peer("vLLM silu_and_mul", ("vllm",), _vllm_swiglu),
    ],
    "t5_norm": [
        Peer("sgl_kernel rmsnorm", ("sgl_kernel",), _sgl_norm),
        Peer("vLLM rms_norm", ("vllm",), _vllm_norm),
    ],
    "add_norm": [
        Peer(
            "sgl_kernel moe_sum_reduce, torch add, sgl_kernel fused_add_rmsnorm, per_token_quant_fp8",
            ("sgl_kernel",),
            _sgl_add_norm,
        ),
        Peer("vLLM moe_sum, torch add, vLLM rms_norm_dynamic_per_token_quant", ("vllm",), _vllm_add_norm),
    ],
    "rope_store": [],
    "sigmoid_topk": [],
}
