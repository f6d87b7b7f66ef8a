"""From measurements to a table of the experts' plans: what is left of a tuning, then the choice, then the file."""

import functools
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
import triton

import gemcutter
from gemcutter.bench.roof import measure_roof
from gemcutter.ops.moe.expert_slots import expert_slots
from gemcutter.ops.moe.experts_table import Plan, Shape, Table, read_table, write_table
from gemcutter.ops.quantize_fp8 import Quantized
from gemcutter.run.ahead import compile_all
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
        compiled = task("compile", 1)
        compile_all(launches(shape, kind, where, left))  # else they are compiled one by one, as they are timed
        compiled()
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


def launches(
    shape: Shape, dtype: torch.dtype, device: torch.device, buckets: Sequence[int]
) -> list[Callable[[], torch.Tensor]]:
    """What launches every tile that the buckets' search will time, on one token."""
    pairs = [tiles(dtype, shape, tokens) for tokens in buckets]
    ups, downs = (list(dict.fromkeys(tile for pair in pairs for tile in pair[i])) for i in (0, 1))
    plans = [Plan("tiles", up or ups[0], down or downs[0]) for up, down in zip_longest(ups, downs)]
    e, k, h, n = shape
    x, gate_up, down = (_zeros(dtype, device, *dims) for dims in ((1, h), (e, 2 * n, h), (e, h, n)))
    ids = torch.zeros(1, k, dtype=torch.int64, device=device)
    return [functools.partial(expert_slots, plan, x, ids, gate_up, down, settled=True) for plan in plans]


def _zeros(dtype: torch.dtype, device: torch.device, *dims: int) -> torch.Tensor | Quantized:
    """One matrix for all experts."""
    zeros = torch.zeros(dims[-2:], dtype=dtype, device=device).expand(dims)
    if dtype != torch.float8_e4m3fn:
        return zeros
    return Quantized(zeros, torch.ones(*dims[:-1], 1, device=device))
