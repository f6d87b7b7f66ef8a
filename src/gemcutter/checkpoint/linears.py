"""Linears: what a quantization_config speaks of, by name, and the merged weights that hold them. No torch."""

from collections import defaultdict
from typing import NamedTuple

from gemcutter.checkpoint.quantization import Quantization, Scheme
from gemcutter.spec import Family, LayerSpec, ModelSpec

NESTED = "model.language_model."  # prefix of the text model in a Gemma4ForConditionalGeneration
TEXT_ONLY = "model."  # and in a Gemma4ForCausalLM
HEAD = "lm_head.weight"  # the one name outside the text model's prefix
# Where a layer's experts lie; Gemma's under `moe` in some exports.
EXPERTS = {Family.GEMMA4: ("experts.", "moe.experts."), Family.GLM4_MOE: ("mlp.experts.",)}


class ExpertNames(NamedTuple):
    """How a checkpoint's files name the experts of a layer."""

    within: str  # one of the family's EXPERTS
    each: bool  # expert's three linears; else all together, in two tensors of three dims, which are no linears


def usual(family: Family, each: bool) -> ExpertNames:
    return ExpertNames(EXPERTS[family][0], each)


def linears(spec: ModelSpec, prefix: str, experts: dict[int, ExpertNames] | None = None) -> dict[str, str | None]:
    """Every linear by its name in the files, and the weight that holds it, as ModelSpec.quantized calls it.

    None stands for those that are never held in FP8: a router, whose choices would change, and the head, which the
    logits read as it came.

    Args:
        experts: by layer, how its experts are named; apart where it is left out.
    """
    table: dict[str, str | None] = {}
    for layer in spec.layers:
        name = f"layers.{layer.index}."
        named = (experts or {}).get(layer.index, usual(spec.family, each=True))
        of_layer = _of_layer(spec, layer, named)
        table |= {prefix + name + linear: slot and name + slot for linear, slot in of_layer.items()}
    if spec.ple_width:
        table[f"{prefix}per_layer_model_projection"] = "per_layer.projection"
    return table if spec.tied_head else table | {HEAD.removesuffix(".weight"): None}


def _of_layer(spec: ModelSpec, layer: LayerSpec, experts: ExpertNames) -> dict[str, str | None]:
    table: dict[str, str | None] = {"self_attn.q_proj": "qkv"}
    if layer.owns_kv:
        table["self_attn.k_proj"] = "qkv"
        if not layer.k_eq_v:
            table["self_attn.v_proj"] = "qkv"
    table |= {"self_attn.o_proj": "o"}
    mlp = mlp_of(spec.family, layer)
    table |= {f"{mlp}gate_proj": "gate_up", f"{mlp}up_proj": "gate_up", f"{mlp}down_proj": "down"}
    if layer.experts is not None:
        if spec.family is Family.GEMMA4:  # GLM's is none of PyTorch's linears
            table["router.proj"] = None
        for id in range(layer.experts.num_experts if experts.each else 0):
            table |= {f"{experts.within}{id}.{name}_proj": "experts" for name in ("gate", "up", "down")}
    if spec.ple_width:
        table |= {"per_layer_input_gate": "per_layer_input.gate"}
        table |= {"per_layer_projection": "per_layer_input.projection"}
    return table


def mlp_of(family: Family, layer: LayerSpec) -> str:
    """Where a layer's MLP lies."""
    return "mlp.shared_experts." if family is Family.GLM4_MOE and layer.experts else "mlp."


def schemes_of(linears: dict[str, str | None], quantization: Quantization | None) -> dict[str, Scheme]:
    """The schemes of those linears that have one."""
    if quantization is None:
        return {}
    found = {name: quantization.scheme_of(_names(name)) for name in linears}
    return {name: scheme for name, scheme in found.items() if scheme is not None}


def _names(name: str) -> list[str]:
    """What exporters call a linear: the text model may lie under another prefix, the experts under `moe`."""
    names = [name]
    for one, other in ((NESTED, TEXT_ONLY), (TEXT_ONLY, NESTED)):
        if name.startswith(one):
            names.append(other + name.removeprefix(one))
            break
    plain, within = EXPERTS[Family.GEMMA4]
    bare = [each.replace(f".{within}", f".{plain}") for each in names]
    return sorted({*names, *bare, *(each.replace(f".{plain}", f".{within}") for each in bare)})


def held_in_fp8(linears: dict[str, str | None], schemes: dict[str, Scheme]) -> frozenset[str]:
    """The weights that can be held in FP8: those of which every linear is stored so, in a scheme that runs."""
    parts = defaultdict(list)
    for name, slot in linears.items():
        if slot is not None:
            parts[slot].append(name in schemes and schemes[name].runs)
    return frozenset(slot for slot, fits in parts.items() if all(fits))
