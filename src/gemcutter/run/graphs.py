"""StepGraphs: CUDA graphs of whole steps, from token ids to the likeliest next ones, one per bucket.

A host takes 25 ms, a slow one up to 88, to launch a step of 26B-A4B kernel by kernel, however few its tokens, and
0.02 ms as a graph. Beyond MOST_TOKENS of prompts a step runs eagerly, for the device takes as long, or nearly (8192
tokens in FP8 73 ms), unless it is one whole chunk of a long prompt, which nothing need fill up.
"""

import functools
from bisect import bisect_left

import torch
from rich.progress import track

from gemcutter.batch import StepBatch
from gemcutter.cache.pool import KVPool
from gemcutter.model.models import Model
from gemcutter.ops.tokens.sample import argmax_into
from gemcutter.run.ahead import compile_ahead
from gemcutter.run.bucket import PROMPTS, Bucket
from gemcutter.run.build import StepBuilder
from gemcutter.schedule.plan import Plan

MOST_TOKENS = 4096
PROMPT_TOKENS = (32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, MOST_TOKENS)
BESIDE = (0, 8, 32)  # rows of decoding beside prompts, and as many as there may be


class StepGraphs:
    """Captured steps. A batch padded to its bucket is built where the graph reads it."""

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        builder: StepBuilder,
        suppressed: torch.Tensor | None,
        max_bs: int,
        max_prompt_tokens: int,
        chunk: int,
        progress: bool,
    ) -> None:
        """Up to max_bs rows to decode and max_prompt_tokens of prompts, which come in chunks of `chunk` tokens."""
        self._model, self._pool, self._builder, self._suppressed = model, pool, builder, suppressed
        self._alone = decode_sizes(max_bs)
        self._beside = sorted({size for size in (*BESIDE, max_bs) if size <= max_bs})
        self._prompt_tokens = [size for size in PROMPT_TOKENS if size <= max_prompt_tokens]
        embed = model.weights.embed
        # Of the step last replayed, whichever graph it was: a tensor of each graph's own would hold 2 GB.
        self._logits = torch.empty(max_bs + PROMPTS, len(embed), dtype=embed.dtype, device=embed.device)
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        memory = torch.cuda.graph_pool_handle()
        mixed = [Bucket(rows, PROMPTS, tokens) for tokens in self._prompt_tokens for rows in self._beside]
        buckets = [*(Bucket(rows, 0, 0) for rows in self._alone), *mixed]
        if chunk > MOST_TOKENS:
            buckets.append(Bucket(0, 1, chunk))
        buckets.reverse()  # the smaller graphs then fit into the memory the largest one left in the shared pool
        compile_ahead([functools.partial(self._try, bucket) for bucket in buckets])
        for bucket in track(buckets, "Capturing graphs", disable=not progress, transient=True):
            batch = self._try(bucket)  # fills library workspaces outside the capture
            torch.cuda.synchronize(embed.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                self._run(batch, bucket)
            self._graphs[bucket] = graph

    def bucket(self, plan: Plan) -> Bucket | None:
        """The smallest captured one that holds the plan, or is just the plan; None if there is none."""
        whole = Bucket.of(plan)
        if whole in self._graphs:
            return whole
        if not plan.prefills:
            rows = _at_least(whole.decodes, self._alone)
            return None if rows is None else Bucket(rows, 0, 0)
        rows, tokens = _at_least(whole.decodes, self._beside), _at_least(whole.prompt_tokens, self._prompt_tokens)
        if rows is None or tokens is None or whole.prompts >= PROMPTS:
            return None
        return Bucket(rows, PROMPTS, tokens)

    def replay(self, plan: Plan, bucket: Bucket) -> torch.Tensor:
        """Logits [rows, V] of the plan's samplers, and of others behind them, which live until the next replay. The
        likeliest tokens of all are then in `builder.drawn`.
        """
        self._builder.build_padded(plan, bucket)
        self._graphs[bucket].replay()
        return self._logits[: bucket.rows]

    def _try(self, bucket: Bucket) -> StepBatch:
        """Run a step of nothing but what fills the bucket up."""
        batch = self._builder.build_padded(Plan((), ()), bucket)
        self._run(batch, bucket)
        return batch

    def _run(self, batch: StepBatch, bucket: Bucket) -> None:
        self._builder.look_up(bucket)
        logits = self._model.forward(batch, self._pool)
        argmax_into(self._builder.drawn[: bucket.rows], logits, self._suppressed)
        self._logits[: bucket.rows].copy_(logits)


def decode_sizes(largest: int) -> list[int]:
    """Rows of decoding that get a graph of their own: 1, 2, 4, every 8 up to 64, every 16 beyond, and the largest.

    At 72 rows cuBLASLt's gate and up of 26B-A4B take 16.6 µs, at 80 to 128 rows 10.
    """
    steps = [1, 2, 4, *range(8, 65, 8), *range(80, largest + 1, 16), largest]
    return sorted({size for size in steps if size <= largest})


def _at_least(number: int, sizes: list[int]) -> int | None:
    """The first of ascending sizes that holds so many."""
    at = bisect_left(sizes, number)
    return sizes[at] if at < len(sizes) else None
