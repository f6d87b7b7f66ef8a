"""Weights from a checkpoint's safetensors files: checked against the table first, then streamed to the device."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open

from gemcutter.checkpoint.dummy import dummy_weights
from gemcutter.checkpoint.files import CheckpointError, shards
from gemcutter.checkpoint.table import HEAD, NESTED, TEXT_ONLY, empty_weights, is_ignored, pieces
from gemcutter.model.cost import parameters
from gemcutter.model.weights import Weights
from gemcutter.spec import ModelSpec

STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # safetensors' names of dtypes
MAX_LISTED = 20  # problems named in one error
CHUNK = 2**24  # elements copied at once; bounds the host memory of casts


def load(
    spec: ModelSpec, folder: Path, device: torch.device, dtype: torch.dtype, load_format: str, seed: int
) -> Weights:
    """Weights of a model on a device, in `dtype`, whatever the checkpoint's own.

    load_format is "auto" or "safetensors" for those of the checkpoint, and "dummy" for random ones, which need
    nothing but the spec.

    Raises:
        CheckpointError: the files are damaged or do not hold exactly this model, or it does not fit the device.
    """
    needed = parameters(spec) * dtype.itemsize
    too_large = (
        f"the weights need {needed / 2**30:.1f} GiB in {dtype}, more than {device} has free; "
        "free the device, or take a smaller model or dtype"
    )
    if needed > _memory(device):  # asked first: where host memory runs out the kernel kills, and says nothing
        raise CheckpointError(too_large)
    try:
        if load_format == "dummy":
            return dummy_weights(spec, device, dtype, seed)
        assert load_format in ("auto", "safetensors"), f"unknown load_format {load_format!r}"
        return load_weights(spec, folder, device, dtype)
    except torch.OutOfMemoryError as error:
        raise CheckpointError(too_large) from error


def _memory(device: torch.device) -> int:
    """Bytes of a device, free or not: what the page cache holds counts as used, but gives way."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info(device)[1]


def load_weights(
    spec: ModelSpec, folder: Path, device: torch.device, dtype: torch.dtype, progress: bool = True
) -> Weights:
    """Stream a checkpoint, one memory-mapped file at a time; host memory stays under twice the largest file.

    A file with anything missing, left over, doubled or of another shape or dtype is refused before any weight is
    read. A tied lm_head.weight may be stored too, but only if it equals the embedding.
    """
    found = _read_headers(shards(folder))
    prefix = _find_prefix(folder, found)
    _check(spec, folder, prefix, found)
    weights = empty_weights(spec, device, dtype)
    table = pieces(spec, weights, prefix)
    by_file: dict[Path, set[str]] = defaultdict(set)
    for name in table:
        by_file[found[name][0].path].add(name)
    with _progress_bar(progress) as bar:
        task = bar.add_task("weights", total=sum(view.numel() for view in table.values()) * _itemsize(spec))
        for path, names in by_file.items():
            with _opened(path) as shard:
                for name in shard.offset_keys():  # in the order of the file, so that disks read ahead
                    if name in names:
                        for ours, theirs in _chunks(table[name], shard.get_tensor(name)):
                            ours.copy_(theirs)
                            bar.advance(task, theirs.numel() * _itemsize(spec))
    if spec.tied_head and HEAD in found:
        _check_tied(found[HEAD][0].path, weights)
    return weights


@dataclass(frozen=True)
class _Stored:
    """A tensor as a file's header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def _read_headers(paths: list[Path]) -> dict[str, list[_Stored]]:
    """Every place where each name is stored."""
    found = defaultdict(list)
    for path in paths:
        with _opened(path) as shard:
            for name in shard.keys():
                header = shard.get_slice(name)
                found[name].append(_Stored(path, tuple(header.get_shape()), header.get_dtype()))
    return found


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}; fetch or write it again"
        ) from error


def _find_prefix(folder: Path, found: dict[str, list[_Stored]]) -> str:
    prefixes = [prefix for prefix in (NESTED, TEXT_ONLY) if f"{prefix}embed_tokens.weight" in found]
    if len(prefixes) == 1:
        return prefixes[0]
    names = " and ".join(f"{prefix}embed_tokens.weight" for prefix in (NESTED, TEXT_ONLY))
    raise CheckpointError(
        f"{folder} must hold exactly one of {names}, which tells where its text model lies; it holds "
        + ("both" if prefixes else f"neither, but {', '.join(sorted(found)[:3]) or 'no tensor at all'}")
    )


def _check(spec: ModelSpec, folder: Path, prefix: str, found: dict[str, list[_Stored]]) -> None:
    """Compare all headers with the table, and raise one error that names every difference."""
    wanted = {name: tuple(view.shape) for name, view in _table(spec, prefix).items()}
    optional = {HEAD: (spec.vocab, spec.hidden)} if spec.tied_head else {}
    ignored = is_ignored(spec, prefix)
    problems = [f"{name}: missing" for name in wanted if name not in found]
    for name, places in sorted(found.items()):
        if len(places) > 1:
            problems.append(f"{name}: stored twice, in {' and in '.join(place.path.name for place in places)}")
        shape = wanted.get(name) or optional.get(name)
        if shape is None:
            if not ignored(name):
                problems.append(f"{name}: left over; this model has no such weight (in {places[0].path.name})")
            continue
        for place in places:
            if place.shape != shape:
                problems.append(f"{name}: shape must be {list(shape)}, got {list(place.shape)}")
            if place.dtype != STORED_AS[spec.dtype]:
                problems.append(f"{name}: dtype must be {STORED_AS[spec.dtype]}, got {place.dtype}")
    if problems:
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json, {len(problems)} problem(s):\n  "
            + "\n  ".join(problems[:MAX_LISTED])
            + more
        )


def _check_tied(path: Path, weights: Weights) -> None:
    with _opened(path) as shard:
        for ours, theirs in _chunks(weights.embed, shard.get_tensor(HEAD)):
            if not torch.equal(ours, theirs.to(ours.device, ours.dtype)):
                raise CheckpointError(
                    f"{path}: {HEAD} differs from the embedding, though tie_word_embeddings is true; "
                    "set tie_word_embeddings to false in config.json to use both"
                )


def _table(spec: ModelSpec, prefix: str) -> dict[str, torch.Tensor]:
    """The table with shapes only."""
    return pieces(spec, empty_weights(spec, torch.device("meta"), torch.float32), prefix)


def _chunks(ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(ours.view(-1).split(CHUNK), theirs.view(-1).split(CHUNK), strict=True)


def _itemsize(spec: ModelSpec) -> int:
    return getattr(torch, spec.dtype).itemsize


def _progress_bar(wanted: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not (wanted and sys.stderr.isatty()),
    )
