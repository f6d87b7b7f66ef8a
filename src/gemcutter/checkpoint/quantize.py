"""Quantise: a checkpoint written again with its linears in FP8, in the format that llm-compressor writes.

That is compressed-tensors' float-quantized: e4m3 and, for each output channel, a float32 scale, as `quantize_fp8`
makes them; activations are left to the run. Experts are taken apart, into three linears each. One file for each
layer and one for the rest are written to a folder beside the new one, which gets its name when all is there. A run
that was broken off goes on behind its last file.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemcutter.checkpoint.config import read_quantization, read_spec
from gemcutter.checkpoint.fields import Fields
from gemcutter.checkpoint.files import INDEX, CheckpointError, read_json
from gemcutter.checkpoint.fill import fill
from gemcutter.checkpoint.linears import linears, schemes_of
from gemcutter.checkpoint.plan import Plan, read_plan
from gemcutter.checkpoint.quantization import Quantization, parse_quantization
from gemcutter.checkpoint.scales import read_scales
from gemcutter.checkpoint.stored import opened
from gemcutter.checkpoint.table import unused_kv
from gemcutter.ops.quantize_fp8 import Quantized

# As published checkpoints have it: what is looked up, chooses experts, or belongs to other modalities.
IGNORE = (
    "lm_head", "re:.*embed.*", "re:.*norm.*", "re:.*router.*", r"re:.*mlp\.gate$", "re:.*vision_tower.*",
    "re:.*audio_tower.*",
)  # fmt: skip
BEGUN = "quantize.json"  # what a run was begun with
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", INDEX, "*.bin.index.json")


def quantize_checkpoint(source: Path, out: Path, ignore: list[str], report: Callable[[int, int], None]) -> None:
    """Write `out` from the checkpoint in `source`.

    Args:
        ignore: linears to leave as they are, by name or pattern (re:), beside IGNORE.
        report: called after each file with the bytes read so far, and in all.

    Raises:
        CheckpointError: the source is not a whole checkpoint, or quantised already; a name matches no linear; a
            weight is not finite; a run into the same folder was begun otherwise.
        FileExistsError: `out` is there.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; name a folder that does not, or remove it")
    if read_quantization(source) is not None:
        raise CheckpointError(f"{source} is quantised already; give the checkpoint that it was made from")
    plan = read_plan(read_spec(source), source)
    config = _quantization_config([*IGNORE, *_behind(plan), *ignore])
    quantization = parse_quantization(Fields({"quantization_config": config}, "--ignore"))
    chosen = _chosen(plan, quantization, ignore)
    partial = out.with_name(f"{out.name}.partial")
    _begin(partial, source, plan, ignore)
    files = _files(plan)
    total = sum(stored.nbytes for names in files for stored in map(plan.found.get, names))
    done, where = 0, {}
    for number, names in enumerate(files, 1):
        path = partial / f"model-{number:05}-of-{len(files):05}.safetensors"
        if not path.exists():
            save_file(_state(names, plan, chosen), partial / "unfinished", metadata={"format": "pt"})
            shutil.copymode(partial / BEGUN, partial / "unfinished")  # safetensors writes for the owner alone
            (partial / "unfinished").rename(path)
        with opened(path) as shard:
            where |= dict.fromkeys(shard.keys(), path.name)
        done += sum(plan.found[name].nbytes for name in names)
        report(done, total)
    _finish(source, partial, where, config)
    partial.rename(out)


def _behind(plan: Plan) -> list[str]:
    """Patterns for the layer behind the last one, if there is one: GLM's drafts tokens, and stays as it is."""
    index = len(plan.spec.layers)
    return [rf"re:.*layers\.{index}\."] * any(
        name.startswith(f"{plan.prefix}layers.{index}.") for name in plan.found
    )


