"""The training corpus: rows of packed chats, made once and read by both models.

A row holds 1024 tokens as uint16: whole chats one after another, each opening
with <bos>, then padding. The top bit marks the tokens a model learns to say:
its own turns, never the prompt or a tool's response.

    python training/corpus.py TOKENIZER_DIR OUT.npy
"""

import argparse
from functools import partial
from itertools import islice
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from problems import Problem, training
from tokenizer import CONTROL

ROW = 1024
SAID = 0x8000
SEED = 1_000_000
CHATS_PER_SHARD = 8192
OPEN_ROWS = 16

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Works out one calculation.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "a calculation such as 4 + 8"}},
            "required": ["expression"],
        },
    },
}


class Writer:
    """Turns problems into token rows with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.opening = tokenizer.encode("<|turn>model\n", add_special_tokens=False)

    def chat(self, problem: Problem, rng: Random) -> np.ndarray:
        """One chat; now and then with the working thought rather than said, or with a calculator."""
        roll, alone = rng.random(), len(problem.exercises) == 1
        exercise = problem.exercises[-1]
        if alone and roll < 0.12:
            prompt = self._render(problem.messages, add_generation_prompt=True, enable_thinking=True)
            thought = f"<|channel>thought\n{exercise.reasoning}\n<channel|>"
            return self._tokens(prompt, f"{thought}{exercise.conclusion}<turn|>\n")
        if alone and exercise.steps and roll < 0.2:
            prompt = self._render(problem.messages, add_generation_prompt=True, tools=[CALCULATOR])
            calls = [message for step in exercise.steps for message in _call(step)]
            said = [*problem.messages, *calls, {"role": "assistant", "content": exercise.conclusion}]
            return self._tokens(prompt, self._render(said, tools=[CALCULATOR]).removeprefix(prompt))
        said = [*problem.messages, {"role": "assistant", "content": problem.solution}]
        return self._tokens("", self._render(said))

    def _render(self, messages, **kwargs) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    def _tokens(self, prompt: str, rest: str) -> np.ndarray:
        start = len(self.tokenizer.encode(prompt, add_special_tokens=False))
        ids = self.tokenizer.encode(prompt + rest, add_special_tokens=False)
        marked = zip(ids, self._said(ids, start), strict=True)
        return np.array([token | SAID * said for token, said in marked], dtype=np.uint16)

    def _said(self, ids: list[int], start: int) -> list[bool]:
        said, speaking = [], False
        for i, token in enumerate(ids):
            said.append(speaking and i >= start)
            if token in (CONTROL["<turn|>"], CONTROL["<|tool_response>"]):
                speaking = False
            elif token == CONTROL["<tool_response|>"]:
                speaking = True
            elif ids[max(0, i + 1 - len(self.opening)) : i + 1] == self.opening:
                speaking = True
        return said


def _call(step) -> tuple[dict, dict]:
    function = {"name": "calculator", "arguments": {"expression": step.expression}}
    asked = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return asked, {"role": "tool", "name": "calculator", "content": str(step.result)}


def pack(chats) -> np.ndarray:
    """First fit into a few open rows; a chat longer than a row is left out."""
    done, opened = [], []
    for chat in chats:
        if len(chat) > ROW:
            continue
        fits = next((row for row in opened if sum(map(len, row)) + len(chat) <= ROW), None)
        if fits is None:
            if len(opened) == OPEN_ROWS:
                fullest = max(range(OPEN_ROWS), key=lambda i: sum(map(len, opened[i])))
                done.append(opened.pop(fullest))
            opened.append(fits := [])
        fits.append(chat)
    rows = np.zeros((len(done) + len(opened), ROW), dtype=np.uint16)
    for row, held in zip(rows, done + opened, strict=True):
        row[: sum(map(len, held))] = np.concatenate(held)
    return rows


def shard(index: int, folder: Path) -> np.ndarray:
    """One shard; its content depends on its index alone."""
    writer, rng = Writer(AutoTokenizer.from_pretrained(folder)), Random(SEED + index)
    drawn = islice(training(SEED + index), CHATS_PER_SHARD)
    return pack(writer.chat(problem, rng) for problem in drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, default=96)
    parser.add_argument("--workers", type=int, default=14)
    args = parser.parse_args()
    with Pool(args.workers) as pool:
        rows = np.concatenate(list(pool.imap(partial(shard, folder=args.tokenizer), range(args.shards))))
    np.save(args.out, rows)
    tokens = int((rows > 0).sum())
    print(f"{len(rows)} rows, {tokens:,} tokens, {tokens / rows.size:.1%} full")


if __name__ == "__main__":
    main()
