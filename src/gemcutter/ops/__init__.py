"""The ops of Gemma 4's layers and GLM's, each usable alone: `from gemcutter.ops import rms_norm`.

The file of its name has its plain PyTorch reference, and says shapes and sources; but for matrix products and
attention, kernels have the reference's bits.
On Hopper their kernels are chained (`chain.py`): what is passed as a model's weight may be no result of one of
them, unless an operation of PyTorch's came after it. (The routing weights that `experts` takes are data, and may.)
"""

from gemcutter.ops.activation import Activation
from gemcutter.ops.add_norm import Slots, add_norm
from gemcutter.ops.attention_seam import attention_seam
from gemcutter.ops.embed import embed
from gemcutter.ops.experts import experts
from gemcutter.ops.float_linear import float_linear
from gemcutter.ops.gate_up import gate_up
from gemcutter.ops.geglu import geglu, gelu_mul
from gemcutter.ops.geglu_fp8 import geglu_fp8
from gemcutter.ops.k_eq_v_norm import k_eq_v_norm
from gemcutter.ops.layer_seam import Routed, layer_seam
from gemcutter.ops.linear import linear
from gemcutter.ops.logits import logits, softcap_
from gemcutter.ops.per_layer_inputs import per_layer_inputs
from gemcutter.ops.qkv_norm import qkv_norm_
from gemcutter.ops.qkv_rope_store import QkvMode, qkv_rope_store
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8
from gemcutter.ops.rms_norm import rms_norm
from gemcutter.ops.rms_norm_fp8 import rms_norm_fp8
from gemcutter.ops.rope_store import rope_store
from gemcutter.ops.seam_gate_up import seam_gate_up
from gemcutter.ops.seam_linear import seam_linear
from gemcutter.ops.select_experts import select_experts
from gemcutter.ops.sigmoid_topk import sigmoid_topk
from gemcutter.ops.sort_by_expert import sort_by_expert
from gemcutter.ops.swiglu import swiglu
from gemcutter.ops.t5_norm import t5_norm

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
