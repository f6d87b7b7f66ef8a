"""The table from a checkpoint's tensor names to the places of the merged weights that they fill."""

from collections.abc import Callable

import torch

from gemcutter.checkpoint.glm4_moe_table import empty_glm4_moe, glm4_moe_layer_pieces
from gemcutter.checkpoint.linears import HEAD, NESTED, ExpertNames, usual
from gemcutter.checkpoint.views import empty_linear, expert_pieces, rows
from gemcutter.model.glm4_moe_weights import Glm4MoeWeights
from gemcutter.model.weights import (
    ExpertWeights,
    LayerWeights,
    Linear,
    PerLayerEmbeddingWeights,
    PerLayerInputWeights,
    Weights,
)
from gemcutter.spec import Family, LayerSpec, ModelSpec

OTHER_MODALITIES = (
    "model.vision_tower.",
    "model.vision_embedder.",  # 12B, which has no towers; HF renames it to embed_vision as it loads
    "model.embed_vision.",
    "model.audio_tower.",
    "model.embed_audio.",
)
SCALES = ("weight_scale", "input_scale")  # beside the weight of a linear in FP8


def empty_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Weights | Glm4MoeWeights:
    """Uninitialised weights of a model, every tensor contiguous."""
    return EMPTY[spec.family](spec, device, dtype)


