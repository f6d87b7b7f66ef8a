"""What a loaded model holds of an FP8 checkpoint, and what it should, linear by linear."""

import torch
from fp8_checkpoints import dequantized

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.load import load_weights
from gemcutter.checkpoint.plan import read_plan
from gemcutter.model.weights import Weights
from gemcutter.ops.quantize_fp8 import Quantized


def read(folder, dtype=torch.bfloat16) -> Weights:
    return load_weights(read_plan(read_spec(folder), folder), torch.device("cpu"), dtype)


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
