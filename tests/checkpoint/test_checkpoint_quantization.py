"""quantization_config against the compressed-tensors library, and what is refused by name."""

import copy

import pytest
import torch
from fp8_checkpoints import BLOCK, CHANNEL, IGNORE, STATIC, TENSOR, TOKEN, quantization_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemcutter.checkpoint.fields import Fields
from gemcutter.checkpoint.files import CheckpointError
from gemcutter.checkpoint.linears import NESTED, TEXT_ONLY, held_in_fp8, schemes_of
from gemcutter.checkpoint.quantization import Scheme, parse_quantization


def parse(config):
    return parse_quantization(Fields({"quantization_config": config}, "config.json"))


NAMES = [
    f"{prefix}layers.{layer}.{name}"
    for prefix in (TEXT_ONLY, NESTED)
    for layer in (1, 11)
    for name in (
        "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "router.proj",
        "experts.1.up_proj", "experts.12.down_proj", "per_layer_input_gate",
    )
] + ["lm_head"]  # fmt: skip
WORDS = ["layers", "1", "11", "self_attn", "mlp", "q_proj", "proj", "gate", "experts", "down", "router", "lm_head"]
PATTERNS = st.one_of(
    st.builds("re:.*{}.*".format, st.sampled_from(WORDS)),
    st.builds("re:.*{}$".format, st.sampled_from(WORDS)),
    st.builds("re:{}".format, st.sampled_from(WORDS)),
    st.builds(r"re:.*layers\.{}\..*{}".format, st.sampled_from(["1", "11", "[0-9]+"]), st.sampled_from(WORDS)),
    st.sampled_from(["re:", "re:.*", "re:.*[qo]_proj", "re:(?!.*experts).*proj", "re:lm_head$"]),
)
TARGETS = st.one_of(
    st.just("Linear"), st.sampled_from(NAMES), PATTERNS, st.sampled_from(["nothing.here", "proj.x"])
)
ARGUMENTS = [(CHANNEL, TOKEN), (TENSOR, STATIC), (BLOCK, None), (TENSOR, TOKEN)]


@settings(max_examples=300, deadline=None)
@given(
    groups=st.lists(st.lists(TARGETS, min_size=1, max_size=3), min_size=1, max_size=3),
    ignore=st.lists(TARGETS, max_size=3),
    one_prefix=st.sampled_from([TEXT_ONLY, NESTED]),
)
def test_schemes_are_those_of_the_library(groups, ignore, one_prefix):
    """Of a checkpoint whose names are those that the exporter had."""
    library = pytest.importorskip("compressed_tensors.quantization")
    match = pytest.importorskip("compressed_tensors.utils.match")
    flat = [target for group in groups for target in group]
    assume(len(set(flat)) == len(flat))
    # Names of the other prefix say the same here, as one exporter's may be another's
    other = {TEXT_ONLY: NESTED, NESTED: TEXT_ONLY}[one_prefix]
    assume(not any(target.startswith(f"{other}layers") for target in (*flat, *ignore)))
    made = {
        f"group_{i}": {"targets": targets, "weights": weights, "input_activations": inputs}
        for i, (targets, (weights, inputs)) in enumerate(zip(groups, ARGUMENTS, strict=False))
    }
    config = quantization_config(ignore=ignore, config_groups=made)
    ours = parse(copy.deepcopy(config))
    ignored_keys = {"version", "sparsity_config", "transform_config"}
    theirs = library.QuantizationConfig.model_validate({k: v for k, v in config.items() if k not in ignored_keys})
    by_target = {target: group for group in theirs.config_groups.values() for target in group.targets}
    linear = torch.nn.Linear(1, 1)
    names = [
        name for name in NAMES if name.startswith(one_prefix) and not name.startswith(other) or name == "lm_head"
    ]
    if one_prefix == TEXT_ONLY:
        names = [name for name in names if not name.startswith(NESTED)]
    found = schemes_of(dict.fromkeys(names, "x"), ours)
    for name in names:
        if match.is_match(name, linear, by_target, ignore):
            group = by_target[match.match_targets(name, linear, by_target)[0]]
            assert found[name].weights == group.weights.strategy, name
            assert (found[name].activations is None) == (group.input_activations is None)
        else:
            assert name not in found


