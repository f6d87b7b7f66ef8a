"""Time of GPU work: many calls in one CUDA graph, replayed, medians; and what no kernel can beat."""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton

LONGEST = 8e9  # bytes: what arguments, and then results, of one graph may take
WARM_ROUNDS, ROUNDS = 2, 11
GRAPH_SECONDS = 4e-4  # of the shortest graph: its start takes some µs, which then weigh less than 2 %


class Ceiling(NamedTuple):
    """What this GPU reaches in this run."""

    bandwidth: float  # bytes/s of a device copy, read and written bytes together
    empty: float  # s that an empty kernel takes in a graph

    def floor(self, moved: int) -> float:
        """s that moving so many bytes takes at least, in a kernel of its own."""
        return moved / self.bandwidth + self.empty


class Turns(NamedTuple):
    """How a graph calls a kernel: `calls` times, over `sets` copies of its arguments in turn."""

    sets: int
    calls: int


def plan_turns(moved: int, held: int, cache: int, ceiling: Ceiling) -> Turns:
    """As many copies as it takes to find nothing in the cache, 32 at most: calls that move less than 2 L2 / 32,
    about 3 MB, find their arguments there, as a layer finds what the one before it wrote.

    Args:
        moved: bytes that a call reads and writes.
        held: bytes of its arguments, tables included.
        cache: bytes of the GPU's L2.
    """
    sets = max(1, min(32, math.ceil(2 * cache / moved), int(LONGEST // held)))
    wanted = min(200, math.ceil(GRAPH_SECONDS / ceiling.floor(moved)))
    # Results live until the graph is dropped, so that no call writes where the one before it did.
    wanted = max(1, min(wanted, int(LONGEST // moved)))
    return Turns(sets, sets * math.ceil(wanted / sets))


def copies(args: tuple, count: int) -> list[tuple]:
    """The arguments and further ones like them, strides and shared storage included."""
    return [args, *(copy.deepcopy(args) for _ in range(count - 1))]


def held_bytes(args: tuple) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in args if isinstance(x, torch.Tensor)}
    return max(1, sum(storage.nbytes() for storage in storages.values()))


class Graph:
    """Calls captured once. The first runs before, to compile and to load."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()
        torch.cuda.synchronize()
        self.calls = len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = [call() for call in calls]

    def replay(self) -> None:
        self._graph.replay()


def time_graphs(graphs: Sequence[Graph]) -> list[float]:
    """Median s of one call of each, replayed in turn, so that a change of clocks meets all alike."""
    marks = []
    for _ in range(WARM_ROUNDS + ROUNDS):
        for graph in graphs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            marks.append((begin, end))
    torch.cuda.synchronize()
    times = [1e-3 * begin.elapsed_time(end) for begin, end in marks[WARM_ROUNDS * len(graphs) :]]
    return [statistics.median(times[i :: len(graphs)]) / graph.calls for i, graph in enumerate(graphs)]


def time_calls(contenders: Sequence[Sequence[Callable[[], object]]], turns: Turns) -> list[float]:
    """Median s of one call of each contender, which comes as one call for each set of arguments."""
    return time_graphs([Graph([*calls] * (turns.calls // turns.sets)) for calls in contenders])


@triton.jit
def _empty_kernel():
    pass


def measure_ceiling() -> Ceiling:
    size = 1 << 30
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda").view(torch.int32)
    target = torch.empty_like(source)
    # A kernel of the multiprocessors: the copy engine, which a graph's copy node goes to, reaches 2.7 of 4.3 TB/s.
    copying = Graph([lambda: torch.bitwise_not(source, out=target)] * 4)
    idling = Graph([lambda: _empty_kernel[(1,)]()] * 200)
    copied, empty = time_graphs([copying, idling])
    return Ceiling(2 * size / copied, empty)
