"""Take other functions for ops, where PyTorch's dispatcher looks for them, and count their calls."""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator

import torch

# Every op of the forward pass but the matrix products (attention and experts): where its reference stands.
REFERENCES = {
    "add_norm": "seams.add_norm.add_norm_reference",
    "embed": "tokens.embed.embed_reference",
    "layer_seam": "seams.layer_seam.layer_seam_reference",
    "per_layer_inputs": "tokens.per_layer_inputs.per_layer_inputs_reference",
    "qkv_rope_store": "attention.qkv_rope_store.qkv_rope_store_reference",
    "rms_norm": "norms.rms_norm.rms_norm_reference",
    "rope_store": "attention.rope_store.rope_store_reference",
    "seam_gate_up": "seams.seam_gate_up.seam_gate_up_reference",
    "seam_linear": "seams.seam_linear.seam_linear_reference",
    "select_experts": "moe.select_experts.select_experts_reference",
    "sigmoid_topk": "moe.sigmoid_topk.sigmoid_topk_reference",
    "softcap_": "tokens.logits.softcap_reference_",
    "sort_by_expert": "moe.sort_by_expert.sort_by_expert_reference",
    "swiglu": "activations.swiglu.swiglu_reference",
    "t5_norm": "norms.t5_norm.t5_norm_reference",
}


def reference(op: str) -> Callable:
    module, _, name = REFERENCES[op].rpartition(".")
    return getattr(importlib.import_module(f"gemcutter.ops.{module}"), name)


@contextlib.contextmanager
def swapped(key: str, **functions: Callable) -> Iterator[Counter]:
    """Until the end of the block, ops on devices of this dispatch key run these functions; yields calls of each."""
    calls = Counter()

    def counted(name: str, function: Callable) -> Callable:
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    with torch.library._scoped_library("gemcutter", "IMPL") as library:
        for name, function in functions.items():
            library.impl(name, counted(name, function), key, allow_override=True)
        yield calls
