"""Sequence: a request inside the engine, and how far it has come."""

from array import array

from gemcutter.cache.prefix import PrefixChain
from gemcutter.schedule.request import Request


class Sequence:
    """Tokens drawn, read and computed are counted apart: a step is planned before the tokens of the last are read.

    Tokens are an array, and the request with its list of them is not kept: Python's collector walks every element
    of every list, and with 4000 waiting prompts of 4000 tokens it stopped the engine for 0.4 s. It also costs 44
    bytes a token less.
    """

    __slots__ = (
        "id", "params", "only_argmax", "stop_ids", "seed", "prompt_length", "arrival", "tokens", "chain",
        "max_length", "length", "drawn_row", "num_computed", "quiet", "cached_tokens", "preemptions",
        "finish_reason", "stop_id",
    )  # fmt: skip

    def __init__(self, request: Request, arrival: int, page_size: int, context_length: int) -> None:
        self.id = request.id
        self.params = request.params
        self.only_argmax = request.params.only_argmax  # kept, for it is asked at every token
        self.stop_ids = request.stop_ids
        self.seed = request.seed
        self.prompt_length = len(request.prompt_ids)
        self.arrival = arrival  # position in the order of arrival, which is the order of service
        self.tokens = array("i", request.prompt_ids)  # prompt and output
        self.chain = PrefixChain(self.tokens, page_size)
        allowed = self.params.max_tokens
        self.max_length = context_length  # tokens of prompt and output
        if allowed is not None:
            self.max_length = min(context_length, self.prompt_length + allowed)
        self.length = self.prompt_length  # tokens that the next step may count on, read or not
        self.drawn_row = 0  # of the newest that is not read, among the tokens that its step draws
        self.num_computed = 0  # tokens whose K/V a launched step has written, or will before the next step begins
        self.quiet = 0  # up to so many tokens computed the ledger has nothing to do
        self.cached_tokens: int | None = None  # prompt tokens reused when first admitted; None before that
        self.preemptions = 0
        self.finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None while it runs
        self.stop_id: int | None = None  # the token that stopped it, where finish_reason is "stop"

    @property
    def num_unread(self) -> int:
        """Tokens that launched steps draw and nobody has read."""
        return self.length - len(self.tokens)

    @property
    def num_to_compute(self) -> int:
        """Tokens without K/V. 1 while decoding: the newest token."""
        return self.length - self.num_computed

    @property
    def in_prompt(self) -> bool:
        """The next token to compute is one of the prompt."""
        return self.num_computed < self.prompt_length

    @property
    def prompt_ids(self) -> array:
        return self.tokens[: self.prompt_length]

    @property
    def output_ids(self) -> array:
        return self.tokens[self.prompt_length :]

    def append(self, token_id: int) -> None:
        """Add a token that was drawn, now read, and see whether the sequence ends with it."""
        self.tokens.append(token_id)
        if token_id in self.stop_ids:
            self.finish_reason, self.stop_id = "stop", token_id
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"

    def __repr__(self) -> str:
        return f"Sequence({self.id!r}, {self.num_computed} of {self.length} tokens computed)"
