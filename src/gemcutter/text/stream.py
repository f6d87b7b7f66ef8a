"""TextStream: the text of one sequence, as its tokens come, with stop strings."""

from dataclasses import dataclass, field

from gemcutter.params import SamplingParams
from gemcutter.schedule.request import Update
from gemcutter.text.tokens import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows bytes that are no character (yet)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token with its alternatives; natural logarithms."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (id, logprob) of the params.logprobs likeliest, likeliest first


@dataclass(frozen=True, slots=True)
class Delta:
    """What one update adds."""

    text: str
    finish_reason: str | None = None  # "stop" also for a stop string, which the engine knows nothing of
    stop_reason: str | int | None = None  # the stop string, or the id out of stop_token_ids; None for the end token
    token_ids: list[int] = field(default_factory=list)  # the update's, up to the one that completed a stop string
    tokens: list[TokenLogprob] = field(default_factory=list)  # of token_ids, where logprobs were asked for


class TextStream:
    """Joined over all pushes, the text is the one that decoding all ids at once and cutting it would give.

    Text is emitted once it can no longer change: not inside a run of byte pieces, not while a character is
    incomplete, not while its end may be the start of a stop string. The end flushes what is held. The stop string
    that is complete first wins, the longer of two that are complete together; the text ends before it. The stop
    token is not part of the text. Without a tokenizer the text stays empty.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        assert tokenizer is not None or not params.stop, "stop strings need a tokenizer"
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, params.skip_special_tokens)
        self._held = ""  # decoded, but perhaps the start of a stop string
        self.finished = False

    def push(self, update: Update) -> Delta:
        """Take the update's tokens; after a delta with a finish_reason nothing may follow.

        A finish_reason that the update does not have means a stop string: the caller aborts the request.
        """
        assert not self.finished, f"{update.id}: pushed after the end"
        text = ""
        stop = None
        taken = 0
        reason = update.finish_reason
        for token in update.token_ids:
            taken += 1
            last = taken == len(update.token_ids)
            if self._detokenizer is not None and not (last and reason == "stop" and token == update.stop_id):
                ready, stop = self._release(self._detokenizer.push(token))
                text += ready
                if stop is not None:
                    break
        if stop is None and reason is not None and self._detokenizer is not None:
            ready, stop = self._release(self._detokenizer.flush())
            text += ready
            if stop is None:
                text += self._held
        if stop is not None:
            reason, stop_reason = "stop", stop
        else:
            stop_reason = update.stop_id if update.stop_id in self._params.stop_token_ids else None
        self.finished = reason is not None
        token_ids = update.token_ids[:taken]
        return Delta(text, reason, stop_reason, token_ids, self._logprobs(token_ids, update.logprobs))

    def _release(self, fresh: str) -> tuple[str, str | None]:
        """Add decoded text; give what is now safe to emit, and the stop string if one is complete."""
        if not fresh:
            return "", None
        buffer = self._held + fresh
        hit = _first_stop(buffer, self._params.stop)
        if hit is not None:
            start, stop = hit
            self._held = ""
            return buffer[:start], stop
        keep = _tail(buffer, self._params.stop)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def _logprobs(self, token_ids: list[int], logprobs: list[dict[int, float]] | None) -> list[TokenLogprob]:
        if logprobs is None or self._params.logprobs is None:
            return []
        count = self._params.logprobs
        return [
            TokenLogprob(id, table[id], tuple(sorted(table.items(), key=lambda item: -item[1])[:count]))
            for id, table in zip(token_ids, logprobs, strict=False)  # token_ids may end at a stop string
        ]


class Detokenizer:
    """Decodes a window that begins one emitted group earlier: a piece's text may depend on the piece before it."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []  # the last emitted group, then the ids not emitted yet
        self._emitted = 0  # ids of the window that are emitted
        self._emitted_text = ""  # what they decode to

    def push(self, token: int) -> str:
        """Text that this token completes."""
        # A skipped or unknown id has no text and does not end a run of byte pieces: keep it out of the window.
        if token in self._skip or not self._tokenizer.knows(token):
            return ""
        self._window.append(token)
        # A run of byte pieces is decoded as one: a later invalid byte turns all of its characters into U+FFFD.
        if token in self._tokenizer.byte_ids:
            return ""
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        if text.endswith(BROKEN) and not self._tokenizer.byte_ids:
            return ""  # byte-level vocabularies: the character goes on in the next token
        return self._emit(text)

    def flush(self) -> str:
        """Text of everything still held: the sequence is over."""
        if self._emitted == len(self._window):
            return ""
        return self._emit(self._tokenizer.decode(self._window, skip_special_tokens=False))

    def _emit(self, text: str) -> str:
        fresh = text[len(self._emitted_text) :]
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        self._emitted_text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        return fresh


def _first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """(start, stop) of the stop string that ends first, of those the longest.

    By its end and not its start, so that the answer does not depend on how the text was cut into pieces.
    """
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    if not found:
        return None
    _, start, stop = min(found)
    return start, stop


def _tail(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
