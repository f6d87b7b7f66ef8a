"""Plan: what a checkpoint's files hold, by their headers and its config, and how each weight will be held."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gemcutter.checkpoint.config import read_quantization
from gemcutter.checkpoint.files import CheckpointError, shards
from gemcutter.checkpoint.linears import HEAD, ExpertNames, held_in_fp8, linears, schemes_of
from gemcutter.checkpoint.quantization import ONE_SCALE, STATIC, Scheme
from gemcutter.checkpoint.stored import FP8, STORED_AS, Stored, find_experts, find_prefix, read_headers
from gemcutter.checkpoint.table import empty_weights, is_ignored, pieces
from gemcutter.spec import Family, ModelSpec

SCALE_DTYPES = ("BF16", "F16", "F32")
MAX_LISTED = 20  # problems named in one error


@dataclass(frozen=True)
class Plan:
    """Of files whose headers say that they hold exactly the model."""

    folder: Path
    spec: ModelSpec  # with `quantized` as the files have it
    prefix: str
    experts: dict[int, ExpertNames]  # by layer
    schemes: dict[str, Scheme]  # of the linears in FP8, by their names in the files
    found: dict[str, Stored]
    notices: list[str]  # what the user should know


@dataclass(frozen=True)
class Wanted:
    """What a tensor must be."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    why: str = ""  # where the config has a say in it


def read_plan(spec: ModelSpec, folder: Path) -> Plan:
    """Read the headers, and compare them with the table.

    Raises:
        CheckpointError: the files do not hold exactly this model. It names every difference.
    """
    found = read_headers(shards(folder))
    prefix = find_prefix(folder, found)
    quantization = read_quantization(folder)
    experts = find_experts(spec, prefix, found, quantization is not None)
    table = linears(spec, prefix, experts)
    schemes = schemes_of(table, quantization)
    unused = set()
    if quantization is not None:
        spec = replace(spec, quantized=held_in_fp8(table, schemes))
        if quantization.kv_cache:
            layers = (f"{prefix}layers.{layer.index}.self_attn." for layer in spec.layers)
            unused = {layer + name for layer in layers for name in ("k_scale", "v_scale")}
    wanted = _wanted(spec, prefix, experts, schemes, quantization is not None)
    _check(spec, folder, prefix, wanted, {name: found[name] for name in found if name not in unused})
    notices = _notices(spec, table, schemes)
    if drafting := [name for name in found if spec.family is Family.GLM4_MOE and is_ignored(spec, prefix)(name)]:
        notices.append(f"{len(drafting)} tensors of layer {len(spec.layers)}, which drafts tokens, are not used")
    if unused:
        notices.append(
            "its kv_cache_scheme is left out: kv_cache_dtype says how K and V are cached, norms by which scales"
        )
    first = {name: places[0] for name, places in found.items()}
    return Plan(folder, spec, prefix, experts, schemes, first, notices)


def _wanted(
    spec: ModelSpec, prefix: str, experts: dict[int, ExpertNames], schemes: dict[str, Scheme], quantized: bool
) -> dict[str, Wanted]:
    plain = replace(spec, quantized=frozenset())
    weights = empty_weights(plain, torch.device("meta"), getattr(torch, spec.dtype))
    wanted = {}
    for name, view in pieces(plain, weights, prefix, experts).items():
        linear, shape = name.removesuffix(".weight"), tuple(view.shape)
        scheme = schemes.get(linear)
        if scheme is None:
            why = ": quantization_config leaves it out" if quantized and len(shape) > 1 else ""
            wanted[name] = Wanted((shape,), (STORED_AS[str(view.dtype).removeprefix("torch.")],), why)
            continue
        wanted[name] = Wanted((shape,), (FP8,), ": quantization_config means it, and its ignore list does not")
        wanted[f"{linear}.weight_scale"] = Wanted(scheme.scale_shapes(*shape), SCALE_DTYPES)
        if scheme.activations == STATIC:
            wanted[f"{linear}.input_scale"] = Wanted(ONE_SCALE, SCALE_DTYPES)
    return wanted


def _check(
    spec: ModelSpec, folder: Path, prefix: str, wanted: dict[str, Wanted], found: dict[str, list[Stored]]
) -> None:
    head = Wanted(((spec.vocab, spec.hidden),), (STORED_AS[spec.dtype],))
    optional = {HEAD: head} if spec.tied_head else {}
    ignored = is_ignored(spec, prefix)
    problems = [f"{name}: missing" for name in wanted if name not in found]
    for name, places in sorted(found.items()):
        if len(places) > 1:
            problems.append(f"{name}: stored twice, in {' and in '.join(place.path.name for place in places)}")
        want = wanted.get(name) or optional.get(name)
        if want is None:
            if not ignored(name):
                problems.append(f"{name}: left over; this model has no such weight (in {places[0].path.name})")
            continue
        for place in places:
            if place.shape not in want.shapes:
                shapes = " or ".join(str(list(shape)) for shape in want.shapes)
                problems.append(f"{name}: shape must be {shapes}, got {list(place.shape)}")
            if place.dtype not in want.dtypes:
                problems.append(f"{name}: dtype must be {' or '.join(want.dtypes)}, got {place.dtype}{want.why}")
    if problems:
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json, {len(problems)} problem(s):\n  "
            + "\n  ".join(problems[:MAX_LISTED])
            + more
        )


def _notices(spec: ModelSpec, table: dict[str, str | None], schemes: dict[str, Scheme]) -> list[str]:
    """One for each reason why weights stored in FP8 are not held so."""
    reasons: Counter[str] = Counter()
    for name, scheme in schemes.items():
        if table[name] in spec.quantized:
            continue
        if not scheme.runs:
            reasons[f"their scheme ({scheme}) is not run in FP8"] += 1
        elif table[name] is None:
            reasons["routers and heads are not run in FP8"] += 1
        else:
            reasons["they are merged with linears that are not in FP8"] += 1
    return [
        f"{count} linears stored in FP8 are dequantised, which takes twice the memory: {reason}"
        for reason, count in reasons.items()
    ]
