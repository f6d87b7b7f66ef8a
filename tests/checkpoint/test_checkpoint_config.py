"""read_spec against HF's own config and modules; refusals; generation configs."""

import copy
import json
import random

import pytest
import released
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import GEMMA
from transformers import Gemma4Config, Gemma4TextConfig, Gemma4UnifiedConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel, Gemma4TextRotaryEmbedding
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedTextModel

from gemcutter.checkpoint.config import read_generation_config, read_spec
from gemcutter.checkpoint.files import CheckpointError
from gemcutter.spec import ExpertSpec, Kind, ModelSpec

S, F = "sliding_attention", "full_attention"
COMMON = {"model_type": "gemma4_text", "dtype": "bfloat16", "final_logit_softcapping": 30.0}
RELEASED = {name: released.config(name)["text_config"] for name in released.NAMES}


def write(folder, config, generation=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def nested(config):
    kind = config["model_type"].removesuffix("_text")
    return {"model_type": kind, "dtype": config["dtype"], "vision_config": None, "text_config": config}


def hf_config(config):
    config = copy.deepcopy(config)
    if config["model_type"] == "gemma4_unified_text":
        return Gemma4UnifiedConfig(text_config=config).text_config
    return Gemma4TextConfig(**config)


def random_config(rng):
    """A valid old-dialect config; some fields are left to HF's defaults."""
    heads = rng.choice([4, 8, 16])
    layers = rng.randint(4, 13)
    config = COMMON | {
        "hidden_size": rng.choice([64, 96, 2816]),
        "intermediate_size": rng.choice([96, 2112]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, 4]),
        "head_dim": rng.choice([32, 64, 256]),
        "global_head_dim": rng.choice([32, 128, 512]),
        "num_global_key_value_heads": rng.choice([None, 1, 2, 4]),
        "attention_k_eq_v": rng.random() < 0.5,
        "sliding_window": rng.choice([8, 512]),
        "hidden_size_per_layer_input": rng.choice([0, 16]),
        "vocab_size": 151,
        "vocab_size_per_layer_input": 160,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "layer_types": [rng.choice([S, F]) for _ in range(layers)],
        "use_double_wide_mlp": rng.random() < 0.5,
        "rope_parameters": {
            S: {"rope_type": "default", "rope_theta": rng.choice([1e4, 5e5])},
            F: {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": rng.choice([0.25, 0.3, 0.77, 1]),
            },
        },
    }
    config["layer_types"][:2] = rng.sample([S, F], 2)
    config["num_kv_shared_layers"] = rng.choice([0, rng.randint(0, layers - 2)])
    if rng.random() < 0.5:
        config |= {"enable_moe_block": True, "num_experts": 8, "top_k_experts": rng.randint(1, 8)}
        config["moe_intermediate_size"] = 32
    optional = set(config) - {"dtype", "model_type", "hidden_size", "vocab_size", "num_kv_shared_layers"}
    if config["num_kv_shared_layers"]:  # the default pattern needs six layers
        optional.discard("layer_types")
    for name in rng.sample(sorted(optional), rng.randint(0, 4)):
        if name == "num_hidden_layers":
            config.pop("layer_types")
        if not name.startswith(("num_experts", "top_k", "moe_")):
            config.pop(name, None)
    return config


