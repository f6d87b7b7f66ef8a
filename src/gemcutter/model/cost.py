"""What a model costs: parameters, bytes and FLOPs, from its spec alone. No torch.

Floors are bytes that must move and FLOPs that must run, whatever the engine. Routing is taken as uniform: a step
of B tokens touches E * (1 - (1 - k/E)^B) of a layer's E experts.
"""

from enum import StrEnum
from typing import NamedTuple

from gemcutter.spec import Family, Kind, LayerSpec, ModelSpec

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8_e4m3": 1}


def parameters(spec: ModelSpec) -> int:
    """All parameters of the text model; a tied head counts once."""
    experts = sum(
        layer.experts.num_experts * _expert_matrices(spec, layer) for layer in spec.layers if layer.experts
    )
    tables = spec.vocab * spec.hidden * (1 if spec.tied_head else 2) + _ple_table(spec)
    return tables + _dense(spec) + experts


def weight_bytes(spec: ModelSpec, element: float) -> float:
    """Bytes of all weights: those in FP8 take 1, and 4 for each channel's scale, the others `element`."""
    experts = sum(
        layer.experts.num_experts * _expert_bytes(spec, layer, element) for layer in spec.layers if layer.experts
    )
    tables = spec.vocab * spec.hidden * (1 if spec.tied_head else 2) + _ple_table(spec)
    return (tables + _vectors(spec)) * element + _linear_bytes(spec, element) + experts


def active_parameters(spec: ModelSpec) -> int:
    """Parameters that one token is multiplied with: its own experts and the head, but no rows merely looked up."""
    experts = sum(layer.experts.top_k * _expert_matrices(spec, layer) for layer in spec.layers if layer.experts)
    return spec.vocab * spec.hidden + _dense(spec) + experts


def kv_bytes(spec: ModelSpec, context: int, element_bytes: float) -> float:
    """KV cache of one sequence of `context` tokens: sliding layers keep at most their window."""
    sliding = min(context, spec.window or 0)
    return element_bytes * (
        context * spec.kv_bytes_per_token(Kind.FULL, 1) + sliding * spec.kv_bytes_per_token(Kind.SLIDING, 1)
    )


class Part(StrEnum):
    """Kinds of work in a step."""

    LINEARS = "dense linears"
    EXPERTS = "experts"
    ATTENTION = "attention"
    HEAD = "head"
    NORMS = "norms, seams"
    ROUTER = "router, sort"
    OTHER = "other"


class Work(NamedTuple):
    """What must move and what must run, at least."""

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, flops: float) -> float:
        return max(self.bytes / bandwidth, self.flops / flops)


def step_work(
    spec: ModelSpec, batch: int, new: int, context: int, weight_bytes: float, kv_element_bytes: float
) -> dict[Part, Work]:
    """Work of a step in which `batch` sequences compute the last `new` of `context` tokens and a logit row each.

    Weights move once, of the experts those that are touched: in 1 byte and their scales where they are in FP8, else
    in `weight_bytes`. K/V moves once per layer that reads it, for the weights between two layers that share K/V
    sweep it out of the GPU's cache. The head keeps at least 2 bytes, as quantised checkpoints leave it. Activations
    move in no part but the norms, which do little else: there each op reads what it is given and writes what others
    read. FLOPs are 2 per weight and token, and 4 per head dim of every visible (query, key) pair. Once the last K/V
    are written, the last token alone goes on, from that layer's own queries. Router, sort and the rest have no
    floor worth a number.
    """
    last_owner = spec.last_kv_owner
    linear_flops = expert_flops = pairs_flops = 0.0
    expert_bytes = kv = activations = 0.0
    for layer in spec.layers:
        queries = new if layer.index < last_owner else 1
        linear_flops += 2 * (_layer_matrices(spec, layer) + spec.ple_width * spec.hidden) * batch * queries
        pairs = _pairs(context, layer.window) - _pairs(context - queries, layer.window)
        pairs_flops += 4 * layer.q_width * batch * pairs
        kv += 2 * layer.kv_width * batch * min(context, queries + (layer.window or context) - 1)
        # The attention seam reads 2 rows and writes 2, the layer seam too; with experts 2 and 4, 2 + top_k and 2.
        seams = 8 if layer.experts is None else 10 + layer.experts.top_k
        stored = 2 * layer.kv_width if layer.owns_kv else 0
        activations += batch * queries * (layer.qkv_width + layer.q_width + stored + seams * spec.hidden)
        if layer.index == last_owner:
            others = batch * (new - queries)
            linear_flops += 2 * spec.hidden * (layer.qkv_width - layer.q_width) * others
            activations += (layer.qkv_width - layer.q_width + stored) * others
        if layer.experts:
            expert = _expert_matrices(spec, layer)
            expert_flops += 2 * layer.experts.top_k * expert * batch * queries
            expert_bytes += _touched(layer, batch * queries) * _expert_bytes(spec, layer, weight_bytes)
    vectors = _vectors(spec)
    table = spec.vocab * spec.hidden
    return {
        Part.LINEARS: Work(_linear_bytes(spec, weight_bytes), linear_flops),
        Part.EXPERTS: Work(expert_bytes, expert_flops),
        Part.ATTENTION: Work(kv * kv_element_bytes, pairs_flops),
        Part.HEAD: Work(table * max(2.0, weight_bytes), 2.0 * batch * table),
        Part.NORMS: Work((vectors + activations) * weight_bytes, 0.0),
    }


