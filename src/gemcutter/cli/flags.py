"""Flags from the fields of EngineConfig and SamplingParams, and errors as one line."""

import argparse
import contextlib
import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator

from gemcutter.config import EngineConfig
from gemcutter.params import SamplingParams

# Options of one request, as SamplingParams names them; what is not given stays the checkpoint's choice.
SAMPLING = {
    "max_tokens": (int, "tokens to generate at most; default: until the end of the context"),
    "temperature": (float, "0 is greedy; default: the checkpoint's"),
    "top_p": (float, "keep the likeliest tokens up to this probability, (0, 1]; default: the checkpoint's"),
    "top_k": (int, "keep this many likeliest tokens, 0 keeps all; default: the checkpoint's"),
    "min_p": (float, "keep tokens this share as likely as the likeliest, [0, 1]; default: the checkpoint's"),
    "repetition_penalty": (float, "over 1 makes tokens already seen less likely; default: the checkpoint's"),
    "presence_penalty": (float, "[-2, 2], once for each token generated before; default: 0"),
    "frequency_penalty": (float, "[-2, 2], for each time a token was generated before; default: 0"),
    "seed": (int, "same seed, same text; default: drawn from --random-seed"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes no abbreviated flags."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def blame_user(parser: Parser) -> Iterator[None]:
    """Around what depends on the user's input: ValueError and OSError become one line and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.error(str(error) or type(error).__name__)


def whole(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers, `least` or more."""

    def read(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text}")

    return read


def add_model(parser: Parser) -> None:
    """The checkpoint as a positional argument; --model-path says the same."""
    parser.add_argument("model", nargs="?", help="folder or hub id of the checkpoint, or a built-in name")


def add_config(parser: Parser, *groups: str) -> None:
    """A flag for every field of EngineConfig in these groups, with its help, default and choices."""
    kinds = typing.get_type_hints(EngineConfig)
    for name in groups:
        group = parser.add_argument_group(name)
        for field in dataclasses.fields(EngineConfig):
            if field.metadata["group"] != name:
                continue
            flag = "--" + field.name.replace("_", "-")
            says = field.metadata["help"]
            kind = kinds[field.name]
            kind = next((part for part in typing.get_args(kind) if part is not type(None)), kind)  # of `int | None`
            if kind is bool:
                assert field.default is False, f"{field.name}: a switch is off unless given"
                group.add_argument(flag, action="store_true", help=says.replace("%", "%%"))
                continue
            if field.default is not None:
                says += f" (default: {field.default})"
            group.add_argument(
                flag,
                type=kind,
                default=None if field.name == "model_path" else field.default,
                choices=field.metadata["choices"],
                metavar=None if field.metadata["choices"] else kind.__name__.upper(),
                help=says.replace("%", "%%"),
            )


def read_config(args: argparse.Namespace) -> EngineConfig:
    """The flags as a config; a bad value ends the program."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(EngineConfig) if hasattr(args, f.name)}
    values["model_path"] = read_model(args)
    with blame_user(args.parser):
        return EngineConfig(**values)


def read_model(args: argparse.Namespace) -> str:
    """The checkpoint that is named, or the built-in one."""
    named = {name for name in (getattr(args, "model", None), args.model_path) if name is not None}
    if len(named) > 1:
        args.parser.error(f"two checkpoints are named, {' and '.join(map(repr, sorted(named)))}; name one")
    if "" in named:
        args.parser.error("the checkpoint's name is empty; give a folder, a hub id or a built-in name")
    return named.pop() if named else EngineConfig.model_path


def add_sampling(parser: Parser) -> None:
    """Flags for the sampling choices of one request."""
    group = parser.add_argument_group("sampling")
    for name, (kind, says) in SAMPLING.items():
        group.add_argument(
            "--" + name.replace("_", "-"), type=kind, metavar=kind.__name__.upper(), help=says.replace("%", "%%")
        )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end token")


def read_sampling(args: argparse.Namespace) -> SamplingParams:
    """The flags as params; a bad value ends the program."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    with blame_user(args.parser):
        return SamplingParams(**given, stop=tuple(args.stop), ignore_eos=args.ignore_eos)
