"""FP8 checkpoints: every layout lands exactly, mixed ones too, in FP8 or dequantised, and what that is is said."""

import fp8_checkpoints as made
import pytest
import tiny_models
import torch
from fp8_checkpoints import BLOCK, CHANNEL, IGNORE, STATIC, TENSOR, TOKEN, dequantized, quantization_config
from fp8_held import assert_pair, at, expected, merged, read
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.files import CheckpointError
from gemcutter.checkpoint.load import load, quantize_on_load
from gemcutter.ops.quantize_fp8 import Quantized

CPU = torch.device("cpu")
BF16 = torch.bfloat16


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


def test_experts_in_fp8_run_in_bfloat16_only(tmp_path):
    made.make(tmp_path)
    spec = read_spec(tmp_path)
    with pytest.raises(CheckpointError, match="experts in FP8 run in bfloat16 only, got dtype torch.float32"):
        load(spec, tmp_path, CPU, torch.float32, "auto", 0)
    with pytest.raises(CheckpointError, match="bfloat16 only"):
        load(spec, tmp_path, CPU, torch.float16, "dummy", 0)


def test_experts_together_need_no_bfloat16(tmp_path):
    """The config alone would have them in FP8; the files do not."""
    made.make(tmp_path, within=None)
    assert load(read_spec(tmp_path), tmp_path, CPU, torch.float32, "auto", 0).embed.dtype == torch.float32


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
