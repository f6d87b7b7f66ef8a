"""Measure: ops against their floors and peers, servers under load, one batch part by part."""

import argparse

from gemcutter.cli import bench_latency, bench_ops, bench_serve
from gemcutter.cli.flags import Parser

SUBJECTS = {"ops": bench_ops, "serve": bench_serve, "latency": bench_latency}


def add_arguments(parser: Parser) -> None:
    subjects = parser.add_subparsers(dest="subject", metavar="WHAT", required=True)
    for name, module in SUBJECTS.items():
        says = module.__doc__.splitlines()[0]
        subject = subjects.add_parser(
            name, help=says, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(subject)
        subject.set_defaults(parser=subject, measure=module.run)


def run(args: argparse.Namespace) -> int:
    return args.measure(args)