def decode_bytes(spec: ModelSpec, batch: int, context: int, weight_bytes: float, kv_element_bytes: float) -> float:
    """Bytes that one decode step of `batch` sequences moves, each with `context` tokens held.

    Weights, K/V and the rows of the embeddings, which keep at least 2 bytes, as the head does; no activations.
    """
    return _moved(spec, step_work(spec, batch, 1, context, weight_bytes, kv_element_bytes), batch, weight_bytes)


def prefill_bytes(spec: ModelSpec, batch: int, tokens: int, weight_bytes: float) -> float:
    """Bytes that `batch` prompts of `tokens` each move in one step: as in a decode step, but no K/V."""
    return _moved(spec, step_work(spec, batch, tokens, tokens, weight_bytes, 0), batch * tokens, weight_bytes)


def _moved(spec: ModelSpec, work: dict[Part, Work], tokens: int, weight_bytes: float) -> float:
    rows = tokens * (spec.hidden + (len(spec.layers) * spec.ple_width)) * max(2.0, weight_bytes)
    moved = sum(part.bytes for name, part in work.items() if name is not Part.NORMS)
    return moved + _vectors(spec) * weight_bytes + rows


def prefill_flops(spec: ModelSpec, tokens: int) -> float:
    """FLOPs of one prompt, without the head's."""
    work = step_work(spec, 1, tokens, tokens, 0, 0)
    return sum(part.flops for name, part in work.items() if name is not Part.HEAD)


def _pairs(tokens: int, window: int | None) -> int:
    """(query, key) pairs in sight of the first `tokens` queries."""
    span = min(tokens, window or tokens)
    return span * (span + 1) // 2 + (tokens - span) * span


def _touched(layer: LayerSpec, tokens: int) -> float:
    experts = layer.experts
    return experts.num_experts * (1 - (1 - experts.top_k / experts.num_experts) ** tokens)


def _dense(spec: ModelSpec) -> int:
    """Everything that every step reads whole, but the head."""
    return _vectors(spec) + sum(rows * columns for rows, columns in _linears(spec).values())


def _linear_bytes(spec: ModelSpec, element: float) -> float:
    return sum(_bytes(spec, name, *shape, element) for name, shape in _linears(spec).items())


def _expert_bytes(spec: ModelSpec, layer: LayerSpec, element: float) -> float:
    """Of one expert."""
    name, width = f"layers.{layer.index}.experts", layer.experts.width
    up = _bytes(spec, name, 2 * width, spec.hidden, element)
    return up + _bytes(spec, name, spec.hidden, width, element)


def _bytes(spec: ModelSpec, name: str, rows: int, columns: int, element: float) -> float:
    return rows * (columns + 4) if name in spec.quantized else rows * columns * element


def _vectors(spec: ModelSpec) -> int:
    """Norms and scales, the last norm and the per-layer projection's included."""
    return spec.hidden + spec.ple_width + sum(_layer_vectors(spec, layer) for layer in spec.layers)


def _ple_table(spec: ModelSpec) -> int:
    return spec.ple_vocab * len(spec.layers) * spec.ple_width


def _linears(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices that every step reads, head and experts left out."""
    shapes = {}
    for layer in spec.layers:
        shapes |= {f"layers.{layer.index}.{name}": shape for name, shape in _layer_linears(spec, layer).items()}
    if spec.ple_width:
        shapes["per_layer.projection"] = len(spec.layers) * spec.ple_width, spec.hidden
    return shapes


def _layer_linears(spec: ModelSpec, layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """The names are those of ModelSpec.quantized."""
    shapes = {
        "qkv": (layer.qkv_width, spec.hidden),
        "o": (spec.hidden, layer.q_width),
        "gate_up": (2 * layer.mlp_width, spec.hidden),
        "down": (spec.hidden, layer.mlp_width),
    }
    if layer.experts:
        shapes["router"] = layer.experts.num_experts, spec.hidden
    if spec.ple_width:
        shapes["per_layer_input.gate"] = spec.ple_width, spec.hidden
        shapes["per_layer_input.projection"] = spec.hidden, spec.ple_width
    return shapes


def _layer_matrices(spec: ModelSpec, layer: LayerSpec) -> int:
    """Weights of a layer's matrices, experts left out."""
    return sum(rows * columns for rows, columns in _layer_linears(spec, layer).values())


def _expert_matrices(spec: ModelSpec, layer: LayerSpec) -> int:
    """Weights of one expert: gate, up and down."""
    return 3 * spec.hidden * layer.experts.width


def _layer_vectors(spec: ModelSpec, layer: LayerSpec) -> int:
    """Norms, biases and scales."""
    if spec.family is Family.GLM4_MOE:
        heads = 2 * layer.head_dim * layer.qk_norm + layer.qkv_width * layer.qkv_bias
        return 2 * spec.hidden + heads + (layer.experts.num_experts if layer.experts else 0)
    norms = 4 + (1 if spec.ple_width else 0)
    count = norms * spec.hidden + layer.head_dim * (2 if layer.owns_kv else 1) + 1
    if layer.experts:
        count += 4 * spec.hidden + layer.experts.num_experts
    return count
