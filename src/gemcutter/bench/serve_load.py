"""The prompts that `bench serve` sends, as token ids, and when it sends them. Same seed, same load."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ask:
    """One request: a prompt and how many tokens to answer."""

    prompt: list[int]
    output_len: int


def random_ids(
    rng: np.random.Generator, num_prompts: int, input_len: int, output_len: int, range_ratio: float, vocab: int
) -> list[Ask]:
    """Prompts that share nothing."""
    inputs = _lengths(rng, input_len, range_ratio, num_prompts)
    outputs = _lengths(rng, output_len, range_ratio, num_prompts)
    return [Ask(_tokens(rng, i, vocab), o) for i, o in zip(inputs, outputs, strict=True)]


def shared_prefix(
    rng: np.random.Generator,
    num_groups: int,
    prompts_per_group: int,
    system_prompt_len: int,
    question_len: int,
    output_len: int,
    range_ratio: float,
    ordered: bool,
    vocab: int,
) -> list[Ask]:
    """Groups of prompts that begin alike: a group's own system prompt, then a question. Shuffled unless ordered."""
    count = num_groups * prompts_per_group
    systems = [_tokens(rng, n, vocab) for n in _lengths(rng, system_prompt_len, range_ratio, num_groups)]
    questions = _lengths(rng, question_len, range_ratio, count)
    outputs = _lengths(rng, output_len, range_ratio, count)
    asks = [
        Ask(systems[place // prompts_per_group] + _tokens(rng, questions[place], vocab), outputs[place])
        for place in range(count)
    ]
    return asks if ordered else [asks[place] for place in rng.permutation(count)]


def gaps(rng: np.random.Generator, count: int, rate: float) -> list[float]:
    """Seconds before each request, the first at once: a Poisson process of `rate` a second, or no waits if inf."""
    return [0.0] * count if rate == float("inf") else [0.0, *rng.exponential(1 / rate, count - 1).tolist()]


def _lengths(rng: np.random.Generator, full: int, range_ratio: float, count: int) -> list[int]:
    """Uniform in [max(1, full * ratio), full]."""
    return rng.integers(max(1, int(full * range_ratio)), full + 1, count).tolist()


def _tokens(rng: np.random.Generator, count: int, vocab: int) -> list[int]:
    """Control tokens stand at the beginning of a vocabulary, so its first 256th is left out."""
    return rng.integers(vocab // 256, vocab, count).tolist()
