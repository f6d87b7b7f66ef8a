"""Request and Update: what goes into the engine and what comes out, token ids only."""

from array import array

import msgspec

from gemcutter.params import SamplingParams


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. `params` is resolved: no None where the checkpoint decides; n is 1 here."""

    id: str
    prompt_ids: array  # of C ints
    params: SamplingParams
    stop_ids: frozenset[int]  # that end the text: the checkpoint's eos list unless ignored, and the user's
    seed: int


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """News of one request after a step. The stop token itself is in token_ids."""

    id: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None = None  # per token: chosen and top alternatives, natural log
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None while it runs
    stop_id: int | None = None  # the token that stopped it, where finish_reason is "stop"
    cached_tokens: int = 0  # prompt tokens whose K/V came from the prefix cache
    error: str | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's load, for /metrics."""

    waiting: int
    running: int
    pages_used: dict[str, int]  # by kind: held by running requests
    pages_cached: dict[str, int]  # by kind: free, but holding a reusable prefix
    pages_total: dict[str, int]
    preemptions: int  # since start
    steps: int  # since start
