"""The two models' shapes, as config.json and generation_config.json.

Both files are written from here rather than by `save_pretrained`, because
released Gemma 4 checkpoints carry the raw `global_head_dim` and
`num_global_key_value_heads`, which HF's own serialisation rewrites.
"""

import json
from pathlib import Path

from tokenizer import EOS, VOCABULARY

SLIDING, FULL = "sliding_attention", "full_attention"

COMMON = {
    "model_type": "gemma4_text",
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 192,
    "num_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}

CARAT = COMMON | {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, SLIDING, FULL] * 2,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "intermediate_size": 256,
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 4,
    "moe_intermediate_size": 64,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}

CARAT_EDGE = COMMON | {
    "num_hidden_layers": 8,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": None,
    "sliding_window": 64,
    "intermediate_size": 512,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
}

SHAPES = {"carat": CARAT, "carat-edge": CARAT_EDGE}

# Released Gemma 4 samples at temperature 1. A model that shows its working
# must not, since one unlikely digit spoils all that follow.
GENERATION = {
    "bos_token_id": 2,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "do_sample": False,
    "max_new_tokens": 512,
}


def config(name: str) -> dict:
    """config.json of a model: the text shape nested as released checkpoints nest it."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": SHAPES[name],
        "vision_config": None,
        "audio_config": None,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": EOS[:2],
        "dtype": "bfloat16",
    }


def save(name: str, folder: Path) -> None:
    """Write config.json and generation_config.json."""
    for file, content in (("config.json", config(name)), ("generation_config.json", GENERATION)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
