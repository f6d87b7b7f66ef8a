"""GLM-4 MoE (4.5 to 4.7) as the engine runs it: sequences in one flat batch, K/V in pages, fusion behind op names.

Stage by stage the mathematics of `model/glm4_moe_plain.py`, which says what each step means and where HF rounds. A
layer's seams hand on its residual twice: as it is, and normed for those that read it next.
Shapes: T tokens of all sequences, S sequences, R sampled rows, H hidden, V vocab.
"""

from torch import Tensor

from gemcutter.batch import StepBatch
from gemcutter.cache.pool import KVPool
from gemcutter.model.glm4_moe_weights import Glm4MoeLayerWeights, Glm4MoeWeights
from gemcutter.model.weights import Linear
from gemcutter.ops.activations.activation import Activation
from gemcutter.ops.activations.swiglu import swiglu
from gemcutter.ops.attention.attend import attend
from gemcutter.ops.attention.rope import rope_table
from gemcutter.ops.attention.rope_store import rope_store
from gemcutter.ops.linears.float_linear import float_linear
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.moe.experts import experts
from gemcutter.ops.moe.sigmoid_topk import sigmoid_topk
from gemcutter.ops.norms.t5_norm import t5_norm
from gemcutter.ops.quantize_fp8 import Quantized
from gemcutter.ops.seams.add_norm import Slots, add_norm
from gemcutter.ops.tokens.embed import embed
from gemcutter.ops.tokens.logits import logits
from gemcutter.spec import LayerSpec, ModelSpec


class Glm4Moe:
    """The text model. Holds the weights and the rope tables, no state of any request."""

    def __init__(self, spec: ModelSpec, weights: Glm4MoeWeights, context_length: int) -> None:
        self.spec = spec
        self.weights = weights
        dtype, device = weights.embed.dtype, weights.embed.device
        ropes = {layer.rope for layer in spec.layers}
        self._rope = {rope: rope_table(rope, 2 * rope.angles, context_length, dtype, device) for rope in ropes}

    def forward(self, batch: StepBatch, pool: KVPool) -> Tensor:
        """Logits [R, V] of `batch.logit_rows`; K/V of all the batch's tokens are written to the pool."""
        spec, w, last_owner = self.spec, self.weights, self.spec.last_kv_owner
        hidden = embed(batch.token_ids, w.embed, 1.0)
        normed: Tensor | Quantized = t5_norm(hidden, w.layers[0].input_norm, spec.eps)
        next_norms = [*(following.input_norm for following in w.layers[1:]), w.norm]
        next_readers = [*(following.qkv for following in w.layers[1:]), w.head]
        for layer, layer_weights, *following in zip(spec.layers, w.layers, next_norms, next_readers, strict=True):
            if layer.index == last_owner and batch.has_prompts:
                # The last K/V. What else this layer makes is read of each sequence's last token alone, or not at
                # all in the middle of a prompt.
                self._project(layer, layer_weights, normed, batch, pool)
                if not len(batch.logit_rows):
                    return hidden.new_empty(0, spec.vocab)
                rows, batch = batch.last_tokens()
                hidden = hidden.index_select(0, rows)
                normed = t5_norm(hidden, layer_weights.input_norm, spec.eps)
            hidden, normed = self.decoder_layer(layer, layer_weights, *following, hidden, normed, batch, pool)
        return logits(normed[batch.logit_rows], w.head, None)

    def decoder_layer(
        self,
        layer: LayerSpec,
        w: Glm4MoeLayerWeights,
        next_norm: Tensor,
        next_reader: Linear,
        hidden: Tensor,
        normed: Tensor | Quantized,
        batch: StepBatch,
        pool: KVPool,
    ) -> tuple[Tensor, Tensor | Quantized]:
        """The residual [T, H] after this layer, and the same under next_norm, for the product with next_reader.

        normed: [T, H], the residual before it, under this layer's input norm.
        """
        eps, e, slots = self.spec.eps, w.experts, None
        # 1. Attention
        attended = self._attention(layer, w, normed, batch, pool)
        readers = [w.gate_up] if e is None else [w.gate_up, e.gate_up, e.router]
        hidden, (mlp_in, *more) = add_norm(attended, hidden, w.post_attention_norm, eps, readers)
        # 2. Feed-forward: a dense MLP, in most layers as an expert that every token shares, beside those it is
        # routed to
        if e is not None:
            expert_in, router_in = more
            scores = float_linear(router_in, e.router)
        activated = swiglu(linear(mlp_in, w.gate_up))
        if e is not None:
            # Ahead of the MLP's last product, which releases behind its join and so settles the choice
            # (ops/chain.py): the experts run beside it.
            routing = layer.experts
            ids, weights = sigmoid_topk(scores, e.correction, routing.top_k, routing.renormalise, routing.scale)
        out = linear(activated, w.down)
        if e is not None:
            each = experts(expert_in, ids, e.gate_up, e.down, settled=True, activation=Activation.SILU)
            slots = Slots(each, ids, weights)
        hidden, (normed,) = add_norm(out, hidden, next_norm, eps, [next_reader], slots)
        return hidden, normed

    def _attention(
        self, layer: LayerSpec, w: Glm4MoeLayerWeights, x: Tensor | Quantized, batch: StepBatch, pool: KVPool
    ) -> Tensor:
        """Attend over the pages, the new tokens' K/V included."""
        q = self._project(layer, w, x, batch, pool)
        k_cache, v_cache, pages = pool.k(layer.index), pool.v(layer.index), batch.kinds[layer.kind].pages
        out = attend(q, k_cache, v_cache, batch, pages, layer.window, layer.head_dim**-0.5)
        return linear(out.flatten(1), w.o)

    def _project(
        self, layer: LayerSpec, w: Glm4MoeLayerWeights, x: Tensor | Quantized, batch: StepBatch, pool: KVPool
    ) -> Tensor:
        """q, normed and rotated; K/V of the new tokens go to their slots."""
        return rope_store(
            linear(x, w.qkv, w.qkv_bias),
            w.q_norm,
            w.k_norm,
            *self._rope[layer.rope],
            batch.positions,
            self.spec.eps,
            pool.k(layer.index),
            pool.v(layer.index),
            batch.kinds[layer.kind].slots,
        )
