"""What a Gemma 4 model costs: parameters, bytes and FLOPs, from its spec alone. No torch.

Floors are bytes that must move and FLOPs that must run, whatever the engine. Routing is taken as uniform: a step
of B tokens touches E * (1 - (1 - k/E)^B) of a layer's E experts.
"""

from gemcutter.spec import Kind, LayerSpec, ModelSpec

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def parameters(spec: ModelSpec) -> int:
    """All parameters of the text model; a tied head counts once."""
    experts = sum(
        layer.experts.num_experts * _expert_matrices(spec, layer) for layer in spec.layers if layer.experts
    )
    tables = spec.vocab * spec.hidden * (1 if spec.tied_head else 2) + _ple_table(spec)
    return tables + _dense(spec) + experts


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


def decode_bytes(spec: ModelSpec, batch: int, context: int, weight_bytes: float, kv_element_bytes: float) -> float:
    """Bytes that one decode step of `batch` sequences moves, each with `context` tokens held.

    Weights once a step, of the experts those that are touched; K/V once per layer that reads them, for the weights
    between two layers that share K/V sweep them out of the GPU's cache. Embeddings and head keep at least 2 bytes,
    as quantised checkpoints leave them.
    """
    experts = sum(_touched(layer, batch) * _expert_matrices(spec, layer) for layer in spec.layers if layer.experts)
    head = spec.vocab * spec.hidden * max(2.0, weight_bytes)
    rows = batch * (spec.hidden + (len(spec.layers) * spec.ple_width)) * max(2.0, weight_bytes)
    kv = sum(2 * layer.kv_width * min(context, layer.window or context) for layer in spec.layers)
    return (_dense(spec) + experts) * weight_bytes + head + rows + batch * kv * kv_element_bytes


def prefill_flops(spec: ModelSpec, tokens: int) -> float:
    """FLOPs of one prompt: 2 per weight and token, 4 per head dim of every visible (query, key) pair; no head.

    Layers behind the last one that writes K/V serve the last token only.
    """
    writers = 1 + max(layer.index for layer in spec.layers if layer.owns_kv)
    flops = 0.0
    for layer in spec.layers:
        queries = tokens if layer.index < writers else 1
        matrices = _layer_matrices(spec, layer)
        if layer.experts:
            matrices += layer.experts.top_k * _expert_matrices(spec, layer)
        span = min(tokens, layer.window or tokens)
        pairs = span * span / 2 + (tokens - span) * span if queries == tokens else span
        flops += 2 * matrices * queries + 4 * layer.q_width * pairs
    if spec.ple_width:
        flops += 2 * tokens * len(spec.layers) * spec.ple_width * spec.hidden
    return flops


def _touched(layer: LayerSpec, tokens: int) -> float:
    experts = layer.experts
    return experts.num_experts * (1 - (1 - experts.top_k / experts.num_experts) ** tokens)


def _dense(spec: ModelSpec) -> int:
    """Everything that every step reads whole, but the head."""
    count = spec.hidden  # the last norm
    if spec.ple_width:
        count += len(spec.layers) * spec.ple_width * spec.hidden + spec.ple_width
    return count + sum(_layer_matrices(spec, layer) + _layer_vectors(spec, layer) for layer in spec.layers)


def _ple_table(spec: ModelSpec) -> int:
    return spec.ple_vocab * len(spec.layers) * spec.ple_width


def _layer_matrices(spec: ModelSpec, layer: LayerSpec) -> int:
    """Weights of a layer's matrices, experts left out."""
    router = layer.experts.num_experts if layer.experts else 0
    rows = layer.qkv_width + layer.q_width + 3 * layer.mlp_width + router + 2 * spec.ple_width
    return spec.hidden * rows


def _expert_matrices(spec: ModelSpec, layer: LayerSpec) -> int:
    """Weights of one expert: gate, up and down."""
    return 3 * spec.hidden * layer.experts.width


def _layer_vectors(spec: ModelSpec, layer: LayerSpec) -> int:
    """Norms and scales."""
    norms = 4 + (1 if spec.ple_width else 0)
    count = norms * spec.hidden + layer.head_dim * (2 if layer.owns_kv else 1) + 1
    if layer.experts:
        count += 4 * spec.hidden + layer.experts.num_experts
    return count
