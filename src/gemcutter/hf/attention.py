"""HF's `Gemma4TextAttention` with its way in as one op: head norms, rotary embedding, the layout of K and V.

`qkv_rope_store` writes into a cache of one-token pages, [T, heads, 1, D]: laid out as HF's own K and V. Cache,
mask and attention stay HF's.
"""

from collections.abc import Callable

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gemcutter.hf.guards import takes_ops
from gemcutter.hf.norm import fusable
from gemcutter.ops import QkvMode, qkv_rope_store
from gemcutter.ops.fused import heads_fuse


class Attention:
    eager: Callable  # the family's plain attention, which HF takes where no other is set

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask,
        shared_kv_states=None,
        past_key_values=None,
        **more,
    ):
        if not self._fuses(hidden_states, position_embeddings):
            return super().forward(
                hidden_states, position_embeddings, attention_mask, shared_kv_states, past_key_values, **more
            )
        q, k, v = self._enter(hidden_states, *position_embeddings)
        if self.is_kv_shared_layer:
            k, v = (each.to(q.device) for each in shared_kv_states[self.layer_type])
        elif past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self.store_full_length_kv:
            shared_kv_states[self.layer_type] = k, v
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        out, probabilities = attend(
            self, q, k, v, attention_mask,
            dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window, **more,
        )  # fmt: skip
        return self.o_proj(out.reshape(*hidden_states.shape[:2], -1).contiguous()), probabilities

    def _fuses(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> bool:
        norms = [self.q_norm]
        if not self.is_kv_shared_layer:
            norms += [self.k_norm, self.v_norm]
        elif torch.compiler.is_compiling():
            return False  # Inductor (2.13) fails on an op that mutates arguments of which every one is None
        return (
            x.numel() > 0
            and takes_ops(self, x, *position_embeddings)
            and fusable(x, *norms)
            and heads_fuse(self.head_dim, v_scaled=len(norms) == 3 and self.v_norm.with_scale)
        )

    def _enter(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """q, k and v as HF's attention takes them, [B, heads, S, D]; k and v None if they are another layer's."""
        batch, length = x.shape[:2]
        tokens, head_dim = batch * length, self.head_dim
        parts = [self.q_proj(x)]
        mode, k_norm, k, v, slots, kv_heads = QkvMode.Q_ONLY, None, None, None, None, 0
        num_heads = parts[0].shape[-1] // head_dim
        if not self.is_kv_shared_layer:
            parts.append(self.k_proj(x))
            kv_heads = parts[1].shape[-1] // head_dim
            mode = QkvMode.Q_KEQV
            if self.v_proj is not None:
                parts.append(self.v_proj(x))
                mode = QkvMode.QKV
            k_norm = self.k_norm.weight
            k, v = (x.new_empty(tokens, kv_heads, 1, head_dim) for _ in range(2))
            slots = torch.arange(tokens, device=x.device)
        qkv = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        # HF's rows repeat their angles: as a table of half rows, token t's stand in row 2t. One sequence's rows
        # may serve all of a batch.
        rows = cos.shape[0] * length
        positions = torch.arange(0, 2 * rows, 2, device=x.device)
        if rows < tokens:
            positions = positions.repeat(tokens // rows)
        cos, sin = cos.reshape(2 * rows, -1), sin.reshape(2 * rows, -1)
        q = qkv_rope_store(
            qkv.view(tokens, -1), self.q_norm.weight, k_norm, cos, sin, positions, self.q_norm.eps,
            num_heads, kv_heads, k, v, slots, mode,
        )  # fmt: skip
        return [x if x is None else x.view(batch, length, -1, head_dim).transpose(1, 2) for x in (q, k, v)]
