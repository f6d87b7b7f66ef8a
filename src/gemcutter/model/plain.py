"""Gemma 4 in plain words: one sequence, no cache, no fusion. The oracle that the fused forward is held against.

Every operation and every rounding is that of HF's `modeling_gemma4.py` with `attn_implementation="eager"` and
`experts_implementation="eager"`: in bf16 each operation below rounds its result once, and what is computed in
float32 says so, from `float()` to `to(dtype)`.
Shapes: T tokens, H hidden, D head_dim, L layers, P per-layer embedding width, V vocab.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.model.weights import ExpertWeights, LayerWeights, Linear, PerLayerInputWeights, Weights
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8_reference
from gemcutter.spec import ExpertSpec, LayerSpec, ModelSpec


def forward(spec: ModelSpec, weights: Weights, token_ids: Tensor) -> Tensor:
    """Logits [T, V] of one sequence, token_ids [T] int64."""
    *_, hidden = residual_stream(spec, weights, token_ids)
    return head(spec, weights, hidden)


def residual_stream(spec: ModelSpec, weights: Weights, token_ids: Tensor) -> Iterator[Tensor]:
    """Yield the residual stream [T, H]: the embedding, then the output of each layer."""
    hidden = embed(weights.embed, token_ids, spec.hidden)
    yield hidden
    per_layer = per_layer_inputs(spec, weights, token_ids, hidden) if weights.per_layer is not None else None
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, w in zip(spec.layers, weights.layers, strict=True):
        own_input = per_layer[:, layer.index] if per_layer is not None else None
        hidden = decoder_layer(spec, layer, w, hidden, own_input, shared)
        yield hidden


def head(spec: ModelSpec, weights: Weights, hidden: Tensor) -> Tensor:
    """Final norm, vocabulary projection, soft cap."""
    logits = F.linear(rms_norm(hidden, weights.norm, spec.eps), weights.head)
    if spec.softcap is not None:
        logits = torch.tanh(logits / spec.softcap) * spec.softcap
    return logits


def embed(table: Tensor, token_ids: Tensor, width: int) -> Tensor:
    """Rows of the table times sqrt(width), the root itself rounded to the table's dtype (53.0 for 2816 in bf16)."""
    return table[token_ids] * torch.tensor(width**0.5, dtype=table.dtype, device=table.device)


def per_layer_inputs(spec: ModelSpec, weights: Weights, token_ids: Tensor, hidden: Tensor) -> Tensor:
    """Per-layer embeddings [T, L, P]: one part says which token it is, one is projected from its embedding."""
    w, shape = weights.per_layer, (len(token_ids), len(spec.layers), spec.ple_width)
    identity = embed(w.embed, token_ids, spec.ple_width).reshape(shape)
    context = linear(hidden, w.projection) * spec.hidden**-0.5
    context = rms_norm(context.reshape(shape), w.projection_norm, spec.eps)
    return (context + identity) * 2.0**-0.5


