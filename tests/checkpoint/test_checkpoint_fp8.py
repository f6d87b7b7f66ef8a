"""FP8 checkpoints: every layout lands exactly, mixed ones too, and each of many ways to break one is named."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import fp8_checkpoints as made
import pytest
import tiny_models
import torch
from fp8_checkpoints import BLOCK, CHANNEL, IGNORE, STATIC, TENSOR, TOKEN, dequantized, quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemcutter.checkpoint.config import read_quantization, read_spec
from gemcutter.checkpoint.files import CheckpointError, shards
from gemcutter.checkpoint.linears import linears, schemes_of, usual
from gemcutter.checkpoint.load import load, load_weights, quantize_on_load
from gemcutter.checkpoint.plan import read_plan
from gemcutter.checkpoint.table import empty_weights, pieces
from gemcutter.model.cost import weight_bytes
from gemcutter.model.weights import Weights
from gemcutter.ops.quantize_fp8 import Quantized

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def read(folder, dtype=BF16) -> Weights:
    return load_weights(read_plan(read_spec(folder), folder), CPU, dtype)


def expected(state: dict, names: list[str]) -> torch.Tensor:
    """Stored weights one below the other, in float32."""
    return torch.cat([dequantized(state, f"{name}.weight") for name in names])


def merged(spec, prefix="model.", within="experts."):
    """Path in Weights -> names of the linears that it merges, for weights that may be in FP8."""
    for layer in spec.layers:
        at = f"{prefix}layers.{layer.index}."
        qkv = ["q_proj"] + ["k_proj"] * layer.owns_kv + ["v_proj"] * (layer.owns_kv and not layer.k_eq_v)
        yield layer.index, "qkv", [f"{at}self_attn.{name}" for name in qkv]
        yield layer.index, "o", [f"{at}self_attn.o_proj"]
        yield layer.index, "gate_up", [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"]
        yield layer.index, "down", [f"{at}mlp.down_proj"]
        if layer.experts:
            for id in range(layer.experts.num_experts):
                expert = f"{at}{within}{id}."
                yield layer.index, f"experts.gate_up.{id}", [f"{expert}gate_proj", f"{expert}up_proj"]
                yield layer.index, f"experts.down.{id}", [f"{expert}down_proj"]
        if spec.ple_width:
            yield layer.index, "per_layer_input.gate", [f"{at}per_layer_input_gate"]
            yield layer.index, "per_layer_input.projection", [f"{at}per_layer_projection"]


def at(weights: Weights, layer: int, path: str):
    value = weights.layers[layer]
    for part in path.split("."):
        if part.isdecimal():
            id = int(part)
            value = Quantized(value.q[id], value.scale[id]) if isinstance(value, Quantized) else value[id]
        else:
            value = getattr(value, part)
    return value


def assert_pair(got, state, names):
    """Held as it is stored: every byte of the values, every scale."""
    assert isinstance(got, Quantized), names
    assert got.q.is_contiguous() and got.scale.is_contiguous() and got.scale.dtype == torch.float32
    q = torch.cat([state[f"{name}.weight"].view(torch.uint8) for name in names])
    assert torch.equal(got.q.view(torch.uint8), q), names
    scale = torch.cat([state[f"{name}.weight_scale"].float().reshape(-1, 1).expand(len(state[f"{name}.weight"]), 1)
                       for name in names])  # fmt: skip
    assert torch.equal(got.scale, scale), names


@pytest.mark.parametrize("flat", [False, True], ids=["[out, 1]", "[out]"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("within", ["experts.", "moe.experts."])
def test_experts_one_by_one_bit_for_bit(within, scale_dtype, flat, tmp_path):
    state = made.make(tmp_path, within=within, scale_dtype=scale_dtype, flat_scales=flat)
    weights = read(tmp_path)
    for layer, path, names in merged(read_spec(tmp_path), within=within):
        assert_pair(at(weights, layer, path), state, names)
    assert torch.equal(weights.layers[0].experts.router, state["model.layers.0.router.proj.weight"])
    assert torch.equal(weights.embed, state["model.embed_tokens.weight"])


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("kind", ["dense_k_eq_v", "ple_double_wide", "ple_shared"])
def test_dense_and_per_layer_inputs(kind, prefix, tmp_path):
    state = made.make(tmp_path, kind, prefix=prefix)
    weights = read(tmp_path)
    for layer, path, names in merged(read_spec(tmp_path), prefix):
        assert_pair(at(weights, layer, path), state, names)
    if weights.per_layer is not None:
        assert_pair(weights.per_layer.projection, state, [f"{prefix}per_layer_model_projection"])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_scale_of_a_tensor_is_that_of_its_channels(shape, tmp_path):
    state = made.make(tmp_path, config=quantization_config(TENSOR))
    state = {name: x.reshape(shape) if name.endswith("weight_scale") else x for name, x in state.items()}
    made.write(tmp_path, state)
    weights = read(tmp_path)
    for layer, path, names in merged(read_spec(tmp_path)):
        assert_pair(at(weights, layer, path), state, names)


NOT_RUN = {
    "static inputs": quantization_config(CHANNEL, STATIC),
    "static inputs, one scale": quantization_config(TENSOR, STATIC),
    "dynamic inputs, one scale": quantization_config(TENSOR, TOKEN | {"strategy": "tensor"}),
    "weights alone": quantization_config(CHANNEL, None),
    "blocks": quantization_config(BLOCK, TOKEN),
    "blocks and groups": quantization_config(BLOCK, TOKEN | {"strategy": "group", "group_size": 48}),
}


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", NOT_RUN)
def test_schemes_that_are_not_run_are_dequantised_and_said(scheme, scale_dtype, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("gemcutter.checkpoint.fill.CHUNK", 1000)  # more chunks than one, across blocks
    state = made.make(tmp_path, config=NOT_RUN[scheme], scale_dtype=scale_dtype)
    spec = read_spec(tmp_path)
    assert not spec.quantized
    for dtype in (torch.float32, BF16):
        weights = read(tmp_path, dtype)
        for layer, path, names in merged(spec):
            assert torch.equal(at(weights, layer, path), expected(state, names).to(dtype)), path
    linears = sum(name.endswith(".weight_scale") for name in state)
    assert f"{linears} linears stored in FP8 are dequantised" in caplog.text and "is not run in FP8" in caplog.text


def test_experts_together_in_a_file_of_fp8(tmp_path, caplog):
    state = made.make(tmp_path, within=None)
    weights = read(tmp_path)
    for layer in range(4):
        assert_pair(weights.layers[layer].down, state, [f"model.layers.{layer}.mlp.down_proj"])
        experts = weights.layers[layer].experts
        assert torch.equal(experts.gate_up, state[f"model.layers.{layer}.experts.gate_up_proj"])
        assert torch.equal(experts.down, state[f"model.layers.{layer}.experts.down_proj"])
    assert not caplog.text


def test_layers_may_differ(tmp_path, caplog):
    """Left out: all of layer 1, q of layer 2, one expert of layer 3. What is merged goes one way."""
    ignore = (
        *IGNORE,
        r"re:model\.layers\.1\.",
        "model.layers.2.self_attn.q_proj",
        "model.layers.3.experts.5.up_proj",
    )
    state = made.make(tmp_path, config=quantization_config(ignore=ignore))
    weights = read(tmp_path)
    plain = {(1, "qkv"), (1, "o"), (1, "gate_up"), (1, "down"), (1, "experts"), (2, "qkv"), (3, "experts")}
    for layer, path, names in merged(read_spec(tmp_path)):
        if (layer, path.split(".")[0]) in plain:
            assert torch.equal(at(weights, layer, path), expected(state, names).to(BF16)), path
        else:
            assert_pair(at(weights, layer, path), state, names)
    merged_with = 8 * 3 - 1 + 2  # the other experts' linears of layer 3, k and v of layer 2
    assert f"{merged_with} linears stored in FP8 are dequantised" in caplog.text
    assert "merged with linears that are not in FP8" in caplog.text


def test_a_router_and_a_head_quantised_by_omission(tmp_path, caplog):
    state = made.make(tmp_path, config=quantization_config(ignore=()), tie_word_embeddings=False)
    assert state["lm_head.weight"].dtype == torch.float8_e4m3fn
    weights = read(tmp_path)
    assert torch.equal(weights.head, dequantized(state, "lm_head.weight").to(BF16))
    router = dequantized(state, "model.layers.2.router.proj.weight").to(BF16)
    assert torch.equal(weights.layers[2].experts.router, router)
    assert isinstance(weights.layers[2].qkv, Quantized)
    assert "5 linears stored in FP8 are dequantised" in caplog.text and "routers and heads" in caplog.text


def test_scales_of_a_cache_are_left_out_and_said(tmp_path, caplog):
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config = quantization_config(kv_cache_scheme=cache)
    state = made.make(tmp_path, config=config)
    extra = {f"model.layers.{i}.self_attn.{x}_scale": torch.ones(1) for i in range(4) for x in "kv"}
    made.write(tmp_path, state | extra)
    assert isinstance(read(tmp_path).layers[0].qkv, Quantized)
    assert "kv_cache_scheme is left out" in caplog.text
    made.write(tmp_path, state | {"model.layers.9.self_attn.k_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.self_attn\.k_scale: left over"):
        read(tmp_path)


def test_unused_kv_of_shared_layers_may_be_quantised(tmp_path):
    state = made.make(tmp_path, "ple_shared")
    extra = {f"model.layers.6.self_attn.k_proj.{name}": torch.ones(3) for name in ("weight", "weight_scale")}
    made.write(tmp_path, state | extra)
    read(tmp_path)


EXPERT = "model.layers.2.experts.5"
LINEAR = "model.layers.1.mlp.down_proj"


def swap(state, one, other):
    state[one], state[other] = state[other], state[one]


def put(name, value):
    return lambda state: state.update({name: value(state[name]) if callable(value) else value})


def spoil(name, index, value):
    """The scale with another value in one row."""
    return lambda state: state[name].view(-1).__setitem__(index, value)


# How a checkpoint is broken: what is done to its tensors, and what the error says
BROKEN = {
    "an expert's scale is missing": (
        lambda s: s.pop(f"{EXPERT}.up_proj.weight_scale"),
        f"1 problem(s):\n  {EXPERT}.up_proj.weight_scale: missing",
    ),
    "an expert's weight is missing": (
        lambda s: s.pop(f"{EXPERT}.gate_proj.weight"),
        f"1 problem(s):\n  {EXPERT}.gate_proj.weight: missing",
    ),
    "an expert is missing": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith(f"{EXPERT}.")],
        "6 problem(s)",
    ),
    "a linear's scale is missing": (
        lambda s: s.pop(f"{LINEAR}.weight_scale"),
        f"1 problem(s):\n  {LINEAR}.weight_scale: missing",
    ),
    "two experts' shapes are swapped": (
        lambda s: swap(s, f"{EXPERT}.up_proj.weight", f"{EXPERT}.down_proj.weight"),
        f"{EXPERT}.up_proj.weight: shape must be [32, 64], got [64, 32]",
    ),
    "two scales are swapped": (
        lambda s: swap(s, f"{EXPERT}.up_proj.weight_scale", f"{EXPERT}.down_proj.weight_scale"),
        f"{EXPERT}.up_proj.weight_scale: shape must be [32, 1] or [32], got [64, 1]",
    ),
    "a scale is truncated": (
        put(f"{LINEAR}.weight_scale", lambda x: x[:-1]),
        f"{LINEAR}.weight_scale: shape must be [64, 1] or [64], got [63, 1]",
    ),
    "a scale lies down": (
        put(f"{LINEAR}.weight_scale", lambda x: x.T),
        f"{LINEAR}.weight_scale: shape must be [64, 1] or [64], got",
    ),
    "one scale for a tensor of channels": (
        put(f"{LINEAR}.weight_scale", lambda x: x[:1]),
        f"{LINEAR}.weight_scale: shape must be [64, 1] or [64], got",
    ),
    "a scale is NaN": (
        spoil(f"{EXPERT}.down_proj.weight_scale", 9, torch.nan),
        f"{EXPERT}.down_proj.weight_scale: must be finite and above 0, got nan",
    ),
    "a scale is infinite": (
        spoil(f"{LINEAR}.weight_scale", 63, torch.inf),
        f"{LINEAR}.weight_scale: must be finite and above 0, got inf",
    ),
    "a scale is zero": (
        spoil(f"{LINEAR}.weight_scale", 0, 0.0),
        f"{LINEAR}.weight_scale: must be finite and above 0, got 0.0",
    ),
    "a scale is negative": (
        spoil(f"{LINEAR}.weight_scale", 1, -0.5),
        f"{LINEAR}.weight_scale: must be finite and above 0, got -0.5",
    ),
    "a scale is in FP8": (
        put(f"{LINEAR}.weight_scale", lambda x: x.to(torch.float8_e4m3fn)),
        f"{LINEAR}.weight_scale: dtype must be BF16 or F16 or F32, got F8_E4M3",
    ),
    "an expert was left in bfloat16": (
        put(f"{EXPERT}.up_proj.weight", lambda x: x.to(BF16)),
        f"{EXPERT}.up_proj.weight: dtype must be F8_E4M3, got BF16: quantization_config means it",
    ),
    "the other FP8": (
        put(f"{LINEAR}.weight", lambda x: x.float().to(torch.float8_e5m2)),
        f"{LINEAR}.weight: dtype must be F8_E4M3, got F8_E5M2",
    ),
    "the router was quantised": (
        put("model.layers.0.router.proj.weight", lambda x: x.to(torch.float8_e4m3fn)),
        "model.layers.0.router.proj.weight: dtype must be BF16, got F8_E4M3: quantization_config leaves it out",
    ),
    "a norm was quantised": (
        put("model.layers.0.input_layernorm.weight", lambda x: x.to(torch.float8_e4m3fn)),
        "model.layers.0.input_layernorm.weight: dtype must be BF16, got F8_E4M3",
    ),
    "a scale without a quantised weight": (
        put("model.layers.0.router.proj.weight_scale", torch.ones(8, 1)),
        "model.layers.0.router.proj.weight_scale: left over",
    ),
    "an expert too many": (
        put("model.layers.0.experts.8.up_proj.weight", torch.ones(32, 64).to(torch.float8_e4m3fn)),
        "model.layers.0.experts.8.up_proj.weight: left over",
    ),
    "an expert by two names": (
        lambda s: s.update(
            {"model.layers.0.experts.03.up_proj.weight": s["model.layers.0.experts.3.up_proj.weight"]}
        ),
        "model.layers.0.experts.03.up_proj.weight: left over",
    ),
    "experts in both places": (
        lambda s: s.update({n.replace(".experts.", ".moe.experts."): x for n, x in s.items() if EXPERT in n}),
        "model.layers.2.moe.experts.5.gate_proj.weight: left over",
    ),
    "experts apart and together": (
        put("model.layers.0.experts.gate_up_proj", torch.ones(8, 64, 64, dtype=BF16)),
        "model.layers.0.experts.0.gate_proj.weight: left over",
    ),
    "experts together in FP8": (
        lambda s: (
            [s.pop(name) for name in list(s) if "layers.0.experts." in name],
            put("model.layers.0.experts.gate_up_proj", torch.ones(8, 64, 64).to(torch.float8_e4m3fn))(s),
            put("model.layers.0.experts.down_proj", torch.ones(8, 64, 32, dtype=BF16))(s),
        ),
        "model.layers.0.experts.gate_up_proj: dtype must be BF16, got F8_E4M3",
    ),
    "a static scale that no scheme has": (
        put(f"{LINEAR}.input_scale", torch.ones(1)),
        f"{LINEAR}.input_scale: left over",
    ),
    "a zero point": (
        put(f"{LINEAR}.weight_zero_point", torch.zeros(64, 1)),
        f"{LINEAR}.weight_zero_point: left over",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    return folder, made.make(folder)


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    return str(caught.value)


@pytest.mark.parametrize("way", BROKEN)
def test_broken_tensors_are_named(way, whole):
    folder, state = whole
    damage, says = BROKEN[way]
    broken = {name: tensor.clone() for name, tensor in state.items()}
    damage(broken)
    made.write(folder, broken)
    assert says in refusal(folder)
    made.write(folder, state)
    read(folder)  # whole again


def test_every_piece_of_every_expert_is_needed_once(whole):
    folder, state = whole
    pieces = [name for name in state if "layers.3.experts." in name]
    assert len(pieces) == 8 * 3 * 2
    for name in pieces:
        made.write(folder, {key: tensor for key, tensor in state.items() if key != name})
        assert f"1 problem(s):\n  {name}: missing" in refusal(folder)
    made.write(folder, state)
    first, second = shards(folder)
    name = next(name for name in pieces if name in load_file(second))
    save_file(load_file(first) | {name: state[name]}, first)
    assert f"1 problem(s):\n  {name}: stored twice" in refusal(folder)
    made.write(folder, state)


def test_a_truncated_file_is_named(whole):
    folder, state = whole
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is not a whole safetensors file" in refusal(folder)
    made.write(folder, state)


def test_all_damaged_scales_are_counted(whole):
    folder, state = whole
    names = [name for name in state if name.endswith("weight_scale")]
    made.write(folder, {name: x * (torch.nan if name in names[:30] else 1) if name in names else x
                        for name, x in state.items()})  # fmt: skip
    message = refusal(folder)
    assert "30 scale(s)" in message and message.count("must be finite") == 20 and names[0] in message
    made.write(folder, state)


def test_damage_is_found_before_any_weight_is_read(whole, monkeypatch):
    folder, state = whole
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken[f"{LINEAR}.weight_scale"][3] = torch.nan
    made.write(folder, broken)
    monkeypatch.setattr("gemcutter.checkpoint.load.empty_weights", None)
    assert f"{LINEAR}.weight_scale" in refusal(folder)
    made.write(folder, state)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_linears_may_be_left_out(data, tmp_path_factory):
    """Whatever the ignore list says, by name or pattern, lands exactly, in FP8 or not."""
    folder = tmp_path_factory.mktemp("ignored")
    layers = st.sampled_from([0, 1, 2, 3])
    linears = st.sampled_from(["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "experts.7.gate_proj"])
    name = st.builds("model.layers.{}.{}".format, layers, linears)
    pattern = st.one_of(
        st.builds(r"re:.*layers\.{}\..*".format, layers), st.builds(r"re:model\.layers\.\d\.{}$".format, linears),
        st.sampled_from([r"re:.*\.experts\..*", r"re:.*self_attn", r"re:.*(gate|up)_proj", "re:embed", "re:proj"]),
    )  # fmt: skip
    ignore = data.draw(st.lists(st.one_of(name, pattern), max_size=3))
    state = made.make(folder, config=quantization_config(ignore=(*IGNORE, *ignore)))
    weights, spec = read(folder), read_spec(folder)
    in_fp8 = set()
    for layer, path, names in merged(spec):
        got = at(weights, layer, path)
        if isinstance(got, Quantized):
            assert_pair(got, state, names)
            in_fp8.add(f"layers.{layer}.{path.split('.')[0]}")
        else:
            assert torch.equal(got, expected(state, names).to(BF16))
    assert in_fp8 == spec.quantized


def test_experts_in_fp8_run_in_bfloat16_only(whole):
    folder, _ = whole
    spec = read_spec(folder)
    with pytest.raises(CheckpointError, match="experts in FP8 run in bfloat16 only, got dtype torch.float32"):
        load(spec, folder, CPU, torch.float32, "auto", 0)
    with pytest.raises(CheckpointError, match="bfloat16 only"):
        load(spec, folder, CPU, torch.float16, "dummy", 0)


def test_experts_together_need_no_bfloat16(tmp_path):
    """The config alone would have them in FP8; the files do not."""
    made.make(tmp_path, within=None)
    assert load(read_spec(tmp_path), tmp_path, CPU, torch.float32, "auto", 0).embed.dtype == torch.float32


@pytest.mark.parametrize("kind", ["moe", "ple_double_wide"])
def test_quantised_on_load_as_each_channel_alone(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("gemcutter.checkpoint.fill.CHUNK", 1000)
    model = tiny_models.make(kind, BF16)
    model.save_pretrained(tmp_path)
    spec = quantize_on_load(read_spec(tmp_path), tmp_path)
    weights = load(spec, tmp_path, CPU, BF16, "auto", 0)
    state = made.unpacked(model.state_dict())
    for layer, path, names in merged(spec):
        got = at(weights, layer, path)
        wide = torch.cat([state[f"{name}.weight"] for name in names]).float()
        scale = wide.abs().amax(1, keepdim=True) / torch.full((len(wide), 1), 448.0)
        assert isinstance(got, Quantized) and torch.equal(got.scale, scale), path
        assert torch.equal(got.q.float(), (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()), path
    assert isinstance(weights.embed, torch.Tensor)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_not_quantised(value, tmp_path):
    model = tiny_models.make("moe", BF16)
    model.model.layers[2].experts.down_proj.data[7, 63, 31] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.experts\.down_proj holds an infinity or a NaN"):
        load(quantize_on_load(read_spec(tmp_path), tmp_path), tmp_path, CPU, BF16, "auto", 0)


def test_what_is_quantised_is_not_quantised_on_load(whole):
    folder, _ = whole
    with pytest.raises(CheckpointError, match="has a quantization_config, so that nothing is left to quantise"):
        quantize_on_load(read_spec(folder), folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("scheme", ["channels", "blocks", "on load"])
def test_host_memory_stays_under_twice_the_largest_file(scheme, tmp_path):
    """Besides the weights themselves, on a checkpoint of six files."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
    sizes |= {"num_experts": 32, "moe_intermediate_size": 512}
    config = tiny_models.config("moe", **sizes)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    quantization = {
        "channels": quantization_config(),
        "blocks": quantization_config(CHANNEL | {"strategy": "block", "block_structure": [128, 128]}),
        "on load": None,
    }[scheme]
    if quantization is not None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    spec = read_spec(tmp_path)
    names = dict.fromkeys(range(6), usual(spec.family, each=quantization is not None))
    schemes = schemes_of(linears(spec, "model.", names), quantization and read_quantization(tmp_path))
    meta = empty_weights(replace(spec, quantized=frozenset()), torch.device("meta"), BF16)
    table = pieces(spec, meta, "model.", names)
    files = [{} for _ in range(6)]
    for name, view in table.items():
        linear, file = name.removesuffix(".weight"), files[int(name.split(".")[2]) if "layers" in name else 0]
        file[name] = torch.full(view.shape, 0.5, dtype=torch.float8_e4m3fn if linear in schemes else BF16)
        if linear in schemes:
            file[f"{linear}.weight_scale"] = torch.full(schemes[linear].scale_shapes(*view.shape)[0], 0.25)
    for index, file in enumerate(files):
        save_file(file, tmp_path / f"{index}.safetensors")
    largest = max(path.stat().st_size for path in shards(tmp_path))
    if scheme == "on load":
        spec = quantize_on_load(spec, tmp_path)
    held = weight_bytes(spec, 2)
    assert sum(path.stat().st_size for path in shards(tmp_path)) > 5 * largest, "the bound must be far below"
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, "auto" if quantization else "fp8"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert held < int(run.stdout) < held + 2 * largest