def _quantization_config(ignore: list[str]) -> dict:
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": fp8 | {"strategy": "channel", "dynamic": False},
        "input_activations": fp8 | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _chosen(plan: Plan, quantization: Quantization, ignore: list[str]) -> set[str]:
    """The linears to quantise, by the names that they get."""
    apart = {index: names._replace(each=True) for index, names in plan.experts.items()}
    table = linears(plan.spec, plan.prefix, apart)
    for pattern in ignore:
        if schemes_of(table, replace(quantization, ignore=(pattern,))).keys() == table.keys():
            raise CheckpointError(
                f"--ignore {pattern!r} matches no linear of the text model; give a name as the files have it, but "
                "for its .weight, or re: and a pattern that matches from the name's beginning"
            )
    return set(schemes_of(table, quantization))


def _begin(partial: Path, source: Path, plan: Plan, ignore: list[str]) -> None:
    paths = sorted({stored.path for stored in plan.found.values()})
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    begun = {"source": str(source.resolve()), "files": stats, "ignore": ignore}
    if partial.exists():
        if not (partial / BEGUN).exists() or read_json(partial / BEGUN) != begun:
            raise CheckpointError(f"{partial} is of a run that was begun otherwise; remove it, or begin as then")
        return
    partial.mkdir(parents=True)
    (partial / BEGUN).write_text(json.dumps(begun))


def _files(plan: Plan) -> list[list[str]]:
    """Names of the source's tensors, by the file that they go to: each layer's, ahead of them all others.

    K/V projections of layers that read another layer's K/V are left out: no model has them, so that the loader of
    another engine would look for their scales in vain.
    """
    of_layer: dict[int, list[str]] = defaultdict(list)
    layers = {f"{plan.prefix}layers.{layer.index}.": layer.index for layer in plan.spec.layers}
    unused = unused_kv(plan.spec, plan.prefix)
    for name in plan.found:
        if name not in unused:
            of_layer[next((index for begin, index in layers.items() if name.startswith(begin)), -1)].append(name)
    return [of_layer[index] for index in sorted(of_layer)]


def _state(names: list[str], plan: Plan, chosen: set[str]) -> dict[str, torch.Tensor]:
    """What is written for these of the source's tensors."""
    state = {}
    for path, of_file in groupby(
        sorted(names, key=lambda name: plan.found[name].path), lambda name: plan.found[name].path
    ):
        with opened(path) as shard:
            for name in of_file:
                tensor = shard.get_tensor(name)
                apart = dict(_apart(name, tensor)) if tensor.dim() == 3 else {}
                if not any(part.removesuffix(".weight") in chosen for part in apart):
                    apart = {name: tensor}
                for part, weight in apart.items():
                    if part.removesuffix(".weight") not in chosen:
                        state[part] = weight if part == name else weight.clone()
                        continue
                    try:
                        pair = _quantized(weight)
                    except ValueError as error:
                        raise CheckpointError(f"{path}: {part} {error}") from error
                    state |= {part: pair.q, part.replace(".weight", ".weight_scale"): pair.scale}
    return state


def _quantized(weight: torch.Tensor) -> Quantized:
    q, scale = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(len(weight), 1)
    pair = Quantized(q, scale)
    fill(pair, weight, None, None)
    return pair


def _apart(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of each expert's linears, if this is of experts that lie together."""
    begin, _, kind = name.rpartition(".")
    for id, weight in enumerate(tensor):
        if kind == "down_proj":
            yield f"{begin}.{id}.down_proj.weight", weight
        elif kind == "gate_up_proj":
            gate, up = weight.chunk(2)
            yield f"{begin}.{id}.gate_proj.weight", gate
            yield f"{begin}.{id}.up_proj.weight", up


def _finish(source: Path, partial: Path, where: dict[str, str], config: dict) -> None:
    """All but the weights, and a look at these as a reader has it."""
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in (*WEIGHTS, ".*")):
            shutil.copy(path, partial)
    total = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (partial / INDEX).write_text(json.dumps(index, indent=2))
    (partial / "config.json").write_text(
        json.dumps(read_json(source / "config.json") | {"quantization_config": config}, indent=2)
    )
    plan = read_plan(read_spec(partial), partial)
    read_scales(plan.schemes, plan.found)
    os.unlink(partial / BEGUN)
