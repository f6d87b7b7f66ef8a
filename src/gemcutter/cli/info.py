"""Show what a model is and what it costs.

config.json is read, and of a quantised checkpoint the headers of its files, if they are here. Floors are times
that no engine can beat: bytes that must move, over --bandwidth; FLOPs that must run, over --flops. Experts are
taken as chosen uniformly.
"""

import argparse
import contextlib
import math
from collections import Counter
from dataclasses import replace

from rich.table import Table

from gemcutter.checkpoint.config import read_quantization, read_spec
from gemcutter.checkpoint.files import locate
from gemcutter.checkpoint.quantization import Quantization
from gemcutter.cli.flags import Parser, add_model, blame_user, read_model
from gemcutter.cli.table import show, table_of
from gemcutter.model import cost
from gemcutter.spec import Kind, LayerSpec, ModelSpec

CONTEXTS = (1024, 8192, 32_768, 131_072)
BATCHES = (1, 8, 32, 128)
ORDER = ("qkv", "o", "gate_up", "down", "experts", "per_layer_input.gate", "per_layer_input.projection")


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument("--model-path", metavar="STR", help="the same as the positional argument")
    parser.add_argument("--revision", metavar="STR", help="branch, tag or commit of a hub checkpoint")
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp8_e4m3"), default="auto",
        help="of the K/V counted here; auto: the checkpoint's dtype (default: auto)",
    )  # fmt: skip
    parser.add_argument("--memory", type=_positive, metavar="GB", help="memory for weights and cache, 1e9 bytes")
    parser.add_argument("--bandwidth", type=_positive, metavar="TB/S", help="memory bandwidth, 1e12 bytes/s")
    parser.add_argument("--flops", type=_positive, metavar="TFLOP/S", help="matrix throughput, 1e12 FLOP/s")


def run(args: argparse.Namespace) -> int:
    model = read_model(args)
    with blame_user(args.parser):
        notices: list[str] = []
        folder = locate(model, args.revision, weights=False)
        spec, quantization = read_spec(folder), read_quantization(folder)
        if quantization is not None and any(folder.glob("*.safetensors")):
            from gemcutter.checkpoint.plan import read_plan  # imports PyTorch, which others need not wait for

            plan = read_plan(spec, folder)
            spec, notices = plan.spec, plan.notices
    kv_element = cost.DTYPE_BYTES[spec.dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype]
    parts = [_size(spec, model), _layers(spec), _memory(spec, kv_element)]
    if quantization is not None:
        parts.append(_quantized(spec, quantization, notices))
    if args.memory:
        parts += _fit(spec, args.memory * 1e9, kv_element)
    if args.bandwidth:
        parts += _decode_floors(spec, args.bandwidth * 1e12, kv_element)
    if args.flops:
        parts += _prefill_floors(spec, args.flops * 1e12, args.bandwidth and args.bandwidth * 1e12)
    show(*parts)
    return 0


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")


def _element(spec: ModelSpec) -> int:
    return cost.DTYPE_BYTES[spec.dtype]


def _size(spec: ModelSpec, model: str) -> str:
    ple = f", per-layer embeddings of {spec.ple_width}" if spec.ple_width else ""
    return (
        f"{model}: {len(spec.layers)} layers, hidden {spec.hidden}, vocab {spec.vocab}, "
        f"context {spec.context_length}, {spec.dtype}{ple}"
    )


def _layers(spec: ModelSpec) -> Table:
    """Layers that are alike in one row."""

    def key(layer: LayerSpec) -> tuple:
        owner = "own" if layer.owns_kv else f"of layer {layer.kv_owner}"
        experts = layer.experts
        return (
            layer.kind.value,
            str(layer.num_heads),
            str(layer.num_kv_heads),
            str(layer.head_dim),
            str(layer.window or "all"),
            owner + (", K = V" if layer.k_eq_v else ""),
            str(layer.mlp_width),
            f"{experts.top_k} of {experts.num_experts} x {experts.width}" if experts else "-",
        )

    counts: dict[tuple, int] = {}
    for layer in spec.layers:
        counts[key(layer)] = counts.get(key(layer), 0) + 1
    table = table_of("layers", "kind", "heads", "kv heads", "head dim", "sees", "K/V", "MLP", "experts")
    for row, count in counts.items():
        table.add_row(str(count), *row)
    return table


