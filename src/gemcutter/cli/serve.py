"""Serve a model over an OpenAI-compatible HTTP API."""

import argparse

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.files import locate
from gemcutter.cli.flags import Parser, add_config, add_model, blame_user, read_config


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_config(parser, "engine", "server")


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    with blame_user(args.parser):
        # before two processes start for nothing
        read_spec(locate(config.model_path, config.revision, weights=False))
    from gemcutter.serve.app import serve  # the web framework, for which no --help should wait

    return serve(config)
