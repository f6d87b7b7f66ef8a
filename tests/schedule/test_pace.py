"""When a step is planned: before the one under way ends, and not much earlier. Only the test moves the clock."""

import random

import pytest

from gemcutter.schedule.pace import FIRST_LAUNCH, MARGIN, RECENT_STEPS, Pace
from gemcutter.schedule.plan import Chunk, Plan


def plan(decodes: int, *prompts: int) -> Plan:
    return Plan(
        tuple(Chunk(None, 9, 10, True) for _ in range(decodes)),
        tuple(Chunk(None, 0, length, True) for length in prompts),
    )


class Desk:
    """A host and a device. The host plans when the pace says so; the device takes the steps one after another."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = Pace(lambda: self.now)
        self.free = 0.0  # when the device has done all that it was given
        self.idle = 0.0  # seconds that it waited for the host, while there were steps to do
        self.early = 0.0  # seconds between the last planning and the end of what was under way
        self.flights: list[float] = []  # when each ends

    def step(self, one: Plan, device: float, host: float, at_once: bool = True, wait: bool = True) -> None:
        """As the server does: wait, plan and launch `one`, read the step before."""
        while self.flights and wait and self.now < self.flights[0] and (left := self.pace.left):
            self.now += min(left, 0.001)
        self.pace.planning(idle=not self.flights)
        self.early = max(0.0, self.free - self.now)
        begin = self.now
        self.now += host
        launched = self.now if at_once else begin
        if self.flights:
            self.idle += max(0.0, launched - self.free)
        self.free = max(self.free, launched) + device
        self.pace.launched(one, at_once)
        self.flights.append(self.free)
        if len(self.flights) > 1:
            self.read()

    def read(self) -> None:
        end = self.flights.pop(0)
        just_now = self.now < end
        self.now = max(self.now, end)
        self.pace.ended(just_now)


def test_a_known_step_is_planned_late_and_launched_in_time():
    desk = Desk()
    for _ in range(40):
        desk.step(plan(24), device=0.0126, host=0.0006)
    assert desk.idle == 0
    assert 0.0006 + MARGIN <= desk.early + 1e-9 <= FIRST_LAUNCH + MARGIN + 2e-9
    for _ in range(40):
        desk.step(plan(24), device=0.0126, host=0.0006)
    assert desk.idle == 0 and desk.early == pytest.approx(0.0006 + MARGIN)


def test_an_unknown_kind_of_step_is_not_waited_for():
    desk = Desk()
    for one in (plan(3), plan(3, 100), plan(3, 1000)):
        desk.step(one, device=1.0, host=0.0)
        assert desk.pace.left == 0
    desk.step(plan(3), device=1.0, host=0.0)
    assert desk.pace.left == pytest.approx(1.0 - FIRST_LAUNCH - MARGIN)
    desk.read()
    desk.pace.planning(idle=True)
    assert desk.pace.left == 0  # nothing is under way


def test_a_step_that_began_unseen_teaches_nothing():
    """An eager one is under way long before the host has launched the last of it."""
    desk = Desk()
    desk.step(plan(3), device=1.0, host=0.2, at_once=False)
    desk.read()
    desk.step(plan(3), device=1.0, host=0.0)
    assert desk.pace.left == 0


@pytest.mark.parametrize("known, other, alike", [(24, 25, True), (24, 26, False), (2, 3, False), (15, 14, False)])
def test_steps_of_about_as_many_rows_are_of_a_kind(known, other, alike):
    desk = Desk()
    for rows in (known, known, other):
        desk.step(plan(rows), device=1.0, host=0.0)
    assert (desk.pace.left > 0) == alike


def test_a_host_that_comes_late_to_plan_is_reckoned_with():
    desk = Desk()
    for _ in range(3):
        desk.step(plan(3), device=1.0, host=0.0)
    desk.now += desk.pace.left + 0.3
    desk.step(plan(3), device=1.0, host=0.1)
    assert desk.pace.left == pytest.approx(1.0 - 0.3 - 0.1 - MARGIN)


@pytest.mark.parametrize("host", [0.0002, 0.0015, 0.01, 0.02])
def test_a_host_slower_than_the_device_never_waits(host):
    """Beyond 20 ms the device waits for it whatever is done; nothing is added to that."""
    eager, late = Desk(), Desk()
    for _ in range(60):
        eager.step(plan(1), device=0.005, host=host, wait=False)
        late.step(plan(1), device=0.005, host=host)
    # Until the host's slowness was seen once, FIRST_LAUNCH is believed.
    assert late.idle <= eager.idle + max(0.0, host - FIRST_LAUNCH) * 2
    if host < 0.005:
        assert late.idle == eager.idle == 0


def test_steps_that_got_shorter_cost_one_look():
    """That the device is done before its time is seen within a millisecond, and foreseen from then on."""
    desk = Desk()
    for _ in range(RECENT_STEPS + 2):
        desk.step(plan(2, 2000), device=0.4, host=0.001)
    desk.step(plan(2, 2000), device=0.1, host=0.001)
    assert desk.idle == 0
    desk.step(plan(2, 2000), device=0.1, host=0.001)
    cost = desk.idle
    assert 0 < cost <= 0.002 + 1e-9
    for _ in range(20):
        desk.step(plan(2, 2000), device=0.1, host=0.001)
    assert desk.idle == cost


def test_a_mixed_load_keeps_the_device_busy_and_lets_late_arrivals_in():
    """As at 8 requests a second: steps differ by a percent, some take in a prompt, now and then one is eager."""
    rng = random.Random(0)
    desk, waits = Desk(), []
    for number in range(3000):
        rows, kind = rng.choice([22, 23, 24, 25]), rng.random()
        if kind < 0.12:
            desk.step(plan(rows, 1024), device=0.023 * rng.uniform(0.99, 1.01), host=0.0012)
        elif kind < 0.125:
            desk.step(plan(rows, 4000), device=0.061, host=0.025, at_once=False)
        else:
            device = (0.0106 + rows * 0.00008) * rng.uniform(0.99, 1.01)
            desk.step(plan(rows), device=device, host=rng.uniform(0.0003, 0.0005))
        if number > 500:
            waits.append(desk.early)
    assert desk.idle < desk.now / 50_000
    assert 0.0012 < sum(waits) / len(waits) < 0.0025