def _memory(spec: ModelSpec, kv_element: int) -> str:
    total, active, element = cost.parameters(spec), cost.active_parameters(spec), _element(spec)
    full, sliding = (spec.kv_bytes_per_token(kind, kv_element) / 1024 for kind in (Kind.FULL, Kind.SLIDING))
    lines = [
        f"parameters  {_count(total)}, active for a token {_count(active)}",
        f"weights     {_bytes(cost.weight_bytes(spec, element))}",
        f"K/V         {full:g} KiB a token in full layers",
    ]
    if spec.window:
        lines.append(f"            {sliding:g} KiB a token in sliding layers, for {spec.window} tokens at most")
    return "\n".join(lines) + "\n"


def _quantized(spec: ModelSpec, quantization: Quantization, notices: list[str]) -> str:
    """The schemes, what is held in FP8 of the layers that have it, and what that saves."""
    counts = Counter(name.split(".", 2)[2] for name in spec.quantized if name.startswith("layers."))
    held = [
        f"{name} ({count} layers)" for name, count in sorted(counts.items(), key=lambda item: ORDER.index(item[0]))
    ]
    held += sorted(name for name in spec.quantized if not name.startswith("layers."))
    plain = cost.weight_bytes(replace(spec, quantized=frozenset()), _element(spec))
    saved = plain - cost.weight_bytes(spec, _element(spec))
    lines = [
        f"stored      FP8: {scheme}" for scheme in sorted({str(each) for each in quantization.schemes.values()})
    ]
    lines += [f"in FP8      {', '.join(held) or 'nothing: this scheme is dequantised as it is loaded'}"]
    lines += [f"saves       {_bytes(saved)} of {_bytes(plain)}"]
    return "\n".join([*lines, *notices]) + "\n"


def _contexts(spec: ModelSpec) -> list[int]:
    return sorted({min(context, spec.context_length) for context in (*CONTEXTS, spec.context_length)})


def _fit(spec: ModelSpec, memory: float, kv_element: int) -> list[Table | str]:
    free = memory - cost.weight_bytes(spec, _element(spec))
    if free <= 0:
        return [f"The weights do not fit into {_bytes(memory)}.\n"]
    table = table_of("context", "K/V a request", "requests", "tokens")
    for context in _contexts(spec):
        each = cost.kv_bytes(spec, context, kv_element)
        requests = int(free // each)
        table.add_row(f"{context}", _bytes(each), f"{requests}", f"{requests * context}")
    return [f"What {_bytes(free)} beside the weights hold:", table]


def _decode_floors(spec: ModelSpec, bandwidth: float, kv_element: int) -> list[Table | str]:
    table = table_of("context", *(f"batch {batch}" for batch in BATCHES))
    for context in _contexts(spec):
        times = (cost.decode_bytes(spec, batch, context, _element(spec), kv_element) for batch in BATCHES)
        table.add_row(f"{context}", *(f"{1e3 * moved / bandwidth:.2f}" for moved in times))
    return [f"Decode floor, ms a step at {bandwidth / 1e12:g} TB/s:", table]


def _prefill_floors(spec: ModelSpec, flops: float, bandwidth: float | None) -> list[Table | str]:
    """Of one prompt: FLOPs, or one pass over the weights where that takes longer."""
    table = table_of("tokens", "ms")
    for tokens in _contexts(spec):
        seconds = cost.prefill_flops(spec, tokens) / flops
        if bandwidth:
            seconds = max(seconds, cost.prefill_bytes(spec, 1, tokens, _element(spec)) / bandwidth)
        table.add_row(f"{tokens}", f"{1e3 * seconds:.1f}")
    at = f"{flops / 1e12:g} TFLOP/s" + (f" and {bandwidth / 1e12:g} TB/s" if bandwidth else "")
    return [f"Prefill floor of one prompt at {at}:", table]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"
