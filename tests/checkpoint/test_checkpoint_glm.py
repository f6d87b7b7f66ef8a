"""GLM-4 MoE checkpoints: config.json as HF reads it, HF's own tensors, FP8, and what is refused by name."""

import json
import logging
from dataclasses import replace

import pytest
import tiny_models
import torch
from fp8_checkpoints import CHANNEL, dequantized, quantization_config, quantize, write
from glm_cut import GLM_4_7
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

from gemcutter.checkpoint.config import read_generation_config, read_spec
from gemcutter.checkpoint.files import CheckpointError
from gemcutter.checkpoint.load import load, quantize_on_load
from gemcutter.checkpoint.table import empty_weights, pieces
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine
from gemcutter.model import cost
from gemcutter.ops.attention.rope import rope_table
from gemcutter.ops.quantize_fp8 import Quantized
from gemcutter.spec import Family, Kind

CPU = torch.device("cpu")
AIR = GLM_4_7 | {
    "hidden_size": 4096, "intermediate_size": 10_944, "num_hidden_layers": 46, "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408, "n_routed_experts": 128, "routed_scaling_factor": 1.0, "use_qk_norm": False,
}  # fmt: skip


def folder_of(path, config: dict):
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("config", [GLM_4_7, AIR], ids=["4.7", "4.5-Air"])
def test_released_configs(config, tmp_path):
    spec = read_spec(folder_of(tmp_path, config))
    theirs = Glm4MoeConfig.from_pretrained(tmp_path)
    assert spec.family is Family.GLM4_MOE and spec.dtype == "bfloat16" and not spec.tied_head
    assert (spec.hidden, spec.vocab, spec.eps) == (theirs.hidden_size, theirs.vocab_size, theirs.rms_norm_eps)
    assert len(spec.layers) == theirs.num_hidden_layers and spec.context_length == theirs.max_position_embeddings
    for index, layer in enumerate(spec.layers):
        dense = index < theirs.first_k_dense_replace
        assert layer.kind is Kind.FULL and layer.window is None and layer.owns_kv and not layer.k_eq_v
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (96, 8, 128)
        assert layer.qkv_bias and layer.qk_norm == theirs.use_qk_norm
        assert layer.mlp_width == (theirs.intermediate_size if dense else theirs.moe_intermediate_size)
        assert (layer.experts is None) == dense
    experts = spec.layers[-1].experts
    assert (experts.num_experts, experts.top_k) == (theirs.n_routed_experts, 8)
    assert experts.renormalise and experts.scale == theirs.routed_scaling_factor
    rope = spec.layers[0].rope
    cos, _ = Glm4MoeRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(100)[None])
    assert torch.equal(rope_table(rope, 2 * rope.angles, 100, torch.float32, "cpu")[0], cos[0, :, : rope.angles])


def test_published_sizes(tmp_path):
    """Published are 355 and 106 billion, 32 and 12 active; the former with the layer that drafts."""
    for config, billions, active in ((GLM_4_7, 353, 32), (AIR, 107, 12)):
        spec = read_spec(folder_of(tmp_path, config))
        views = pieces(spec, empty_weights(spec, torch.device("meta"), torch.bfloat16), "model.").values()
        assert sum(view.numel() for view in views) == cost.parameters(spec)
        assert cost.parameters(spec) / 1e9 == pytest.approx(billions, abs=1)
        assert cost.active_parameters(spec) / 1e9 == pytest.approx(active, abs=2)


