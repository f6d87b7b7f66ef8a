"""The search for the experts' plans: up's tiles with the built-in ones of down, then down's with the best of up.

Each time is that of sort, up and down together, as a layer runs them. Tiles whose times are near each other are as
good, and a tile that serves several numbers of tokens is one kernel less to compile when a model starts.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from gemcutter.ops.moe.experts_table import KERNELS, Plan, Shape, Tile, Times
from gemcutter.ops.moe.experts_tiles import built_in_tiles
from gemcutter.tune.candidates import down_tiles, up_tiles

NEAR = 1.01  # times the best: the noise of a measurement


class Clock(Protocol):
    """`tune.clock.Clock`, or one that is told times."""

    shape: Shape
    dtype: object
    tokens: int

    def built_in(self) -> Plan: ...

    def failure(self, plan: Plan) -> str: ...

    def seconds(self, plans: list[Plan]) -> list[float]: ...

    def floor(self) -> float: ...


class Found(NamedTuple):
    """s by tile, of one number of tokens; tiles that failed are left out."""

    ups: Mapping[Tile, float]
    downs: Mapping[Tile, float]


def tiles(dtype: object, shape: Shape, tokens: int) -> tuple[list[Tile], list[Tile]]:
    """All of up and all of down that are measured, the built-in ones first."""
    rows = tokens * shape.top_k / shape.num_experts
    up, down = built_in_tiles(dtype, rows)
    ups, downs = up_tiles(dtype, rows, shape.intermediate), down_tiles(dtype, rows, shape.hidden)
    return list(dict.fromkeys([up, *ups])), list(dict.fromkeys([down, *downs]))


def search(clock: Clock, advance: Callable[[], None]) -> Found:
    """advance: called after each tile."""

    def timed(plans: Mapping[Tile, Plan]) -> dict[Tile, float]:
        found = {}
        for tile, plan in plans.items():
            if not clock.failure(plan):
                [found[tile]] = clock.seconds([plan])
            advance()
        return found

    ups, downs = tiles(clock.dtype, clock.shape, clock.tokens)
    up_times = timed({up: Plan("tiles", up, downs[0]) for up in ups})
    assert up_times, "the built-in tiles failed"
    best = min(up_times, key=up_times.__getitem__)
    return Found(up_times, timed({down: Plan("tiles", best, down) for down in downs}))


def settle(found: Mapping[int, Found]) -> dict[int, Plan]:
    """A plan for each number of tokens, of as few tiles as are near the best."""
    ups = _cover({tokens: one.ups for tokens, one in found.items()})
    downs = _cover({tokens: one.downs for tokens, one in found.items()})
    return {tokens: Plan("tiles", ups[tokens], downs[tokens]) for tokens in found}


def _cover(times: Mapping[int, Mapping[Tile, float]]) -> dict[int, Tile]:
    """Again and again the tile that is near the best for most of what is left."""
    slower = {  # by tile, then by tokens: times the best
        tile: {n: of[tile] / min(of.values()) for n, of in times.items() if tile in of}
        for tile in dict.fromkeys(tile for of in times.values() for tile in of)
    }
    chosen: dict[int, Tile] = {}
    while left := [n for n in times if n not in chosen]:
        near = {tile: [n for n in left if by.get(n, NEAR + 1) <= NEAR] for tile, by in slower.items()}
        best = max(near, key=lambda tile: (len(near[tile]), -sum(slower[tile][n] for n in near[tile])))
        chosen |= dict.fromkeys(near[best], best)
    return chosen


def decide(clock: Clock, tiled: Plan) -> tuple[Plan, Times]:
    """The fastest of the tiles found, the other kernels and the built-in plan, which stays where none beats it."""
    built_in = clock.built_in()
    plans = dict.fromkeys([built_in, tiled, *(Plan(kernel) for kernel in KERNELS if kernel != "tiles")])
    plans = [plan for plan in plans if plan == built_in or not clock.failure(plan)]
    times = dict(zip(plans, clock.seconds(plans), strict=True))
    best = min(times, key=times.__getitem__)
    if times[best] * NEAR > times[built_in]:
        best = built_in
    return best, Times(*(round(1e6 * s, 2) for s in (times[built_in], times[best], clock.floor())))
