"""GLM-4 MoE in plain words: one sequence, no cache, no fusion. The oracle that the fused forward is held against.

Every operation and every rounding is that of HF's `modeling_glm4_moe.py` with `attn_implementation="eager"` and
`experts_implementation="eager"`: in bf16 each operation below rounds its result once, and what is computed in
float32 says so, from `float()` to `to(dtype)`. Products with weights in FP8 are `plain.py`'s.
Shapes: T tokens, H hidden, D head_dim, V vocab.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.model.glm4_moe_weights import Glm4MoeExpertWeights, Glm4MoeLayerWeights, Glm4MoeWeights
from gemcutter.model.plain import linear, rotate, weight_of
from gemcutter.model.weights import Linear
from gemcutter.spec import ExpertSpec, LayerSpec, ModelSpec


def forward(spec: ModelSpec, weights: Glm4MoeWeights, token_ids: Tensor) -> Tensor:
    """Logits [T, V] of one sequence, token_ids [T] int64."""
    *_, hidden = residual_stream(spec, weights, token_ids)
    return F.linear(norm(hidden, weights.norm, spec.eps), weights.head)


def residual_stream(spec: ModelSpec, weights: Glm4MoeWeights, token_ids: Tensor) -> Iterator[Tensor]:
    """Yield the residual stream [T, H]: the embedding, then the output of each layer."""
    hidden = weights.embed[token_ids]
    yield hidden
    for layer, w in zip(spec.layers, weights.layers, strict=True):
        hidden = decoder_layer(spec, layer, w, hidden)
        yield hidden


def decoder_layer(spec: ModelSpec, layer: LayerSpec, w: Glm4MoeLayerWeights, hidden: Tensor) -> Tensor:
    # 1. Attention
    hidden = hidden + attention(spec, layer, w, norm(hidden, w.input_norm, spec.eps))
    # 2. Feed-forward: a dense MLP, in most layers as an expert that every token shares, beside those it is
    # routed to
    x = norm(hidden, w.post_attention_norm, spec.eps)
    out = mlp(x, w.gate_up, w.down)
    if layer.experts is not None:
        out = experts(x, *router(layer.experts, w.experts, x), w.experts) + out
    return hidden + out


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) in float, rounded, times weight, rounded."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def attention(spec: ModelSpec, layer: LayerSpec, w: Glm4MoeLayerWeights, x: Tensor) -> Tensor:
    """Causal attention over the whole sequence."""
    tokens, count = len(x), layer.num_kv_heads
    heads = linear(x, w.qkv, w.qkv_bias).view(tokens, -1, layer.head_dim)
    q, k, v = heads.split([layer.num_heads, count, count], 1)
    if layer.qk_norm:
        q, k = norm(q, w.q_norm, spec.eps), norm(k, w.k_norm, spec.eps)
    cos, sin = rope(layer, tokens, x)
    q, k = turn(q, cos, sin), turn(k, cos, sin)
    group = layer.num_heads // count
    k, v = (part.repeat_interleave(group, 1).transpose(0, 1) for part in (k, v))
    scores = torch.matmul(q.transpose(0, 1), k.transpose(1, 2)) * layer.head_dim**-0.5
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
    probabilities = torch.softmax(scores.masked_fill(later, float("-inf")), -1, dtype=torch.float32).to(x.dtype)
    out = torch.matmul(probabilities, v).transpose(0, 1).reshape(tokens, layer.q_width)
    return linear(out, w.o)


def rope(layer: LayerSpec, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [T, 1, 2 * angles], angles in float, rounded to the dtype of `like`."""
    turns = 2 * layer.rope.angles
    exponent = torch.arange(0, turns, 2, dtype=torch.float32, device=like.device) / turns
    frequency = 1.0 / (layer.rope.theta**exponent)
    angle = torch.arange(tokens, dtype=torch.float32, device=like.device)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first dims turn, the others stay."""
    turns = cos.shape[-1]
    return torch.cat([rotate(x[..., :turns], cos, sin), x[..., turns:]], -1)


def mlp(x: Tensor, gate_up: Linear, down: Linear) -> Tensor:
    """down(silu(gate x) * up x)."""
    gate, up = linear(x, gate_up).chunk(2, -1)
    return linear(F.silu(gate) * up, down)


def router(experts: ExpertSpec, w: Glm4MoeExpertWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Expert ids [T, k] and float weights [T, k]."""
    scores = F.linear(x.float(), w.router.float()).sigmoid()
    ids = torch.topk(scores + w.correction, experts.top_k, -1, sorted=False).indices
    weights = scores.gather(1, ids)
    if experts.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * experts.scale


def experts(x: Tensor, ids: Tensor, top: Tensor, w: Glm4MoeExpertWeights) -> Tensor:
    """Weighted sum of each token's experts, added in the model's dtype in ascending expert id."""
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():  # unique sorts
        token, slot = torch.where(ids == expert)
        y = mlp(x[token], weight_of(w.gate_up, expert), weight_of(w.down, expert))
        out.index_add_(0, token, (y * top[token, slot, None]).to(x.dtype))
    return out
