"""Write a checkpoint again with its linears in FP8.

The new one is of the format that llm-compressor writes (compressed-tensors, float-quantized) and that vLLM and
SGLang read too: weights in e4m3 with a scale for each output channel, activations quantised for each token as the
model runs. Left as they are: embeddings and head, norms, routers, the towers of other modalities, and what
--ignore names. A run that was broken off goes on where it was.
"""

import argparse
from pathlib import Path

from gemcutter.checkpoint.files import locate
from gemcutter.checkpoint.progress import bytes_bar
from gemcutter.cli.flags import Parser, blame_user


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help="folder or hub id of a checkpoint that is not quantised, or a built-in name")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--revision", metavar="STR", help="branch, tag or commit of a hub checkpoint")
    parser.add_argument("--scheme", choices=("fp8-dynamic",), default="fp8-dynamic", help="the only one so far")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="NAME",
        help="linears to leave as they are: names, or patterns behind re:, matched from a name's beginning",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from gemcutter.checkpoint.quantize import quantize_checkpoint  # PyTorch, for which no --help should wait

    with blame_user(args.parser), bytes_bar() as bar:
        task = bar.add_task("quantise")
        source = locate(args.model, args.revision)
        quantize_checkpoint(
            source, args.out, args.ignore, lambda done, total: bar.update(task, completed=done, total=total)
        )
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"Written to {args.out}: {size / 1e9:.2f} GB of weights")
    return 0
