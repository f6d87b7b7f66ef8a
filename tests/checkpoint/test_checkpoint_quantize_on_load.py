"""Checkpoints that are quantised as they are loaded."""

import fp8_checkpoints as made
import pytest
import tiny_models
import torch
from fp8_held import at, merged

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.files import CheckpointError
from gemcutter.checkpoint.load import load, quantize_on_load
from gemcutter.ops.quantize_fp8 import Quantized

CPU = torch.device("cpu")
BF16 = torch.bfloat16


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


def test_what_is_quantised_is_not_quantised_on_load(tmp_path):
    made.make(tmp_path)
    with pytest.raises(CheckpointError, match="has a quantization_config, so that nothing is left to quantise"):
        quantize_on_load(read_spec(tmp_path), tmp_path)
