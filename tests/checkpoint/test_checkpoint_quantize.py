"""quantize_checkpoint: the values are the op's, nothing else changes, HF reads the result, a broken run goes on."""

import json
import re
import shutil

import pytest
import tiny_models
import torch
from fp8_checkpoints import dequantized, unpacked
from safetensors.torch import load_file, save_file
from transformers import (
    CompressedTensorsConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Glm4MoeForCausalLM,
    conversion_mapping,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from gemcutter.checkpoint import quantize as module
from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.files import INDEX, CheckpointError, shards
from gemcutter.checkpoint.load import load, quantize_on_load
from gemcutter.checkpoint.quantize import IGNORE, quantize_checkpoint
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8_reference

CPU = torch.device("cpu")
BF16 = torch.bfloat16
LEFT = ("embed", "norm", "router", "scalar", "tower", "lm_head")  # in names of tensors that stay as they are


def quiet(done: int, total: int) -> None: ...


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folders = {}
    for kind in ("moe", "ple_shared"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny_models.make(kind, BF16).save_pretrained(folders[kind], max_shard_size="100KB")
        (folders[kind] / "tokenizer.json").write_text("{}")
        (folders[kind] / "pytorch_model.bin").write_bytes(b"a pickle")
        (folders[kind] / "original").mkdir()
        (folders[kind] / "original" / "weights.pth").write_bytes(b"another")
    return folders


@pytest.mark.parametrize("kind", ["moe", "ple_shared"])
def test_every_linear_and_nothing_else(kind, sources, tmp_path):
    out = tmp_path / "new" / "fp8"
    reports = []
    quantize_checkpoint(sources[kind], out, [], lambda *report: reports.append(report))
    before, after = unpacked(tensors(sources[kind])), tensors(out)
    quantised = {name for name, x in before.items() if x.dim() == 2 and not any(word in name for word in LEFT)}
    assert len(quantised) == {"moe": 4 * 6 + 3 + 4 * 8 * 3, "ple_shared": 7 * 7 + 4 * 2 + 1}[kind]
    assert set(after) == set(before) | {f"{name}_scale" for name in quantised}
    for name, tensor in before.items():
        if name not in quantised:
            assert torch.equal(after[name], tensor) and after[name].dtype == BF16, name
            continue
        q, scale = quantize_fp8_reference(tensor)
        assert after[name].dtype == torch.float8_e4m3fn and after[f"{name}_scale"].dtype == torch.float32
        assert torch.equal(after[name].view(torch.uint8), q.view(torch.uint8)), name
        assert torch.equal(after[f"{name}_scale"], scale), name
    assert len(reports) == len(shards(out)) == 1 + read_spec(out).layers[-1].index + 1
    assert reports == sorted(reports) and reports[-1][0] == reports[-1][1] > 0
    index = json.loads((out / INDEX).read_text())["weight_map"]
    assert all(name in load_file(out / file) for name, file in index.items()) and set(index) == set(after)
    config = json.loads((out / "config.json").read_text())
    scheme = config.pop("quantization_config")
    assert config == json.loads((sources[kind] / "config.json").read_text())
    assert scheme["ignore"] == list(IGNORE) and scheme["quant_method"] == "compressed-tensors"
    others = {path.name for path in out.iterdir()} - {path.name for path in shards(out)}
    assert others == {"config.json", "generation_config.json", "tokenizer.json", INDEX}
    assert {oct(path.stat().st_mode) for path in shards(out)} == {oct((out / INDEX).stat().st_mode)}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["moe", "ple_shared"])
def test_loads_as_what_is_quantised_on_load(kind, sources, tmp_path):
    quantize_checkpoint(sources[kind], tmp_path / "fp8", [], quiet)
    spec = read_spec(tmp_path / "fp8")
    on_load = quantize_on_load(read_spec(sources[kind]), sources[kind])
    assert spec == on_load
    one = load(spec, tmp_path / "fp8", CPU, BF16, "auto", 0)
    other = load(on_load, sources[kind], CPU, BF16, "auto", 0)
    pairs = list(zip(walk(one), walk(other), strict=True))
    assert sum(a.dtype == torch.float8_e4m3fn for a, _ in pairs) == len(spec.quantized) + 4 * (kind == "moe")
    assert all(a.dtype == b.dtype and torch.equal(a.float(), b.float()) for a, b in pairs)


def walk(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        parts = value if isinstance(value, (list, Quantized)) else vars(value).values()
        for part in parts:
            yield from walk(part)


def test_other_modalities_stay(tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    config = Gemma4Config(text_config=tiny_models.GEMMA["moe"], vision_config=vision, audio_config=audio)
    model = Gemma4ForConditionalGeneration._from_config(config, dtype=BF16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1)
    model.save_pretrained(tmp_path / "bf16")
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8", [], quiet)
    before, after = tensors(tmp_path / "bf16"), tensors(tmp_path / "fp8")
    others = [name for name in before if "language_model" not in name]
    assert len(others) > 20 and all(torch.equal(before[name], after[name]) for name in others)
    assert len(after) - len(unpacked(before)) == 4 * 6 + 3 + 4 * 8 * 3


def test_what_is_ignored_stays(sources, tmp_path):
    ignore = ["model.layers.1.mlp.up_proj", r"re:.*layers\.2\.experts", "model.layers.0.experts.3.down_proj"]
    quantize_checkpoint(sources["moe"], tmp_path / "fp8", ignore, quiet)
    before, after = tensors(sources["moe"]), tensors(tmp_path / "fp8")
    for name in ("layers.1.mlp.up_proj.weight", "layers.2.experts.gate_up_proj", "layers.2.experts.down_proj"):
        assert torch.equal(after[f"model.{name}"], before[f"model.{name}"]), name
    expert = "model.layers.0.experts.3.down_proj.weight"
    assert torch.equal(after[expert], before["model.layers.0.experts.down_proj"][3])
    assert after["model.layers.0.experts.2.down_proj.weight"].dtype == torch.float8_e4m3fn
    spec = read_spec(tmp_path / "fp8")
    assert {"layers.1.gate_up", "layers.2.experts", "layers.0.experts"}.isdisjoint(spec.quantized)
    weights = load(spec, tmp_path / "fp8", CPU, BF16, "auto", 0)
    assert torch.equal(weights.layers[2].experts.gate_up, before["model.layers.2.experts.gate_up_proj"])
    assert torch.equal(weights.layers[0].experts.down[3], before["model.layers.0.experts.down_proj"][3])


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", tiny_models.GLM)
def test_glm(kind, tmp_path):
    """HF reads its experts by a rule of its own. The layer that drafts stays, and the config leaves it out."""
    tiny_models.make(kind, BF16).save_pretrained(tmp_path / "bf16")
    before = tensors(tmp_path / "bf16")
    drafting = {f"model.layers.4.{name}": torch.full((8, 8), 0.5, dtype=BF16) for name in ("eh_proj.weight", "x")}
    save_file(before | drafting, shards(tmp_path / "bf16")[0])
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8", [], quiet)
    after = tensors(tmp_path / "fp8")
    fp8 = {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn}
    linear = re.compile(r".*layers\.[0-3]\..*_proj\.weight")
    assert fp8 == {name for name in before if linear.fullmatch(name)}
    assert set(after) == set(before) | set(drafting) | {f"{name}_scale" for name in fp8}
    for name in fp8:
        q, scale = quantize_fp8_reference(before[name])
        assert torch.equal(after[name].float(), q.float()) and torch.equal(after[f"{name}_scale"], scale)
    scheme = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    for name in drafting:
        assert torch.equal(after[name], drafting[name]) and any(
            re.match(pattern.removeprefix("re:"), name) for pattern in scheme["ignore"]
        )
    weights = load(read_spec(tmp_path / "fp8"), tmp_path / "fp8", CPU, BF16, "auto", 0)
    assert isinstance(weights.layers[3].qkv, Quantized) and isinstance(weights.layers[3].experts.down, Quantized)
    pytest.importorskip("compressed_tensors")
    theirs = Glm4MoeForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=BF16, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    experts = theirs["model.layers.3.mlp.experts.down_proj"]
    for id, expert in enumerate(experts):
        name = f"model.layers.3.mlp.experts.{id}.down_proj.weight"
        assert torch.equal(expert.float(), dequantized(after, name).to(BF16).float())


MERGE_EXPERTS = [
    WeightConverter(
        source_patterns=["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
        target_patterns="experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter(
        source_patterns="experts.*.down_proj.weight",
        target_patterns="experts.down_proj",
        operations=[MergeModulelist(dim=0)],
    ),
]


@pytest.fixture
def merged_experts():
    """transformers has no rule that merges a Gemma 4's experts; its rule for other models' does it."""
    register_checkpoint_conversion_mapping("gemma4_text", MERGE_EXPERTS)
    yield
    conversion_mapping._checkpoint_conversion_mapping_cache.pop("gemma4_text")
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("gemma4_text")


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", ["moe", "ple_shared"])
def test_hf_reads_it(kind, sources, tmp_path, merged_experts):
    pytest.importorskip("compressed_tensors")
    quantize_checkpoint(sources[kind], tmp_path / "fp8", [], quiet)
    model, report = Gemma4ForCausalLM.from_pretrained(
        tmp_path / "fp8",
        dtype=BF16,
        output_loading_info=True,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    assert not any(report.values()), report
    stored = tensors(tmp_path / "fp8")
    theirs = unpacked(model.state_dict())
    assert set(theirs) - {"lm_head.weight"} == {name for name in stored if not name.endswith("weight_scale")}
    for name, tensor in theirs.items():
        if name in stored:
            assert torch.equal(tensor.float(), dequantized(stored, name).to(BF16).float()), name


def broken_off(source, out, monkeypatch, files):
    """A run that dies as it writes the file after so many."""
    real, count = module.save_file, []

    def dies(state, path, metadata):
        if len(count) == files:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        count.append(path)
        real(state, path, metadata)

    monkeypatch.setattr(module, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, [], quiet)
    monkeypatch.setattr(module, "save_file", real)
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize("files", [0, 3])
def test_a_run_that_was_broken_off_goes_on(files, sources, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "fp8"
    quantize_checkpoint(sources["moe"], whole, [], quiet)
    partial = broken_off(sources["moe"], out, monkeypatch, files)
    assert not out.exists() and len(list(partial.glob("*.safetensors"))) == files
    written, real = [], module.save_file
    monkeypatch.setattr(
        module, "save_file", lambda state, *rest, **more: (written.append(state), real(state, *rest, **more))
    )
    quantize_checkpoint(sources["moe"], out, [], quiet)
    assert len(written) == 5 - files and not partial.exists()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


@pytest.mark.parametrize("change", ["ignore", "weights", "source"])
def test_a_run_begun_otherwise_is_not_gone_on_with(change, sources, tmp_path, monkeypatch):
    source = shutil.copytree(sources["moe"], tmp_path / "bf16")
    partial = broken_off(source, tmp_path / "fp8", monkeypatch, 2)
    if change == "weights":
        path = shards(source)[0]
        save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    elif change == "source":
        source = sources["moe"]
    with pytest.raises(CheckpointError, match=f"{partial} is of a run that was begun otherwise"):
        quantize_checkpoint(source, tmp_path / "fp8", [r"re:.*mlp"] if change == "ignore" else [], quiet)


def test_refusals(sources, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(FileExistsError, match=f"{taken} exists"):
        quantize_checkpoint(sources["moe"], taken, [], quiet)
    for pattern in ("model.layers.0.self_attn.v_norm", r"re:.*mlpp", "model.layers.4.mlp.up_proj"):
        with pytest.raises(CheckpointError, match="matches no linear"):
            quantize_checkpoint(sources["moe"], tmp_path / "fp8", [pattern], quiet)
    with pytest.raises(CheckpointError, match="--ignore.*is no pattern"):
        quantize_checkpoint(sources["moe"], tmp_path / "fp8", ["re:("], quiet)
    assert list(tmp_path.iterdir()) == [taken]
    quantize_checkpoint(sources["moe"], tmp_path / "fp8", [], quiet)
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "again", [], quiet)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_named(value, sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "bf16")
    for path in shards(source):
        state = load_file(path)
        if "model.layers.3.experts.gate_up_proj" in state:
            state["model.layers.3.experts.gate_up_proj"][6, 40, 7] = value
            save_file(state, path)
    with pytest.raises(CheckpointError, match=r"layers\.3\.experts\.6\.up_proj\.weight holds an infinity or a NaN"):
        quantize_checkpoint(source, tmp_path / "fp8", [], quiet)
    assert not (tmp_path / "fp8").exists()


def test_a_damaged_source_is_refused_before_anything_is_written(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "bf16")
    path = shards(source)[0]
    state = load_file(path)
    name = next(iter(state))
    save_file({key: tensor for key, tensor in state.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        quantize_checkpoint(source, tmp_path / "fp8", [], quiet)
    assert list(tmp_path.iterdir()) == [source]
