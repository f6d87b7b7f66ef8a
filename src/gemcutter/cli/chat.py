"""Talk with a model in the terminal.

/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator

from gemcutter.cli.flags import (
    Parser,
    add_config,
    add_model,
    add_sampling,
    blame_user,
    read_config,
    read_sampling,
)


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message that opens every conversation")
    add_sampling(parser)
    add_config(parser, "engine")


def run(args: argparse.Namespace) -> int:
    params, config = read_sampling(args), read_config(args)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing in input(), where Python was built with it
    from gemcutter.llm import LLM  # seconds of torch, for which no --help should wait

    with blame_user(args.parser):
        llm = LLM.of(config)
        if llm.tokenizer is None or llm.tokenizer.chat_template is None:
            raise ValueError(f"{config.model_path} has no chat template; use gemcutter generate --raw")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    history = list(opening)
    print("/reset begins anew, /exit leaves", file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return 0
        if said == "/exit":
            return 0
        if said == "/reset":
            history = list(opening)
        elif said.startswith("/"):
            print(f"no command {said.split()[0]}; there are /reset and /exit", file=sys.stderr)
        elif said:
            _answer(llm, history, said, params)


def _answer(llm, history: list[dict], said: str, params) -> None:
    """Stream one answer. Question and answer join the history; a question that cannot run does not."""
    history.append({"role": "user", "content": said})
    try:
        deltas = llm.stream(history, params)
    except ValueError as error:
        history.pop()
        print(f"{error}\n/reset begins a new conversation", file=sys.stderr)
        return
    text = ""
    with _interrupts() as interrupted:
        for delta in deltas:
            print(delta.text, end="", flush=True)
            text += delta.text
            if interrupted:
                deltas.close()
                break
    print()
    history.append({"role": "assistant", "content": text})


@contextlib.contextmanager
def _interrupts() -> Iterator[list]:
    """Gather Ctrl-C in a list instead of breaking into the middle of a step; a second one breaks."""
    came: list[int] = []

    def note(number, _) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
