"""Which part of a step a kernel belongs to, by its name and by what runs after it.

cuBLAS names the head's product like any other's, and a graph keeps no trace of who launched what. But a step is a
fixed sequence, and the head is the one product that no seam, norm, rope or router follows: after it come the soft
cap and sampling, or the next step's embedding.
"""

import importlib
import pkgutil
from collections.abc import Sequence

import triton

import gemcutter.ops
from gemcutter.model.cost import Part

# In names of products with weights: cuBLAS's, CUTLASS's, PyTorch's on a CPU (where attention's are aten::matmul).
PRODUCTS = ("nvjet", "gemm", "gemv", "cutlass", "splitkreduce", "cublas", "aten::linear")

# By op, and for kernels by the file of ops/ that they stand in; others are Part.OTHER.
PARTS = {
    "linear": Part.LINEARS,
    "linear_fp8": Part.LINEARS,
    "linear_fp8_hopper": Part.LINEARS,
    "linear_hopper": Part.LINEARS,
    "linear_row_hopper": Part.LINEARS,
    "gate_up": Part.LINEARS,
    "gate_up_fp8": Part.LINEARS,
    "gate_up_fp8_hopper": Part.LINEARS,
    "gate_up_hopper": Part.LINEARS,
    "seam_gate_up": Part.LINEARS,
    "seam_gate_up_hopper": Part.LINEARS,
    "seam_gate_up_wide_hopper": Part.LINEARS,
    "seam_linear": Part.LINEARS,
    "seam_linear_hopper": Part.LINEARS,
    "experts": Part.EXPERTS,
    "experts_hopper": Part.EXPERTS,
    "experts_stream_hopper": Part.EXPERTS,
    "experts_tiled": Part.EXPERTS,
    "experts_tiled_fp8": Part.EXPERTS,
    "attend": Part.ATTENTION,
    "attend_decode": Part.ATTENTION,
    "attend_decode_hopper": Part.ATTENTION,
    "attend_prefill": Part.ATTENTION,
    "attend_prefill_hopper": Part.ATTENTION,
    "widen_pages": Part.ATTENTION,
    "logits": Part.HEAD,
    "softcap": Part.HEAD,
    "rms_norm": Part.NORMS,
    "rms_norm_fp8": Part.NORMS,
    "quantize_fp8": Part.NORMS,
    "qkv_norm": Part.NORMS,
    "k_eq_v_norm": Part.NORMS,
    "qkv_rope_store": Part.NORMS,
    "attention_seam": Part.NORMS,
    "attention_seam_fp8": Part.NORMS,
    "layer_seam": Part.NORMS,
    "layer_seam_fp8": Part.NORMS,
    "add_norm": Part.NORMS,
    "rope_store": Part.NORMS,
    "select_experts": Part.ROUTER,
    "sigmoid_topk": Part.ROUTER,
    "sort_by_expert": Part.ROUTER,
}
AFTER_HEAD = ("logits", "softcap", "embed", "sample")  # and the end


def kernels_of_ops() -> dict[str, str]:
    """The file of ops/ of every Triton kernel there, by its name, which is the name that profilers show."""
    found: dict[str, str] = {}
    for info in pkgutil.walk_packages(gemcutter.ops.__path__, "gemcutter.ops."):
        module, file = importlib.import_module(info.name), info.name.rpartition(".")[2]
        for name, value in vars(module).items():
            if not isinstance(value, triton.runtime.JITFunction) or not name.endswith("_kernel"):
                continue  # what is not launched has no name in a profile
            if value.fn.__module__ == module.__name__:
                assert found.setdefault(name, file) == file, f"two kernels are named {name}"
    return found


def parts_of(names: Sequence[str]) -> list[Part]:
    """The part of each kernel or op, given in the order in which they ran."""
    kernels = kernels_of_ops()
    ops = [_op(name, kernels) for name in names]
    parts = [PARTS.get(op, Part.OTHER) for op in ops]
    follower = None  # the op of ours, products aside, that runs next
    for place in reversed(range(len(ops))):
        if parts[place] is Part.LINEARS:
            if follower is None or follower in AFTER_HEAD:
                parts[place] = Part.HEAD
        elif ops[place] is not None:
            follower = ops[place]
    return parts


def _op(name: str, kernels: dict[str, str]) -> str | None:
    if name.startswith("gemcutter::"):
        return name.removeprefix("gemcutter::").rstrip("_")
    if name in kernels:
        return kernels[name]
    return "linear" if any(product in name.lower() for product in PRODUCTS) else None
