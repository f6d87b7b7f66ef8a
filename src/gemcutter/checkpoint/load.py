"""Weights from a checkpoint's safetensors files: checked by their headers first, then streamed to the device."""

import logging
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from gemcutter.checkpoint.config import read_quantization
from gemcutter.checkpoint.dummy import dummy_weights
from gemcutter.checkpoint.files import CheckpointError
from gemcutter.checkpoint.fill import chunks, fill
from gemcutter.checkpoint.linears import HEAD, TEXT_ONLY, linears
from gemcutter.checkpoint.plan import Plan, read_plan
from gemcutter.checkpoint.progress import bytes_bar
from gemcutter.checkpoint.scales import read_scales
from gemcutter.checkpoint.stored import opened
from gemcutter.checkpoint.table import empty_weights, pieces
from gemcutter.model.cost import weight_bytes
from gemcutter.model.weights import Weights
from gemcutter.spec import ModelSpec


def quantize_on_load(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec of a checkpoint all of whose linears that can be held in FP8 are quantised as they are loaded.

    Raises:
        CheckpointError: it is quantised already.
    """
    if read_quantization(folder) is not None:
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config, so that nothing is left to quantise; "
            "leave out quantization"
        )
    return replace(
        spec, quantized=frozenset(slot for slot in linears(spec, TEXT_ONLY).values() if slot is not None)
    )


def load(
    spec: ModelSpec, folder: Path, device: torch.device, dtype: torch.dtype, load_format: str, seed: int
) -> Weights:
    """Weights of a model on a device, in `dtype` but for those in FP8, whatever the checkpoint's own.

    load_format is "auto" or "safetensors" for those of the checkpoint, and "dummy" for random ones, which need
    nothing but the spec.

    Raises:
        CheckpointError: the files are damaged or do not hold exactly this model, or it does not fit the device.
    """
    _check_fits(spec, device, dtype)  # asked first: where host memory runs out the kernel kills, and says nothing
    try:
        if load_format == "dummy":
            _check_runs(spec, dtype)
            return dummy_weights(spec, device, dtype, seed)
        assert load_format in ("auto", "safetensors"), f"unknown load_format {load_format!r}"
        plan = read_plan(spec, folder)
        _check_fits(plan.spec, device, dtype)
        _check_runs(plan.spec, dtype)
        return load_weights(plan, device, dtype)
    except torch.OutOfMemoryError as error:
        raise CheckpointError(_too_large(spec, device, dtype)) from error


def _check_fits(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    if weight_bytes(spec, dtype.itemsize) > _memory(device):
        raise CheckpointError(_too_large(spec, device, dtype))


def _too_large(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> str:
    kinds = f"FP8 and {dtype}" if spec.quantized else f"{dtype}"
    return (
        f"the weights need {weight_bytes(spec, dtype.itemsize) / 2**30:.1f} GiB in {kinds}, more than {device} has "
        "free; free the device, or take a smaller model or dtype"
    )


def _check_runs(spec: ModelSpec, dtype: torch.dtype) -> None:
    if dtype != torch.bfloat16 and any(name.endswith(".experts") for name in spec.quantized):
        raise CheckpointError(f"experts in FP8 run in bfloat16 only, got dtype {dtype}; take bfloat16")


def _memory(device: torch.device) -> int:
    """Bytes of a device, free or not: what the page cache holds counts as used, but gives way."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info(device)[1]


def load_weights(plan: Plan, device: torch.device, dtype: torch.dtype) -> Weights:
    """Stream a checkpoint, one memory-mapped file at a time; host memory stays under twice the largest file.

    What is stored in FP8 is held so where its scheme runs, and else dequantised; another weight that the spec wants
    in FP8 is quantised. A tied lm_head.weight may be stored too, but only if it equals the embedding.

    Raises:
        CheckpointError: a scale is not finite or not above 0, which is found before any weight is read; a weight
            that is to be quantised is not finite.
    """
    scales = read_scales(plan.schemes, plan.found)
    for notice in plan.notices:
        logging.getLogger(__name__).warning("%s: %s", plan.folder, notice)
    weights = empty_weights(plan.spec, device, dtype)
    table = pieces(plan.spec, weights, plan.prefix, plan.experts)
    by_file: dict[Path, set[str]] = defaultdict(set)
    for name in table:
        by_file[plan.found[name].path].add(name)
    with bytes_bar() as bar:
        task = bar.add_task("weights", total=sum(plan.found[name].nbytes for name in table))
        for path, names in by_file.items():
            with opened(path) as shard:
                for name in shard.offset_keys():  # in the order of the file, so that disks read ahead
                    if name in names:
                        linear = name.removesuffix(".weight")
                        try:
                            fill(table[name], shard.get_tensor(name), plan.schemes.get(linear), scales.get(linear))
                        except ValueError as error:
                            raise CheckpointError(f"{path}: {name} {error}") from error
                        bar.advance(task, plan.found[name].nbytes)
    if plan.spec.tied_head and HEAD in plan.found:
        _check_tied(plan.found[HEAD].path, weights)
    return weights


def _check_tied(path: Path, weights: Weights) -> None:
    with opened(path) as shard:
        for ours, theirs in chunks(weights.embed, shard.get_tensor(HEAD)):
            if not torch.equal(ours, theirs.to(ours.device, ours.dtype)):
                raise CheckpointError(
                    f"{path}: {HEAD} differs from the embedding, though tie_word_embeddings is true; "
                    "set tie_word_embeddings to false in config.json to use both"
                )
