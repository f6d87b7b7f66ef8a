"""Results compared as bits, from memory that held something else before."""

import torch
from torch.overrides import TorchFunctionMode

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ALLOCATORS = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
POISON = 7  # in no input, so an element that is not written differs from what is expected


class Poisoned(TorchFunctionMode):
    """While it is on, new memory holds POISON throughout."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return made.fill_(POISON) if function in _ALLOCATORS else made


def count_differing(got: torch.Tensor, want: torch.Tensor) -> int:
    """Elements whose bits differ: all of another shape or dtype. Any NaN equals any other; -0.0 is not 0.0."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return max(want.numel(), 1)
    bits = _INTEGERS[want.element_size()]
    wrong = got.contiguous().view(bits) != want.contiguous().view(bits)
    if want.is_floating_point():
        wrong &= ~(_is_nan(got) & _is_nan(want))
    return int(wrong.sum())


def _is_nan(x: torch.Tensor) -> torch.Tensor:
    return (x.float() if x.element_size() == 1 else x).isnan()