def test_both_dialects_of_rope(tmp_path):
    for rope in (
        {"rope_theta": 500.0, "partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"rope_theta": 500.0}, "partial_rotary_factor": 0.25},
    ):
        plain = {name: value for name, value in GLM_4_7.items() if not name.startswith(("rope", "partial"))}
        spec = read_spec(folder_of(tmp_path, plain | rope))
        assert (spec.layers[0].rope.theta, spec.layers[0].rope.angles) == (500.0, 16)
    assert read_spec(folder_of(tmp_path, plain)).layers[0].rope.angles == 32  # half of a head


@pytest.mark.parametrize(
    "change, says",
    [
        ({"n_group": 4}, "n_group must be 1"),
        ({"topk_group": 2}, "topk_group must be 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type must be default, got 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type must be default, got 'linear'"),
        ({"partial_rotary_factor": 0.001}, "partial_rotary_factor turns 0"),
        ({"n_shared_experts": 0}, "n_shared_experts must be an integer from 1"),
        ({"num_experts_per_tok": 161}, "num_experts_per_tok must be an integer from 1 to 160"),
        ({"head_dim": 96}, "head_dim must be one of"),
        ({"num_key_value_heads": 7}, "num_attention_heads must be a multiple of the 7"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor must be a number above 0"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of"),
        ({"model_type": "glm5"}, "model_type must be one of .*glm4_moe"),
    ],
)
def test_refusals(change, says, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        read_spec(folder_of(tmp_path, GLM_4_7 | change))


@pytest.fixture(params=list(tiny_models.GLM))
def saved(request, tmp_path):
    """(HF's model, its folder): HF stores each expert's three linears, as the releases do."""
    model = tiny_models.make(request.param, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_loads_hfs_tensors(saved):
    model, folder = saved
    spec = read_spec(folder)
    weights = load(spec, folder, CPU, torch.bfloat16, "auto", 0)
    state = model.state_dict()
    assert torch.equal(weights.embed, state["model.embed_tokens.weight"])
    assert torch.equal(weights.head, state["lm_head.weight"]) and torch.equal(
        weights.norm, state["model.norm.weight"]
    )
    for layer, w in zip(spec.layers, weights.layers, strict=True):
        of = {k.removeprefix(f"model.layers.{layer.index}."): v for k, v in state.items()}
        names = [f"self_attn.{name}_proj" for name in "qkv"]
        assert torch.equal(w.qkv, torch.cat([of[f"{name}.weight"] for name in names]))
        assert torch.equal(w.o, of["self_attn.o_proj.weight"])
        if layer.qkv_bias:
            assert torch.equal(w.qkv_bias, torch.cat([of[f"{name}.bias"] for name in names]))
        if layer.qk_norm:
            assert torch.equal(w.k_norm, of["self_attn.k_norm.weight"])
            assert torch.equal(w.q_norm, of["self_attn.q_norm.weight"])
        assert torch.equal(w.input_norm, of["input_layernorm.weight"])
        assert torch.equal(w.post_attention_norm, of["post_attention_layernorm.weight"])
        mlp = "mlp.shared_experts." if layer.experts else "mlp."
        assert torch.equal(w.gate_up, torch.cat([of[f"{mlp}gate_proj.weight"], of[f"{mlp}up_proj.weight"]]))
        assert torch.equal(w.down, of[f"{mlp}down_proj.weight"])
        if layer.experts:
            assert torch.equal(w.experts.gate_up, of["mlp.experts.gate_up_proj"])
            assert torch.equal(w.experts.down, of["mlp.experts.down_proj"])
            assert torch.equal(w.experts.router, of["mlp.gate.weight"])
            correction = of["mlp.gate.e_score_correction_bias"]
            assert torch.equal(w.experts.correction, correction) and correction.dtype == torch.float32


def rewrite(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.pop("model.layers.2.mlp.experts.5.up_proj.weight"), "experts.5.up_proj.weight: missing"),
        (lambda s: s.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "e_score_correction_bias: missing"),
        (lambda s: s.pop("model.layers.0.self_attn.k_proj.bias"), "k_proj.bias: missing"),
        (lambda s: s.update({"model.layers.0.mlp.gate.weight": torch.ones(2)}), "0.mlp.gate.weight: left over"),
        (
            lambda s: s.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(8).bfloat16()}),
            "e_score_correction_bias: dtype must be F32, got BF16",
        ),
        (
            lambda s: s.update({"model.layers.1.mlp.experts.0.down_proj.weight": torch.zeros(32, 64).bfloat16()}),
            r"experts.0.down_proj.weight: shape must be \[64, 32\]",
        ),
    ],
)
def test_every_difference_is_named(change, says, tmp_path):
    tiny_models.make("glm", dtype=torch.bfloat16).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=says):
        load(read_spec(tmp_path), tmp_path, CPU, torch.bfloat16, "auto", 0)


