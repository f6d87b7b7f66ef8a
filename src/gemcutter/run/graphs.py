"""DecodeGraphs: one CUDA graph per bucket of decoding sequences, from token ids to the likeliest next ones."""

import dataclasses
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
        context_length: int,
        progress: bool,
    ) -> None:
        self._buckets = buckets_up_to(max_bs)
        self._inputs: dict[int, StepBatch] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        device = model.weights.embed.device
        memory = torch.cuda.graph_pool_handle()
        # Largest first: the smaller graphs then fit into the memory the largest one left in the shared pool.
        sizes = track(self._buckets[::-1], "Capturing decode graphs", disable=not progress, transient=True)
        for size in sizes:
            # Sequences of one token each, which they write to page 0; grids hold any up to the context.
            inputs = dataclasses.replace(builder.build(Plan((), ()), size), max_kv_len=context_length)
            # Compiles kernels and fills library workspaces outside the capture.
            argmax_into(builder.drawn[:size], model.forward(inputs, pool), suppressed)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                logits = model.forward(inputs, pool)
                argmax_into(builder.drawn[:size], logits, suppressed)
            self._inputs[size], self._graphs[size] = inputs, (graph, logits)

    def bucket(self, sequences: int) -> int | None:
        """The smallest captured batch size that holds so many sequences; None if there is none."""
        at = bisect_left(self._buckets, sequences)
        return self._buckets[at] if at < len(self._buckets) else None

    def replay(self, batch: StepBatch) -> torch.Tensor:
        """Logits [bucket, V] of a batch padded to a bucket, which live until the next replay; the likeliest tokens
        are in `builder.drawn`.
        """
        size = batch.num_decodes
        graph, logits = self._graphs[size]
        assert _places(batch) == _places(self._inputs[size]), f"the graph of {size} reads its batch elsewhere"
        graph.replay()
        return logits


def _places(batch: StepBatch) -> list[int]:
    tensors = [batch.token_ids, batch.positions, batch.query_start, batch.kv_len, batch.logit_rows]
    tensors += [tensor for where in batch.kinds.values() for tensor in (where.pages, where.slots)]
    return [tensor.data_ptr() for tensor in tensors]
