"""Intake: a prompt and its SamplingParams to requests the engine can run, or an error that says why not."""

import contextlib
import random
from array import array
from typing import Annotated

import msgspec

from gemcutter.params import SamplingParams, resolve
from gemcutter.schedule.request import Request
from gemcutter.text.tokens import Tokenizer


class Intake:
    """Not thread-safe as to the seeds it draws: from several threads their order is not repeatable."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab: int,
        context_length: int,
        generation_config: dict,
        random_seed: int = 0,
    ) -> None:
        """
        Args:
            vocab: ids the model knows; a tokenizer may know fewer.
            context_length: tokens of prompt and answer together.
            generation_config: of the checkpoint: eos_token_id and the sampling defaults.
            random_seed: of the generator that gives a seed to requests that bring none.
        """
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._known_ids = list[Annotated[int, msgspec.Meta(ge=0, lt=vocab)]]
        self._context_length = context_length
        self._defaults = generation_config
        self._eos = frozenset(_ids(generation_config.get("eos_token_id")))
        self._seeds = random.Random(random_seed)

    def requests(
        self, prompt: str | list[int], params: SamplingParams, id: str, clip: bool = False
    ) -> list[Request]:
        """`params.n` requests with ids f"{id}-0", f"{id}-1", …; with a seed, choice i has seed + i.

        `clip`: cut a max_tokens that does not fit to what the context leaves, instead of refusing it.

        Raises ValueError for what can never run.
        """
        prompt_ids = self.encode(prompt)
        params = self._resolved(params, len(prompt_ids), clip)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        one = msgspec.structs.replace(params, n=1)
        return [
            Request(
                id=f"{id}-{choice}",
                prompt_ids=prompt_ids,
                params=one,
                stop_ids=stop_ids,
                seed=self._seed(params.seed, choice),
            )
            for choice in range(params.n)
        ]

    def encode(self, prompt: str | list[int]) -> array:
        """Token ids of a prompt, all of them known to the model, and short enough to leave room for one more."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer; give the prompt as token ids")
            prompt = self._tokenizer.encode(prompt)
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if len(prompt) >= self._context_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but the context holds {self._context_length} of prompt and "
                "answer together; shorten the prompt or start with a larger context_length"
            )
        # The whole list at once: a loop in Python over a long prompt would take longer than its tokenizing.
        with contextlib.suppress(msgspec.ValidationError):
            return array("i", msgspec.convert(prompt, self._known_ids))
        for token in prompt:
            self._check_id("the prompt", token)
        return array("i", prompt)

    def _resolved(self, params: SamplingParams, prompt_tokens: int, clip: bool) -> SamplingParams:
        room = self._context_length - prompt_tokens
        wanted = params.max_tokens
        if wanted is not None and wanted > room and not clip:
            raise ValueError(
                f"max_tokens is {wanted}, but a prompt of {prompt_tokens} tokens leaves {room} of the context of "
                f"{self._context_length}; ask for at most {room}, or shorten the prompt"
            )
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this checkpoint has none; use stop_token_ids")
        for token in params.stop_token_ids:
            self._check_id("stop_token_ids", token)
        for token in params.logit_bias or {}:
            self._check_id("logit_bias", token)
        params = resolve(params, self._defaults)
        return msgspec.structs.replace(params, max_tokens=room if wanted is None else min(wanted, room))

    def _check_id(self, where: str, token: int) -> None:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self._vocab:
            raise ValueError(f"{where} holds {token!r:.40}; token ids are integers in [0, {self._vocab - 1}]")

    def _seed(self, seed: int | None, choice: int) -> int:
        """In [0, 2^63): fits every generator's signed 64 bits."""
        return self._seeds.getrandbits(63) if seed is None else (seed + choice) % 2**63


def _ids(value: int | list[int] | None) -> list[int]:
    """generation_config writes one id, a list of ids, or nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