def decoder_layer(
    spec: ModelSpec,
    layer: LayerSpec,
    w: LayerWeights,
    hidden: Tensor,
    own_input: Tensor | None,
    shared: dict[int, tuple[Tensor, Tensor]],
) -> Tensor:
    """One layer; `shared` holds the K, V of earlier layers by their index, and receives this layer's own."""
    # 1. Attention
    attended = attention(spec, layer, w, rms_norm(hidden, w.input_norm, spec.eps), shared)
    hidden = hidden + rms_norm(attended, w.post_attention_norm, spec.eps)
    # 2. Feed-forward: the dense MLP, and beside it the experts, which read the same residual
    out = mlp(rms_norm(hidden, w.pre_feedforward_norm, spec.eps), w.gate_up, w.down)
    if layer.experts is not None:
        routed = rms_norm(hidden, w.experts.pre_norm, spec.eps)
        routed = experts(routed, *router(spec, layer.experts, w.experts, hidden), w.experts)
        out = rms_norm(out, w.experts.dense_post_norm, spec.eps) + rms_norm(routed, w.experts.post_norm, spec.eps)
    hidden = hidden + rms_norm(out, w.post_feedforward_norm, spec.eps)
    # 3. Per-layer input
    if w.per_layer_input is not None:
        hidden = hidden + inject(spec, w.per_layer_input, hidden, own_input)
    # 4. Scale
    return hidden * w.scalar


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight in float, rounded once. The weight is w, not 1 + w."""
    wide = x.float()
    wide = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        wide = wide * weight.float()
    return wide.to(x.dtype)


def linear(x: Tensor, weight: Linear, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. A weight in FP8 takes x in FP8, each row with a scale of its own, and sums in float."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    q, scale = quantize_fp8_reference(x)
    out = F.linear(q.float(), weight.q.float()) * weight.scale.T * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def attention(
    spec: ModelSpec, layer: LayerSpec, w: LayerWeights, x: Tensor, shared: dict[int, tuple[Tensor, Tensor]]
) -> Tensor:
    """Causal attention over the whole sequence; the score scale is 1, the norms of q and k stand in for it."""
    tokens = len(x)
    cos, sin = rope(layer, tokens, x)
    heads = linear(x, w.qkv).view(tokens, -1, layer.head_dim)
    q, kv = heads[:, : layer.num_heads], heads[:, layer.num_heads :]
    q = rotate(rms_norm(q, w.q_norm, spec.eps), cos, sin)
    if layer.owns_kv:
        k, v = kv[:, : layer.num_kv_heads], kv[:, -layer.num_kv_heads :]  # the same projection where K = V
        k = rotate(rms_norm(k, w.k_norm, spec.eps), cos, sin)
        shared[layer.index] = k, rms_norm(v, None, spec.eps)  # V has no norm weight, and is not rotated
    group = layer.num_heads // layer.num_kv_heads
    k, v = (part.repeat_interleave(group, 1).transpose(0, 1) for part in shared[layer.kv_owner])
    scores = torch.matmul(q.transpose(0, 1), k.transpose(1, 2))
    scores = scores.masked_fill(~visible(layer, tokens, x.device), float("-inf"))
    probabilities = torch.softmax(scores, -1, dtype=torch.float32).to(x.dtype)
    out = torch.matmul(probabilities, v).transpose(0, 1).reshape(tokens, layer.q_width)
    return linear(out, w.o)


def visible(layer: LayerSpec, tokens: int, device: torch.device) -> Tensor:
    """[T, T] bool: query i sees key j if 0 <= i - j, and i - j < window on sliding layers."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (distance >= 0) if layer.window is None else (distance >= 0) & (distance < layer.window)


def rope(layer: LayerSpec, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [T, 1, D], angles in float, rounded to the dtype of `like`. Pairs past `angles` do not turn."""
    exponent = torch.arange(0, 2 * layer.rope.angles, 2, dtype=torch.float32, device=like.device) / layer.head_dim
    frequency = torch.zeros(layer.head_dim // 2, device=like.device)
    frequency[: layer.rope.angles] = 1.0 / (layer.rope.theta**exponent)
    angle = torch.arange(tokens, dtype=torch.float32, device=like.device)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dim i with dim i + D/2."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def mlp(x: Tensor, gate_up: Linear, down: Linear) -> Tensor:
    """down(gelu_tanh(gate x) * up x)."""
    gate, up = linear(x, gate_up).chunk(2, -1)
    return linear(F.gelu(gate, approximate="tanh") * up, down)


def router(spec: ModelSpec, experts: ExpertSpec, w: ExpertWeights, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Expert ids [T, k] and float weights [T, k] from the un-normed residual."""
    x = rms_norm(hidden, None, spec.eps) * w.router_scale * spec.hidden**-0.5
    probabilities = torch.softmax(F.linear(x, w.router), -1, dtype=torch.float32)
    top, ids = torch.topk(probabilities, experts.top_k, -1)
    return ids, top / top.sum(-1, keepdim=True) * w.per_expert_scale[ids].float()


def experts(x: Tensor, ids: Tensor, top: Tensor, w: ExpertWeights) -> Tensor:
    """Weighted sum of each token's experts, added in the model's dtype in ascending expert id."""
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():  # unique sorts
        token, slot = torch.where(ids == expert)
        y = mlp(x[token], weight_of(w.gate_up, expert), weight_of(w.down, expert))
        out.index_add_(0, token, (y.float() * top[token, slot, None]).to(x.dtype))
    return out


def weight_of(weights: Linear, expert: int) -> Linear:
    """One expert's."""
    return weights[expert] if isinstance(weights, Tensor) else Quantized(weights.q[expert], weights.scale[expert])


def inject(spec: ModelSpec, w: PerLayerInputWeights, hidden: Tensor, own_input: Tensor) -> Tensor:
    """What a layer's own embedding adds to the residual, gated by the residual."""
    gate = F.gelu(linear(hidden, w.gate), approximate="tanh")
    return rms_norm(linear(gate * own_input, w.projection), w.post_norm, spec.eps)
