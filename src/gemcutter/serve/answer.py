"""Answer: the sequences of one API request, from the engine's tokens to text."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from gemcutter.schedule.request import Request, Update
from gemcutter.serve.bridge import Bridge
from gemcutter.serve.metrics import Metrics, Stopwatch
from gemcutter.text.stream import Delta, TextStream
from gemcutter.text.tokens import Tokenizer


@dataclass(slots=True)
class Choice:
    """One sequence."""

    index: int
    request: Request
    text: TextStream
    watch: Stopwatch
    tokens: int = 0  # generated so far, a stop token included
    cached_tokens: int = 0
    finish_reason: str | None = None


@dataclass(slots=True)
class Part:
    """What one engine step added to one choice."""

    choice: Choice
    delta: Delta


class Answer:
    """Opened here, closed by `close`, which also aborts what still runs."""

    def __init__(
        self,
        bridge: Bridge,
        metrics: Metrics,
        tokenizer: Tokenizer | None,
        requests: list[Request],
        n: int,
        arrival: float,
    ) -> None:
        """
        Args:
            requests: in order of their choices, n in a row for each prompt.
            arrival: time.monotonic() when the API request came in.

        Raises ApiError (503) if the engine takes nothing now.
        """
        self.choices = [
            Choice(index, request, TextStream(tokenizer, request.params), Stopwatch(metrics, arrival))
            for index, request in enumerate(requests)
        ]
        self._n = n
        self._bridge = bridge
        self._flight = bridge.open(requests)

    def fail(self, error: Exception) -> None:
        """Make `parts` raise."""
        self._flight.fail(error)

    async def parts(self) -> AsyncIterator[list[Part]]:
        """What has arrived, in order, until every choice has ended.

        Raises ApiError if the engine refuses the request or dies, and what `fail` was given.
        """
        left = len(self.choices)
        while left:
            news = await self._flight.news()
            now = time.monotonic()
            parts = []
            for index, update in news:
                choice = self.choices[index]
                if choice.finish_reason is None:
                    parts.append(self._take(choice, update, now))
                    left -= choice.finish_reason is not None
            if parts:
                yield parts

    def usage(self) -> dict:
        """OpenAI's usage object, as of now. A prompt counts once, however many choices it has."""
        firsts = self.choices[:: self._n]
        prompt = sum(len(choice.request.prompt_ids) for choice in firsts)
        generated = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in firsts)},
        }

    def close(self) -> None:
        self._bridge.land(self._flight.ids)
        now = time.monotonic()
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.finish_reason = "abort"
                choice.watch.finish("abort", len(choice.request.prompt_ids), choice.cached_tokens, now)

    def _take(self, choice: Choice, update: Update, now: float) -> Part:
        delta = choice.text.push(update)
        choice.tokens += len(delta.token_ids)
        choice.cached_tokens = max(choice.cached_tokens, update.cached_tokens)
        choice.watch.tokens(len(delta.token_ids), now)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.watch.finish(delta.finish_reason, len(choice.request.prompt_ids), choice.cached_tokens, now)
            if update.finish_reason is None:  # a stop string: the engine knows nothing of it and would go on
                self._bridge.land([update.id])
        return Part(choice, delta)
