"""Measure what is fastest on this card, and keep it in a table.

moe: tiles of the experts' products, up and down apart, for each number of tokens, against the built-in ones. Only
tiles whose results have the built-in ones' bits are timed. Tokens choose their experts at random and evenly. Floor:
weights of the experts hit, at the bandwidth of a copy, which reads alone may beat by some percent; or the FLOPs. A
tuning that is broken off goes on where it was; the engine takes the table of its device, dtype and shape by itself.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.files import locate
from gemcutter.cli.flags import Parser, blame_user, whole
from gemcutter.cli.table import show, table_of
from gemcutter.spec import ModelSpec

if TYPE_CHECKING:  # it imports PyTorch, for which no --help should wait
    from gemcutter.ops.moe.experts_table import Plan, Shape
    from gemcutter.ops.moe.experts_table import Table as TileTable

BUCKETS = tuple(2**i for i in range(14))
DTYPES = ("bfloat16", "float16", "float8_e4m3fn")
SIZES = {
    "num_experts": "experts of a layer",
    "top_k": "of which a token takes so many",
    "hidden": "the model's width",
    "intermediate": "an expert's width",
}


def add_arguments(parser: Parser) -> None:
    subjects = parser.add_subparsers(dest="subject", metavar="WHAT", required=True)
    moe = subjects.add_parser("moe", help="tiles of the experts' products", description=__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    moe.add_argument(
        "model", nargs="?", help="folder or hub id of a checkpoint with experts; or give the four sizes"
    )
    for name, says in SIZES.items():
        moe.add_argument("--" + name.replace("_", "-"), type=whole(1), metavar="N", help=says)
    moe.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's, else bfloat16)")
    moe.add_argument(
        "--buckets", type=whole(1), nargs="+", metavar="TOKENS",
        help="only these numbers of tokens; others that the table has stay (default: 1 2 4 … 8192)",
    )  # fmt: skip
    moe.add_argument(
        "--out", type=Path, metavar="FILE", help="default: where the engine looks for this card's table"
    )
    moe.add_argument("--list", action="store_true", help="show the tables that are there, and run nothing")
    moe.set_defaults(parser=moe)


def run(args: argparse.Namespace) -> int:
    given = [name for name in SIZES if getattr(args, name) is not None]
    if args.list:
        if args.model or given or args.dtype or args.buckets or args.out:
            args.parser.error("--list shows all tables; leave the other flags out")
        return _list(args)
    sizes, dtype = _sizes(args, given)
    import torch  # seconds, for which no --help should wait

    if not torch.cuda.is_available():
        args.parser.error("it times kernels, and PyTorch finds no GPU here; run it on the card to be tuned")
    from gemcutter.ops.moe.experts_table import Shape, table_path

    shape, device = Shape(*sizes), torch.cuda.get_device_name()
    out = args.out or table_path(device, dtype, shape)
    with blame_user(args.parser):
        table = _tune(shape, dtype, device, out, sorted(set(args.buckets or BUCKETS)))
    show(_times(table))
    print(f"Written to {out}")
    return 0


def _sizes(args: argparse.Namespace, given: list[str]) -> tuple[tuple[int, ...], str]:
    """num_experts, top_k, hidden and intermediate; and the dtype."""
    if bool(args.model) == bool(given) or 0 < len(given) < len(SIZES):
        flags = ", ".join("--" + name.replace("_", "-") for name in SIZES)
        args.parser.error(f"name a checkpoint, or give all of {flags}")
    if given:
        sizes = tuple(getattr(args, name) for name in SIZES)
        if sizes[1] > sizes[0]:
            args.parser.error(f"--top-k is {sizes[1]}, of {sizes[0]} experts; give at most as many")
        return sizes, args.dtype or "bfloat16"
    with blame_user(args.parser):
        spec = read_spec(locate(args.model, weights=False))
    experts = {layer.experts for layer in spec.layers if layer.experts}
    if len(experts) != 1:
        args.parser.error(f"{args.model} has {len(experts) or 'no'} kinds of experts; one is needed")
    [one] = experts
    dtype = args.dtype or _dtype_of_experts(spec)
    if dtype not in DTYPES:
        args.parser.error(f"{args.model} is in {dtype}, whose tiles are fixed; give --dtype {' or '.join(DTYPES)}")
    return (one.num_experts, one.top_k, spec.hidden, one.width), dtype


def _dtype_of_experts(spec: ModelSpec) -> str:
    held = [f"layers.{layer.index}.experts" in spec.quantized for layer in spec.layers if layer.experts]
    return "float8_e4m3fn" if all(held) else spec.dtype


def _tune(shape: "Shape", dtype: str, device: str, out: Path, buckets: list[int]) -> "TileTable":
    from gemcutter.tune.moe import tune_moe

    with Progress(console=Console(stderr=True)) as progress:

        def task(name: str, total: int):
            number = progress.add_task(name, total=total)
            return lambda: progress.advance(number)

        return tune_moe(shape, dtype, device, out, buckets, task)


def _times(table: "TileTable") -> Table:
    shown = table_of("tokens", "kernel", "up", "down", "built-in, µs", "tuned, µs", "x", "floor, µs", "of floor")
    shown.title = f"{table.device}, {table.dtype}, {tuple(table.shape)}: sort, up and down of one layer"
    for tokens, plan in sorted(table.plans.items()):
        times = table.times[tokens]
        shown.add_row(
            f"{tokens}", plan.kernel, *_tiles(plan), f"{times.built_in:.1f}", f"{times.tuned:.1f}",
            f"{times.built_in / times.tuned:.2f}", f"{times.floor:.1f}", f"{times.floor / times.tuned:.0%}",
        )  # fmt: skip
    return shown


def _tiles(plan: "Plan") -> list[str]:
    """block_m x block_n x block_k, warps and stages."""
    tiles = (plan.up, plan.down)
    return ["{}x{}x{} w{} s{}".format(*tile) if tile else "-" for tile in tiles]


def _list(args: argparse.Namespace) -> int:
    import torch

    from gemcutter.ops.moe.experts_table import FOLDER, read_table, table_path

    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    shown = table_of("device", "dtype", "experts", "top k", "hidden", "width", "tokens", "made with", "taken here")
    for path in sorted(FOLDER.glob("*.json")):
        with blame_user(args.parser):
            table = read_table(path)
        tokens = f"{len(table.plans)} from {min(table.plans)} to {max(table.plans)}"
        taken = here == table.device and path == table_path(here, table.dtype, table.shape)
        last = table.made_with, "yes" if taken else "no"
        shown.add_row(table.device, table.dtype, *map(str, table.shape), tokens, *last)
    show(shown)
    print(f"In {FOLDER}; this machine has {here or 'no GPU'}")
    return 0
