"""Plan: what one step computes, as positions only. Token values are looked up when the step is built."""

from dataclasses import dataclass
from typing import NamedTuple

from gemcutter.schedule.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens [start, stop) of a sequence, whose pages are held."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool  # it reaches the last known token, so the next one is drawn

    @property
    def is_decode(self) -> bool:
        return self.samples and self.stop - self.start == 1


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Both parts are in order of arrival."""

    decodes: tuple[Chunk, ...]  # one token each that samples: a generated one, or a prompt's last
    prefills: tuple[Chunk, ...]  # all others

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """In the order of the batch."""
        return self.decodes + self.prefills

    @property
    def sequences(self) -> list[Sequence]:
        return [chunk.sequence for chunk in self.chunks]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)