PEAK = """
import re, sys, torch
from pathlib import Path
from gemcutter.checkpoint.config import read_quantization, read_spec
from gemcutter.checkpoint.load import load, quantize_on_load
from gemcutter.ops.quantize_fp8 import quantize_fp8

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

folder = Path(sys.argv[1])
spec = read_spec(folder)
if sys.argv[2] == "fp8":
    spec = quantize_on_load(spec, folder)
quantize_fp8(torch.ones(1, 512, dtype=torch.bfloat16))
before = status("VmRSS")
weights = load(spec, folder, torch.device("cpu"), torch.bfloat16, "auto", 0)
print(status("VmHWM") - before)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["channels", "blocks", "on load"])
def test_load_to_a_gpu_equals_load_to_the_cpu(scheme, tmp_path):
    if scheme == "on load":
        tiny_models.make("moe", BF16).save_pretrained(tmp_path)
        spec = quantize_on_load(read_spec(tmp_path), tmp_path)
    else:
        made.make(tmp_path, config=quantization_config(CHANNEL if scheme == "channels" else BLOCK))
        spec = read_spec(tmp_path)
    here, there = (load(spec, tmp_path, torch.device(name), BF16, "auto", 0) for name in ("cpu", "cuda"))
    for layer, path, names in merged(spec):
        one, other = at(here, layer, path), at(there, layer, path)
        assert type(one) is type(other), names
        for a, b in zip(one, other, strict=True) if isinstance(one, Quantized) else [(one, other)]:
            assert torch.equal(a.float(), b.cpu().float()), names
