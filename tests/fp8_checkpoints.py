"""FP8 checkpoints of tiny HF models, as llm-compressor lays them out, made without the code under test."""

import json
import re
from pathlib import Path

import tiny_models
import torch
from safetensors.torch import save_file

IGNORE = ("lm_head", "re:.*embed.*", "re:.*router.*", "re:.*norm.*")
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
REST = {"actorder": None, "block_structure": None, "group_size": None, "observer_kwargs": {}}
CHANNEL = FP8 | REST | {"strategy": "channel", "dynamic": False, "observer": "minmax"}
TENSOR = CHANNEL | {"strategy": "tensor"}
BLOCK = CHANNEL | {"strategy": "block", "block_structure": [32, 48]}
TOKEN = FP8 | REST | {"strategy": "token", "dynamic": True, "observer": None}
STATIC = FP8 | REST | {"strategy": "tensor", "dynamic": False, "observer": "minmax"}
# As nn.Linear stands in HF's module: not the embeddings, nor the experts' tensors of three dims
LINEAR = re.compile(
    r".*(_proj|router\.proj|per_layer_input_gate|per_layer_projection|per_layer_model_projection)\.weight"
)


def quantization_config(weights: dict = CHANNEL, inputs: dict | None = TOKEN, ignore=IGNORE, **changes) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "config_groups": {"group_0": group | {"format": "float-quantized"}},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.15.0",
    } | changes


def quantize(weight: torch.Tensor, arguments: dict, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scale as stored; the scale is rounded before it divides, as llm-compressor does."""
    wide = weight.float()
    rows, columns = wide.shape
    height, width = {"tensor": (rows, columns), "channel": (1, columns)}.get(arguments["strategy"], (32, 48))
    scale = torch.stack([
        torch.stack([block.abs().max() for block in band.split(width, dim=1)]) for band in wide.split(height)
    ])  # fmt: skip
    scale = (scale.clamp(min=1e-10) / 448).to(scale_dtype)
    spread = scale.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return (wide / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scale


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # as HF holds them, of three dims


def unpacked(state: dict, within: str = "experts.") -> dict:
    """Experts apart: three linears each."""
    out = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition("experts.")
        if not name.endswith(EXPERTS):
            out[name] = tensor
            continue
        for id, weight in enumerate(tensor):
            parts = (
                {"down": weight} if kind == "down_proj" else dict(zip(("gate", "up"), weight.chunk(2), strict=True))
            )
            out |= {f"{layer}{within}{id}.{part}_proj.weight": each.clone() for part, each in parts.items()}
    return out


def make(
    folder: Path, kind: str = "moe", *, config: dict | None = None, within: str | None = "experts.",
    scale_dtype: torch.dtype = torch.bfloat16, flat_scales: bool = False, prefix: str = "model.", **model,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Write a checkpoint, and give its tensors. `within` is where experts lie; None leaves them together."""
    config = config or quantization_config()
    made = tiny_models.make(kind, torch.bfloat16, **model)
    made.config.dtype = "bfloat16"
    made.config.save_pretrained(folder)
    state = {name.replace("model.", prefix, 1): tensor for name, tensor in made.state_dict().items()}
    if made.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state = state if within is None else unpacked(state, within)
    [group] = config["config_groups"].values()
    for name in list(state):
        linear = name.removesuffix(".weight")
        ignored = any(
            re.match(each[3:], linear) if each.startswith("re:") else each == linear for each in config["ignore"]
        )
        if ignored or not (LINEAR.fullmatch(name) or name == "lm_head.weight"):
            continue
        q, scale = quantize(state[name], group["weights"], scale_dtype)
        state |= {name: q, f"{linear}.weight_scale": scale.flatten() if flat_scales else scale}
        if group["input_activations"] == STATIC:
            state[f"{linear}.input_scale"] = torch.tensor([0.03], dtype=scale_dtype)
    write(folder, state, config)
    return state


def write(folder: Path, state: dict, config: dict | None = None, num_files: int = 2) -> None:
    """The tensors, dealt out to files, and the quantization_config."""
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    names = list(state)
    files = {name: f"model-{index % num_files + 1:05}.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": sum(x.nbytes for x in state.values())}, "weight_map": files})
    )
    if config is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def dequantized(state: dict, name: str) -> torch.Tensor:
    """A stored weight in float32: the exact product, or as it is."""
    scale = state.get(f"{name.removesuffix('.weight')}.weight_scale")
    if scale is None:
        return state[name].float()
    rows, columns = state[name].shape
    if scale.numel() not in (1, rows):
        spread = scale.float().repeat_interleave(32, 0)[:rows].repeat_interleave(48, 1)[:, :columns]
        return state[name].float() * spread
    return state[name].float() * scale.float().reshape(-1, 1)
