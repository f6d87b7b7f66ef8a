"""Plan: what one step computes, as positions only. Token values are looked up when the step is built."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from gemcutter.schedule.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens [start, stop) of a sequence, whose pages are held; all of its prompt, or none."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool  # it reaches the newest token, so the next one is drawn


@dataclass(frozen=True)
class Plan:
    """One step. Attention has one kernel for decoding and one for prompts, and their last bits differ. So which of
    the two computes a token follows from the token: a prompt's is prefilled, be it the only one of its chunk, and a
    generated one is decoded, be it computed again after a preemption.
    """

    # One generated token each. Those whose successor is drawn stand first, in order of arrival, for a graph gives
    # logits of every row; then those whose successor is known, several of a sequence in order.
    decodes: tuple[Chunk, ...]
    prefills: tuple[Chunk, ...]  # tokens of prompts, in order of arrival

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """In the order of the batch."""
        return self.decodes + self.prefills

    @cached_property
    def samplers(self) -> tuple[Chunk, ...]:
        """Those that draw a token, in the order of the batch."""
        return tuple(chunk for chunk in self.chunks if chunk.samples)

    @property
    def sequences(self) -> list[Sequence]:
        """Each once."""
        return list(dict.fromkeys(chunk.sequence for chunk in self.chunks))