def _empty_gemma4(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Weights:

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def linear(name: str, *shape: int) -> Linear:
        return empty_linear(shape, device, None if name in spec.quantized else dtype)

    def layer(layer: LayerSpec) -> LayerWeights:
        at = f"layers.{layer.index}."
        experts = per_layer_input = None
        if layer.experts is not None:
            count, width = layer.experts.num_experts, layer.experts.width
            experts = ExpertWeights(
                router=empty(count, spec.hidden),
                router_scale=empty(spec.hidden),
                per_expert_scale=empty(count),
                gate_up=linear(at + "experts", count, 2 * width, spec.hidden),
                down=linear(at + "experts", count, spec.hidden, width),
                pre_norm=empty(spec.hidden),
                post_norm=empty(spec.hidden),
                dense_post_norm=empty(spec.hidden),
            )
        if spec.ple_width:
            per_layer_input = PerLayerInputWeights(
                gate=linear(at + "per_layer_input.gate", spec.ple_width, spec.hidden),
                projection=linear(at + "per_layer_input.projection", spec.hidden, spec.ple_width),
                post_norm=empty(spec.hidden),
            )
        return LayerWeights(
            input_norm=empty(spec.hidden),
            post_attention_norm=empty(spec.hidden),
            pre_feedforward_norm=empty(spec.hidden),
            post_feedforward_norm=empty(spec.hidden),
            qkv=linear(at + "qkv", layer.qkv_width, spec.hidden),
            q_norm=empty(layer.head_dim),
            k_norm=empty(layer.head_dim) if layer.owns_kv else None,
            o=linear(at + "o", spec.hidden, layer.q_width),
            gate_up=linear(at + "gate_up", 2 * layer.mlp_width, spec.hidden),
            down=linear(at + "down", spec.hidden, layer.mlp_width),
            scalar=empty(1),
            experts=experts,
            per_layer_input=per_layer_input,
        )

    per_layer = None
    if spec.ple_width:
        packed = len(spec.layers) * spec.ple_width
        per_layer = PerLayerEmbeddingWeights(
            embed=empty(spec.ple_vocab, packed),
            projection=linear("per_layer.projection", packed, spec.hidden),
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


def pieces(
    spec: ModelSpec,
    weights: Weights | Glm4MoeWeights,
    prefix: str,
    experts: dict[int, ExpertNames] | None = None,
) -> dict[str, Linear]:
    """Every weight that a checkpoint must hold: its name, and the view of `weights` that it fills.

    Together the views cover the weights exactly once. A view has the shape of the checkpoint's tensor and is
    contiguous, as merged tensors are split by rows; so are the scales of one in FP8.

    Args:
        experts: by layer, how its experts are named; as the family's releases have them where it is left out.
    """
    table: dict[str, Linear] = {
        "embed_tokens.weight": weights.embed,
        "norm.weight": weights.norm,
    }
    if spec.ple_width:
        table |= {
            "embed_tokens_per_layer.weight": weights.per_layer.embed,
            "per_layer_model_projection.weight": weights.per_layer.projection,
            "per_layer_projection_norm.weight": weights.per_layer.projection_norm,
        }
    for layer in spec.layers:
        of_layer = LAYER_PIECES[spec.family](layer, weights.layers[layer.index])
        of_experts = weights.layers[layer.index].experts
        if of_experts is not None:
            named = (experts or {}).get(layer.index, usual(spec.family, each=spec.family is Family.GLM4_MOE))
            of_layer |= expert_pieces(of_experts.gate_up, of_experts.down, named)
        table |= {f"layers.{layer.index}.{name}": view for name, view in of_layer.items()}
    table = {prefix + name: view for name, view in table.items()}
    return table if spec.tied_head else table | {HEAD: weights.head}


def _gemma4_layer_pieces(layer: LayerSpec, weights: LayerWeights) -> dict[str, Linear]:
    width = layer.mlp_width
    table: dict[str, Linear] = {
        "input_layernorm.weight": weights.input_norm,
        "post_attention_layernorm.weight": weights.post_attention_norm,
        "pre_feedforward_layernorm.weight": weights.pre_feedforward_norm,
        "post_feedforward_layernorm.weight": weights.post_feedforward_norm,
        "self_attn.q_proj.weight": rows(weights.qkv, 0, layer.q_width),
        "self_attn.q_norm.weight": weights.q_norm,
        "self_attn.o_proj.weight": weights.o,
        "mlp.gate_proj.weight": rows(weights.gate_up, 0, width),
        "mlp.up_proj.weight": rows(weights.gate_up, width, 2 * width),
        "mlp.down_proj.weight": weights.down,
        "layer_scalar": weights.scalar,
    }
    if layer.owns_kv:
        begin, end = layer.q_width, layer.q_width + layer.kv_width
        table |= {
            "self_attn.k_proj.weight": rows(weights.qkv, begin, end),
            "self_attn.k_norm.weight": weights.k_norm,
        }
        if not layer.k_eq_v:
            table["self_attn.v_proj.weight"] = rows(weights.qkv, end, layer.qkv_width)
    if weights.experts is not None:
        table |= {
            "router.proj.weight": weights.experts.router,
            "router.scale": weights.experts.router_scale,
            "router.per_expert_scale": weights.experts.per_expert_scale,
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


EMPTY = {Family.GEMMA4: _empty_gemma4, Family.GLM4_MOE: empty_glm4_moe}
LAYER_PIECES = {Family.GEMMA4: _gemma4_layer_pieces, Family.GLM4_MOE: glm4_moe_layer_pieces}


def is_ignored(spec: ModelSpec, prefix: str) -> Callable[[str], bool]:
    """Tells names that a checkpoint may hold and we have no use for; anything else left over is an error.

    They are the K/V projections and norms of layers that read another layer's K/V, which some exports keep, the
    towers and projectors of other modalities beside a nested text model, and the layer behind GLM's last one, which
    drafts further tokens.
    """
    if spec.family is Family.GLM4_MOE:
        return lambda name: name.startswith(f"{prefix}layers.{len(spec.layers)}.")
    unused = unused_kv(spec, prefix)
    unused |= {name.replace("_proj.weight", f"_proj.{scale}") for name in unused for scale in SCALES}
    towers = OTHER_MODALITIES if prefix == NESTED else ()
    return lambda name: name in unused or name.startswith(towers)


def unused_kv(spec: ModelSpec, prefix: str) -> set[str]:
    """Weights of the K/V that layers would make which read another layer's."""
    return {
        f"{prefix}layers.{layer.index}.self_attn.{module}.weight"
        for layer in spec.layers
        if not layer.owns_kv
        for module in ("k_proj", "v_proj", "k_norm", "v_norm")
    }
