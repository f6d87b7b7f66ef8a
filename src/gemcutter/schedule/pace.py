"""Pace: how long the next step may wait to be planned without the device waiting for it. No torch.

A request joins the step that is planned after it arrived. So the host plans a step not when it could, as the one
before begins, but when it must: as that one nears its end. When that is, follows from what steps like it took on
this device, and from what the host took of late to plan and launch one.
"""

import time
from collections import deque
from collections.abc import Callable
from math import inf

from gemcutter.schedule.plan import Plan

RECENT_STEPS = 8  # of a kind, of which the shortest is believed: planning early costs an arrival, late everyone
RECENT_LAUNCHES = 32  # of which the slowest is: one with a prompt takes the host longer, and may come next
FIRST_LAUNCH = 0.002  # seconds, until one was seen
MARGIN = 0.0005  # seconds, for steps shorter and hosts slower than any of these
LEADING_BITS = 4  # of a step's numbers, that tell kinds apart: 24 and 25 rows take as long, 24 and 26 do not


class Pace:
    """Steps are launched and end in one order, at most one launched while another is under way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._took: dict[tuple[int, int], deque[float]] = {}  # seconds on the device, by kind
        self._launches = deque([FIRST_LAUNCH], maxlen=RECENT_LAUNCHES)  # seconds from when planning was due
        self._under_way: deque[tuple[tuple[int, int], bool]] = deque()  # kind, launched at once
        self._began = 0.0  # the first of them, on the device
        self._saw_begin = False  # that is when, and not only the host's first look
        self._due = inf  # when its successor must be planned
        self._planning = 0.0  # since when the host does, or should

    @property
    def left(self) -> float:
        """Seconds until the next step must be planned: 0 if it is time, or nobody knows how long this one takes."""
        return max(0.0, self._due - self._clock()) if self._under_way else 0.0

    def planning(self, idle: bool) -> None:
        """The host begins to plan a step. `idle`: nothing is under way."""
        if idle:  # also after a step that broke and was never told of again
            self._under_way.clear()
        now = self._clock()
        self._planning = min(now, self._due) if self._under_way else now

    def launched(self, plan: Plan, at_once: bool) -> None:
        """It is under way. `at_once`: as a graph; otherwise the device began long before the host was done."""
        now = self._clock()
        if at_once:
            self._launches.append(now - self._planning)
        self._under_way.append((_kind(plan), at_once))
        if len(self._under_way) == 1:
            self._begin(now, saw=at_once)

    def ended(self, just_now: bool) -> None:
        """The older of those under way is done, and has been for some time unless `just_now`. What was launched
        behind it was launched last of all.
        """
        now = self._clock()
        kind, _ = self._under_way.popleft()
        known = self._took.setdefault(kind, deque(maxlen=RECENT_STEPS))
        took = now - self._began
        if self._saw_begin and (just_now or known and took < min(known)):
            known.append(took)
        if self._under_way:
            self._begin(now, saw=just_now or self._under_way[0][1])

    def _begin(self, now: float, saw: bool) -> None:
        self._began = self._due = now
        self._saw_begin = saw
        if took := self._took.get(self._under_way[0][0]):
            self._due = max(now, now + min(took) - max(self._launches) - MARGIN)


def _kind(plan: Plan) -> tuple[int, int]:
    """Steps of a kind take about as long: rows of decoding and tokens of prompts, both roughly."""
    return _rough(len(plan.decodes)), _rough(sum(chunk.stop - chunk.start for chunk in plan.prefills))


def _rough(number: int) -> int:
    rest = max(0, number.bit_length() - LEADING_BITS)
    return number >> rest << rest
