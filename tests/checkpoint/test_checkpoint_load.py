"""load_weights: every tensor of HF models lands bit for bit, and every way to damage a checkpoint is named."""

import json
import re
import shutil
import struct
import sys

import pytest
import tiny_models
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

from gemcutter.checkpoint import load as load_module
from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.files import INDEX, CheckpointError, shards
from gemcutter.checkpoint.load import load, load_weights
from gemcutter.checkpoint.plan import read_plan
from gemcutter.model.weights import Weights

CPU = torch.device("cpu")
NESTED = "model.language_model."


def load_folder(folder, dtype=torch.float32):
    return load_weights(read_plan(read_spec(folder), folder), CPU, dtype)


def expected_tensors(state: dict, prefix: str, num_layers: int) -> dict[str, list[str]]:
    """Path in Weights -> names of HF's tensors that it concatenates by rows; the loader's table, said again."""
    tops = {
        "embed": ["embed_tokens.weight"],
        "norm": ["norm.weight"],
        "per_layer.embed": ["embed_tokens_per_layer.weight"],
        "per_layer.projection": ["per_layer_model_projection.weight"],
        "per_layer.projection_norm": ["per_layer_projection_norm.weight"],
    }
    layer = {
        "input_norm": ["input_layernorm.weight"],
        "post_attention_norm": ["post_attention_layernorm.weight"],
        "pre_feedforward_norm": ["pre_feedforward_layernorm.weight"],
        "post_feedforward_norm": ["post_feedforward_layernorm.weight"],
        "qkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        "q_norm": ["self_attn.q_norm.weight"],
        "k_norm": ["self_attn.k_norm.weight"],
        "o": ["self_attn.o_proj.weight"],
        "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "down": ["mlp.down_proj.weight"],
        "scalar": ["layer_scalar"],
        "experts.router": ["router.proj.weight"],
        "experts.router_scale": ["router.scale"],
        "experts.per_expert_scale": ["router.per_expert_scale"],
        "experts.gate_up": ["experts.gate_up_proj"],
        "experts.down": ["experts.down_proj"],
        "experts.pre_norm": ["pre_feedforward_layernorm_2.weight"],
        "experts.post_norm": ["post_feedforward_layernorm_2.weight"],
        "experts.dense_post_norm": ["post_feedforward_layernorm_1.weight"],
        "per_layer_input.gate": ["per_layer_input_gate.weight"],
        "per_layer_input.projection": ["per_layer_projection.weight"],
        "per_layer_input.post_norm": ["post_per_layer_input_norm.weight"],
    }
    paths = {path: [prefix + name for name in names] for path, names in tops.items()}
    for i in range(num_layers):
        paths |= {
            f"layers.{i}.{path}": [f"{prefix}layers.{i}.{name}" for name in names] for path, names in layer.items()
        }
    paths["head"] = ["lm_head.weight"]
    present = {path: [name for name in names if name in state] for path, names in paths.items()}
    return {path: names for path, names in present.items() if names}


def lookup(weights: Weights, path: str) -> torch.Tensor | None:
    value = weights
    for part in path.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
        if value is None:
            return None
    return value


def assert_same(weights: Weights, state: dict, prefix: str, dtype: torch.dtype) -> None:
    """Every tensor of the text model in HF's state dict is in the weights, and nothing else is."""
    state = {name: tensor for name, tensor in state.items() if name.startswith((prefix, "lm_head."))}
    paths = expected_tensors(state, prefix, len(weights.layers))
    assert sorted(name for names in paths.values() for name in names) == sorted(state)
    for path, names in paths.items():
        ours, theirs = lookup(weights, path), torch.cat([state[name] for name in names]).to(dtype)
        assert ours.dtype == dtype and ours.is_contiguous(), path
        assert torch.equal(ours, theirs), path
    held = {id(tensor) for tensor in walk(weights)}
    assert held == {id(lookup(weights, path)) for path in paths}


def walk(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from walk(item)
    elif value is not None:
        for item in vars(value).values():
            yield from walk(item)


@pytest.mark.parametrize("size", ["1GB", "100KB"])
@pytest.mark.parametrize("kind", tiny_models.GEMMA)
def test_text_only_models_bit_for_bit(kind, size, tmp_path):
    model = tiny_models.make(kind)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(shards(tmp_path)) > 3) == (size == "100KB")
    weights = load_folder(tmp_path)
    assert_same(weights, model.state_dict(), "model.", torch.float32)
    assert weights.head is weights.embed


