"""The first layers of GLM-4.7, one dense and some with experts, at their real widths with random weights."""

import dataclasses
import json

import torch

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.dummy import dummy_weights

# config.json as the release has it, in the dialect of transformers 4.
GLM_4_7 = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}


def build(folder, layers: int = 2, device: str = "cuda"):
    """(spec, weights), of which the first layer is dense."""
    small = {"num_hidden_layers": layers, "first_k_dense_replace": 1, "vocab_size": 4096}
    (folder / "config.json").write_text(json.dumps(GLM_4_7 | small | {"max_position_embeddings": 2048}))
    spec = read_spec(folder)
    weights = dummy_weights(spec, torch.device(device), torch.bfloat16, seed=3)
    generator = torch.Generator(device).manual_seed(4)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, device=device)

    for w in weights.layers:  # norms of 1 hide a swapped or forgotten norm weight
        for field in dataclasses.fields(w):
            value = getattr(w, field.name)
            if isinstance(value, torch.Tensor) and value.dim() == 1:
                value.copy_(0.3 * drawn(value) if field.name == "qkv_bias" else 1.0 + 0.1 * drawn(value))
        if w.experts is not None:
            w.experts.correction.copy_(0.1 * drawn(w.experts.correction))
    return spec, weights
