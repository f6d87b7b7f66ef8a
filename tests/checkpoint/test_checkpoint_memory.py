"""Loading holds less on the host than the weights and twice the largest file, whatever is stored and wanted."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_models
import torch
from fp8_checkpoints import CHANNEL, quantization_config
from safetensors.torch import save_file

from gemcutter.checkpoint.config import read_quantization, read_spec
from gemcutter.checkpoint.files import shards
from gemcutter.checkpoint.linears import linears, schemes_of, usual
from gemcutter.checkpoint.load import quantize_on_load
from gemcutter.checkpoint.table import empty_weights, pieces
from gemcutter.model.cost import weight_bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

PEAK = """
import re, sys, torch
from pathlib import Path
from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.load import load, quantize_on_load
from gemcutter.ops.quantize_fp8 import quantize_fp8

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
spec = read_spec(folder)
if sys.argv[3] == "quantise":
    spec = quantize_on_load(spec, folder)
quantize_fp8(torch.ones(1, 512, dtype=torch.bfloat16))
before = status("VmRSS")
weights = load(spec, folder, torch.device("cpu"), dtype, "auto", 0)
print(status("VmHWM") - before)
"""


def assert_bounded(folder, held: int, dtype: torch.dtype, quantise: bool = False) -> None:
    """`held`: bytes of the weights that are loaded."""
    sizes = [path.stat().st_size for path in shards(folder)]
    assert sum(sizes) > 5 * max(sizes), "the bound must be far below the whole checkpoint"
    run = subprocess.run(
        [sys.executable, "-c", PEAK, folder, str(dtype).removeprefix("torch."), "quantise" if quantise else ""],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert held < int(run.stdout) < held + 2 * max(sizes)


def save_layers(folder, state: dict[str, torch.Tensor]) -> None:
    """A file a layer; what is of no layer goes with the first."""
    files: dict[str, dict] = {}
    for name, tensor in state.items():
        files.setdefault(name.split(".")[2] if "layers" in name else "0", {})[name] = tensor
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_as_stored_or_cast(wanted, tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    config = tiny_models.config("dense", **wide, layer_types=["full_attention"] * 8)
    config.dtype = "float32"
    config.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    table = pieces(spec, empty_weights(spec, torch.device("meta"), torch.float32), "model.")
    save_layers(tmp_path, {name: torch.full(view.shape, 0.5) for name, view in table.items()})
    assert_bounded(tmp_path, sum(view.numel() for view in table.values()) * wanted.itemsize, wanted)


@pytest.mark.parametrize("scheme", ["channels", "blocks", "on load"])
def test_in_fp8(scheme, tmp_path):
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
    sizes |= {"num_experts": 32, "moe_intermediate_size": 512}
    config = tiny_models.config("moe", **sizes)
    config.dtype = "bfloat16"
    quantization = {
        "channels": quantization_config(),
        "blocks": quantization_config(CHANNEL | {"strategy": "block", "block_structure": [128, 128]}),
        "on load": None,
    }[scheme]
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    names = dict.fromkeys(range(6), usual(spec.family, each=quantization is not None))
    schemes = schemes_of(linears(spec, "model.", names), quantization and read_quantization(tmp_path))
    meta = empty_weights(replace(spec, quantized=frozenset()), torch.device("meta"), torch.bfloat16)
    state = {}
    for name, view in pieces(spec, meta, "model.", names).items():
        linear = name.removesuffix(".weight")
        dtype = torch.float8_e4m3fn if linear in schemes else torch.bfloat16
        state[name] = torch.full(view.shape, 0.5, dtype=dtype)
        if linear in schemes:
            state[f"{linear}.weight_scale"] = torch.full(schemes[linear].scale_shapes(*view.shape)[0], 0.25)
    save_layers(tmp_path, state)
    if scheme == "on load":
        spec = quantize_on_load(spec, tmp_path)
    assert_bounded(tmp_path, weight_bytes(spec, 2), torch.bfloat16, quantise=scheme == "on load")
