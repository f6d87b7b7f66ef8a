"""Tiny random GLM-4 MoE models, made by HF, for tests to compare against."""

import copy

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

_COMMON = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    "attention_bias": True,
    "use_qk_norm": True,
    "eos_token_id": [1, 3],
    "pad_token_id": 0,
}

# Keyword arguments of HF's Glm4MoeConfig.
KINDS: dict[str, dict] = {
    "glm": _COMMON,  # as GLM-4.5, 4.6 and 4.7
    "glm_air": _COMMON | {"use_qk_norm": False, "num_attention_heads": 6, "num_key_value_heads": 1},
    # What no release has: whole heads turn, no biases, several shared experts, weights not divided by their sum
    "glm_other": _COMMON
    | {
        "attention_bias": False,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 0.7,
        "first_k_dense_replace": 2,
        "tie_word_embeddings": True,
    },
}


def config(kind: str, **changes) -> Glm4MoeConfig:
    """HF config of a kind, with eager attention and experts, HF's plainest maths."""
    made = Glm4MoeConfig(**copy.deepcopy(KINDS[kind] | changes))
    made._attn_implementation = "eager"
    made._experts_implementation = "eager"
    return made


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Glm4MoeForCausalLM:
    """An HF model whose every parameter is random enough to matter, as `tiny_models.make` has it."""
    model = Glm4MoeForCausalLM._from_config(config(kind, **changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(_random(name, tensor.shape, generator))
    return model.eval()


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        centre = {"model.norm.weight": 6.0}.get(name, 1.5 if "q_norm" in name or "k_norm" in name else 1.0)
        return centre * (0.8 + 0.4 * torch.rand(shape, generator=generator))
    gaussian = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return 0.5 * gaussian
    if name.endswith("e_score_correction_bias"):
        return 0.2 * gaussian  # beside scores of 0 to 1, so that the choice is not the scores'
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0.05 * gaussian
    if name.endswith("mlp.gate.weight"):
        return 0.3 * gaussian  # expert choices differ between tokens, with clear gaps
    return gaussian * shape[-1] ** -0.5
