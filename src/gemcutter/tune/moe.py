"""From measurements to a table of the experts' plans: what is left of a tuning, then the choice, then the file."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
import triton

import gemcutter
from gemcutter.bench.roof import measure_roof
from gemcutter.ops.experts_table import Plan, Shape, Table, read_table, write_table
from gemcutter.tune.ahead import compile_ahead
from gemcutter.tune.clock import Clock
from gemcutter.tune.record import part_path, read_part, write_part
from gemcutter.tune.search import decide, search, settle, tiles

Task = Callable[[str, int], Callable[[], None]]  # by name and total, what to call after each part of it


def tune_moe(shape: Shape, dtype: str, device: str, out: Path, buckets: Sequence[int], task: Task) -> Table:
    """Tune what no earlier run, broken off, has measured, and write the table.

    Raises:
        ValueError, OSError: `out` or the part of a tuning beside it is another one's, or cannot be written.
    """
    made_with = f"gemcutter {gemcutter.__version__}, torch {torch.__version__}, triton {triton.__version__}"
    head = dict(device=device, dtype=dtype, shape=list(shape), made_with=made_with)
    kept = _others(out, device, dtype, shape, buckets)
    part = part_path(out)
    found = read_part(part, head)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_part(part, head, found)  # what cannot be written is told before the work, not after it
    left = [tokens for tokens in buckets if tokens not in found]
    kind, where = getattr(torch, dtype), torch.device("cuda", torch.cuda.current_device())
    if left:
        _compile(shape, kind, left, task)
    clock = Clock(shape, kind, where, measure_roof(where, kind))
    measured = task("measure", sum(len(each) for tokens in left for each in tiles(kind, shape, tokens)))
    for tokens in left:
        clock.take(tokens)
        found[tokens] = search(clock, measured)
        write_part(part, head, found)
    decided = task("decide", len(buckets))
    plans, times = dict(kept.plans) if kept else {}, dict(kept.times) if kept else {}
    for tokens, tiled in settle({tokens: found[tokens] for tokens in buckets}).items():
        clock.take(tokens)
        plans[tokens], times[tokens] = decide(clock, tiled)
        decided()
    table = Table(device, dtype, shape, made_with, plans, times)
    write_table(table, out)
    part.unlink()
    return table


def _others(out: Path, device: str, dtype: str, shape: Shape, buckets: Sequence[int]) -> Table | None:
    """The table that stands there, whose other numbers of tokens stay."""
    if not out.exists():
        return None
    table = read_table(out)
    if (table.device, table.dtype, table.shape) != (device, dtype, shape):
        raise ValueError(f"{out} is for {table.device}, {table.dtype}, {tuple(table.shape)}; name another --out")
    return table if table.plans.keys() - set(buckets) else None


def _compile(shape: Shape, dtype: torch.dtype, buckets: Sequence[int], task: Task) -> None:
    pairs = [tiles(dtype, shape, tokens) for tokens in buckets]
    ups, downs = (list(dict.fromkeys(tile for pair in pairs for tile in pair[i])) for i in (0, 1))
    plans = [Plan("tiles", up or ups[0], down or downs[0]) for up, down in zip_longest(ups, downs)]
    compile_ahead(shape, dtype, plans, task("compile", len(plans)))
