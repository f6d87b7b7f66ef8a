"""One op at one shape and number of rows: held to its reference, then timed beside its peers."""

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from gemcutter.bench.peers import PEERS, why_absent
from gemcutter.bench.timing import Ceiling, copies, held_bytes, plan_turns, time_calls
from gemcutter.verify.case import Case
from gemcutter.verify.check import check
from gemcutter.verify.inputs import Kind

# A peer rounds elsewhere, and so may break a tie elsewhere: its elements may be 2 % of the largest one off, and one
# in ten of them more. Beyond that it does another job and is no peer.
CLOSE, OUTLIERS = 0.02, 0.1
LARGEST = torch.finfo(torch.float32).max  # stands for a NaN, which JSON does not have


@dataclass
class PeerTime:
    says: str
    number: int  # place among the op's peers, from 1
    difference: float | None  # largest, from the reference; None where the forms cannot be compared
    failure: str = ""  # why it is not timed
    seconds: float = math.nan


@dataclass
class Row:
    op: str
    shape: str
    rows: int
    refused: str = ""  # what verification found
    skipped: str = ""  # why nothing was verified
    seconds: float = math.nan
    floor: float = math.nan
    peers: list[PeerTime] = field(default_factory=list)

    @property
    def timed(self) -> bool:
        return not self.refused and not self.skipped

    @property
    def of_floor(self) -> float:
        return self.floor / self.seconds

    @property
    def best(self) -> PeerTime | None:
        return min((p for p in self.peers if not p.failure), key=lambda p: p.seconds, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best peer."""
        return None if not self.timed or self.best is None else self.best.seconds / self.seconds


def measure(
    case: Case,
    rows: int,
    ceiling: Ceiling,
    device: torch.device,
    cache: int,
    clock: Callable[[Sequence, object], list[float]] = time_calls,
) -> Row:
    """Args: cache: bytes of the device's L2; clock: seconds of one call of each contender."""
    row = Row(case.op, case.shape, rows)
    result = check(case, [rows], device)
    if result.left_out:
        row.skipped = "its inputs do not fit this device's memory often enough to verify it"
    elif not result.passed:
        kinds = ", ".join(failure["kind"] for failure in result.failures)
        row.refused = f"{result.different} of {result.compared} elements differ from the reference: {kinds}"
    if not row.timed:
        return row
    args, moved = case.make(rows, Kind.NORMAL, device), case.bytes_moved(rows)
    turns = plan_turns(moved, held_bytes(args), cache, ceiling)
    sets = copies(args, turns.sets)
    contenders = [[functools.partial(case.launch, *one) for one in sets]]
    want = case.run(case.reference, copy.deepcopy(args))
    row.floor = ceiling.floor(moved)
    for number, peer in enumerate(PEERS.get(case.op, ()), 1):
        if any(why_absent(package) for package in peer.needs):
            continue
        found = PeerTime(peer.says, number, None)
        try:
            probe = peer.prepare(*copy.deepcopy(args))
            if probe is None:
                continue
            found.difference, found.failure = compare(probe(), want)
            if not found.failure:
                contenders.append([peer.prepare(*one) for one in sets])
        except Exception as error:  # whatever a peer raises is its own; the others and ours are timed
            found.failure = _says(error)
        row.peers.append(found)
    timed = [p for p in row.peers if not p.failure]
    try:
        row.seconds, *seconds = clock(contenders, turns)
    except Exception as error:  # a peer that a graph cannot hold: one of them, and which is not told
        if not timed:
            raise
        for found in timed:
            found.failure = f"while timed together, {_says(error)}"
        (row.seconds,), seconds, timed = clock(contenders[:1], turns), [], []
    for found, time in zip(timed, seconds, strict=True):
        found.seconds = time
    return row


def _says(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def compare(got: Sequence[torch.Tensor | None], want: Sequence[torch.Tensor]) -> tuple[float | None, str]:
    """The largest difference, and what is wrong where a peer's results are not those of the op."""
    largest = None
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        if x is None:
            continue
        if x.shape != y.shape:
            return largest, f"result {index} is {tuple(x.shape)}, not {tuple(y.shape)}"
        y = y.float()
        difference = (x.float() - y).abs()
        off = (~(difference <= CLOSE * y.abs().max())).float().mean().item()
        if off > OUTLIERS:
            return largest, f"result {index}: {off:.0%} of its elements are far from the reference's"
        if want[index].is_floating_point():  # ids have no distance
            largest = max(largest or 0.0, difference.nan_to_num(LARGEST).max().item())
    return largest, ""


def geometric_mean(ratios: Iterable[float]) -> float | None:
    ratios = list(ratios)
    return statistics.geometric_mean(ratios) if ratios else None
