"""What the experts' products take under a plan, and whether they keep their bits: sort, up, down, in CUDA graphs.

Tokens choose their experts at random and evenly, so nearly all experts are hit from 64 tokens on at 26B-A4B. A
model that prefers some experts reads fewer weights and has fuller tiles.
"""

import functools
import math
from collections.abc import Sequence

import torch

from gemcutter.bench.latency_ceiling import Ceiling
from gemcutter.bench.timing import GRAPH_SECONDS, Graph, time_graphs
from gemcutter.ops.expert_slots import expert_slots
from gemcutter.ops.experts_table import Plan, Shape
from gemcutter.ops.experts_tiles import built_in_plan, takes

COPIES = 2  # of the weights: what one call read has left the cache when its copy's turn comes again
ROUTINGS = 4  # calls in turn, each of its own tokens


class Clock:
    """Holds weights; `take` sets the number of tokens that all else is about."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, ceiling: Ceiling) -> None:
        e, _, h, n = self.shape = shape
        self.dtype, self.device, self.ceiling = dtype, device, ceiling
        self._weights = [(self._normal(e, 2 * n, h), self._normal(e, h, n)) for _ in range(COPIES)]
        self.take(1)

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_(0, size[-1] ** -0.5)

    def take(self, tokens: int) -> None:
        torch.manual_seed(tokens)
        e, k, h, _ = self.shape
        self.tokens, self._calls = tokens, []
        for i in range(ROUTINGS):
            x = torch.empty(tokens, h, dtype=self.dtype, device=self.device).normal_()
            ids = torch.rand(tokens, e, device=self.device).topk(k, -1).indices
            self._calls.append((x, ids, *self._weights[i % COPIES]))
        self._want = self._run(self.built_in(), *self._calls[0])

    def built_in(self) -> Plan:
        x, _, gate_up, down = self._calls[0]
        return built_in_plan(x, self.shape.top_k, gate_up, down)

    def failure(self, plan: Plan) -> str:
        """Why the plan cannot be taken: it does not run, or has other results than the built-in one; or nothing."""
        x, _, *weights = self._calls[0]
        if not takes(plan, x, *weights):
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
        moved = (hit * 3 * n * h + slots * (h + 2 * n) + self.tokens * h) * self.dtype.itemsize
        return max(moved / self.ceiling.bandwidth, 6 * slots * n * h / self.ceiling.flops)
