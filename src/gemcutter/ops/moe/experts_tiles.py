"""Which kernels and tiles take the products of `experts`: a tuned table's, or a rule's where there is none."""

import functools
import logging

import torch

from gemcutter.ops.moe.experts_hopper import groups, takes_groups
from gemcutter.ops.moe.experts_stream_hopper import streams
from gemcutter.ops.moe.experts_table import DTYPES, Plan, Shape, Table, Tile, read_table, table_path

# Tiles of the up and the down product by a bound of mean rows an expert. The first streams weights: many programs,
# deep queues.
_HALF_TILES = (
    (8, Tile(16, 32, 64, 4, 5), Tile(16, 64, 64, 4, 5)),
    (64, Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)),
    (float("inf"), Tile(128, 64, 64, 8, 4), Tile(128, 128, 64, 8, 4)),
)
# Weights are the M operand: 64 rows or more, gate's and up's together, by four warps (`experts_tiled_fp8.py`).
_FP8_TILES = (
    (8, Tile(16, 32, 128, 4, 6), Tile(16, 128, 128, 4, 4)),
    (32, Tile(32, 32, 256, 4, 3), Tile(32, 128, 128, 4, 4)),
    (float("inf"), Tile(64, 64, 128, 4, 4), Tile(64, 128, 128, 4, 4)),
)
# Without tensor cores: "ieee" products of floats are FMAs.
_FLOAT_TILES = (Tile(16, 32, 32, 4, 2), Tile(16, 64, 32, 4, 2))


def plan_for(x: torch.Tensor, top_k: int, gate_up: torch.Tensor, down: torch.Tensor) -> Plan:
    """How x [T, H], T from 1 on, goes through gate_up [E, 2N, H] and down [E, H, N]."""
    if table := table_in_use(top_k, down):
        for plan in table.nearest(len(x)):
            if takes(plan, x, gate_up, down):
                return plan
    return built_in_plan(x, top_k, gate_up, down)


def built_in_plan(x: torch.Tensor, top_k: int, gate_up: torch.Tensor, down: torch.Tensor) -> Plan:
    num_slots = len(x) * top_k
    if streams(x, gate_up, down):
        return Plan("stream")
    if groups(gate_up, down, num_slots):
        return Plan("grouped")
    return Plan("tiles", *built_in_tiles(x.dtype, num_slots / len(down)))


def takes(plan: Plan, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether the plan's kernel runs with these."""
    if plan.kernel == "stream":
        return streams(x, gate_up, down)
    return plan.kernel == "tiles" or takes_groups(gate_up, down)


def built_in_tiles(dtype: torch.dtype, rows: float) -> tuple[Tile, Tile]:
    """Of up and of down. rows: slots an expert has in the mean."""
    if dtype == torch.float32:
        return _FLOAT_TILES
    tiles = _FP8_TILES if dtype == torch.float8_e4m3fn else _HALF_TILES
    return next((up, down) for most, up, down in tiles if rows <= most)


def table_in_use(top_k: int, down: torch.Tensor) -> Table | None:
    """The table of this device, dtype and shape.

    Raises:
        ValueError: there is one, and it is broken.
    """
    dtype = str(down.dtype).removeprefix("torch.")
    if not down.is_cuda or dtype not in DTYPES:
        return None
    num_experts, hidden, width = down.shape
    return load_table(_device_name(down.device), dtype, Shape(num_experts, top_k, hidden, width))


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def load_table(device: str, dtype: str, shape: Shape) -> Table | None:
    path = table_path(device, dtype, shape)
    if not path.is_file():
        e, k, h, n = shape
        logging.getLogger(__name__).warning(
            f"no tuned tiles for {e} experts (top {k}) of {n} x {h} in {dtype} on {device}: the built-in ones are "
            f"used, with the same results; `gemcutter tune moe --num-experts {e} --top-k {k} --hidden {h} "
            f"--intermediate {n} --dtype {dtype}` tunes them"
        )
        return None
    table = read_table(path)
    if (table.device, table.dtype, table.shape) != (device, dtype, shape):
        named = f"{table.device}, {table.dtype}, {tuple(table.shape)}"
        raise ValueError(f"{path} says that it is for {named}: its name says otherwise; rename or delete it")
    return table
