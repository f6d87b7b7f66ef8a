"""GLM-4 MoE's weights by the names of a checkpoint's tensors: `table.py` for that family."""

import torch

from gemcutter.checkpoint.linears import mlp_of
from gemcutter.checkpoint.views import empty_linear, rows
from gemcutter.model.glm4_moe_weights import Glm4MoeExpertWeights, Glm4MoeLayerWeights, Glm4MoeWeights
from gemcutter.model.weights import Linear
from gemcutter.spec import Family, LayerSpec, ModelSpec


def empty_glm4_moe(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Glm4MoeWeights:
    """Uninitialised weights, every tensor contiguous."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def linear(name: str, *shape: int) -> Linear:
        return empty_linear(shape, device, None if name in spec.quantized else dtype)

    def layer(layer: LayerSpec) -> Glm4MoeLayerWeights:
        at, experts = f"layers.{layer.index}.", None
        if layer.experts is not None:
            count, width = layer.experts.num_experts, layer.experts.width
            experts = Glm4MoeExpertWeights(
                router=empty(count, spec.hidden),
                correction=torch.empty(count, device=device, dtype=torch.float32),
                gate_up=linear(at + "experts", count, 2 * width, spec.hidden),
                down=linear(at + "experts", count, spec.hidden, width),
            )
        return Glm4MoeLayerWeights(
            input_norm=empty(spec.hidden),
            post_attention_norm=empty(spec.hidden),
            qkv=linear(at + "qkv", layer.qkv_width, spec.hidden),
            qkv_bias=empty(layer.qkv_width) if layer.qkv_bias else None,
            q_norm=empty(layer.head_dim) if layer.qk_norm else None,
            k_norm=empty(layer.head_dim) if layer.qk_norm else None,
            o=linear(at + "o", spec.hidden, layer.q_width),
            gate_up=linear(at + "gate_up", 2 * layer.mlp_width, spec.hidden),
            down=linear(at + "down", spec.hidden, layer.mlp_width),
            experts=experts,
        )

    embed = empty(spec.vocab, spec.hidden)
    return Glm4MoeWeights(
        embed=embed,
        head=embed if spec.tied_head else empty(spec.vocab, spec.hidden),
        norm=empty(spec.hidden),
        layers=[layer(each) for each in spec.layers],
    )


def glm4_moe_layer_pieces(layer: LayerSpec, weights: Glm4MoeLayerWeights) -> dict[str, Linear]:
    """All of a layer but its routed experts."""
    q, k, v = layer.q_width, layer.q_width + layer.kv_width, layer.qkv_width
    parts = {"q_proj": (0, q), "k_proj": (q, k), "v_proj": (k, v)}
    mlp = mlp_of(Family.GLM4_MOE, layer)
    table: dict[str, Linear] = {
        "input_layernorm.weight": weights.input_norm,
        "post_attention_layernorm.weight": weights.post_attention_norm,
        "self_attn.o_proj.weight": weights.o,
        f"{mlp}gate_proj.weight": rows(weights.gate_up, 0, layer.mlp_width),
        f"{mlp}up_proj.weight": rows(weights.gate_up, layer.mlp_width, 2 * layer.mlp_width),
        f"{mlp}down_proj.weight": weights.down,
    }
    table |= {f"self_attn.{name}.weight": rows(weights.qkv, *part) for name, part in parts.items()}
    if weights.qkv_bias is not None:
        table |= {f"self_attn.{name}.bias": rows(weights.qkv_bias, *part) for name, part in parts.items()}
    if weights.q_norm is not None:
        table |= {"self_attn.q_norm.weight": weights.q_norm, "self_attn.k_norm.weight": weights.k_norm}
    if weights.experts is not None:
        table |= {
            "mlp.gate.weight": weights.experts.router,
            "mlp.gate.e_score_correction_bias": weights.experts.correction,
        }
    return table
