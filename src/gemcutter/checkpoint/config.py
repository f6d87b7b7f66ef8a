"""config.json and generation_config.json of a checkpoint, read raw.

Missing fields take the defaults of HF's Gemma4TextConfig; `glm4_moe_config.py` reads GLM's. What a model cannot
do is refused by name, since a guess would give wrong text without an error.
"""

from dataclasses import replace
from pathlib import Path

from gemcutter.checkpoint.fields import HEAD_DIMS, MAX_EXPERTS, MAX_LAYERS, Fields
from gemcutter.checkpoint.files import CheckpointError, read_json
from gemcutter.checkpoint.glm4_moe_config import GLM4_MOE, glm4_moe_spec
from gemcutter.checkpoint.linears import TEXT_ONLY, held_in_fp8, linears, schemes_of
from gemcutter.checkpoint.quantization import Quantization, parse_quantization
from gemcutter.spec import ExpertSpec, Kind, LayerSpec, ModelSpec, RopeSpec

KINDS = {"sliding_attention": Kind.SLIDING, "full_attention": Kind.FULL}
DTYPES = ("bfloat16", "float16", "float32")
# 12B is "unified": no towers, no per-layer embeddings, no experts, and other defaults in HF
TEXT_TYPES = {"gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
ROPE_DEFAULTS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def read_spec(folder: Path) -> ModelSpec:
    """The model that a folder's config.json describes: nested (with a text_config) or text-only.

    Raises:
        CheckpointError: the file is not readable, a field is missing or wrong, or it asks for what we do not do.
    """
    top = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    model_type = top.get("model_type")
    if model_type == GLM4_MOE:
        return _held(glm4_moe_spec(top, _tied_head(top, top, default=False), _dtype(top, top)), folder)
    known = [*TEXT_TYPES, *TEXT_TYPES.values(), GLM4_MOE]
    if model_type not in known:
        top.fail("model_type", f"must be one of {', '.join(known)}")
    text = top.object("text_config") if model_type in TEXT_TYPES else top
    text_type = TEXT_TYPES.get(model_type, model_type)
    if text.get("model_type", text_type) != text_type:
        text.fail("model_type", f"must be {text_type} inside {model_type}")
    _refuse(text)
    unified = text_type == "gemma4_unified_text"
    kinds = _kinds(text)
    ple_width = 0 if unified else text.size("hidden_size_per_layer_input", 256, low=0)
    if unified and (text.get("hidden_size_per_layer_input") or text.get("enable_moe_block")):
        raise CheckpointError(
            f"{text.where}: {text_type} has neither hidden_size_per_layer_input nor enable_moe_block"
        )
    spec = ModelSpec(
        hidden=text.size("hidden_size", 2304),
        vocab=text.size("vocab_size", 262_144),
        layers=_layers(text, kinds, window=text.size("sliding_window", 1024 if unified else 512)),
        eps=text.number("rms_norm_eps", 1e-6),
        softcap=None if text.get("final_logit_softcapping") is None else text.number("final_logit_softcapping"),
        context_length=text.size("max_position_embeddings", 262_144 if unified else 131_072),
        ple_width=ple_width,
        ple_vocab=text.size("vocab_size_per_layer_input", 262_144) if ple_width else 0,
        tied_head=_tied_head(top, text),
        dtype=_dtype(top, text),
    )
    return _held(spec, folder)


def _held(spec: ModelSpec, folder: Path) -> ModelSpec:
    """With the weights that are held in FP8."""
    _refuse_modelopt(folder)
    quantization = read_quantization(folder)
    if quantization is None:
        return spec
    table = linears(spec, TEXT_ONLY)
    return replace(spec, quantized=held_in_fp8(table, schemes_of(table, quantization)))


def read_quantization(folder: Path) -> Quantization | None:
    """What a folder's config.json says of quantised weights; None where it has no quantization_config."""
    top = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    text = [top.object("text_config")] if top.get("text_config") is not None else []
    return parse_quantization(top, *text)


def _refuse_modelopt(folder: Path) -> None:
    if (folder / "hf_quant_config.json").exists():
        raise CheckpointError(
            f"{folder / 'hf_quant_config.json'}: ModelOpt quantization is not supported yet; "
            "use the checkpoint in bfloat16"
        )


def _refuse(text: Fields) -> None:
    if text.flag("attention_bias", False):
        text.fail("attention_bias", "must be false: attention with biases is not supported")
    if text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        text.fail("hidden_activation", "must be gelu_pytorch_tanh, the only activation supported")
    if text.get("use_bidirectional_attention") not in (None, "vision"):
        text.fail("use_bidirectional_attention", "must be null or vision (which leaves text causal)")


def _kinds(text: Fields) -> list[str]:
    """Layer type of each layer. HF forces the last to full attention, and so do we."""
    count = text.size("num_hidden_layers", 30, high=MAX_LAYERS)
    names = text.get("layer_types")
    if names is None:
        names = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    if type(names) is not list or len(names) != count:
        text.fail("layer_types", f"must list the types of {count} layers (num_hidden_layers)")
    unknown = [name for name in names if name not in tuple(KINDS)]
    if unknown:
        raise CheckpointError(f"{text.where}: layer_types must be of {', '.join(KINDS)}; got {unknown[0]!r:.80}")
    return [*names[:-1], "full_attention"]


def _layers(text: Fields, kinds: list[str], window: int) -> tuple[LayerSpec, ...]:
    owners = _kv_owners(text, kinds)
    heads = text.size("num_attention_heads", 8)
    geometry = _geometry(text, kinds)
    rope = {name: _rope(text, name, geometry[name][0]) for name in sorted(set(kinds))}
    k_eq_v = text.flag("attention_k_eq_v", False)
    width = text.size("intermediate_size", 9216)
    double_wide = text.flag("use_double_wide_mlp", False)
    experts = _experts(text)
    layers = []
    for index, name in enumerate(kinds):
        head_dim, kv_heads = geometry[name]
        if heads % kv_heads:
            text.fail("num_attention_heads", f"must be a multiple of the {kv_heads} kv heads of {name}")
        layers.append(
            LayerSpec(
                index=index,
                kind=KINDS[name],
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                window=window if KINDS[name] is Kind.SLIDING else None,
                rope=rope[name],
                kv_owner=owners[index],
                k_eq_v=k_eq_v and KINDS[name] is Kind.FULL,
                mlp_width=width * (2 if double_wide and owners[index] != index else 1),
                experts=experts,
            )
        )
    return tuple(layers)


def _kv_owners(text: Fields, kinds: list[str]) -> list[int]:
    """The layer whose K/V each layer reads; the last num_kv_shared_layers read the last owner of their type."""
    first_shared = len(kinds) - text.size("num_kv_shared_layers", 0, low=0, high=len(kinds))
    last = {name: index for index, name in enumerate(kinds[:first_shared])}
    orphans = set(kinds) - set(last)
    if orphans:
        text.fail("num_kv_shared_layers", f"leaves no layer that makes the K/V of {', '.join(sorted(orphans))}")
    return [*range(first_shared), *(last[name] for name in kinds[first_shared:])]


def _geometry(text: Fields, kinds: list[str]) -> dict[str, tuple[int, int]]:
    """(head_dim, kv heads) by layer type, from either dialect.

    transformers >= 5.17 writes per_layer_config, overrides by layer index; before, global_head_dim and
    num_global_key_value_heads overrode the full layers, the latter only with attention_k_eq_v.
    """
    head_dim, kv_heads = text.size("head_dim", 256), text.size("num_key_value_heads", 4)
    pairs = [(head_dim, kv_heads)] * len(kinds)
    if text.get("per_layer_config") is not None:
        overrides = text.object("per_layer_config")
        for key in overrides.data:
            # HF pads with zeros: "05"; isdecimal alone would take other scripts' digits
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < len(kinds)):
                raise CheckpointError(
                    f"{overrides.where}: keys must be layer indices below {len(kinds)}; got {key!r:.80}"
                )
            layer = overrides.object(key)
            unknown = sorted(set(layer.data) - {"head_dim", "num_key_value_heads"})
            if unknown:
                layer.fail(unknown[0], "cannot vary by layer; only head_dim and num_key_value_heads can")
            pairs[int(key)] = layer.size("head_dim", head_dim), layer.size("num_key_value_heads", kv_heads)
    elif "per_layer_config" not in text.data:
        full = text.size("global_head_dim", 512), kv_heads
        if text.flag("attention_k_eq_v", False) and text.get("num_global_key_value_heads") is not None:
            full = full[0], text.size("num_global_key_value_heads")
        pairs = [full if name == "full_attention" else pair for name, pair in zip(kinds, pairs, strict=True)]
    geometry = dict(zip(kinds, pairs, strict=True))
    for index, (name, pair) in enumerate(zip(kinds, pairs, strict=True)):
        if pair != geometry[name]:
            raise CheckpointError(
                f"{text.where}: per_layer_config must give all {name} layers the same head_dim and "
                f"num_key_value_heads; got {pair} for layer {index}, but {geometry[name]} for another"
            )
        if pair[0] not in HEAD_DIMS:
            raise CheckpointError(
                f"{text.where}: head_dim must be one of {', '.join(map(str, HEAD_DIMS))}; got {pair[0]} for {name}"
            )
    return geometry


