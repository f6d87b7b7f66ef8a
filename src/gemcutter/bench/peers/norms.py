"""Counterparts of the norm and of both seams, as SGLang's and vLLM's Gemma 4 layers chain them."""

import torch

from gemcutter.bench.peers.packages import sgl_kernel, sglang_gemma4, vllm_ops
from gemcutter.bench.peers.peer import Peer


def _sgl_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    sgl_kernel().rmsnorm(out, x, weight, eps, True)
    return out


def _vllm_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    vllm_ops()[0].rms_norm(out, x, weight, eps)
    return out


def _sgl_rms_norm(x, weight, eps):
    width = x.shape[-1]
    rows = x.view(-1, width)
    weight = torch.ones(width, dtype=x.dtype, device=x.device) if weight is None else weight
    return lambda: [_sgl_norm(rows, weight, eps).view(x.shape)]


def _vllm_rms_norm(x, weight, eps):
    return lambda: [_vllm_norm(x, weight, eps)]


def _folded(router_scale: torch.Tensor) -> torch.Tensor:
    """Both engines fold the scale and H^-0.5 into the router norm's weight."""
    return router_scale * router_scale.shape[0] ** -0.5


def _sgl_attention_seam(attended, residual, post, pre, eps, expert_pre, router_scale):
    router = None if router_scale is None else _folded(router_scale)

    def call():
        mlp_in = _sgl_norm(attended, post, eps)
        sgl_kernel().fused_add_rmsnorm(mlp_in, residual, pre, eps, True)
        if router is None:
            return [residual, mlp_in]
        return [residual, mlp_in, _sgl_norm(residual, expert_pre, eps), _sgl_norm(residual, router, eps)]

    return call


def _vllm_attention_seam(attended, residual, post, pre, eps, expert_pre, router_scale):
    router = None if router_scale is None else _folded(router_scale)

    def call():
        mlp_in = _vllm_norm(attended, post, eps)
        vllm_ops()[0].fused_add_rms_norm(mlp_in, residual, pre, eps)
        if router is None:
            return [residual, mlp_in]
        return [residual, mlp_in, _vllm_norm(residual, expert_pre, eps), _vllm_norm(residual, router, eps)]

    return call


def _weighted(slots: torch.Tensor | None, weights: torch.Tensor | None) -> torch.Tensor | None:
    """In both engines the experts' down product does it."""
    return slots if weights is None else (slots * weights[..., None]).to(slots.dtype)


def _sgl_layer_seam(out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post, ids, weights):
    """A scalar of 1 where the layer goes on, so that one launch does it."""
    ops = sglang_gemma4()
    scale = torch.ones(1, dtype=out.dtype, device=out.device) if scalar is None else scalar
    slots = _weighted(routed, weights)

    def call():
        if routed is None:
            hidden = ops.gemma_rmsnorm_residual_scalar(out, post, residual, scale, eps)
        else:
            added = slots
            if ids is not None:
                added = torch.empty_like(out)
                sgl_kernel().moe_sum_reduce(slots, added, 1.0)
            hidden = ops.gemma_dual_rmsnorm_residual_scalar(
                out, dense_post, added, expert_post, post, residual, scale, eps, eps, eps
            )
        return [hidden] if next_norm is None else [hidden, _sgl_norm(hidden, next_norm, eps)]

    return call


def _vllm_layer_seam(out, residual, post, eps, scalar, next_norm, routed, dense_post, expert_post, ids, weights):
    slots = _weighted(routed, weights)

    def call():
        x, added = out, slots
        if ids is not None:
            added = torch.empty_like(out)
            vllm_ops()[1].moe_sum(slots, added)
        if routed is not None:
            x = _vllm_norm(out, dense_post, eps) + _vllm_norm(added, expert_post, eps)
        hidden = _vllm_norm(x, post, eps) + residual
        if next_norm is None:
            return [hidden]
        hidden = hidden * scalar
        return [hidden, _vllm_norm(hidden, next_norm, eps)]

    return call


NORMS = {
    "rms_norm": [
        Peer("sgl_kernel rmsnorm", ("sgl_kernel",), _sgl_rms_norm),
        Peer("vLLM rms_norm", ("vllm",), _vllm_rms_norm),
    ],
    "attention_seam": [
        Peer("sgl_kernel rmsnorm, fused_add_rmsnorm, rmsnorm a reader", ("sgl_kernel",), _sgl_attention_seam),
        Peer("vLLM rms_norm, fused_add_rms_norm, rms_norm a reader", ("vllm",), _vllm_attention_seam),
    ],
    "attention_seam_fp8": [],
    "layer_seam_fp8": [],
    "layer_seam": [
        Peer(
            "sgl_kernel moe_sum_reduce, SGLang rmsnorm_residual_scalar, sgl_kernel rmsnorm",
            ("sglang", "sgl_kernel"),
            _sgl_layer_seam,
        ),
        Peer("vLLM moe_sum, rms_norm a norm, torch add, mul", ("vllm",), _vllm_layer_seam),
    ],
}
