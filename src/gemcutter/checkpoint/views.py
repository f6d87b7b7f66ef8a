"""Views: parts of merged weights, in FP8 or not, under the names of a checkpoint's own tensors."""

import torch

from gemcutter.checkpoint.linears import ExpertNames
from gemcutter.model.weights import Linear
from gemcutter.ops.quantize_fp8 import Quantized


def empty_linear(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None) -> Linear:
    """Uninitialised, of a dtype, or with None in FP8."""
    if dtype is not None:
        return torch.empty(shape, device=device, dtype=dtype)
    q = torch.empty(shape, device=device, dtype=torch.float8_e4m3fn)
    return Quantized(q, torch.empty(*shape[:-1], 1, device=device, dtype=torch.float32))


def expert_pieces(gate_up: Linear, down: Linear, names: ExpertNames) -> dict[str, Linear]:
    if not names.each:
        return {f"{names.within}gate_up_proj": gate_up, f"{names.within}down_proj": down}
    count, double = gate_up.shape[:2] if isinstance(gate_up, torch.Tensor) else gate_up.q.shape[:2]
    table = {}
    for id in range(count):
        both = expert(gate_up, id)
        table |= {
            f"{names.within}{id}.gate_proj.weight": rows(both, 0, double // 2),
            f"{names.within}{id}.up_proj.weight": rows(both, double // 2, double),
            f"{names.within}{id}.down_proj.weight": expert(down, id),
        }
    return table


def rows(weight: Linear, begin: int, end: int) -> Linear:
    if isinstance(weight, Quantized):
        return Quantized(weight.q[begin:end], weight.scale[begin:end])
    return weight[begin:end]


def expert(weight: Linear, id: int) -> Linear:
    return Quantized(weight.q[id], weight.scale[id]) if isinstance(weight, Quantized) else weight[id]
