"""Files that say, for one device, dtype and shape of experts, which kernels and tiles run for how many tokens.

`gemcutter tune moe` writes them, and those in `tables/` come with the package. A table changes times only: tiles do
not show in the bits ("Products without company" in docs/kernels.md), which the tuner checks of each tile it takes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "tables"
# Triton's tiles in `experts.py`; the products of `experts_stream_hopper.py`, and those of `experts_hopper.py`.
KERNELS = ("tiles", "stream", "grouped")
DTYPES = ("bfloat16", "float16", "float8_e4m3fn")  # of weights: products on tensor cores


class Shape(NamedTuple):
    """Of a layer's experts: gate_up [num_experts, 2 * intermediate, hidden], each token in top_k of them."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How the products up and down of one number of tokens run. Tiles are those of the kernel "tiles"."""

    kernel: str
    up: Tile | None = None
    down: Tile | None = None


class Times(NamedTuple):
    """What was measured when a plan was chosen, in µs: sort, up and down, by the built-in rule and by the plan."""

    built_in: float
    tuned: float
    floor: float


class Table(NamedTuple):
    device: str
    dtype: str
    shape: Shape
    made_with: str
    plans: Mapping[int, Plan]  # by the number of tokens they were measured with
    times: Mapping[int, Times]

    def nearest(self, tokens: int) -> list[Plan]:
        """The plans measured with over half and under twice as many tokens, the nearest first, by ratio."""
        ratios = {other: max(other / tokens, tokens / other) for other in self.plans}
        return [self.plans[other] for other in sorted(ratios, key=ratios.get) if ratios[other] < 2]


def table_path(device: str, dtype: str, shape: Shape) -> Path:
    """Where the table of this device, dtype and shape is looked for."""
    e, k, h, n = shape
    name = "".join(c if c.isalnum() or c in "-." else "_" for c in device)
    return FOLDER / f"{name}-E{e}-k{k}-H{h}-N{n}-{dtype}.json"


def write_table(table: Table, path: Path) -> None:
    """As a whole or not at all; a number of tokens a line."""
    head = table._asdict() | table.shape._asdict()
    lines = [f"  {json.dumps(name)}: {json.dumps(head[name])}," for name in _HEAD]
    plans = []
    for tokens, plan in sorted(table.plans.items()):
        entry = {"kernel": plan.kernel}
        entry |= {name: tile._asdict() for name, tile in (("up", plan.up), ("down", plan.down)) if tile}
        entry["us"] = table.times[tokens]._asdict()
        plans.append(f'    "{tokens}": {json.dumps(entry)}')
    text = "\n".join(["{", *lines, '  "tokens": {', ",\n".join(plans), "  }", "}"]) + "\n"
    write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fresh.write_text(text)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def read_table(path: Path) -> Table:
    """
    Raises:
        ValueError: the file is no table, or holds what no kernel takes; named with what is wrong.
        OSError: it cannot be read.
    """
    try:
        return _table(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is not a table of experts' tiles: {what}; delete it, or write it with `gemcutter tune moe`"
        ) from None


_HEAD = ("device", "dtype", *Shape._fields, "made_with")


def _table(found: dict) -> Table:
    _only(found, (*_HEAD, "tokens"))
    device, dtype, made_with = (str(found[name]) for name in ("device", "dtype", "made_with"))
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    shape = Shape(*(_whole(name, found[name]) for name in Shape._fields))
    plans, times = {}, {}
    for text, entry in found["tokens"].items():
        tokens = _whole("tokens", int(text))
        plans[tokens] = _plan(entry)
        _only(entry["us"], Times._fields)
        times[tokens] = Times(*(float(entry["us"][name]) for name in Times._fields))
    if not plans:
        raise ValueError("it has no plan")
    return Table(device, dtype, shape, made_with, plans, times)


def _plan(entry: dict) -> Plan:
    _only(entry, (*Plan._fields, "us"))
    if entry["kernel"] not in KERNELS:
        raise ValueError(f"kernel {entry['kernel']!r} is none of {', '.join(KERNELS)}")
    tiled = entry["kernel"] == "tiles"
    if not tiled and ("up" in entry or "down" in entry):
        raise ValueError(f"kernel {entry['kernel']!r} has tiles of its own")
    return Plan(entry["kernel"], *(_tile(entry[name]) for name in ("up", "down") if tiled))


def _tile(entry: dict) -> Tile:
    _only(entry, Tile._fields)
    tile = Tile(*(_whole(name, entry[name]) for name in Tile._fields))
    for name in ("block_m", "block_n", "block_k"):
        size = getattr(tile, name)
        if size < 16 or size & (size - 1):  # K is walked in steps of 16, the depth of a tensor core's instruction
            raise ValueError(f"{name} is {size}: a power of two from 16 on is needed")
    if tile.warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"warps is {tile.warps}: 1, 2, 4, 8 or 16 are needed")
    return tile


def _whole(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}: a whole number from 1 on is needed")
    return value


def _only(entry: dict, names: tuple[str, ...]) -> None:
    if unknown := sorted(entry.keys() - set(names)):
        raise ValueError(f"unknown {', '.join(map(repr, unknown))}")
