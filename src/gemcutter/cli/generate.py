"""Answer one prompt, streaming.

The answer goes to stdout, tokens and times to stderr. A checkpoint with a chat template gets the prompt as a user's
message; --raw sends it as it stands.
"""

import argparse
import sys
import time

from gemcutter.cli.flags import Parser, add_config, add_sampling, blame_user, read_config, read_sampling


def add_arguments(parser: Parser) -> None:
    parser.add_argument("prompt", help="the text; - reads it from stdin")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="insist on the checkpoint's chat template")
    form.add_argument("--raw", action="store_true", help="no chat template: complete the text itself")
    add_sampling(parser)
    add_config(parser, "engine")


def run(args: argparse.Namespace) -> int:
    params, config = read_sampling(args), read_config(args)
    with blame_user(args.parser):
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        if not prompt.strip():
            raise ValueError("the prompt is empty; give some text")
    from gemcutter.llm import LLM  # seconds of torch, for which no --help should wait

    with blame_user(args.parser):
        llm = LLM.of(config)
        if llm.tokenizer is None:
            raise ValueError(f"{config.model_path} has no tokenizer; use gemcutter.LLM with prompt_token_ids")
        has_template = llm.tokenizer.chat_template is not None
        if args.chat and not has_template:
            raise ValueError(f"{config.model_path} has no chat template; use --raw")
        chat = has_template and not args.raw
        begin = time.perf_counter()
        deltas = llm.stream([{"role": "user", "content": prompt}] if chat else prompt, params)
    tokens, first = 0, None
    for delta in deltas:
        first = first or time.perf_counter()
        tokens += len(delta.token_ids)
        print(delta.text, end="", flush=True)
    print()
    seconds = time.perf_counter() - begin
    print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s, first after {first - begin:.3f} s",
        file=sys.stderr,
    )
    return 0
