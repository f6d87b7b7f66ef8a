"""Runner: one step on the device, from a plan to the sampled token ids."""

from dataclasses import dataclass

import torch

from gemcutter.cache.pool import KVPool
from gemcutter.model.models import Model
from gemcutter.ops.tokens.sample import SampleResult, argmax_into, sample
from gemcutter.ops.tokens.sample_batch import SampleBatch, SampleRow
from gemcutter.run.build import StepBuilder
from gemcutter.run.graphs import StepGraphs
from gemcutter.schedule.plan import Plan
from gemcutter.schedule.sequence import Sequence


@dataclass(frozen=True)
class Sampled:
    """What a step drew: one entry per sampler of the plan, in order."""

    token_ids: list[int]
    logprobs: list[dict[int, float] | None]  # chosen and top alternatives, where the request asked


@dataclass
class Flight:
    """A step on its way through the device."""

    plan: Plan
    logits: torch.Tensor  # of the plan's samplers, and of a graph's other rows
    has_argmax: bool  # the forward pass took the likeliest tokens too
    token_ids: torch.Tensor | None = None  # in host memory, as is what follows; on their way until `done`
    result: SampleResult | None = None  # where rows wanted more than the likeliest token
    done: torch.cuda.Event | None = None  # on a GPU

    @property
    def is_done(self) -> bool:
        """Reading need not wait."""
        return self.done is None or self.done.query()

    def read(self) -> Sampled:
        """Wait until the step is done."""
        if self.done is not None:
            self.done.synchronize()
        token_ids = self.token_ids.tolist()
        return Sampled(token_ids, [None] * len(token_ids) if self.result is None else self.result.logprobs())


class Runner:
    """Builds the batch, runs the model eagerly or by graph, samples.

    On a GPU nothing waits here: `forward` and `draw` launch, in that order for every step, and `Flight.read` waits.
    What `forward` can do is done when the tokens of the step before come, and these are not held up by it.
    The tokens of the latest step stay on the device, where the next one finds them.
    """

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        builder: StepBuilder,
        graphs: StepGraphs | None,
        suppressed: torch.Tensor | None,
    ) -> None:
        """`suppressed` are tokens that the checkpoint's generation_config never lets out."""
        self._model = model
        self._pool = pool
        self._builder = builder
        self._graphs = graphs
        self._suppressed = suppressed
        self._suppress = [] if suppressed is None else suppressed.tolist()

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Flight:
        """Launch a step: all of it where only the likeliest tokens are wanted, else up to its logits. Tokens that
        the step before drew need not have been read.
        """
        bucket = None if self._graphs is None else self._graphs.bucket(plan)
        if bucket is not None:
            flight = Flight(plan, self._graphs.replay(plan, bucket), has_argmax=True)
        else:
            flight = Flight(plan, self._model.forward(self._builder.build(plan), self._pool), has_argmax=False)
        if all([chunk.sequence.only_argmax for chunk in plan.samplers]):
            drawn = self._builder.drawn[: len(plan.samplers)]
            if len(drawn) and not flight.has_argmax:
                argmax_into(drawn, flight.logits, self._suppressed)
            told = torch.empty(len(drawn), dtype=torch.int64, pin_memory=drawn.is_cuda)
            self._tell(flight, told.copy_(drawn, non_blocking=True))
        return flight

    @torch.inference_mode()
    def draw(self, flight: Flight) -> None:
        """Launch what `forward` left. The tokens before must have been read: penalties count them."""
        if flight.token_ids is not None:
            return
        samplers = flight.plan.samplers
        rows, logits = [_sample_row(chunk.sequence) for chunk in samplers], flight.logits[: len(samplers)]
        result = sample(logits, SampleBatch.build(rows, logits.shape[1], logits.device, self._suppress))
        self._builder.drawn[: len(samplers)].copy_(result.token_ids)
        flight.result = result.to_host()
        self._tell(flight, flight.result.token_ids)

    def _tell(self, flight: Flight, token_ids: torch.Tensor) -> None:
        """They are on their way to the host, as the last work of the step."""
        flight.token_ids = token_ids
        if flight.logits.is_cuda:
            flight.done = torch.cuda.Event()
            flight.done.record(torch.cuda.current_stream(flight.logits.device))


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
