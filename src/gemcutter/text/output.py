"""Results of LLM, with vLLM's names."""

from dataclasses import dataclass, field

from gemcutter.text.stream import Delta
from gemcutter.text.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """One alternative at one position."""

    logprob: float  # natural logarithm
    rank: int | None  # 1 is the likeliest; None for a chosen token outside the alternatives asked for
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # a stop token, or those of a stop string, included
    logprobs: list[dict[int, Logprob]] | None = None  # per token, where params.logprobs is set
    cumulative_logprob: float | None = None  # of the chosen tokens, where params.logprobs is set
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or stop_token_id that ended it; None for the end token

    def take(self, delta: Delta, tokenizer: Tokenizer | None, logprobs: bool) -> None:
        """Add what came; `logprobs`: they were asked for."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        if not logprobs:
            return
        self.logprobs = self.logprobs or []
        self.cumulative_logprob = self.cumulative_logprob or 0.0
        for token in delta.tokens:
            ranked = {id: (value, rank) for rank, (id, value) in enumerate(token.top, start=1)}
            ranked.setdefault(token.id, (token.logprob, None))
            self.logprobs.append(
                {
                    id: Logprob(value, rank, "" if tokenizer is None else tokenizer.token(id))
                    for id, (value, rank) in ranked.items()
                }
            )
            self.cumulative_logprob += token.logprob


@dataclass(slots=True)
class RequestOutput:
    """One prompt with its `params.n` answers."""

    request_id: str
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0  # prompt tokens of the first answer that came from the prefix cache