def test_the_layer_that_drafts_is_left_out_with_a_notice(tmp_path, caplog):
    tiny_models.make("glm", dtype=torch.bfloat16).save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda s: s.update({f"model.layers.4.{name}": torch.ones(3) for name in ("eh_proj", "enorm")})
    )
    with caplog.at_level(logging.WARNING):
        load(read_spec(tmp_path), tmp_path, CPU, torch.bfloat16, "auto", 0)
    assert "2 tensors of layer 4, which drafts tokens, are not used" in caplog.text
    rewrite(tmp_path, lambda s: s.update({"model.layers.5.enorm": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="layers.5.enorm: left over"):
        load(read_spec(tmp_path), tmp_path, CPU, torch.bfloat16, "auto", 0)


def test_fp8_dynamic(tmp_path):
    """As llm-compressor writes it: every Linear but the head and the router, which is none of PyTorch's."""
    model = tiny_models.make("glm", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for name in [name for name in state if name.endswith("_proj.weight")]:
        state[name], state[name.replace(".weight", ".weight_scale")] = quantize(
            state[name], CHANNEL, torch.bfloat16
        )
    write(tmp_path, state, quantization_config(ignore=["lm_head", "re:.*mlp.gate$"]))
    spec = read_spec(tmp_path)
    assert {name.partition(".")[2].partition(".")[2] for name in spec.quantized} == {
        "qkv", "o", "gate_up", "down", "experts",
    }  # fmt: skip
    weights = load(spec, tmp_path, CPU, torch.bfloat16, "auto", 0)
    w = weights.layers[2]
    for held, names in (
        (w.qkv, [f"self_attn.{name}_proj" for name in "qkv"]),
        (w.gate_up, ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"]),
        (Quantized(w.experts.down.q[5], w.experts.down.scale[5]), ["mlp.experts.5.down_proj"]),
    ):
        stored = torch.cat([dequantized(state, f"model.layers.2.{name}.weight") for name in names])
        assert torch.equal(held.dequantize(torch.float32), stored)
    assert w.experts.router.dtype == torch.bfloat16 and w.qkv_bias.dtype == torch.bfloat16
    state.pop("model.layers.3.mlp.experts.7.gate_proj.weight_scale")
    write(tmp_path, state)
    with pytest.raises(CheckpointError, match="3.mlp.experts.7.gate_proj.weight_scale: missing"):
        load(spec, tmp_path, CPU, torch.bfloat16, "auto", 0)


def test_quantises_on_load_and_makes_dummies(saved):
    _, folder = saved
    spec = quantize_on_load(read_spec(folder), folder)
    for load_format in ("auto", "dummy"):
        weights = load(spec, folder, CPU, torch.bfloat16, load_format, 0)
        assert isinstance(weights.layers[-1].experts.gate_up, Quantized)
        assert isinstance(weights.layers[0].qkv, Quantized) and isinstance(weights.head, torch.Tensor)
    held = [replace(spec, quantized=frozenset()), spec]
    assert cost.weight_bytes(held[1], 2) < 0.8 * cost.weight_bytes(held[0], 2)


def test_stops_are_the_files_own(tmp_path):
    model = tiny_models.make("glm")
    model.save_pretrained(tmp_path)
    assert read_generation_config(tmp_path)["eos_token_id"] == [1, 3]
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "generation_config.json").unlink()
    assert read_generation_config(folder_of(tmp_path, config))["eos_token_id"] == []
    assert isinstance(model, Glm4MoeForCausalLM)


def test_no_fp8_cache(tmp_path):
    tiny_models.make("glm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="kv_cache_dtype fp8_e4m3 .* leave it at auto"):
        Engine.start(EngineConfig(model_path=str(tmp_path), device="cpu", kv_cache_dtype="fp8_e4m3"))
