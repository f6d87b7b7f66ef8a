"""DecodeGraphs: one CUDA graph per bucket of decoding sequences, from token ids to logits."""

from bisect import bisect_left

import torch
from rich.progress import track

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.cache.pool import KVPool
from gemcutter.model.gemma4 import Gemma4
from gemcutter.spec import Kind


def buckets_up_to(largest: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then every 8, and the largest itself."""
    steps = [1, 2, 4, *range(8, largest + 1, 8), largest]
    return sorted({size for size in steps if size <= largest})


class DecodeGraphs:
    """Captured decode steps. A batch is padded to its bucket, copied into the graph's inputs, and replayed."""

    def __init__(
        self, model: Gemma4, pool: KVPool, max_bs: int, context_length: int, page_size: int, progress: bool
    ) -> None:
        self._buckets = buckets_up_to(max_bs)
        self._inputs: dict[int, StepBatch] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        kinds = tuple(dict.fromkeys(layer.kind for layer in model.spec.layers))
        device = model.weights.embed.device
        memory = torch.cuda.graph_pool_handle()
        # Largest first: the smaller graphs then fit into the memory the largest one left in the shared pool.
        sizes = track(self._buckets[::-1], "Capturing decode graphs", disable=not progress, transient=True)
        for size in sizes:
            inputs = _empty_decode_batch(size, context_length, page_size, kinds, device)
            model.forward(inputs, pool)  # compiles kernels and fills library workspaces outside the capture
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                logits = model.forward(inputs, pool)
            self._inputs[size], self._graphs[size] = inputs, (graph, logits)

    def bucket(self, sequences: int) -> int | None:
        """The smallest captured batch size that holds so many sequences; None if there is none."""
        at = bisect_left(self._buckets, sequences)
        return self._buckets[at] if at < len(self._buckets) else None

    def replay(self, batch: StepBatch) -> torch.Tensor:
        """Logits [bucket, V] of a batch padded to a bucket. They live until the next replay."""
        size = batch.num_decodes
        static, (graph, logits) = self._inputs[size], self._graphs[size]
        static.token_ids.copy_(batch.token_ids)
        static.positions.copy_(batch.positions)
        static.kv_len.copy_(batch.kv_len)
        for kind, where in batch.kinds.items():
            static.kinds[kind].slots.copy_(where.slots)
            # Columns past this step's longest sequence keep old page ids; no kernel reads past kv_len.
            static.kinds[kind].pages[:, : where.pages.shape[1]].copy_(where.pages)
        graph.replay()
        return logits


def _empty_decode_batch(
    size: int, context_length: int, page_size: int, kinds: tuple[Kind, ...], device: torch.device
) -> StepBatch:
    """`size` sequences of one token each, which they write to page 0; shapes hold any up to the context."""
    max_pages = -(-context_length // page_size)

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return StepBatch(
        token_ids=zeros(size, dtype=torch.int64),
        positions=zeros(size, dtype=torch.int64),
        query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
        kv_len=zeros(size, dtype=torch.int32) + 1,
        logit_rows=torch.arange(size, device=device),
        kinds={
            kind: KindBatch(pages=zeros(size, max_pages, dtype=torch.int32), slots=zeros(size, dtype=torch.int64))
            for kind in kinds
        },
        num_decodes=size,
        max_query_len=0,
        max_kv_len=context_length,
    )
