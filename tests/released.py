"""config.json of the five released Gemma 4 models, as far as the text model goes, in the nested dialect."""

import copy

S, F = "sliding_attention", "full_attention"

_TEXT = {
    "model_type": "gemma4_text",
    "vocab_size": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        S: {"rope_type": "default", "rope_theta": 10_000.0},
        F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 262_144,
    "num_kv_shared_layers": 0,
    "num_global_key_value_heads": None,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "use_bidirectional_attention": None,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "dtype": "bfloat16",
}
_LARGE = {
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
}

_OWN = {
    "e2b": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "layer_types": [S, S, S, S, F] * 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
    },
    "e4b": {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 42,
        "layer_types": [S, S, S, S, S, F] * 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 512,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
    },
    "12b": _LARGE
    | {
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_hidden_layers": 48,
        "layer_types": [S, S, S, S, S, F] * 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
    },
    "26b": _LARGE
    | {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "layer_types": [S, S, S, S, S, F] * 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "31b": _LARGE
    | {
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_hidden_layers": 60,
        "layer_types": [S, S, S, S, S, F] * 10,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
}

NAMES = tuple(_OWN)


def text_config(name: str) -> dict:
    """The text model's fields; keyword arguments of HF's Gemma4TextConfig but for model_type."""
    return copy.deepcopy(_TEXT | _OWN[name])


def config(name: str) -> dict:
    """config.json as published: 12B is of the unified type, which has neither PLE nor experts."""
    text, kind = text_config(name), "gemma4"
    if name == "12b":
        kind = "gemma4_unified"
        text["model_type"] = "gemma4_unified_text"
        for field in ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block",
                      "use_double_wide_mlp", "num_kv_shared_layers"):  # fmt: skip
            del text[field]
    return {
        "model_type": kind,
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": True,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "bos_token_id": 2,
        "dtype": "bfloat16",
    }
