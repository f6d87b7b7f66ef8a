"""Tiny random models of every kind of every family, made by HF, for tests to compare against."""

import copy

import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

S, F = "sliding_attention", "full_attention"

_GEMMA = {
    "vocab_size": 151,
    "vocab_size_per_layer_input": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}

# Keyword arguments of HF's Gemma4TextConfig, one model of each structure that is released.
GEMMA: dict[str, dict] = {
    "dense": _GEMMA | {"num_hidden_layers": 5, "layer_types": [S, S, F, S, F]},
    # 12B, 31B: K = V and fewer kv heads on full layers
    "dense_k_eq_v": _GEMMA
    | {
        "vocab_size": 128,
        "num_hidden_layers": 6,
        "layer_types": [S, S, F, S, S, F],
        "hidden_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "sliding_window": 12,
        "use_bidirectional_attention": "vision",
    },
    # 26B-A4B
    "moe": _GEMMA
    | {
        "num_hidden_layers": 4,
        "layer_types": [S, S, S, F],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 4,
        "moe_intermediate_size": 32,
        "use_bidirectional_attention": "vision",
    },
    # E4B: per-layer embeddings, the last layers read the K/V of earlier ones
    "ple_shared": _GEMMA
    | {
        "num_hidden_layers": 7,
        "layer_types": [S, F, S, F, S, S, F],
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 3,
    },
    # E2B: as E4B, one kv head, and the sharing layers' MLP is twice as wide
    "ple_double_wide": _GEMMA
    | {
        "vocab_size": 160,
        "vocab_size_per_layer_input": 160,
        "num_hidden_layers": 7,
        "layer_types": [S, S, F, S, S, S, F],
        "num_key_value_heads": 1,
        "sliding_window": 12,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
    },
}

_GLM = {
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
GLM: dict[str, dict] = {
    "glm": _GLM,  # as GLM-4.5, 4.6 and 4.7
    "glm_air": _GLM | {"use_qk_norm": False, "num_attention_heads": 6, "num_key_value_heads": 1},
    # What no release has: whole heads turn, no biases, several shared experts, weights not divided by their sum
    "glm_other": _GLM
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

KINDS = GEMMA | GLM


def config(kind: str, **changes) -> PretrainedConfig:
    """HF config of a kind, with eager attention and experts, HF's plainest maths."""
    made = (Glm4MoeConfig if kind in GLM else Gemma4TextConfig)(**copy.deepcopy(KINDS[kind] | changes))
    made._attn_implementation = "eager"
    made._experts_implementation = "eager"
    return made


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    """An HF model whose every parameter is random enough to matter.

    Norms lie around 1, scalars and scales in [0.5, 1.2], matrices keep the variance of their input. The
    embedding is small beside what the layers add, or the tied head would just repeat the input token; a final
    norm around 6 makes the logits peaky all the same (std about 2.5): greedy choices are rarely near ties.
    """
    # not model.to(dtype): that would round the RoPE frequencies, which HF keeps in float32
    cls, random = (Glm4MoeForCausalLM, _random_glm) if kind in GLM else (Gemma4ForCausalLM, _random_gemma)
    model = cls._from_config(config(kind, **changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(random(name, tensor.shape, generator))
    return model.eval()


def _random_gemma(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        # scores of std near 3: with weights of 1 it is sqrt(head_dim), a softmax so hard that float32's own
        # rounding moves log-probabilities by 4e-4
        centre = {"model.norm.weight": 6.0}.get(name, 0.6 if "q_norm" in name or "k_norm" in name else 1.0)
        return centre * (0.8 + 0.4 * torch.rand(shape, generator=generator))
    if name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
        return 0.5 + 0.7 * torch.rand(shape, generator=generator)
    gaussian = torch.randn(shape, generator=generator)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0.05 * gaussian
    if "embed_tokens_per_layer" in name:
        return 0.3 * gaussian
    if "router.proj" in name:
        return 2.0 * gaussian  # expert choices differ between tokens, with clear gaps
    return gaussian * shape[-1] ** -0.5


def _random_glm(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
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
