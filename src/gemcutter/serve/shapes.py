"""The JSON of answers: OpenAI's chat and completions objects, whole and in chunks, as plain dicts."""

import time
from collections.abc import Iterable

from gemcutter.serve.answer import Choice, Part
from gemcutter.text.stream import TokenLogprob
from gemcutter.text.tokens import Tokenizer

LOWEST = -9999.0  # stands for log 0, which JSON cannot say


class Shape:
    """What both kinds of answer share. `index` counts choices; one Shape serves one API request."""

    kind: str
    chunk_kind: str

    def __init__(self, id: str, model: str, tokenizer: Tokenizer | None, token_ids: bool, logprobs: bool) -> None:
        """`token_ids`: show them beside the text; without a tokenizer they are the answer, always shown."""
        self._tokenizer = tokenizer
        self._token_ids = token_ids or tokenizer is None
        self._logprobs = logprobs
        self._head = {"id": id, "created": int(time.time()), "model": model}
        self._begun: set[int] = set()

    def whole(self, parts: dict[int, list[Part]], usage: dict) -> dict:
        """`parts`: of every choice, all of them."""
        choices = [self._whole_choice(index, parts[index]) for index in sorted(parts)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, part: Part) -> dict:
        """One streamed chunk: what one step added to one choice."""
        return self._chunk([self._chunk_choice(part)])

    def usage_chunk(self, usage: dict) -> dict:
        return {**self._chunk([]), "usage": usage}

    def opening(self, choice: Choice) -> dict | None:
        """The chunk before a choice's first one, if this kind has any."""
        return None

    def _whole_choice(self, index: int, parts: list[Part]) -> dict:
        raise NotImplementedError

    def _chunk_choice(self, part: Part) -> dict:
        raise NotImplementedError

    def _chunk(self, choices: list[dict]) -> dict:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _end(self, last: Part) -> dict:
        return {"finish_reason": last.delta.finish_reason, "stop_reason": last.delta.stop_reason}

    def _ids(self, parts: Iterable[Part]) -> dict:
        if not self._token_ids:
            return {}
        return {"token_ids": [id for part in parts for id in part.delta.token_ids]}

    def _token(self, id: int) -> tuple[str, list[int] | None]:
        """A token's text and its bytes; without a tokenizer its number stands in for the text."""
        if self._tokenizer is None:
            return f"token_id:{id}", None
        raw = self._tokenizer.token_bytes(id)
        return raw.decode("utf-8", "replace"), list(raw)


class CompletionShape(Shape):
    kind = chunk_kind = "text_completion"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._offsets: dict[int, int] = {}  # by choice: where its next token's text begins

    def _whole_choice(self, index: int, parts: list[Part]) -> dict:
        prompt = {"prompt_token_ids": parts[0].choice.request.prompt_ids.tolist()} if self._token_ids else {}
        return {
            "index": index,
            "text": "".join(part.delta.text for part in parts),
            "logprobs": self._entries(index, [entry for part in parts for entry in part.delta.tokens]),
            **self._end(parts[-1]),
            **self._ids(parts),
            **prompt,
        }

    def _chunk_choice(self, part: Part) -> dict:
        return {
            "index": part.choice.index,
            "text": part.delta.text,
            "logprobs": self._entries(part.choice.index, part.delta.tokens),
            **self._end(part),
            **self._ids([part]),
        }

    def _entries(self, index: int, tokens: list[TokenLogprob]) -> dict | None:
        if not self._logprobs:
            return None
        table: dict[str, list] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for entry in tokens:
            text, _ = self._token(entry.id)
            offset = self._offsets.get(index, 0)
            self._offsets[index] = offset + len(text)
            table["text_offset"].append(offset)
            table["tokens"].append(text)
            table["token_logprobs"].append(max(entry.logprob, LOWEST))
            table["top_logprobs"].append({self._token(id)[0]: max(value, LOWEST) for id, value in entry.top})
        return table


class ChatShape(Shape):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self, choice: Choice) -> dict | None:
        if choice.index in self._begun:
            return None
        self._begun.add(choice.index)
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _whole_choice(self, index: int, parts: list[Part]) -> dict:
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": "".join(part.delta.text for part in parts),
                "refusal": None,
            },
            "logprobs": self._entries([entry for part in parts for entry in part.delta.tokens]),
            **self._end(parts[-1]),
            **self._ids(parts),
        }

    def _chunk_choice(self, part: Part) -> dict:
        return {
            "index": part.choice.index,
            "delta": {"content": part.delta.text},
            "logprobs": self._entries(part.delta.tokens),
            **self._end(part),
            **self._ids([part]),
        }

    def _entries(self, tokens: list[TokenLogprob]) -> dict | None:
        if not self._logprobs:
            return None
        return {"content": [self._entry(entry) for entry in tokens], "refusal": None}

    def _entry(self, entry: TokenLogprob) -> dict:
        def one(id: int, value: float) -> dict:
            text, raw = self._token(id)
            return {"token": text, "logprob": max(value, LOWEST), "bytes": raw}

        return {**one(entry.id, entry.logprob), "top_logprobs": [one(id, value) for id, value in entry.top]}
