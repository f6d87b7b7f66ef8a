"""Gemma 4 as the engine runs it: many sequences in one flat batch, K/V in pages, fusion behind op names.

Stage by stage the mathematics of `model/plain.py`, which says what each step means and where HF rounds. The last
stage of a layer, its scale, is that of the seam which ends it.
Shapes: T tokens of all sequences, S sequences, R sampled rows, H hidden, P per-layer embedding width, V vocab.
"""

from torch import Tensor

from gemcutter.batch import StepBatch
from gemcutter.cache.pool import KVPool
from gemcutter.model.weights import LayerWeights, Weights
from gemcutter.ops.attention.attend import attend
from gemcutter.ops.attention.qkv_rope_store import mode_of, qkv_rope_store
from gemcutter.ops.attention.rope import rope_table
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.moe.experts import experts
from gemcutter.ops.moe.select_experts import select_experts
from gemcutter.ops.norms.rms_norm import rms_norm
from gemcutter.ops.seams.layer_seam import Routed, layer_seam
from gemcutter.ops.seams.seam_gate_up import seam_gate_up
from gemcutter.ops.seams.seam_linear import seam_linear
from gemcutter.ops.tokens.embed import embed
from gemcutter.ops.tokens.logits import logits
from gemcutter.ops.tokens.per_layer_inputs import per_layer_inputs
from gemcutter.spec import LayerSpec, ModelSpec


class Gemma4:
    """The text model. Holds the weights and the rope tables, no state of any request."""

    def __init__(self, spec: ModelSpec, weights: Weights, context_length: int) -> None:
        self.spec = spec
        self.weights = weights
        dtype, device = weights.embed.dtype, weights.embed.device
        geometries = {(layer.rope, layer.head_dim) for layer in spec.layers}
        self._rope = {g: rope_table(*g, context_length, dtype, device) for g in geometries}

    def forward(self, batch: StepBatch, pool: KVPool) -> Tensor:
        """Logits [R, V] of `batch.logit_rows`; K/V of all the batch's tokens are written to the pool."""
        spec, w, last_owner = self.spec, self.weights, self.spec.last_kv_owner
        hidden = embed(batch.token_ids, w.embed, spec.hidden**0.5)
        per_layer = self._per_layer_inputs(batch, hidden) if w.per_layer is not None else None
        projected = linear(rms_norm(hidden, w.layers[0].input_norm, spec.eps), w.layers[0].qkv)
        for layer, layer_weights, following in zip(spec.layers, w.layers, [*w.layers[1:], None], strict=True):
            if layer.index == last_owner and batch.has_prompts:
                # The last K/V. What else this layer and those behind it make is read of each sequence's last token
                # alone (E4B's take 51 of 118 ms for a prompt of 8192), or not at all in the middle of a prompt.
                self._store(layer, layer_weights, projected, batch, pool)
                if not len(batch.logit_rows):
                    return hidden.new_empty(0, spec.vocab)
                rows, batch = batch.last_tokens()
                hidden, projected = hidden.index_select(0, rows), projected.index_select(0, rows)
                per_layer = per_layer.index_select(0, rows) if per_layer is not None else None
            own_input = per_layer[:, layer.index] if per_layer is not None else None
            hidden, projected = self.decoder_layer(
                layer, layer_weights, following, hidden, projected, own_input, batch, pool
            )
        return logits(projected[batch.logit_rows], w.head, spec.softcap)

    def decoder_layer(
        self,
        layer: LayerSpec,
        w: LayerWeights,
        following: LayerWeights | None,
        hidden: Tensor,
        projected: Tensor,
        own_input: Tensor | None,
        batch: StepBatch,
        pool: KVPool,
    ) -> tuple[Tensor, Tensor]:
        """The residual [T, H] after this layer, and that, normed, projected to the following layer's q, k and v.

        After the last layer, which none follows: normed for the head. projected: [T, qkv_width], this layer's own;
        own_input: [T, P], its slice of the per-layer embeddings.
        """
        eps = self.spec.eps
        # 1. Attention
        attended = self._attention(layer, w, projected, batch, pool)
        # 2. Feed-forward: the dense MLP, and beside it the experts, which read the same residual
        e, routed = w.experts, None
        router = (None, None, None) if e is None else (e.pre_norm, e.router_scale, e.router)
        readers = w.down, None if e is None else e.gate_up
        hidden, activated, expert_in, router_logits = seam_gate_up(
            attended, hidden, w.post_attention_norm, w.pre_feedforward_norm, eps, w.gate_up, *router, *readers
        )
        if e is not None:
            # Ahead of the MLP's last product, which releases behind its join and so settles the choice
            # (ops/chain.py): the experts run beside it.
            ids, weights = select_experts(router_logits, e.per_expert_scale, layer.experts.top_k)
        out = linear(activated, w.down)
        if e is not None:
            slots = experts(expert_in, ids, e.gate_up, e.down, settled=True)
            routed = Routed(slots, e.dense_post_norm, e.post_norm, ids, weights)
        if w.per_layer_input is None:
            return self._end(w, following, out, hidden, w.post_feedforward_norm, routed)
        # 3. Per-layer input
        into = w.per_layer_input
        # The per-layer inputs are settled since this layer's attention.
        hidden, gated = seam_linear(
            out, hidden, w.post_feedforward_norm, eps, into.gate, factor=own_input, settled=True
        )
        return self._end(w, following, linear(gated, into.projection), hidden, into.post_norm)

    def _end(
        self,
        w: LayerWeights,
        following: LayerWeights | None,
        out: Tensor,
        hidden: Tensor,
        post_norm: Tensor,
        routed: Routed | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Close a layer, and begin the following one."""
        eps = self.spec.eps
        if following is None:
            return layer_seam(out, hidden, post_norm, eps, w.scalar, self.weights.norm, routed)
        norm, qkv = following.input_norm, following.qkv
        # The choice of experts is settled since the MLP's last product.
        return seam_linear(out, hidden, post_norm, eps, qkv, w.scalar, norm, routed, settled=True)

    def _attention(
        self, layer: LayerSpec, w: LayerWeights, projected: Tensor, batch: StepBatch, pool: KVPool
    ) -> Tensor:
        """Attend over the pages, the new tokens' K/V included."""
        q = self._store(layer, w, projected, batch, pool)
        pages = batch.kinds[layer.kind].pages
        k_cache, v_cache, kv_scales = pool.k(layer.index), pool.v(layer.index), pool.scales(layer.index)
        out = attend(q, k_cache, v_cache, batch, pages, layer.window, kv_scales=kv_scales)
        return linear(out.flatten(1), w.o)

    def _store(
        self, layer: LayerSpec, w: LayerWeights, projected: Tensor, batch: StepBatch, pool: KVPool
    ) -> Tensor:
        """q, normed and rotated; K/V of the new tokens go to their slots."""
        return qkv_rope_store(
            projected,
            w.q_norm,
            w.k_norm,
            *self._rope[layer.rope, layer.head_dim],
            batch.positions,
            self.spec.eps,
            layer.num_heads,
            layer.num_kv_heads,
            pool.k(layer.index),
            pool.v(layer.index),
            batch.kinds[layer.kind].slots,
            mode_of(layer),
            pool.scales(layer.index),
        )

    def _per_layer_inputs(self, batch: StepBatch, hidden: Tensor) -> Tensor:
        """Per-layer embeddings [T, L, P]."""
        spec, w = self.spec, self.weights.per_layer
        projected = linear(hidden, w.projection)
        return per_layer_inputs(projected, batch.token_ids, w.embed, w.projection_norm, spec.hidden**-0.5, spec.eps)
