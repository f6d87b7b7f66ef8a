"""SamplingParams: what a user may ask of one request. No torch, so that every process can hold it."""

import math

import msgspec

MAX_N = 128  # completions of one prompt
MAX_LOGPROBS = 20  # alternatives per token; OpenAI's limit
MAX_STOP = 16  # stop strings of one request
MAX_STOP_LENGTH = 1024  # characters of one stop string: every new piece of text is compared with it
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024  # biased tokens of one request


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling choices, named as in vLLM.

    `None` means "what the checkpoint's generation_config says" for temperature, top_p, top_k, min_p and
    repetition_penalty, and "until a stop or the end of the context" for max_tokens.

    Raises:
        ValueError: a value is of another type, not finite or out of its range; the message names it.
    """

    n: int = 1
    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None  # (0, 1]
    top_k: int | None = None  # 0 or -1 keeps every token
    min_p: float | None = None  # [0, 1]: keep tokens with p >= min_p * p_max
    presence_penalty: float = 0.0  # [-2, 2], over output tokens
    frequency_penalty: float = 0.0  # [-2, 2], over output tokens
    repetition_penalty: float | None = None  # > 0, over prompt and output tokens
    logit_bias: dict[int, float] | None = None  # token id -> [-100, 100], added to the logit
    seed: int | None = None  # same seed, same text; None draws a fresh one
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives to return beside the chosen token; 0 returns the chosen one
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        msgspec.structs.force_setattr(self, "stop", tuple(self.stop or ()))
        msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _check_range("n", self.n, 1, MAX_N)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("top_k", self.top_k, -1, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_range("seed", self.seed, -(2**63), 2**64 - 1)
        _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_range("number of stop strings", len(self.stop), 0, MAX_STOP)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError("stop must hold non-empty strings")
        _check_range("length of a stop string", max(map(len, self.stop), default=0), 0, MAX_STOP_LENGTH)
        _check_range("number of stop_token_ids", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS)
        bias = self.logit_bias or {}
        _check_range("number of logit_bias entries", len(bias), 0, MAX_LOGIT_BIAS)
        for token, value in bias.items():
            _check_range(f"logit_bias[{token}]", value, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def only_argmax(self) -> bool:
        """Of the logits nothing but the likeliest token is wanted, and nothing changes them."""
        penalised = self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        return self.greedy and not penalised and not self.logit_bias and self.logprobs is None


def _check_range(name: str, value: float | None, low: float, high: float, low_open: bool = False) -> None:
    """An integer where `low` is one, else any number."""
    if value is None:
        return
    whole = isinstance(low, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ValueError(f"{name} must be {'an integer' if whole else 'a number'}, got {value!r:.40}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if value < low or value > high or (low_open and value == low):
        raise ValueError(f"{name} must be in {'(' if low_open else '['}{low}, {high}], got {value}")


def resolve(params: SamplingParams, generation_config: dict) -> SamplingParams:
    """Fill every None that the checkpoint's generation_config decides, so that the engine sees numbers only.

    `do_sample: false` in the checkpoint means greedy, as in HF's generate.
    """

    def pick(name: str, neutral: float):
        value = getattr(params, name)
        if value is None:
            value = generation_config.get(name)
        return neutral if value is None else value

    greedy = params.temperature is None and generation_config.get("do_sample") is False
    return msgspec.structs.replace(
        params,
        temperature=0.0 if greedy else float(pick("temperature", 1.0)),
        top_p=float(pick("top_p", 1.0)),
        top_k=max(0, int(pick("top_k", 0))),
        min_p=float(pick("min_p", 0.0)),
        repetition_penalty=float(pick("repetition_penalty", 1.0)),
    )
