"""The command line: generate, chat, serve, info, quantize, bench, tune, verify.

Commands import the model and the server only when they run, so that `--help` answers at once.
"""

import argparse
import os
import sys

import gemcutter
from gemcutter.cli import bench, chat, generate, info, quantize, serve, tune, verify
from gemcutter.cli.flags import Parser

COMMANDS = {
    "generate": generate, "chat": chat, "serve": serve, "info": info,
    "quantize": quantize, "bench": bench, "tune": tune, "verify": verify,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 where something broke, 2 for what the user can mend, 130 after Ctrl-C."""
    parser = Parser(prog="gemcutter", description="Exact, fast inference for Google's Gemma 4.")
    parser.add_argument("--version", action="version", version=f"gemcutter {gemcutter.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        says = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            name, help=says, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(parser=command, run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read us has gone (`gemcutter … | head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
