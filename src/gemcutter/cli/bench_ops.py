"""Time every op at the released shapes, against its floor and its peers' kernels; needs a GPU."""

import argparse

from gemcutter.cli.flags import Parser

ROWS = (1, 8, 64, 256, 1024, 8192)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op; may be given again")
    parser.add_argument("--shape", action="append", metavar="TEXT", help="only shapes with this text in their name")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="INT", help="rows that run together")


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        args.parser.error("it times kernels, and PyTorch finds no GPU here; run it on a machine with one")
    raise NotImplementedError("the table follows")
