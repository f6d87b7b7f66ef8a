"""Flags that choose among the ops' cases: by op, shape and number of rows."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemcutter.cli.flags import Parser, whole

if TYPE_CHECKING:  # it imports PyTorch, for which no --help should wait
    from gemcutter.verify.case import Case


def add_case_flags(parser: Parser, least: int) -> None:
    """least: rows that can be asked for."""
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op; may be given again")
    parser.add_argument("--shape", metavar="TEXT", help="only shapes whose name holds this, such as 26B-A4B")
    parser.add_argument(
        "--rows",
        action="append",
        type=whole(least),
        metavar="N",
        help="only this number of rows; may be given again",
    )


def choose(args: argparse.Namespace, cases: "Sequence[Case]") -> "list[Case]":
    """Those that --op and --shape ask for; an error of the user's where there are none."""
    ops, shape = sorted({case.op for case in cases}), args.shape or ""
    for op in args.op or ():
        if op not in ops:
            args.parser.error(f"no op {op!r}; there are {', '.join(ops)}")
    chosen = [case for case in cases if case.op in (args.op or ops) and shape in case.shape]
    if not chosen:
        args.parser.error(f"no shape of {', '.join(args.op or ops)} holds {shape!r}; leave --shape out to see all")
    return chosen