def assert_equals_hf(spec: ModelSpec, config) -> None:
    """Every width of the spec against the modules that HF builds, and RoPE against its buffers."""
    unified = config.model_type == "gemma4_unified_text"
    with torch.device("meta"):
        model = (Gemma4UnifiedTextModel if unified else Gemma4TextModel)(config)
    rotary = Gemma4TextRotaryEmbedding(config)
    assert (spec.vocab, spec.hidden) == model.embed_tokens.weight.shape
    assert spec.eps == model.norm.eps
    assert spec.softcap == config.final_logit_softcapping
    assert spec.context_length == config.max_position_embeddings
    assert spec.dtype == str(config.dtype).removeprefix("torch.")
    assert len(spec.layers) == len(model.layers)
    if spec.ple_width:
        assert (spec.ple_vocab, spec.ple_width * len(spec.layers)) == model.embed_tokens_per_layer.weight.shape
    else:
        assert not hasattr(model, "embed_tokens_per_layer")
    stored = {}
    for index, (ours, layer) in enumerate(zip(spec.layers, model.layers, strict=True)):
        theirs = layer.self_attn
        assert ours.index == index
        assert ours.kind is (Kind.SLIDING if theirs.is_sliding else Kind.FULL)
        assert ours.window == theirs.sliding_window
        assert ours.head_dim == theirs.head_dim
        assert ours.num_heads // ours.num_kv_heads == theirs.num_key_value_groups
        assert ours.q_width == theirs.q_proj.out_features
        assert ours.k_eq_v == theirs.use_alternative_attention
        assert ours.mlp_width == layer.mlp.gate_proj.out_features
        if theirs.is_kv_shared_layer:
            assert ours.kv_owner == stored[theirs.layer_type], f"layer {index}"
            assert ours.qkv_width == ours.q_width
        else:
            assert ours.owns_kv
            widths = [theirs.q_proj.out_features, theirs.k_proj.out_features]
            assert ours.qkv_width == sum(widths) + (theirs.v_proj.out_features if theirs.v_proj else 0)
            if theirs.store_full_length_kv:
                stored[theirs.layer_type] = index
        if getattr(layer, "enable_moe_block", False):
            count, width2, _ = layer.experts.gate_up_proj.shape
            assert ours.experts == ExpertSpec(count, config.top_k_experts, width2 // 2)
        else:
            assert ours.experts is None
        inv_freq = getattr(rotary, f"{theirs.layer_type}_inv_freq")
        expected = torch.zeros(ours.head_dim // 2, dtype=torch.float64)
        pair = torch.arange(ours.rope.angles, dtype=torch.float64)
        expected[: ours.rope.angles] = ours.rope.theta ** (-2 * pair / ours.head_dim)
        torch.testing.assert_close(inv_freq.double(), expected, rtol=1e-5, atol=0)


def specs_of_all_dialects(config, tmp_path):
    """The same model written by hand and by HF, text-only and nested."""
    unified = config["model_type"] == "gemma4_unified_text"
    hf = hf_config(config)
    hf.save_pretrained(tmp_path / "hf")
    outer = Gemma4UnifiedConfig if unified else Gemma4Config
    outer(text_config=copy.deepcopy(config), dtype=config["dtype"]).save_pretrained(tmp_path / "hf-nested")
    assert "per_layer_config" in (tmp_path / "hf" / "config.json").read_text()
    return {
        "text": read_spec(write(tmp_path / "text", config)),
        "nested": read_spec(write(tmp_path / "nested", nested(config))),
        "hf": read_spec(tmp_path / "hf"),
        "hf-nested": read_spec(tmp_path / "hf-nested"),
    }, hf


@pytest.mark.parametrize("name", [*RELEASED, *GEMMA])
def test_released_and_tiny_shapes_equal_hf_in_all_dialects(name, tmp_path):
    config = RELEASED.get(name) or COMMON | GEMMA[name]
    specs, hf = specs_of_all_dialects(config, tmp_path)
    assert len(set(specs.values())) == 1, specs
    assert_equals_hf(specs["text"], hf)


@pytest.mark.parametrize("seed", range(30))
def test_random_configs_equal_hf_in_all_dialects(seed, tmp_path):
    config = random_config(random.Random(seed))
    specs, hf = specs_of_all_dialects(config, tmp_path)
    assert len(set(specs.values())) == 1, specs
    assert_equals_hf(specs["text"], hf)


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_defaults_are_hfs(model_type, tmp_path):
    config = {"model_type": model_type, "dtype": "float32"}
    assert_equals_hf(read_spec(write(tmp_path, config)), hf_config(config))


def test_owners_and_widths_of_e2b(tmp_path):
    layers = read_spec(write(tmp_path, RELEASED["e2b"])).layers
    assert [layer.kv_owner for layer in layers] == [*range(15), *([13, 13, 13, 13, 14] * 4)]
    assert [layer.mlp_width for layer in layers] == [6144] * 15 + [12288] * 20
    assert layers[34].rope.angles == 64 and layers[34].head_dim == 512 and layers[33].rope.angles == 128


def test_last_layer_is_forced_full(tmp_path):
    config = COMMON | GEMMA["dense"] | {"layer_types": [S] * 5}
    spec = read_spec(write(tmp_path, config))
    assert [layer.kind for layer in spec.layers] == [Kind.SLIDING] * 4 + [Kind.FULL]
    assert_equals_hf(spec, hf_config(config))


def test_per_layer_config_keys_may_be_padded_and_values_partial(tmp_path):
    base = COMMON | GEMMA["dense"] | {"num_hidden_layers": 12, "layer_types": [S, F] * 6}
    overrides = {f"{index:02}": {"head_dim": 128} for index in range(1, 12, 2)}
    config = {name: value for name, value in base.items() if "global" not in name} | {"per_layer_config": overrides}
    spec = read_spec(write(tmp_path, config))
    assert [layer.head_dim for layer in spec.layers] == [32, 128] * 6
    assert {layer.num_kv_heads for layer in spec.layers} == {2}
    assert_equals_hf(spec, hf_config(config))
    for none in ({}, None):  # present, so global_head_dim and its default of 512 are off
        config["per_layer_config"] = none
        spec = read_spec(write(tmp_path, config | {"global_head_dim": 64}))
        assert {layer.head_dim for layer in spec.layers} == {32}
        assert_equals_hf(spec, hf_config(config | {"global_head_dim": 64}))


@pytest.mark.parametrize("inner, outer", [(True, True), (False, False), (None, False), (None, True), (True, None)])
def test_tied_head_is_the_outer_configs(inner, outer, tmp_path):
    config = nested(COMMON | GEMMA["dense"])
    if inner is not None:
        config["text_config"]["tie_word_embeddings"] = inner
    if outer is not None:
        config["tie_word_embeddings"] = outer
    assert read_spec(write(tmp_path, config)).tied_head is (True if outer is None else outer)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("level", ["outer", "inner"])
def test_dtype_at_either_level_under_either_name(name, level, tmp_path):
    config = nested(COMMON | GEMMA["dense"])
    del config["dtype"], config["text_config"]["dtype"]
    (config if level == "outer" else config["text_config"])[name] = "float16"
    assert read_spec(write(tmp_path, config)).dtype == "float16"


REFUSED = [
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_activation": "silu"}, "hidden_activation"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ({"rope_parameters": {S: {"rope_type": "default", "rope_theta": 1e4}}}, F),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, F),
    ({"rope_parameters": {S: None, F: None}}, "must be an object"),
    ({"rope_parameters": {k: {"rope_type": "yarn", "rope_theta": 1e4} for k in (S, F)}}, "yarn"),
    ({"rope_parameters": {k: {"rope_type": "default"} for k in (S, F)}}, "rope_theta"),
    (
        {"rope_parameters": {k: {"rope_type": "proportional", "rope_theta": 1e4, "factor": 8} for k in (S, F)}},
        "factor",
    ),
    (
        {"rope_parameters": {k: {"rope_theta": 1e4, "partial_rotary_factor": 0.5} for k in (S, F)}},
        "partial_rotary_factor",
    ),
    (
        {
            "rope_parameters": {
                k: {"rope_type": "proportional", "rope_theta": 1, "partial_rotary_factor": 0.01} for k in (S, F)
            }
        },
        "rotates no pair",
    ),
    ({"model_type": "gemma3_text"}, "gemma3_text"),
    ({"model_type": "gemma4_assistant"}, "gemma4_assistant"),
    ({"model_type": None}, "model_type"),
    ({"model_type": ["gemma4"]}, "model_type"),
    ({"model_type": "gemma4"}, "text_config is required"),
    ({"head_dim": 96}, "head_dim"),
    ({"head_dim": 1024}, "head_dim"),
    ({"global_head_dim": 16}, "head_dim"),
    ({"global_head_dim": None}, "global_head_dim"),
    ({"num_key_value_heads": 3}, "num_attention_heads"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "config_groups is required"),
    ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
    ({"quantization_config": {}}, "quant_method"),
    ({"layer_types": [S, F]}, "layer_types"),
    ({"layer_types": [S, S, "linear_attention", S, F]}, "linear_attention"),
    ({"layer_types": [S, [S], S, S, F]}, "layer_types"),
    ({"layer_types": S}, "layer_types"),
    ({"num_kv_shared_layers": 3}, "full_attention"),  # S S | F S F: no full layer before
    ({"num_kv_shared_layers": 5}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": 6}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -64}, "hidden_size"),
    ({"hidden_size": 64.0}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"vocab_size": 10**12}, "vocab_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    ({"final_logit_softcapping": "30"}, "final_logit_softcapping"),
    ({"dtype": "float8_e4m3fn"}, "dtype"),
    ({"dtype": None}, "dtype"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"enable_moe_block": True}, "num_experts"),
    ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8}, "top_k_experts"),
    ({"per_layer_config": {"9": {"head_dim": 64}}}, "'9'"),
    ({"per_layer_config": {"full_attention": {"head_dim": 64}}}, "full_attention"),
    ({"per_layer_config": {"2": {"intermediate_size": 64}}}, "intermediate_size"),
    ({"per_layer_config": {"2": {"head_dim": 64}}}, "same head_dim"),  # layer 4 is full, too
    ({"per_layer_config": [1]}, "per_layer_config"),
    ({"per_layer_config": {"2": 64}}, "must be an object"),
]


