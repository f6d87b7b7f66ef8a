"""What clients may send, with OpenAI's field names; fields that no one here knows are ignored."""

from typing import TypeVar

import msgspec

from gemcutter.params import SamplingParams
from gemcutter.serve.errors import bad_request

MAX_PROMPTS = 128  # prompts of one completions request
MAX_PROMPT_TOKENS = 2**22  # over all choices of one request: each carries its prompt to the engine
COMPLETION_TOKENS = 16  # max_tokens of a completion that names none: OpenAI's default

# Fields that would change the answer in ways that nothing here enforces, and the values that ask for nothing.
_NOTHING = (None, False, "", 0)
UNSUPPORTED: dict[str, tuple] = {
    "response_format": (None, {"type": "text"}),
    "structured_outputs": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "json_schema": _NOTHING,
    "regex": _NOTHING,
    "ebnf": _NOTHING,
    "structural_tag": _NOTHING,
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prompt_logprobs": (None,),
    "echo": _NOTHING,
    "suffix": _NOTHING,
    "use_beam_search": _NOTHING,
    "min_tokens": _NOTHING,
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
    "continue_final_message": _NOTHING,
    "chat_template": (None,),
    "lora_path": (None,),
}


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """Fields that both completion routes share."""

    model: str | None = None
    n: int | None = 1
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = False

    def params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises ApiError (400) for values out of their range."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad_request(f"best_of other than n is not supported, got {self.best_of}", "best_of")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        try:
            return SamplingParams(
                n=1 if self.n is None else self.n,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self.logit_bias,
                seed=self.seed,
                max_tokens=max_tokens,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                logprobs=logprobs,
                skip_special_tokens=self.skip_special_tokens is not False,
            )
        except ValueError as error:
            word = str(error).split(" ")[0].split("[")[0]  # messages begin with the name of the value
            raise bad_request(str(error), word if word in self.__struct_fields__ else None) from error


class CompletionRequest(Sampling, kw_only=True):
    prompt: str | list | None = None  # a text, token ids, or a list of either
    max_tokens: int | None = None
    logprobs: int | None = None


class ChatRequest(Sampling, kw_only=True):
    messages: list[dict]
    tools: list[dict] | None = None
    tool_choice: str | None = None
    chat_template_kwargs: dict | None = None
    add_generation_prompt: bool = True
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict] | None = None
    tools: list[dict] | None = None
    chat_template_kwargs: dict | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int]


T = TypeVar("T")


def parse(body: bytes, kind: type[T]) -> T:
    """Raises ApiError (400) for malformed JSON, values of a wrong type and fields that cannot be honoured."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise bad_request(f"the body must be a JSON object, got {type(fields).__name__}")
    for name, neutral in UNSUPPORTED.items():
        if name in fields and fields[name] not in neutral:
            raise bad_request(f"{name} is not supported here; leave it out", name)
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        param = path.rstrip("`").split(".")[0].split("[")[0] or None
        raise bad_request(f"{param}: {what}" if param else what, param) from error


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a completions request. Raises ApiError (400) if there are none or too many."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    for kind in (list[int], list[str], list[list[int]]):
        try:
            prompts = msgspec.convert(prompt, kind)
        except msgspec.ValidationError:
            continue
        if not prompts:
            break
        if kind == list[int]:
            return [prompts]
        if len(prompts) > MAX_PROMPTS:
            raise bad_request(f"at most {MAX_PROMPTS} prompts per request, got {len(prompts)}", "prompt")
        return prompts
    raise bad_request("prompt must be a text, a list of token ids, or a list of either", "prompt")
