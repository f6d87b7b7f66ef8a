"""DecodeGraphs: one CUDA graph per bucket of decoding sequences, from token ids to the likeliest next ones."""

from bisect import bisect_left

import torch
from rich.progress import track

from gemcutter.batch import StepBatch
from gemcutter.cache.pool import KVPool
from gemcutter.model.gemma4 import Gemma4
from gemcutter.ops.sample import argmax_into
from gemcutter.run.build import StepBuilder
from gemcutter.schedule.plan import Plan


def buckets_up_to(largest: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then every 8, and the largest itself."""
    steps = [1, 2, 4, *range(8, largest + 1, 8), largest]
    return sorted({size for size in steps if size <= largest})


class DecodeGraphs:
    """Captured decode steps. A batch padded to its bucket is built where the graph reads it."""

    def __init__(
        self,
        model: Gemma4,
        pool: KVPool,
        builder: StepBuilder,
        suppressed: torch.Tensor | None,
        max_bs: int,
        progress: bool,
    ) -> None:
        self._model, self._pool, self._builder, self._suppressed = model, pool, builder, suppressed
        self._buckets = buckets_up_to(max_bs)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        device = model.weights.embed.device
        memory = torch.cuda.graph_pool_handle()
        # Largest first: the smaller graphs then fit into the memory the largest one left in the shared pool.
        sizes = track(self._buckets[::-1], "Capturing decode graphs", disable=not progress, transient=True)
        for size in sizes:
            batch = builder.build_padded(Plan((), ()), size)
            self._run(batch)  # compiles kernels and fills library workspaces outside the capture
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                logits = self._run(batch)
            self._graphs[size] = graph, logits

    def bucket(self, sequences: int) -> int | None:
        """The smallest captured batch size that holds so many sequences; None if there is none."""
        at = bisect_left(self._buckets, sequences)
        return self._buckets[at] if at < len(self._buckets) else None

    def replay(self, plan: Plan, bucket: int) -> torch.Tensor:
        """Logits [bucket, V] of a plan that only decodes, which live until the next replay. The likeliest tokens of
        all rows are then in `builder.drawn`.
        """
        self._builder.build_padded(plan, bucket)
        graph, logits = self._graphs[bucket]
        graph.replay()
        return logits

    def _run(self, batch: StepBatch) -> torch.Tensor:
        rows = batch.num_decodes
        self._builder.look_up(rows)
        logits = self._model.forward(batch, self._pool)
        argmax_into(self._builder.drawn[:rows], logits, self._suppressed)
        return logits
