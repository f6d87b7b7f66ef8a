"""HF's `Gemma4TextDecoderLayer` with its residual seams as ops.

The layer scalar stays a launch of its own, and so does the next layer's input norm, which `layer_seam` could do in
the same one: it is another module's, and hooks may stand between the two.
"""

import torch

from gemcutter.hf.guards import stands_for, takes_ops
from gemcutter.hf.mlp import is_gelu_tanh
from gemcutter.hf.norm import fusable
from gemcutter.hf.router import Router
from gemcutter.ops import Routed, attention_seam, gelu_mul, layer_seam


class Layer:
    def forward(
        self, hidden_states, per_layer_input=None, shared_kv_states=None, position_embeddings=None,
        attention_mask=None, position_ids=None, past_key_values=None, **more,
    ):  # fmt: skip
        more.update(
            shared_kv_states=shared_kv_states, position_embeddings=position_embeddings,
            attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
        )  # fmt: skip
        with_ple = getattr(self, "hidden_size_per_layer_input", 0)
        if not self._fuses(hidden_states, per_layer_input):
            if with_ple:
                more["per_layer_input"] = per_layer_input
            return super().forward(hidden_states, **more)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
        hidden = self._feed_forward(_rows(attended), _rows(hidden_states), hidden_states.shape)
        if with_ple:
            gate = self.per_layer_input_gate(hidden.view(hidden_states.shape))
            gated = gelu_mul(_rows(gate), _rows(per_layer_input)).view(gate.shape)
            injected = self.per_layer_projection(gated)
            norm = self.post_per_layer_input_norm
            hidden, _ = layer_seam(_rows(injected), hidden, norm.weight, norm.eps)
        hidden *= self.layer_scalar
        return hidden.view(hidden_states.shape)

    def _feed_forward(self, attended: torch.Tensor, residual: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """[T, H] out of attention -> [T, H], the residual behind the MLP and the experts."""
        post, pre = self.post_attention_layernorm, self.pre_feedforward_layernorm
        closing = self.post_feedforward_layernorm
        if not getattr(self, "enable_moe_block", False):
            hidden, mlp_in, _, _ = attention_seam(attended, residual, post.weight, pre.weight, post.eps)
            return layer_seam(_rows(self.mlp(mlp_in.view(shape))), hidden, closing.weight, closing.eps)[0]
        expert_pre = self.pre_feedforward_layernorm_2
        hidden, mlp_in, expert_in, router_in = attention_seam(
            attended, residual, post.weight, pre.weight, post.eps, expert_pre.weight, self.router.scale
        )
        out = _rows(self.mlp(mlp_in.view(shape)))
        if stands_for(self.router, Router) and self.router.selects():
            ids, weights = self.router.select(self.router.proj(router_in))
        else:
            _, weights, ids = self.router(hidden)
        routed = Routed(
            self.experts(expert_in, ids, weights).contiguous(),
            self.post_feedforward_layernorm_1.weight,
            self.post_feedforward_layernorm_2.weight,
        )
        return layer_seam(out, hidden, closing.weight, closing.eps, routed=routed)[0]

    def _fuses(self, x: torch.Tensor, per_layer_input: torch.Tensor | None) -> bool:
        norms = [self.post_attention_layernorm, self.pre_feedforward_layernorm, self.post_feedforward_layernorm]
        scale, others = None, [self.layer_scalar]
        if getattr(self, "hidden_size_per_layer_input", 0):
            if not is_gelu_tanh(self):
                return False
            norms.append(self.post_per_layer_input_norm)
            others.append(per_layer_input)
        if getattr(self, "enable_moe_block", False):
            norms += [self.pre_feedforward_layernorm_2, self.router.norm]
            norms += [self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2]
            scale = self.router.scale
        return takes_ops(self, x, scale) and fusable(x, *norms) and all(w.dtype == x.dtype for w in others)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