@pytest.mark.parametrize("changes, named", REFUSED, ids=lambda value: str(value)[:60])
def test_what_we_cannot_run_is_refused_by_file_and_field(changes, named, tmp_path):
    folder = write(tmp_path, COMMON | GEMMA["dense"] | changes)
    with pytest.raises(CheckpointError) as caught:
        read_spec(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"text_config": None}, "text_config"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "modelopt"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"model_type": "gemma4_unified"}, "gemma4_unified_text"),
    ],
)
def test_nested_refusals(changes, named, tmp_path):
    config = nested(COMMON | GEMMA["dense"] | {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=named):
        read_spec(write(tmp_path, config | changes))


def test_unified_has_no_experts_and_no_per_layer_inputs(tmp_path):
    for changes in ({"enable_moe_block": True}, {"hidden_size_per_layer_input": 256}):
        with pytest.raises(CheckpointError, match="gemma4_unified_text has neither"):
            read_spec(write(tmp_path, RELEASED["12b"] | changes))


def test_modelopt_side_file_is_refused(tmp_path):
    write(tmp_path, COMMON | GEMMA["dense"])
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="hf_quant_config.json"):
        read_spec(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"a": 1,}', "[" * 100_000, "{\ud800}"])
def test_malformed_json(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="config.json"):
        read_spec(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([S, F, "gemma4", "default", "0", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([S, F, "0", "rope_type", "x"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(GEMMA)), data=st.data(), value=json_values, wrap=st.booleans())
def test_any_value_in_any_field_is_read_or_refused(tmp_path_factory, kind, data, value, wrap):
    """No other exception than CheckpointError escapes, whatever a field holds."""
    config = COMMON | GEMMA[kind] | {"rope_parameters": None, "per_layer_config": None, "text_config": None}
    config[data.draw(st.sampled_from(sorted(config)))] = value
    if wrap:
        config = nested(config | {"model_type": "gemma4_text"}) | {"model_type": "gemma4"}
    folder = write(tmp_path_factory.getbasetemp() / "fuzz", config)
    try:
        assert isinstance(read_spec(folder), ModelSpec)
        read_generation_config(folder)
    except CheckpointError as error:
        assert "config.json" in str(error)


@pytest.mark.parametrize(
    "generation, outer, inner, expected",
    [
        ({"eos_token_id": [1, 106, 50]}, [1, 106], 1, [1, 106, 50]),
        ({"eos_token_id": 7}, [1, 106], 1, [7]),
        ({"eos_token_id": None}, [1, 106], 1, [1, 106]),
        (None, [1, 106], 1, [1, 106]),
        ({}, None, 5, [5]),
        ({}, None, None, []),
        (None, "absent", "absent", [1]),  # HF's default
    ],
)
def test_stops_come_from_the_nearest_file_that_has_them(generation, outer, inner, expected, tmp_path):
    config = nested(COMMON | GEMMA["dense"])
    config["eos_token_id"], config["text_config"]["eos_token_id"] = outer, inner
    for level in (config, config["text_config"]):
        if level["eos_token_id"] == "absent":
            del level["eos_token_id"]
    assert read_generation_config(write(tmp_path, config, generation))["eos_token_id"] == expected


def test_stops_of_a_text_only_config(tmp_path):
    folder = write(tmp_path, COMMON | GEMMA["dense"] | {"eos_token_id": [3, 4]})
    assert read_generation_config(folder) == {"eos_token_id": [3, 4]}


def test_sampling_defaults_are_kept_and_nulls_dropped(tmp_path):
    generation = {"eos_token_id": 1, "temperature": 1, "top_p": 0.95, "top_k": 64, "min_p": None, "do_sample": True}
    generation |= {"suppress_tokens": [258883, 258882], "transformers_version": "5.17.0", "pad_token_id": 0}
    read = read_generation_config(write(tmp_path, COMMON | GEMMA["dense"], generation))
    assert read == {
        "eos_token_id": [1],
        "suppress_tokens": [258883, 258882],
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 64,
    }


@pytest.mark.parametrize(
    "field, value",
    [
        ("eos_token_id", "<eos>"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", [-1]),
        ("eos_token_id", True),
        ("suppress_tokens", {"a": 1}),
        ("do_sample", 1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)
def test_bad_generation_fields_are_named(field, value, tmp_path):
    folder = write(tmp_path, COMMON | GEMMA["dense"], {field: value})
    with pytest.raises(CheckpointError, match=f"generation_config.json: {field}"):
        read_generation_config(folder)
