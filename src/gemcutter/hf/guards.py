"""When a patched module runs the ops, and when HF's own forward."""

import torch
from torch import nn
from torch.nn.modules import module as global_state

from gemcutter.ops.arguments import FLOATS


def takes_ops(module: nn.Module, x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether the ops can take a module's place for this call.

    Not in training, nor while a gradient is recorded: the ops have none. Not under autocast, which hands a module
    several dtypes. Not on another GPU than the current one, where Triton would launch. Not on subclasses of Tensor
    (DTensor), for which no op is registered.

    Args:
        x: what the module is called with.
        weights: those that an op reads beside x; they need x's dtype and device, and be dense.
    """
    if module.training or type(x) is not torch.Tensor or x.dtype not in FLOATS or x.stride(-1) != 1:
        return False
    if x.device.type not in ("cpu", "cuda") or (x.is_cuda and x.device.index != torch.cuda.current_device()):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return False
    return all(w is None or is_dense_like(w, x) for w in weights)


def is_dense_like(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Of x's dtype, on its device, and contiguous."""
    return weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous()


def stands_for(module: nn.Module, kind: type) -> bool:
    """Whether an op may compute what calling this submodule would: nobody hooked, wrapped or replaced it."""
    return (
        isinstance(module, kind)
        and "forward" not in vars(module)  # as accelerate's dispatch leaves it
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not global_state._has_any_global_hook()
    )
