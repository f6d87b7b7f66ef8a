"""Service: what the routes share: the bridge, the text layer, the names, the door that closes at shutdown."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from gemcutter.checkpoint.config import read_generation_config
from gemcutter.config import EngineConfig
from gemcutter.params import SamplingParams
from gemcutter.schedule.request import Request
from gemcutter.serve import wire
from gemcutter.serve.answer import Answer
from gemcutter.serve.bridge import Bridge
from gemcutter.serve.errors import ApiError, bad_request
from gemcutter.serve.metrics import Metrics
from gemcutter.serve.schema import MAX_PROMPT_TOKENS
from gemcutter.text.chat import render
from gemcutter.text.intake import Intake
from gemcutter.text.tokens import Tokenizer

T = TypeVar("T")


class Service:
    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        tokenizer: Tokenizer | None,
        bridge: Bridge,
        ready: wire.Ready,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.bridge = bridge
        self.metrics = Metrics()
        self.context_length = ready.context_length
        self.vocab = ready.vocab
        self.name = config.served_model_name or config.model_path
        self.names = (self.name, config.model_path)
        self.created = int(time.time())
        self.closing = False
        defaults = read_generation_config(folder)
        self._intake = Intake(tokenizer, ready.vocab, ready.context_length, defaults, config.random_seed)

    @property
    def state(self) -> str:
        """ "ok", "stopping" or "dead", as /health says it."""
        if not self.bridge.alive:
            return "dead"
        return "stopping" if self.closing else "ok"

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for a model that is not served. None means whatever is."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist here; served: {self.name!r}",
                "model",
                "model_not_found",
            )

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise bad_request(f"{self.name} has no tokenizer: only completions of token ids are served")
        return self.tokenizer

    def _check_length(self, chars: int) -> None:
        """Raises ApiError (400) for text that cannot fit the context, before it costs seconds to tokenize."""
        bound = None if self.tokenizer is None else self.tokenizer.max_chars
        if bound is not None and chars > self.context_length * bound:
            raise bad_request(
                f"{chars} characters are more than the context of {self.context_length} tokens can hold"
            )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokenizer = self._need_tokenizer()
        self._check_length(len(text))
        return await _aside(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens), "prompt")

    async def token_texts(self, ids: list[int]) -> list[str]:
        """Each token's text on its own."""
        tokenizer = self._need_tokenizer()

        def look_up() -> list[str]:
            table = {id: tokenizer.token(id) for id in set(ids)}
            return [table[id] for id in ids]

        return await _aside(look_up, None)

    async def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens shown. Raises ApiError (400) for unknown ids, and more than the context."""
        tokenizer = self._need_tokenizer()
        if len(ids) > self.context_length:
            raise bad_request(
                f"{len(ids)} tokens are more than the context of {self.context_length}; send fewer at once",
                "tokens",
            )
        if ids and not (0 <= min(ids) and max(ids) < self.vocab):
            wrong = next(id for id in ids if not 0 <= id < self.vocab)
            raise bad_request(f"token id {wrong} is outside [0, {self.vocab})", "tokens")
        return await _aside(lambda: tokenizer.decode(ids, skip_special_tokens=False), "tokens")

    async def render(
        self, messages: list[dict], tools: list[dict] | None, opening: bool, kwargs: dict
    ) -> list[int]:
        """Token ids of a chat; `opening`: end with the start of the model's turn."""
        tokenizer = self._need_tokenizer()
        taken = {"tokenizer", "messages", "tools", "add_generation_prompt"} & kwargs.keys()
        if taken:
            raise bad_request(
                f"chat_template_kwargs may not set {', '.join(sorted(taken))}", "chat_template_kwargs"
            )
        text = await _aside(
            lambda: render(tokenizer, messages, tools=tools, add_generation_prompt=opening, **kwargs),
            "messages",
        )
        return await self.encode(text, add_special_tokens=False)

    async def requests(
        self, prompt: str | list[int], params: SamplingParams, id: str, clip: bool = False
    ) -> list[Request]:
        """One request per choice; `clip` as in Intake. Raises ApiError (400)."""
        if not isinstance(prompt, str):  # checking ids takes less time than reading them did
            with _client_fault(None):
                return self._intake.requests(prompt, params, id, clip)
        self._check_length(len(prompt))
        return await _aside(lambda: self._intake.requests(prompt, params, id, clip), None)

    def answer(self, requests: list[Request], n: int, arrival: float) -> Answer:
        """`requests`: n in a row for each prompt. Raises ApiError (400, 503) where they are not taken."""
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        tokens = sum(len(request.prompt_ids) for request in requests)
        if tokens > MAX_PROMPT_TOKENS:
            raise bad_request(
                f"the prompts of all choices together have {tokens} tokens, at most {MAX_PROMPT_TOKENS} are taken "
                "at once; lower n or send fewer prompts"
            )
        return Answer(self.bridge, self.metrics, self.tokenizer, requests, n, arrival)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


async def _aside(work: Callable[[], T], param: str | None) -> T:
    """Run in a thread: a long prompt must not hold up the streams."""
    with _client_fault(param):
        return await asyncio.to_thread(work)


@contextlib.contextmanager
def _client_fault(param: str | None) -> Iterator[None]:
    """A ValueError is the client's fault."""
    try:
        yield
    except ValueError as error:
        raise bad_request(str(error), param) from error
