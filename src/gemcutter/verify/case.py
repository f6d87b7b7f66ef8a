"""One op at one released shape: how to draw its arguments, what to run, what must move."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemcutter.verify.inputs import Draw, Kind


@dataclass(frozen=True)
class Case:
    op: str  # as in torch.ops.gemcutter
    shape: str  # such as "26B-A4B hidden 2816"
    arguments: Callable[[Draw], tuple]  # of launch and reference
    launch: Callable
    reference: Callable
    bytes_moved: Callable[[int], int]  # of so many rows in bfloat16: inputs read once, results written once
    writes: tuple[int, ...] = ()  # arguments that the op changes
    # Where PyTorch's arithmetic on a CPU is not its CUDA kernels': the latter written out, for the interpreter.
    stand_in: Callable | None = None
    dtype: torch.dtype = torch.bfloat16

    def make(self, rows: int, kind: Kind, device: torch.device | str) -> tuple:
        """Fresh arguments, the same at every call with the same rows, kind and device."""
        return self.arguments(Draw(rows, kind, self.dtype, device))

    def run(self, function: Callable, args: tuple) -> list[torch.Tensor]:
        """The results of launch or reference: what it returns, then what it has changed."""
        found = function(*args)
        found = [found] if isinstance(found, torch.Tensor) else [] if found is None else list(found)
        return found + [args[i] for i in self.writes if args[i] is not None]
