"""LLM: strings in, strings out, in this process."""

import dataclasses
import gc
import itertools
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from gemcutter.checkpoint.config import read_generation_config
from gemcutter.checkpoint.files import locate
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine
from gemcutter.params import SamplingParams
from gemcutter.schedule.request import Request, Update
from gemcutter.text.chat import ChatError, render
from gemcutter.text.intake import Intake
from gemcutter.text.output import CompletionOutput, RequestOutput
from gemcutter.text.stream import Delta, TextStream
from gemcutter.text.tokens import Tokenizer

Prompt = str | dict  # a text, {"prompt": text} or {"prompt_token_ids": ids}


class LLM:
    """A model and its engine, for one thread at a time. As a context manager it frees its memory at the end."""

    def __init__(self, model: str = "carat", **options) -> None:
        """
        Args:
            model: folder or hub id of a checkpoint, or a built-in name.
            options: fields of EngineConfig: device, dtype, context_length, mem_fraction_static, load_format, …

        Raises:
            TypeError: an option that EngineConfig does not have.
            ValueError: an option, the checkpoint, the device or its memory do not do.
        """
        known = {f.name for f in dataclasses.fields(EngineConfig)} - {"model_path"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise TypeError(f"LLM has no option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        config = EngineConfig(model_path=model, **options)
        folder = locate(config.model_path, config.revision, config.reads_weights)
        self.tokenizer = Tokenizer.load(folder)
        self._engine: Engine | None = Engine.start(config)
        self._intake = Intake(
            self.tokenizer,
            self._engine.spec.vocab,
            self._engine.context_length,
            read_generation_config(folder),
            config.random_seed,
        )
        self._numbers = itertools.count()
        self._flights: dict[str, _Flight] = {}

    @classmethod
    def of(cls, config: EngineConfig) -> "LLM":
        """The same, from a whole config."""
        options = dataclasses.asdict(config)
        return cls(options.pop("model_path"), **options)

    @property
    def config(self) -> EngineConfig:
        """What the engine runs with: no "auto" left."""
        return self._running().config

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; results in their order.

        Args:
            prompts: a text, {"prompt": text}, {"prompt_token_ids": ids}, or a list of such.
            params: for all, or one for each prompt; what is left open the checkpoint's generation_config decides.
            progress: show a bar on stderr, if that is a terminal.

        Raises:
            TypeError: a prompt has none of these forms.
            ValueError: a prompt or its params can never run; then none has been started.
            RuntimeError: a step broke, or the LLM is closed.
        """
        return self._finish(self._outputs([_prompt(p) for p in _listed(prompts)], params), progress)

    def chat(
        self,
        conversations: list[dict] | list[list[dict]],
        params: SamplingParams | list[SamplingParams] | None = None,
        tools: list[dict] | None = None,
        chat_template_kwargs: dict | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, each a list of {"role": …, "content": …}.

        Raises:
            ValueError: as `generate`; ChatError where the checkpoint's template cannot render a conversation.
        """
        if not isinstance(conversations, list):
            raise TypeError("conversations must be a list of messages, or a list of such lists")
        if not conversations or isinstance(conversations[0], dict):
            conversations = [conversations]
        variables = chat_template_kwargs or {}
        prompts = [self._render(messages, tools, variables) for messages in conversations]
        return self._finish(self._outputs(prompts, params), progress)

    def stream(self, prompt: Prompt | list[dict], params: SamplingParams | None = None) -> Iterator[Delta]:
        """One answer as it comes, to a prompt or to a conversation. Leaving the iterator ends the request.

        Raises:
            ValueError: as `generate` and `chat`, at the call and not at the first delta.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"stream gives one answer, got n {params.n}")
        one = self._render(prompt, None, {}) if isinstance(prompt, list) else _prompt(prompt)
        [(_, requests)] = self._outputs([one], params)
        return (delta for _, _, delta in self._deltas(requests))

    def close(self) -> None:
        """Free the engine's memory. The LLM cannot be used any more."""
        self._engine = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _running(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._engine

    def _render(self, messages: list[dict], tools: list[dict] | None, variables: dict) -> tuple[str, list[int]]:
        if self.tokenizer is None:
            raise ChatError("this checkpoint has no tokenizer, so it cannot chat; use generate with token ids")
        text = render(self.tokenizer, messages, tools, **variables)
        return text, self.tokenizer.encode(text, add_special_tokens=False)

    def _outputs(
        self,
        prompts: list[tuple[str | None, str | list[int]]],
        params: SamplingParams | list[SamplingParams] | None,
    ) -> list[tuple[RequestOutput, list[Request]]]:
        """Check everything, start nothing. A prompt is its text, if it has one, and what is to be encoded."""
        if not isinstance(params, list):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"got {len(params)} params for {len(prompts)} prompts; give one for all, or one each")
        outputs = []
        for (text, prompt), one in zip(prompts, params, strict=True):
            id = str(next(self._numbers))
            requests = self._intake.requests(prompt, one, id, clip=True)
            answers = [CompletionOutput(index) for index in range(len(requests))]
            outputs.append((RequestOutput(id, text, requests[0].prompt_ids.tolist(), answers), requests))
        return outputs

    def _finish(self, outputs: list[tuple[RequestOutput, list[Request]]], progress: bool) -> list[RequestOutput]:
        places = {
            request.id: (output, output.outputs[index])
            for output, requests in outputs
            for index, request in enumerate(requests)
        }
        everything = [request for _, requests in outputs for request in requests]
        with _bar(progress) as bar:
            task = bar.add_task("requests", total=len(everything))
            for request, update, delta in self._deltas(everything):
                output, answer = places[request.id]
                answer.take(delta, self.tokenizer, request.params.logprobs is not None)
                if answer.index == 0:
                    output.num_cached_tokens = max(output.num_cached_tokens, update.cached_tokens)
                if delta.finish_reason is not None:
                    bar.advance(task)
                    output.finished = all(a.finish_reason is not None for a in output.outputs)
        return [output for output, _ in outputs]

    def _deltas(self, requests: list[Request]) -> Iterator[tuple[Request, Update, Delta]]:
        """Run requests to their ends, news as it comes; whatever stops this ends those that still run."""
        engine = self._running()
        news: deque[tuple[Request, Update, Delta]] = deque()
        left = len(requests)
        try:
            for request in requests:
                engine.submit(request)
                self._flights[request.id] = _Flight(request, TextStream(self.tokenizer, request.params), news)
            while left:
                if not news:
                    self._step(engine)
                while news:
                    request, update, delta = news.popleft()
                    left -= delta.finish_reason is not None
                    if delta.finish_reason == "error":
                        raise RuntimeError(f"request {request.id} failed: {update.error}")
                    yield request, update, delta
        finally:
            for request in requests:
                if self._flights.pop(request.id, None) is not None:
                    engine.abort(request.id)

    def _step(self, engine: Engine) -> None:
        """One step; its news goes to whoever waits for it, since several streams may be open at once."""
        assert engine.has_work, f"the engine is idle, but {len(self._flights)} requests wait for it"
        for update in engine.step():
            flight = self._flights.get(update.id)
            if flight is None:
                continue  # the last word of a request that was aborted
            delta = flight.text.push(update)
            flight.news.append((flight.request, update, delta))
            if delta.finish_reason is not None:
                del self._flights[update.id]
                if update.finish_reason is None:  # a stop string: the engine would go on
                    engine.abort(update.id)


@dataclass(slots=True)
class _Flight:
    """A request in the engine; its news is shared with the others of its call."""

    request: Request
    text: TextStream
    news: deque


def _listed(prompts: Prompt | list[Prompt]) -> list[Prompt]:
    return prompts if isinstance(prompts, list) else [prompts]


def _prompt(prompt: Prompt) -> tuple[str | None, str | list[int]]:
    """Its text, if it has one, and what is to be encoded."""
    if isinstance(prompt, str):
        return prompt, prompt
    if isinstance(prompt, dict) and isinstance(prompt.get("prompt_token_ids"), (list, tuple)):
        return None, list(prompt["prompt_token_ids"])
    if isinstance(prompt, dict) and isinstance(prompt.get("prompt"), str):
        return prompt["prompt"], prompt["prompt"]
    raise TypeError(f'a prompt is a text, {{"prompt": text}} or {{"prompt_token_ids": ids}}, got {prompt!r:.80}')


def _bar(wanted: bool) -> Progress:
    return Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not (wanted and sys.stderr.isatty()),
        transient=True,
    )