@pytest.mark.parametrize(
    "stored, wanted",
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")],
)
def test_dtype_is_cast_at_the_copy(stored, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr("gemcutter.checkpoint.fill.CHUNK", 1000)  # more chunks than one, the last ragged
    model = tiny_models.make("moe", dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path)
    dtype = getattr(torch, wanted)
    assert_same(load_folder(tmp_path, dtype), model.state_dict(), "model.", dtype)


def test_untied_head(tmp_path):
    model = tiny_models.make("dense", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    weights = load_folder(tmp_path)
    assert_same(weights, model.state_dict(), "model.", torch.float32)
    assert not torch.equal(weights.head, weights.embed)


def randomized(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", ["moe", "ple_double_wide"])
def test_conditional_generation_with_towers(kind, tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    config = Gemma4Config(text_config=tiny_models.GEMMA[kind], vision_config=vision, audio_config=audio)
    model = randomized(Gemma4ForConditionalGeneration._from_config(config, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    names = {name for path in shards(tmp_path) for name in load_file(path)}
    for tower in ("vision_tower", "embed_vision", "audio_tower", "embed_audio"):
        assert any(name.startswith(f"model.{tower}.") for name in names), tower
    assert_same(load_folder(tmp_path, torch.bfloat16), model.state_dict(), NESTED, torch.bfloat16)


def test_unified_conditional_generation(tmp_path):
    text = {name: value for name, value in tiny_models.GEMMA["dense_k_eq_v"].items() if "per_layer" not in name}
    vision = {"mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 96, "patch_size": 2}
    config = Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config={"audio_embed_dim": 32})
    model = randomized(Gemma4UnifiedForConditionalGeneration._from_config(config, dtype=torch.float32))
    model.save_pretrained(tmp_path)
    assert_same(load_folder(tmp_path), model.state_dict(), NESTED, torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of each kind, in two shards, to be copied and damaged."""
    folders = {}
    for kind in ("moe", "ple_double_wide"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        model = tiny_models.make(kind)
        size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
        model.save_pretrained(folders[kind], max_shard_size=size // 2)
        assert len(shards(folders[kind])) >= 2
    return folders


@pytest.fixture
def folder(saved, tmp_path):
    """A damageable copy of the model with shared K/V."""
    return shutil.copytree(saved["ple_double_wide"], tmp_path / "model")


def edit(folder, change):
    """Apply `change` to the state dict of each shard; keep the index as it is."""
    for path in shards(folder):
        state = load_file(path)
        change(state)
        save_file(state, path)


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_folder(folder)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["moe", "ple_double_wide"])
def test_every_single_missing_piece_is_named(kind, saved, tmp_path):
    folder = shutil.copytree(saved[kind], tmp_path / "model")
    spec = read_spec(folder)
    for path in shards(folder):
        whole = load_file(path)
        for name in whole:
            save_file({key: value for key, value in whole.items() if key != name}, path)
            with pytest.raises(CheckpointError) as caught:
                load_weights(read_plan(spec, folder), CPU, torch.float32)
            if name == "model.embed_tokens.weight":
                assert "exactly one of" in str(caught.value) and name in str(caught.value)
            else:
                assert f"1 problem(s):\n  {name}: missing" in str(caught.value)
        save_file(whole, path)
    load_weights(read_plan(spec, folder), CPU, torch.float32)  # whole again


@pytest.mark.parametrize("change", ["transposed", "flat", "longer", "batched"])
def test_wrong_shape_is_named(change, folder):
    name = "model.layers.1.self_attn.o_proj.weight"
    reshape = {
        "transposed": lambda x: x.T.contiguous(),  # as many elements
        "flat": lambda x: x.flatten(),
        "longer": lambda x: torch.cat([x, x[:1]]),
        "batched": lambda x: x[None],
    }[change]
    edit(folder, lambda state: state.update({name: reshape(state[name])} if name in state else {}))
    assert f"1 problem(s):\n  {name}: shape must be [64, 128], got [" in refusal(folder)


@pytest.mark.parametrize(
    "dtype, stored", [(torch.bfloat16, "BF16"), (torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_wrong_dtype_is_named(dtype, stored, folder):
    name = "model.layers.2.layer_scalar"
    edit(folder, lambda state: state.update({name: state[name].to(dtype)} if name in state else {}))
    assert f"1 problem(s):\n  {name}: dtype must be F32, got {stored}" in refusal(folder)


EXTRA = [
    "model.layers.7.mlp.gate_proj.weight",  # behind the last layer
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_proj.weight_scale",
    "model.layers.0.router.scale",
    "model.layers.0.self_attn.k_proj.lora",
    "model.layers.6.self_attn.k_proj.bias",  # shared layer, but not one of the four known names
    "model.layers.6.self_attn.q_proj.weigth",
    "model.vision_tower.patch_embedder.input_proj.weight",  # a text-only checkpoint has no tower
    "model.language_model.norm.weight",
    "embed_tokens.weight",
    "something",
]


@pytest.mark.parametrize("name", EXTRA)
def test_left_over_keys_are_named(name, folder):
    path = shards(folder)[-1]
    save_file(load_file(path) | {name: torch.ones(2)}, path)
    assert f"1 problem(s):\n  {name}: left over" in refusal(folder)
    assert path.name in refusal(folder)


def test_unused_kv_of_shared_layers_may_be_stored(folder, saved):
    path = shards(folder)[-1]
    unused = {
        f"model.layers.{layer}.self_attn.{module}.weight": torch.full((4, 4), float("nan"))
        for layer in (3, 6)
        for module in ("k_proj", "v_proj", "k_norm", "v_norm")
    }
    save_file(load_file(path) | unused, path)
    for ours, clean in zip(walk(load_folder(folder)), walk(load_folder(saved["ple_double_wide"])), strict=True):
        assert torch.equal(ours, clean)


def test_v_proj_of_a_k_eq_v_layer_is_left_over(saved, tmp_path):
    folder = shutil.copytree(saved["moe"], tmp_path / "model")
    path = shards(folder)[0]
    save_file(load_file(path) | {"model.layers.3.self_attn.v_proj.weight": torch.ones(128, 64)}, path)
    assert "model.layers.3.self_attn.v_proj.weight: left over" in refusal(folder)


def test_key_in_two_shards_is_named(folder):
    first, second = shards(folder)[:2]
    name = "model.layers.0.mlp.down_proj.weight"
    if name not in load_file(first):
        first, second = second, first
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    message = refusal(folder)
    assert f"1 problem(s):\n  {name}: stored twice" in message
    assert first.name in message and second.name in message


def test_both_prefixes_at_once(folder):
    path = shards(folder)[0]
    save_file(load_file(path) | {NESTED + "embed_tokens.weight": torch.ones(160, 64)}, path)
    assert "it holds both" in refusal(folder)


def test_other_prefix_altogether(folder):
    def rename(state):
        for name in list(state):
            state["transformer." + name] = state.pop(name)

    edit(folder, rename)
    assert "it holds neither, but transformer.model" in refusal(folder)


def test_all_problems_are_counted_and_twenty_listed(folder):
    def damage(state):
        for name in list(state):
            if "layernorm" in name:
                state[name + "x"] = state.pop(name)

    edit(folder, damage)
    message = refusal(folder)
    listed = re.findall(r"^  model.*: (?:missing|left over)", message, re.MULTILINE)
    assert "56 problem(s)" in message and len(listed) == 20 and message.endswith("and 36 more")


def test_missing_head_of_an_untied_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "1 problem(s):\n  lm_head.weight: missing" in refusal(folder)


def test_stored_tied_head_must_equal_the_embedding(folder, monkeypatch):
    monkeypatch.setattr("gemcutter.checkpoint.fill.CHUNK", 1000)
    embed = next(
        state["model.embed_tokens.weight"]
        for state in map(load_file, shards(folder))
        if "model.embed_tokens.weight" in state
    )
    path = shards(folder)[-1]
    rest = load_file(path)
    save_file(rest | {"lm_head.weight": embed.clone()}, path)
    weights = load_folder(folder, torch.bfloat16)
    assert weights.head is weights.embed
    embed[-1, -1] += 1
    save_file(rest | {"lm_head.weight": embed}, path)
    assert "lm_head.weight differs from the embedding" in refusal(folder)
    save_file(rest | {"lm_head.weight": embed[:-1].clone()}, path)
    assert "lm_head.weight: shape must be [160, 64], got [159, 64]" in refusal(folder)


def header(entries: dict, size: int) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


DAMAGED = {
    "empty": lambda whole: b"",
    "cut in the header": lambda whole: whole[:100],
    "cut in the length": lambda whole: whole[:5],
    "cut in the data": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"\0",
    "header is not JSON": lambda whole: whole[:8] + b"\xff" * 20 + whole[28:],
    "huge header": lambda whole: struct.pack("<Q", 2**62) + whole[8:],
    "a pickle": lambda whole: b"\x80\x02}q\x00." * 10,
    "text": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "overlapping tensors": lambda whole: header(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}, 8
    ),
    "size overflow": lambda whole: header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, 8),
    "offsets outside": lambda whole: header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, 8),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("which", [0, -1])
def test_damaged_files_are_named(damage, which, folder):
    path = shards(folder)[which]
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    assert f"{path} is not a whole safetensors file" in refusal(folder)


def test_missing_shard_is_named(folder):
    path = shards(folder)[1]
    path.unlink()
    assert path.name in refusal(folder)


def test_without_index_all_files_are_read(folder, saved):
    (folder / INDEX).unlink()
    for ours, clean in zip(walk(load_folder(folder)), walk(load_folder(saved["ple_double_wide"])), strict=True):
        assert torch.equal(ours, clean)


def test_refusal_comes_before_any_memory_is_taken(folder, monkeypatch):
    def allocate(spec, device, dtype):
        assert torch.device(device).type == "meta", "allocated before the check"
        return real(spec, device, dtype)

    real = load_module.empty_weights
    monkeypatch.setattr(load_module, "empty_weights", allocate)
    edit(folder, lambda state: state.pop("model.norm.weight", None))
    assert "model.norm.weight: missing" in refusal(folder)


def test_no_progress_bar_off_a_terminal(folder, capfd):
    load(read_spec(folder), folder, CPU, torch.float32, "auto", 0)
    assert capfd.readouterr() == ("", "")


def test_progress_bar_on_a_terminal_counts_all_bytes(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    advanced = []
    real = Progress.advance
    monkeypatch.setattr(Progress, "advance", lambda self, task, n: (advanced.append(n), real(self, task, n)))
    load_folder(folder, torch.bfloat16)
    assert sum(advanced) == sum(tensor.nbytes for path in shards(folder) for tensor in load_file(path).values())