def test_what_llm_compressor_writes():
    got = parse(quantization_config())
    assert got.schemes == {"Linear": Scheme("channel", "per token")} and got.ignore == IGNORE and not got.kv_cache
    assert got.schemes["Linear"].runs
    assert parse(quantization_config(kv_cache_scheme=STATIC)).kv_cache
    assert parse(quantization_config() | {"ignore": None}).ignore == ()
    assert parse_quantization(Fields({}, ""), Fields({"quantization_config": None}, "")) is None


def test_other_names_of_a_linear():
    """An ignore list may call experts as a model has them, a file as another does."""
    table = {"model.layers.3.moe.experts.7.up_proj": "x", "model.language_model.layers.2.mlp.up_proj": "y"}
    for name in ("model.layers.3.experts.7.up_proj", "model.language_model.layers.3.moe.experts.7.up_proj"):
        assert set(schemes_of(table, parse(quantization_config(ignore=[name])))) == set(list(table)[1:])
    left = schemes_of(table, parse(quantization_config(ignore=["model.layers.2.mlp.up_proj"])))
    assert set(left) == set(list(table)[:1])


def test_a_merged_weight_goes_one_way():
    runs, blocks = Scheme("channel", "per token"), Scheme("block", "per token", (128, 128))
    table = {"q": "qkv", "k": "qkv", "o": "o", "router": None}
    every = dict.fromkeys(table, runs)
    assert held_in_fp8(table, every) == {"qkv", "o"}
    assert held_in_fp8(table, every | {"k": blocks}) == {"o"}
    assert held_in_fp8(table, {"q": runs, "o": runs}) == {"o"}
    assert held_in_fp8(table, every | {"k": Scheme("tensor", "per token")}) == {"qkv", "o"}


@pytest.mark.parametrize(
    "weights, inputs, scheme",
    [
        ({}, {}, Scheme("tensor", "per tensor, static")),
        ({"group_size": -1}, {"dynamic": True}, Scheme("channel", "per tensor")),
        ({"strategy": "channel"}, {"strategy": "token", "dynamic": True}, Scheme("channel", "per token")),
        ({"group_size": -1}, {"group_size": 16, "dynamic": True}, Scheme("channel", "per 16 columns")),
        ({"strategy": "block", "block_structure": [1, 128]}, None, Scheme("block", None, (1, 128))),
    ],
)
def test_what_is_not_said_is_as_in_the_library(weights, inputs, scheme):
    library = pytest.importorskip("compressed_tensors.quantization")
    fp8 = {"type": "float"}
    config = quantization_config(fp8 | weights, None if inputs is None else fp8 | inputs)
    assert parse(config).schemes == {"Linear": scheme}
    theirs = library.QuantizationArgs(**fp8, **weights)
    assert (theirs.strategy, theirs.num_bits, theirs.symmetric, theirs.dynamic) == (scheme.weights, 8, True, False)
    if inputs is not None:
        theirs = library.QuantizationArgs(**fp8, **inputs)
        said = {"token": "per token", "tensor": "per tensor", "group": "per 16 columns"}[theirs.strategy]
        assert said + ("" if theirs.dynamic else ", static") == scheme.activations


def test_groups_that_a_size_implies_are_refused():
    with pytest.raises(CheckpointError, match="weights: strategy must be channel, tensor or block"):
        parse(quantization_config({"type": "float", "group_size": 16}))


def changed(weights=(), inputs=(), group=(), **config):
    made = quantization_config(CHANNEL | dict(weights), TOKEN | dict(inputs), **config)
    if group:
        made["config_groups"]["group_0"] |= dict(group)
    return made


