"""The table from a checkpoint's tensor names to the places of the merged weights that they fill."""

from collections.abc import Callable

import torch

from gemcutter.model.weights import (
    ExpertWeights,
    LayerWeights,
    PerLayerEmbeddingWeights,
    PerLayerInputWeights,
    Weights,
)
from gemcutter.spec import LayerSpec, ModelSpec

NESTED = "model.language_model."  # prefix of the text model in a Gemma4ForConditionalGeneration
TEXT_ONLY = "model."  # and in a Gemma4ForCausalLM
OTHER_MODALITIES = (
    "model.vision_tower.",
    "model.vision_embedder.",  # 12B, which has no towers; HF renames it to embed_vision as it loads
    "model.embed_vision.",
    "model.audio_tower.",
    "model.embed_audio.",
)
HEAD = "lm_head.weight"  # the one name outside the text model's prefix


def empty_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Weights:
    """Uninitialised weights of a model, every tensor contiguous."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def layer(layer: LayerSpec) -> LayerWeights:
        experts = per_layer_input = None
        if layer.experts is not None:
            count, width = layer.experts.num_experts, layer.experts.width
            experts = ExpertWeights(
                router=empty(count, spec.hidden),
                router_scale=empty(spec.hidden),
                per_expert_scale=empty(count),
                gate_up=empty(count, 2 * width, spec.hidden),
                down=empty(count, spec.hidden, width),
                pre_norm=empty(spec.hidden),
                post_norm=empty(spec.hidden),
                dense_post_norm=empty(spec.hidden),
            )
        if spec.ple_width:
            per_layer_input = PerLayerInputWeights(
                gate=empty(spec.ple_width, spec.hidden),
                projection=empty(spec.hidden, spec.ple_width),
                post_norm=empty(spec.hidden),
            )
        return LayerWeights(
            input_norm=empty(spec.hidden),
            post_attention_norm=empty(spec.hidden),
            pre_feedforward_norm=empty(spec.hidden),
            post_feedforward_norm=empty(spec.hidden),
            qkv=empty(layer.qkv_width, spec.hidden),
            q_norm=empty(layer.head_dim),
            k_norm=empty(layer.head_dim) if layer.owns_kv else None,
            o=empty(spec.hidden, layer.q_width),
            gate_up=empty(2 * layer.mlp_width, spec.hidden),
            down=empty(spec.hidden, layer.mlp_width),
            scalar=empty(1),
            experts=experts,
            per_layer_input=per_layer_input,
        )

    per_layer = None
    if spec.ple_width:
        packed = len(spec.layers) * spec.ple_width
        per_layer = PerLayerEmbeddingWeights(
            embed=empty(spec.ple_vocab, packed),
            projection=empty(packed, spec.hidden),
            projection_norm=empty(spec.ple_width),
        )
    embed = empty(spec.vocab, spec.hidden)
    return Weights(
        embed=embed,
        head=embed if spec.tied_head else empty(spec.vocab, spec.hidden),
        norm=empty(spec.hidden),
        layers=[layer(each) for each in spec.layers],
        per_layer=per_layer,
    )


def pieces(spec: ModelSpec, weights: Weights, prefix: str) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint must hold: its name, and the view of `weights` that it fills.

    Together the views cover the weights exactly once. A view has the shape of the checkpoint's tensor and is
    contiguous, as merged tensors are split by rows.
    """
    table = {
        "embed_tokens.weight": weights.embed,
        "norm.weight": weights.norm,
    }
    if weights.per_layer is not None:
        table |= {
            "embed_tokens_per_layer.weight": weights.per_layer.embed,
            "per_layer_model_projection.weight": weights.per_layer.projection,
            "per_layer_projection_norm.weight": weights.per_layer.projection_norm,
        }
    for layer in spec.layers:
        of_layer = _layer_pieces(layer, weights.layers[layer.index])
        table |= {f"layers.{layer.index}.{name}": view for name, view in of_layer.items()}
    table = {prefix + name: view for name, view in table.items()}
    return table if spec.tied_head else table | {HEAD: weights.head}


def _layer_pieces(layer: LayerSpec, weights: LayerWeights) -> dict[str, torch.Tensor]:
    gate, up = weights.gate_up.chunk(2)
    table = {
        "input_layernorm.weight": weights.input_norm,
        "post_attention_layernorm.weight": weights.post_attention_norm,
        "pre_feedforward_layernorm.weight": weights.pre_feedforward_norm,
        "post_feedforward_layernorm.weight": weights.post_feedforward_norm,
        "self_attn.q_proj.weight": weights.qkv[: layer.q_width],
        "self_attn.q_norm.weight": weights.q_norm,
        "self_attn.o_proj.weight": weights.o,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": weights.down,
        "layer_scalar": weights.scalar,
    }
    if layer.owns_kv:
        kv = weights.qkv[layer.q_width :]
        table |= {
            "self_attn.k_proj.weight": kv[: layer.kv_width],
            "self_attn.k_norm.weight": weights.k_norm,
        }
        if not layer.k_eq_v:
            table["self_attn.v_proj.weight"] = kv[layer.kv_width :]
    if weights.experts is not None:
        table |= {
            "router.proj.weight": weights.experts.router,
            "router.scale": weights.experts.router_scale,
            "router.per_expert_scale": weights.experts.per_expert_scale,
            "experts.gate_up_proj": weights.experts.gate_up,
            "experts.down_proj": weights.experts.down,
            "pre_feedforward_layernorm_2.weight": weights.experts.pre_norm,
            "post_feedforward_layernorm_2.weight": weights.experts.post_norm,
            "post_feedforward_layernorm_1.weight": weights.experts.dense_post_norm,
        }
    if weights.per_layer_input is not None:
        table |= {
            "per_layer_input_gate.weight": weights.per_layer_input.gate,
            "per_layer_projection.weight": weights.per_layer_input.projection,
            "post_per_layer_input_norm.weight": weights.per_layer_input.post_norm,
        }
    return table


def is_ignored(spec: ModelSpec, prefix: str) -> Callable[[str], bool]:
    """Tells names that a checkpoint may hold and we have no use for; anything else left over is an error.

    They are the K/V projections and norms of layers that read another layer's K/V, which some exports keep, and
    the towers and projectors of other modalities beside a nested text model.
    """
    unused_kv = {
        f"{prefix}layers.{layer.index}.self_attn.{module}.weight"
        for layer in spec.layers
        if not layer.owns_kv
        for module in ("k_proj", "v_proj", "k_norm", "v_norm")
    }
    towers = OTHER_MODALITIES if prefix == NESTED else ()
    return lambda name: name in unused_kv or name.startswith(towers)
