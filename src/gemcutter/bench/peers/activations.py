"""Counterparts of activations, embeddings, the soft cap and quantisation.

Both engines compute the per-layer input, its gate and the scaled embedding with PyTorch's own operations.
"""

import torch
import torch.nn.functional as F

from gemcutter.bench.peers.packages import sgl_kernel, sglang_jit, sglang_softcap, vllm_ops
from gemcutter.bench.peers.peer import Peer


def _sgl_activate(gate_up: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    sgl_kernel().gelu_tanh_and_mul(out, gate_up)
    return out


def _vllm_activate(gate_up: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    vllm_ops()[0].gelu_tanh_and_mul(out, gate_up)
    return out


def empty_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for rows in e4m3, and for a scale of each."""
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return q, torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


def _sgl_quantize(x: torch.Tensor) -> list[torch.Tensor]:
    q, scale = empty_fp8(x)
    sgl_kernel().sgl_per_token_quant_fp8(x, q, scale)
    return [q, scale]


def _vllm_quantize(x: torch.Tensor) -> list[torch.Tensor]:
    q, scale = empty_fp8(x)
    vllm_ops()[0].dynamic_per_token_scaled_fp8_quant(q, x, scale, None)
    return [q, scale]


def _sgl_norm_quantize(x, weight, eps, residual):
    weight = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if weight is None else weight

    def call():
        if residual is None:
            normed = torch.empty_like(x)
            sgl_kernel().rmsnorm(normed, x, weight, eps, True)
            return _sgl_quantize(normed)
        sgl_kernel().fused_add_rmsnorm(x, residual, weight, eps, True)
        return [*_sgl_quantize(x), residual]

    return call


def _vllm_norm_quantize(x, weight, eps, residual):
    weight = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if weight is None else weight

    def call():
        q, scale = empty_fp8(x)
        vllm_ops()[0].rms_norm_dynamic_per_token_quant(q, x, weight, scale, eps, None, residual)
        return [q, scale] if residual is None else [q, scale, residual]

    return call


def _jit_activate(gate_up):
    activation = sglang_jit("activation.activation")
    return lambda: [activation.gelu_tanh_and_mul(gate_up)]


def _per_layer_inputs(projected, token_ids, table, weight, scale, eps):
    width = len(weight)

    def call():
        shape = len(token_ids), -1, width
        identity = (F.embedding(token_ids, table) * width**0.5).view(shape)
        context = (projected * scale).view(-1, width)
        normed = torch.empty_like(context)
        sgl_kernel().rmsnorm(normed, context, weight, eps, True)
        return [(normed.view(shape) + identity) * 2.0**-0.5]

    return call


def _softcap(x, cap):
    return lambda: [sglang_softcap().softcap_inplace_logits(x, cap)]


def _calls(function):
    """A peer that takes the op's arguments as they are."""
    return lambda *args: lambda: function(*args)


ACTIVATIONS = {
    "geglu": [
        Peer("sgl_kernel gelu_tanh_and_mul", ("sgl_kernel",), _calls(lambda x: [_sgl_activate(x)])),
        Peer("SGLang gelu_tanh_and_mul, compiled there", ("sglang-jit",), _jit_activate),
        Peer("vLLM gelu_tanh_and_mul", ("vllm",), _calls(lambda x: [_vllm_activate(x)])),
    ],
    "gelu_mul": [
        Peer("torch gelu, mul", ("torch",), _calls(lambda gate, up: [F.gelu(gate, approximate="tanh") * up])),
    ],
    "embed": [
        Peer("torch embedding, mul", ("torch",), _calls(lambda ids, table, root: [F.embedding(ids, table) * root])),
    ],
    "per_layer_inputs": [
        Peer("torch embedding, mul, mul, sgl_kernel rmsnorm, torch add, mul", ("sgl_kernel",), _per_layer_inputs),
    ],
    "softcap_": [Peer("SGLang softcap_inplace_logits", ("sglang",), _softcap)],
    "quantize_fp8": [
        Peer("sgl_kernel per_token_quant_fp8", ("sgl_kernel",), _calls(_sgl_quantize)),
        Peer("vLLM dynamic_per_token_scaled_fp8_quant", ("vllm",), _calls(_vllm_quantize)),
    ],
    "rms_norm_fp8": [
        Peer("sgl_kernel (fused_add_)rmsnorm, per_token_quant_fp8", ("sgl_kernel",), _sgl_norm_quantize),
        Peer("vLLM rms_norm_dynamic_per_token_quant", ("vllm",), _vllm_norm_quantize),
    ],
    "geglu_fp8": [
        Peer(
            "sgl_kernel gelu_tanh_and_mul, per_token_quant_fp8", ("sgl_kernel",),
            _calls(lambda x: _sgl_quantize(_sgl_activate(x))),
        ),
        Peer(
            "vLLM gelu_tanh_and_mul, dynamic_per_token_scaled_fp8_quant", ("vllm",),
            _calls(lambda x: _vllm_quantize(_vllm_activate(x))),
        ),
    ],
}  # fmt: skip
