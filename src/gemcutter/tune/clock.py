"""What the experts' products take under a plan, and whether they keep their bits: sort, up, down, in CUDA graphs.

Tokens choose their experts at random and evenly, so nearly all experts are hit from 64 tokens on at 26B-A4B. A
model that prefers some experts reads fewer weights and has fuller tiles.
"""

import functools
import math
from collections.abc import Sequence

import torch

from gemcutter.bench.roof import Roof
from gemcutter.bench.timing import GRAPH_SECONDS, Graph, time_graphs
from gemcutter.ops.moe.expert_slots import expert_slots
from gemcutter.ops.moe.experts_table import Plan, Shape
from gemcutter.ops.moe.experts_tiles import built_in_plan, takes
from gemcutter.ops.quantize_fp8 import Quantized, pair_of, quantize_fp8

COPIES = 2  # of the weights: what one call read has left the cache when its copy's turn comes again
ROUTINGS = 4  # calls in turn, each of its own tokens


class Clock:
    """Holds weights; `take` sets the number of tokens that all else is about."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, roof: Roof) -> None:
        e, _, h, n = self.shape = shape
        self.dtype, self.device, self.roof = dtype, device, roof
        self._weights = [(self._matrix(e, 2 * n, h), self._matrix(e, h, n)) for _ in range(COPIES)]
        self.take(1)

    def _matrix(self, *dims: int) -> torch.Tensor | Quantized:
        """Normal values, scaled for products of the same size."""
        if self.dtype != torch.float8_e4m3fn:
            return torch.empty(dims, dtype=self.dtype, device=self.device).normal_(0, dims[-1] ** -0.5)
        q = torch.empty(dims, dtype=self.dtype, device=self.device)
        for part in q:  # an expert at a time: normal values of a whole layer would take four times as much
            part.copy_((torch.randn(part.shape, device=self.device) * 64).clamp_(-448, 448))
        return Quantized(q, torch.full((*dims[:-1], 1), dims[-1] ** -0.5 / 64, device=self.device))

    def take(self, tokens: int) -> None:
        torch.manual_seed(tokens)
        e, k, h, _ = self.shape
        self.tokens, self._calls = tokens, []
        for i in range(ROUTINGS):
            x = self._rows(tokens, h)
            ids = torch.rand(tokens, e, device=self.device).topk(k, -1).indices
            self._calls.append((x, ids, *self._weights[i % COPIES]))
        self._want = self._run(self.built_in(), *self._calls[0])

    def _rows(self, tokens: int, hidden: int) -> torch.Tensor | Quantized:
        x = torch.randn(tokens, hidden, device=self.device)
        return quantize_fp8(x) if self.dtype == torch.float8_e4m3fn else x.to(self.dtype)

    def built_in(self) -> Plan:
        x, gate_up, down = self._values()
        return built_in_plan(x, self.shape.top_k, gate_up, down)

    def _values(self) -> list[torch.Tensor]:
        x, _, *weights = self._calls[0]
        return [pair_of(each)[0] for each in (x, *weights)]

    def failure(self, plan: Plan) -> str:
        """Why the plan cannot be taken: it does not run, or has other results than the built-in one; or nothing."""
        if not takes(plan, *self._values()):
            return f"the kernel {plan.kernel!r} is not for such tokens, weights or card"
        _, _, h, n = self.shape
        # The allocator gives such memory out again, so that what a kernel leaves unwritten is NaN.
        poison = [self._want.new_full((len(self._want), width), math.nan) for width in (n, h)]
        del poison
        try:
            got = self._run(plan, *self._calls[0])
            different = int((got != self._want).sum())
        except Exception as error:  # whatever Triton raises of a tile is a reason not to take it
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"{different} elements differ from the built-in plan's" if different else ""

    def seconds(self, plans: Sequence[Plan]) -> list[float]:
        """Median s of each, in turn, so that a change of clocks meets all alike."""
        times = max(1, math.ceil(GRAPH_SECONDS / self.floor() / ROUTINGS))
        return time_graphs(
            [Graph([functools.partial(self._run, plan, *args) for args in self._calls] * times) for plan in plans]
        )

    @staticmethod
    def _run(plan: Plan, *args: torch.Tensor) -> torch.Tensor:
        return expert_slots(plan, *args, settled=True)

    def floor(self) -> float:
        """s that the hit experts' weights take to come, or the products to be computed, at least."""
        _, k, h, n = self.shape
        hit = sum(ids.unique().numel() for _, ids, *_ in self._calls) / len(self._calls)
        slots = self.tokens * k
        rows = (slots * (h + 2 * n) + self.tokens * h) * 2
        moved = hit * 3 * n * h * self.dtype.itemsize + rows
        return max(moved / self.roof.bandwidth, 6 * slots * n * h / self.roof.flops)