def _rope(text: Fields, name: str, head_dim: int) -> RopeSpec:
    """Rotary embedding of a layer type; pairs rounded as in HF's `_compute_proportional_rope_parameters`."""
    if text.get("rope_parameters") is None:
        rope = Fields(ROPE_DEFAULTS[name], text.where)
    else:
        rope = text.object("rope_parameters").object(name)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "proportional"):
        raise CheckpointError(f"{rope.where}: rope_type must be default or proportional; got {kind!r:.80}")
    if rope.number("factor", 1.0) != 1.0:
        rope.fail("factor", "must be 1: stretched positions are not supported")
    partial = rope.number("partial_rotary_factor", 1.0, high=1.0)
    if kind == "default" and partial != 1.0:
        rope.fail("partial_rotary_factor", "goes with rope_type proportional only")
    angles = int(partial * head_dim // 2)
    if angles == 0:
        rope.fail("partial_rotary_factor", f"rotates no pair of head_dim {head_dim}")
    return RopeSpec(theta=rope.number("rope_theta"), angles=angles)


def _experts(text: Fields) -> ExpertSpec | None:
    if not text.flag("enable_moe_block", False):
        return None
    experts = text.size("num_experts", high=MAX_EXPERTS)
    return ExpertSpec(experts, text.size("top_k_experts", high=experts), text.size("moe_intermediate_size"))


def _tied_head(top: Fields, text: Fields, default: bool = True) -> bool:
    """HF asks the outermost config. Where the text config says otherwise, engines differ, so neither is right."""
    tied = top.flag("tie_word_embeddings", default)
    if "tie_word_embeddings" in text.data and text.flag("tie_word_embeddings", True) != tied:
        text.fail("tie_word_embeddings", f"contradicts the outer config, where it is {str(tied).lower()}")
    return tied


def _dtype(top: Fields, text: Fields) -> str:
    for fields in (top, text):
        for name in ("dtype", "torch_dtype"):  # the latter before transformers 4.56
            if fields.get(name) is not None:
                if fields.data[name] not in DTYPES:
                    fields.fail(name, f"must be one of {', '.join(DTYPES)}")
                return fields.data[name]
    raise CheckpointError(
        f"{top.where}: dtype is missing; add the dtype of the weights, one of {', '.join(DTYPES)}"
    )


def read_generation_config(folder: Path) -> dict:
    """Stops and sampling defaults of a checkpoint; only fields that it sets, except eos_token_id.

    Returns:
        eos_token_id: list[int], from generation_config.json, else config.json, else its text_config, else HF's:
            [1] for Gemma, none for GLM.
        suppress_tokens: list[int] never sampled.
        do_sample: bool. temperature, top_p, min_p, repetition_penalty: float. top_k: int.

    Raises:
        CheckpointError: a file is not readable, or a field is of the wrong type or out of range.
    """
    path = folder / "generation_config.json"
    fields = Fields(read_json(path) if path.exists() else {}, str(path))
    top = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    text = top.object("text_config") if top.get("text_config") is not None else top
    stops = [ids for ids in (level.token_ids("eos_token_id") for level in (fields, top, text)) if ids is not None]
    values: dict = {"eos_token_id": stops[0] if stops else _default_stops(text)}
    readers = {
        "suppress_tokens": fields.token_ids,
        "do_sample": lambda name: fields.flag(name, True),
        "temperature": lambda name: fields.number(name, high=100.0, zero=True),
        "top_p": lambda name: fields.number(name, high=1.0),
        "top_k": lambda name: fields.size(name, low=0),
        "min_p": lambda name: fields.number(name, high=1.0, zero=True),
        "repetition_penalty": lambda name: fields.number(name, high=100.0),
    }
    return values | {name: read(name) for name, read in readers.items() if fields.get(name) is not None}


def _default_stops(text: Fields) -> list[int]:
    return [1] if "eos_token_id" not in text.data and text.get("model_type") != GLM4_MOE else []
