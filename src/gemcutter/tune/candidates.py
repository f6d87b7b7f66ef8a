"""Tiles of the experts' products that are worth a measurement, by the mean number of rows an expert has."""

import itertools
from collections.abc import Iterator

import torch

from gemcutter.ops.moe.experts_table import Tile

# block_m: the rows an expert has in the mean, at least and at most. Fewer leave the tile empty; more read the
# weights once for every tile of them.
ROWS = {16: (0, 48), 32: (2, 96), 64: (8, 256), 128: (48, float("inf"))}
SHARED = 227 * 1024  # bytes of shared memory that a program may take on Hopper
MOST_STAGES = 8
IN_FLIGHT = (32, 80, 160)  # KiB that a program asks for before it waits
ACCUMULATORS = (4, 128)  # a thread, at least and at most: with fewer it loads more than it multiplies, more spill


def up_tiles(dtype: torch.dtype, rows: float, intermediate: int) -> list[Tile]:
    """block_n: columns of gate, and as many of up."""
    return list(_tiles(dtype, rows, intermediate, blocks=2))


def down_tiles(dtype: torch.dtype, rows: float, hidden: int) -> list[Tile]:
    return list(_tiles(dtype, rows, hidden, blocks=1))


def _tiles(dtype: torch.dtype, rows: float, columns: int, blocks: int) -> Iterator[Tile]:
    """blocks: of weights, that a program multiplies its rows with."""
    in_fp8 = dtype == torch.float8_e4m3fn
    for block_m, wide, bytes_k in itertools.product(ROWS, (32, 64, 128, 256), (128, 256, 512)):
        least, most = ROWS[block_m]
        block_n = wide // blocks
        if not least <= rows <= most or block_n // 2 >= columns:
            continue
        # Few rows stream weights: small programs fill the card evenly. Many wait for the tensor cores instead.
        if wide == 256 if block_m <= 32 else wide == 32 or bytes_k == 512:
            continue
        if in_fp8 and wide < 64:  # the M operand of wgmma, and of four warps
            continue
        stage, block_k = (block_m + wide) * bytes_k, bytes_k // dtype.itemsize
        depths = {min(MOST_STAGES, max(2, 1 + round(1024 * depth / stage))) for depth in IN_FLIGHT}
        for warps, stages in itertools.product((2, 4, 8), sorted(depths)):
            fits = ACCUMULATORS[0] <= block_m * wide // (32 * warps) <= ACCUMULATORS[1] and stages * stage <= SHARED
            # wgmma, which takes 64 rows or more, is four warps' work; two load 128 rows of weights too slowly.
            if fits and (warps >= 4 or (block_m <= 32 and wide <= 64 and not in_fp8)):
                yield Tile(block_m, block_n, block_k, warps, stages)