REFUSED = {
    "a word": ("fp8", "quantization_config must be an object"),
    "a list": ([], "quantization_config must be an object"),
    "another method": (changed(quant_method="fp8"), "quant_method must be compressed-tensors; .*'fp8'"),
    "no method": ({"config_groups": {}}, "quant_method must be"),
    "another format": (changed(format="pack-quantized"), "format must be .*got 'pack-quantized'"),
    "a list as format": (changed(format=["float-quantized"]), "format must be .*got"),
    "another format of a group": (changed(group={"format": "nvfp4-pack-quantized"}), "group_0: format .*nvfp4"),
    "4 bits": (changed({"num_bits": 4}), "weights: num_bits must be 8.*got 4"),
    "integers": (changed({"type": "int"}), "weights: type must be float.*got 'int'"),
    "no type": (changed(group={"weights": {"num_bits": 8}}), "type must be float.*missing"),
    "zero points": (changed({"symmetric": False}), "symmetric must be true.*got False"),
    "groups of weights": (changed({"strategy": "group", "group_size": 128}), "weights: strategy must be .*'group'"),
    "an unknown strategy": (changed({"strategy": "diagonal"}), "weights: strategy must be .*'diagonal'"),
    "tokens of weights": (changed({"strategy": "token"}), "weights: strategy must be .*'token'"),
    "dynamic weights": (changed({"dynamic": True}), "weights: dynamic must be false.*got True"),
    "block without a size": (changed({"strategy": "block"}), "block_structure must be two numbers.*None"),
    "block of zeros": (changed({"strategy": "block", "block_structure": [0, 128]}), r"block_structure.*\[0, 128\]"),
    "reordered": (changed({"actorder": "weight"}), "actorder must be null.*'weight'"),
    "unknown argument": (changed({"outliers": 3}), "weights: outliers is not known"),
    "static tokens": (changed(inputs={"dynamic": False}), "input_activations: strategy must be .*False.*'token'"),
    "channels of inputs": (changed(inputs={"strategy": "channel"}), "input_activations: strategy.*'channel'"),
    "local": (changed(inputs={"dynamic": "local"}), "input_activations: strategy.*'local'"),
    "4-bit inputs": (changed(inputs={"num_bits": 4}), "input_activations: num_bits must be 8.*got 4"),
    "outputs": (changed(group={"output_activations": TOKEN}), "output_activations must be null"),
    "no weights": (changed(group={"weights": None}), "weights must be an object"),
    "a class": (changed(group={"targets": ["Embedding"]}), "targets may be.*'Embedding'"),
    "targets in no list": (changed(group={"targets": "Linear"}), "targets must be a list"),
    "a preset": (changed(config_groups={"FP8_DYNAMIC": ["Linear"]}), "FP8_DYNAMIC must be an object"),
    "nothing": (changed(config_groups={}), "config_groups must name"),
    "a damaged pattern": (changed(ignore=["re:*"]), r"ignore holds 're:\*', which is no pattern"),
    "a number to ignore": (changed(ignore=[3]), "ignore must be a list of names"),
    "sparsity": (changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config asks for more"),
    "a transform": (changed(transform_config={"config_groups": {"u": {}}}), "transform_config asks for more"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what):
    config, says = REFUSED[what]
    with pytest.raises(CheckpointError, match=f"^config.json.*{says}"):
        parse(config)


def test_a_target_of_two_groups():
    config = quantization_config()
    config["config_groups"]["group_1"] = config["config_groups"]["group_0"]
    with pytest.raises(CheckpointError, match="'Linear' is a target of two groups"):
        parse(config)


def test_two_configs_at_once():
    one = Fields({"quantization_config": quantization_config()}, "config.json")
    other = Fields({"quantization_config": quantization_config()}, "config.json: text_config")
    with pytest.raises(CheckpointError, match="text_config: quantization_config stands in config.json too"):
        parse_quantization(one, other)


@pytest.mark.parametrize(
    "scheme, shapes",
    [
        (Scheme("channel", None), ((300, 1), (300,))),
        (Scheme("tensor", None), ((), (1,), (1, 1))),
        (Scheme("block", None, (128, 128)), ((3, 2),)),
        (Scheme("block", None, (100, 64)), ((3, 4),)),
    ],
)
def test_shapes_of_scales(scheme, shapes):
    assert scheme.scale_shapes(300, 200) == shapes


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 200), st.floats(), st.sampled_from(["", "re:[", "token"])),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_damage_is_an_error_of_the_checkpoint(data, value):
    """Any value of the config replaced by any other: refused by name, or taken for what it says."""
    config = quantization_config(CHANNEL, data.draw(st.sampled_from([TOKEN, STATIC])))
    inner = config = copy.deepcopy(config)
    while True:
        key = data.draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or not inner[key] or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = value
    try:
        parse(config)
    except CheckpointError as error:
        assert "config.json" in str(error)
