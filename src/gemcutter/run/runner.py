"""Runner: one step on the device, from a plan to the sampled token ids."""

from dataclasses import dataclass

import torch

from gemcutter.cache.ledger import Ledger
from gemcutter.cache.pool import KVPool
from gemcutter.model.gemma4 import Gemma4
from gemcutter.ops.sample import sample
from gemcutter.ops.sample_batch import SampleBatch, SampleRow
from gemcutter.run.build import StepBuilder
from gemcutter.run.graphs import DecodeGraphs
from gemcutter.schedule.plan import Plan
from gemcutter.schedule.sequence import Sequence


@dataclass(frozen=True)
class Sampled:
    """What a step drew: one entry per sampling chunk of the plan, in order."""

    token_ids: list[int]
    logprobs: list[dict[int, float] | None]  # chosen and top alternatives, where the request asked


class Runner:
    """Builds the batch, runs the model eagerly or by graph, samples. Keeps nothing between steps."""

    def __init__(
        self,
        model: Gemma4,
        pool: KVPool,
        builder: StepBuilder,
        graphs: DecodeGraphs | None,
        suppress: list[int],
    ) -> None:
        """`suppress` are tokens that the checkpoint's generation_config never lets out."""
        self._model = model
        self._pool = pool
        self._builder = builder
        self._graphs = graphs
        self._suppress = suppress

    @torch.inference_mode()
    def run(self, plan: Plan, ledger: Ledger) -> Sampled:
        bucket = None
        if self._graphs is not None and not plan.prefills:
            bucket = self._graphs.bucket(len(plan.decodes))
        batch = self._builder.build(plan, ledger, pad_to=bucket or 0)
        logits = self._model.forward(batch, self._pool) if bucket is None else self._graphs.replay(batch)
        rows = [_sample_row(chunk.sequence) for chunk in plan.chunks if chunk.samples]
        if not rows:
            return Sampled([], [])
        sampling = SampleBatch.build(rows, logits.shape[1], logits.device, self._suppress)
        result = sample(logits[: len(rows)], sampling)
        return Sampled(result.token_ids.tolist(), result.logprobs())


def _sample_row(sequence: Sequence) -> SampleRow:
    p = sequence.params
    penalised = p.repetition_penalty != 1.0 or p.frequency_penalty or p.presence_penalty
    return SampleRow(
        params=p,
        seed=sequence.seed,
        output_index=len(sequence.tokens) - sequence.prompt_length,
        prompt_ids=sequence.prompt_ids if p.repetition_penalty != 1.0 else (),
        output_ids=sequence.output_ids if penalised else (),
    )
