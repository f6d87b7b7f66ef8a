"""The ops of Gemma 4's layers and GLM's, each usable alone: `from gemcutter.ops import rms_norm`.

The file of its name has its plain PyTorch reference, and says shapes and sources; but for matrix products and
attention, kernels have the reference's bits.
On Hopper their kernels are chained (`chain.py`): what is passed as a model's weight may be no result of one of
them, unless an operation of PyTorch's came after it. (The routing weights that `experts` takes are data, and may.)
"""

from gemcutter.ops.activations.activation import Activation
from gemcutter.ops.activations.geglu import geglu, gelu_mul
from gemcutter.ops.activations.geglu_fp8 import geglu_fp8
from gemcutter.ops.activations.swiglu import swiglu
from gemcutter.ops.attention.k_eq_v_norm import k_eq_v_norm
from gemcutter.ops.attention.qkv_norm import qkv_norm_
from gemcutter.ops.attention.qkv_rope_store import QkvMode, qkv_rope_store
from gemcutter.ops.attention.rope_store import rope_store
from gemcutter.ops.linears.float_linear import float_linear
from gemcutter.ops.linears.gate_up import gate_up
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.moe.experts import experts
from gemcutter.ops.moe.select_experts import select_experts
from gemcutter.ops.moe.sigmoid_topk import sigmoid_topk
from gemcutter.ops.moe.sort_by_expert import sort_by_expert
from gemcutter.ops.norms.rms_norm import rms_norm
from gemcutter.ops.norms.rms_norm_fp8 import rms_norm_fp8
from gemcutter.ops.norms.t5_norm import t5_norm
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8
from gemcutter.ops.seams.add_norm import Slots, add_norm
from gemcutter.ops.seams.attention_seam import attention_seam
from gemcutter.ops.seams.layer_seam import Routed, layer_seam
from gemcutter.ops.seams.seam_gate_up import seam_gate_up
from gemcutter.ops.seams.seam_linear import seam_linear
from gemcutter.ops.tokens.embed import embed
from gemcutter.ops.tokens.logits import logits, softcap_
from gemcutter.ops.tokens.per_layer_inputs import per_layer_inputs

__all__ = [
    "Activation",
    "QkvMode",
    "Quantized",
    "Routed",
    "Slots",
    "add_norm",
    "attention_seam",
    "embed",
    "experts",
    "float_linear",
    "gate_up",
    "geglu",
    "geglu_fp8",
    "gelu_mul",
    "k_eq_v_norm",
    "layer_seam",
    "linear",
    "logits",
    "per_layer_inputs",
    "qkv_norm_",
    "qkv_rope_store",
    "quantize_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "rope_store",
    "seam_gate_up",
    "seam_linear",
    "select_experts",
    "sigmoid_topk",
    "softcap_",
    "sort_by_expert",
    "swiglu",
    "t5_norm",
]
