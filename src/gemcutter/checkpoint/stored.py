"""Stored tensors: what the headers of a checkpoint's safetensors files say, before anything is read."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gemcutter.checkpoint.files import CheckpointError
from gemcutter.checkpoint.linears import EXPERTS, NESTED, TEXT_ONLY, ExpertNames, usual
from gemcutter.spec import Family, ModelSpec

STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # safetensors' names of dtypes
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # F32, BF16, F8_E4M3; BOOL takes 8
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


def read_headers(paths: list[Path]) -> dict[str, list[Stored]]:
    """Every place where each name is stored."""
    found = defaultdict(list)
    for path in paths:
        with opened(path) as shard:
            for name in shard.keys():
                header = shard.get_slice(name)
                found[name].append(Stored(path, tuple(header.get_shape()), header.get_dtype()))
    return dict(found)


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}; fetch or write it again"
        ) from error


def find_prefix(folder: Path, found: dict[str, list[Stored]]) -> str:
    prefixes = [prefix for prefix in (NESTED, TEXT_ONLY) if f"{prefix}embed_tokens.weight" in found]
    if len(prefixes) == 1:
        return prefixes[0]
    names = " and ".join(f"{prefix}embed_tokens.weight" for prefix in (NESTED, TEXT_ONLY))
    raise CheckpointError(
        f"{folder} must hold exactly one of {names}, which tells where its text model lies; it holds "
        + ("both" if prefixes else f"neither, but {', '.join(sorted(found)[:3]) or 'no tensor at all'}")
    )


def find_experts(
    spec: ModelSpec, prefix: str, found: dict[str, list[Stored]], quantized: bool
) -> dict[int, ExpertNames]:
    """How each layer's experts are named: as the tensors of theirs that are there, and where none is, as usual."""
    names = {}
    for layer in spec.layers:
        if layer.experts is None:
            continue
        names[layer.index] = usual(spec.family, each=quantized or spec.family is Family.GLM4_MOE)
        for within in EXPERTS[spec.family]:
            begin = f"{prefix}layers.{layer.index}.{within}"
            ids = range(layer.experts.num_experts)
            if any(f"{begin}{name}" in found for name in ("gate_up_proj", "down_proj")):
                names[layer.index] = ExpertNames(within, each=False)
                break
            if any(f"{begin}{id}.{name}_proj.weight" in found for name in ("gate", "up", "down") for id in ids):
                names[layer.index] = ExpertNames(within, each=True)
                break
    return names
