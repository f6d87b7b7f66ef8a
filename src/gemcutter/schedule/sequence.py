"""Sequence: a request inside the engine, and how far it has come."""

from gemcutter.cache.prefix import PrefixChain
from gemcutter.schedule.request import Request


class Sequence:
    """Known and computed tokens are counted apart: a step can be planned before its tokens are read."""

    __slots__ = (
        "request", "arrival", "tokens", "chain", "max_length", "num_computed", "cached_tokens", "preemptions",
        "finish_reason", "stop_id",
    )  # fmt: skip

    def __init__(self, request: Request, arrival: int, page_size: int, context_length: int) -> None:
        self.request = request
        self.arrival = arrival  # position in the order of arrival, which is the order of service
        self.tokens = list(request.prompt_ids)  # prompt and output
        self.chain = PrefixChain(self.tokens, page_size)
        allowed = request.params.max_tokens
        self.max_length = context_length  # tokens of prompt and output
        if allowed is not None:
            self.max_length = min(context_length, len(self.tokens) + allowed)
        self.num_computed = 0  # tokens that have K/V
        self.cached_tokens: int | None = None  # prompt tokens reused when first admitted; None before that
        self.preemptions = 0
        self.finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None while it runs
        self.stop_id: int | None = None  # the token that stopped it, where finish_reason is "stop"

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_to_compute(self) -> int:
        """Known tokens without K/V. 1 while decoding: the newest token."""
        return len(self.tokens) - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    def token_slice(self, start: int, stop: int) -> list[int]:
        return self.tokens[start:stop]

    def append(self, token_id: int) -> None:
        """Add a sampled token and see whether the sequence ends with it."""
        self.tokens.append(token_id)
        if token_id in self.request.stop_ids:
            self.finish_reason, self.stop_id = "stop", token_id
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"

    def __repr__(self) -> str:
        return f"Sequence({self.id!r}, {self.num_computed} of {len(self.tokens)} tokens computed)"
