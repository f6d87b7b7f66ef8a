"""Scheduler under random loads on tiny pools, run against brute-force memory and a toy model."""

import gc
import random
from collections import Counter

import pytest
from world import STOP, World, expected, next_token, random_request, random_world, request

from gemcutter.schedule.request import Request


def in_order(steps: dict[str, int], items: list[Request]) -> bool:
    order = [steps[item.id] for item in items]
    return order == sorted(order)


@pytest.mark.parametrize("ahead", [False, True])
def test_random_loads_finish_exactly(ahead):
    seen: Counter[str] = Counter()  # what the loads exercised
    for seed in range(400):
        rng = random.Random(seed)
        world = random_world(rng, ahead)
        bases = [[rng.randrange(2) for _ in range(world.context)] for _ in range(2)]
        items = [random_request(rng, f"r{i}", world.context, bases) for i in range(rng.randrange(1, 14))]
        arriving, sequences = list(items), []
        while arriving:
            for _ in range(rng.randrange(1, 5)):
                if arriving:
                    sequences.append(world.add(arriving.pop(0)))
            for _ in range(rng.randrange(4)):
                world.step()
        # The oldest request computes a whole chunk in every step, whatever happens to the younger ones; in one more
        # it may already have ended.
        bound = sum(-(-len(item.prompt_ids) // world.chunk) + 1 + ahead for item in items)
        bound += sum(len(expected(item, world.context)[0]) * 2 for item in items)
        world.run(limit=bound)
        world.check(items)
        assert in_order(world.started, items), f"seed {seed}"
        seen["preempted"] += world.scheduler.stats().preemptions
        seen["reused"] += sum(sequence.cached_tokens for sequence in sequences)
        seen["one kind"] += len(world.ledger.books) == 1
        seen.update(world.finished.values())
    hard = {"preempted": 200, "reused": 2000, "one kind": 50, "stop": 250, "length": 1000}
    assert all(seen[name] >= count for name, count in hard.items()), f"the loads were too easy: {seen}"


@pytest.mark.parametrize("ahead", [False, True])
def test_random_loads_with_aborts(ahead):
    in_flight = 0
    for seed in range(150):
        rng = random.Random(1000 + seed)
        world = random_world(rng, ahead)
        bases = [[rng.randrange(2) for _ in range(world.context)]]
        items = {f"r{i}": random_request(rng, f"r{i}", world.context, bases) for i in range(10)}
        for item in items.values():
            world.add(item)
        aborted = set()

        def abort_some(plan=None, rng=rng, world=world, items=items, aborted=aborted):
            nonlocal in_flight
            for id in items:
                if rng.random() < 0.06:
                    live = id not in aborted and id not in world.finished
                    assert world.scheduler.abort(id) == live
                    aborted |= {id} if live else set()
                    in_flight += live and plan is not None and id in [s.id for s in plan.sequences]

        while world.scheduler.has_work:
            abort_some()
            world.scheduler.check_invariants()
            world.step(during=abort_some)
            assert world.steps < 2000
        assert all(book.used == 0 for book in world.ledger.books.values())
        assert world.finished.keys() == items.keys() - aborted
        world.check([item for id, item in items.items() if id not in aborted])
        for id in aborted:
            wanted = expected(items[id], world.context)[0]
            assert world.outputs[id] == wanted[: len(world.outputs[id])]
            assert len(world.outputs[id]) < len(wanted)
    assert in_flight > 100


def test_first_tokens_come_in_order_of_arrival():
    """With one chunk a step, a prompt gets tokens only once those before it have all of theirs."""
    for seed in range(40):
        rng = random.Random(seed)
        world = World(chunk=5, step=5, running=3, spare=rng.choice([0, 4, 30]))
        items = [request(f"r{i}", [rng.randrange(9) for _ in range(rng.randrange(1, 20))]) for i in range(8)]
        for item in items:
            world.add(item)
        world.run()
        assert in_order(world.first_tokens, items)
        world.check(items)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 30, 31])
@pytest.mark.parametrize("max_tokens", [1, 2, None])
@pytest.mark.parametrize("window", [1, 3, 4, 6, 8, None])
def test_odd_lengths_alone_in_the_smallest_pool(length, max_tokens, window):
    world = World(window=window, spare=0, chunk=7)
    items = [request(f"r{i}", list(range(length)), max_tokens, stop_ids=()) for i in range(3)]
    for item in items:
        world.add(item)
    world.run()
    world.check(items)
    assert len(world.outputs["r0"]) == min(max_tokens or 100, 32 - length)
    assert world.finished["r0"] == "length"


def test_stop_wins_over_length():
    prompt = next(p for p in ([i] for i in range(256)) if next_token(p, 0) == STOP)
    world = World()
    sequence = world.add(request("a", prompt, max_tokens=1))
    world.run()
    assert world.finished == {"a": "stop"} and sequence.stop_id == STOP and world.outputs["a"] == [STOP]


def test_same_prompt_later_starts_behind_the_reused_prefix():
    world = World(chunk=100, step=100)
    first = world.add(request("a", list(range(21)), max_tokens=1))
    twin = world.add(request("b", list(range(21)), max_tokens=1))
    world.run()
    assert (first.cached_tokens, twin.cached_tokens) == (0, 0)  # admitted in one step, each computes its own
    third = world.add(request("c", list(range(21)), max_tokens=1))
    plan = world.scheduler.plan()
    assert third.cached_tokens == 20
    # One token, and yet prefilled: it is the prompt's.
    assert [(c.start, c.stop, c.samples) for c in plan.prefills] == [(20, 21, True)] and not plan.decodes


def test_oldest_takes_pages_from_the_youngest_which_loses_nothing():
    world = World(page_size=4, window=None, context=32, running=3, spare=1, chunk=8, step=24)
    items = [request(f"r{i}", [i] * 8, max_tokens=20, stop_ids=()) for i in range(3)]
    sequences = [world.add(item) for item in items]
    world.run()
    world.check(items)
    assert sequences[0].preemptions == 0 < sequences[2].preemptions
    assert all(sequence.cached_tokens == 0 for sequence in sequences)  # their own pages are no cached prompt


def test_generated_tokens_are_decoded_again_as_many_at_once_as_rows_are_free():
    world = World(page_size=4, window=None, context=32, running=4, spare=1, chunk=8, step=24)
    items = [request(f"r{i}", [i] * 5, max_tokens=20, stop_ids=()) for i in range(2)]
    oldest, youngest = [world.add(item) for item in items]
    while not youngest.preemptions:
        world.step()
    known = len(youngest.tokens)
    shapes = []

    def note(plan):
        shapes.append([(c.start, c.stop) for c in plan.chunks if c.sequence is youngest])

    while youngest.num_computed < known:
        world.step(during=note)
    again = [shape for shape in shapes if shape]
    assert again[0] == [(4, 5)]  # the page of the prompt is found cached, the rest of it prefilled
    rows = again[1:-1]
    assert all(stop == start + 1 for shape in rows for start, stop in shape)
    assert [start for shape in again[1:] for start, _ in shape] == list(range(5, known))
    assert max(map(len, rows)) >= 3 and len(rows) < known - 5
    world.run()
    world.check(items)


def test_admission_does_not_thrash():
    """Two requests that fit together only at first: a handful of preemptions, not one per token."""
    world = World(page_size=4, window=None, context=64, running=2, spare=4, chunk=16, step=64)
    items = [request(f"r{i}", [i] * 16, max_tokens=40, stop_ids=()) for i in range(6)]
    for item in items:
        world.add(item)
    world.run()
    world.check(items)
    assert world.scheduler.stats().preemptions <= 6


def test_a_newcomer_leaves_running_requests_their_next_pages():
    """After step 3 just its 4 pages are free. Were it let in, the others would take them back in step 4."""
    world = World(page_size=1, window=None, context=64, running=3, spare=0, chunk=64, step=64)
    items = [request(f"r{i}", [i] * length, max_tokens=5, stop_ids=()) for i, length in enumerate((28, 28, 4))]
    world.add(items[0])
    world.add(items[1])
    world.step()
    world.step()
    world.add(items[2])
    world.run()
    world.check(items)
    assert world.scheduler.stats().preemptions == 0


def test_abort_in_mid_prefill_frees_its_pages_and_keeps_its_prefix():
    world = World(chunk=8, step=8)
    world.add(request("a", list(range(20))))
    world.step()
    assert world.scheduler.stats().pages_used == {"full": 2, "sliding": 2}
    assert world.scheduler.abort("a") and not world.scheduler.abort("a")
    assert not world.scheduler.has_work
    assert world.scheduler.stats().pages_used == {"full": 0, "sliding": 0}
    assert world.add(request("b", list(range(20)))).cached_tokens is None
    world.step()
    assert world.scheduler.stats().running == 1
    assert world.scheduler._running[0].cached_tokens == 8


@pytest.mark.parametrize("ahead", [False, True])
def test_abort_before_reading_drops_the_token_and_frees_pages_and_id(ahead):
    """What is launched later writes later, so the pages may be given out though a step still writes there."""
    world = World(ahead=ahead)
    world.add(request("a", [1, 2, 3], 3, stop_ids=()))
    world.add(request("b", [1, 2, 3, 4], 3, stop_ids=()))
    again = request("a", [5], 3, stop_ids=())

    def abort(plan):
        assert world.scheduler.abort("a") and not world.scheduler.abort("a")
        assert world.scheduler.stats().pages_used["full"] == 1
        world.add(again)

    world.step(during=abort)
    assert world.outputs["a"] == [] and len(world.outputs["b"]) == (not ahead)
    world.run()
    world.check([again, request("b", [1, 2, 3, 4], 3, stop_ids=())])


def test_a_last_token_needs_no_step_behind_it():
    """Its request gives way to the next one before the token is read. With a stop that nobody foresees it does
    not.
    """
    prompt = next(p for p in ([i] for i in range(256)) if next_token(p, 0) == STOP)
    for max_tokens, steps in ((1, 2), (2, 3)):
        world = World(running=1, ahead=True)
        world.add(request("a", prompt, max_tokens=max_tokens))
        world.add(request("b", [0], max_tokens=1))
        world.step()
        assert world.scheduler.stats().running == (max_tokens == 2)
        world.run()
        assert world.steps == steps and world.outputs["a"] == [STOP]


def test_a_broken_step_ends_its_requests_and_spares_the_waiting():
    world = World(running=1)
    world.add(request("a", list(range(9))))
    waiting = request("b", list(range(9)))
    world.add(waiting)
    plan = world.scheduler.plan()
    assert [sequence.id for sequence in world.scheduler.fail(plan)] == ["a"]
    world.scheduler.check_invariants()
    world.run()
    world.check([waiting])
    assert world.scheduler._steps == world.steps + 1


def test_requests_that_can_never_run_are_refused():
    world = World(context=32)
    with pytest.raises(ValueError, match="no tokens; send at least one"):
        world.scheduler.add(request("a", []))
    with pytest.raises(ValueError, match="32 tokens, the context holds 32 .* at most 31"):
        world.scheduler.add(request("a", [0] * 32))
    assert not world.scheduler.has_work
    world.add(request("a", [0] * 31))
    with pytest.raises(ValueError, match="'a' is still running; choose another id"):
        world.scheduler.add(request("a", [0]))
    world.run()
    assert world.finished["a"] in ("length", "stop")
    world.add(request("a", [0]))


def test_waiting_prompts_are_nothing_for_the_collector_to_walk():
    world = World(context=20_000, running=1)
    for i in range(3):
        world.add(request(str(i), [7] * 12_345))
    walked = [seen for seen in gc.get_objects() if type(seen) is list and len(seen) >= 12_345]
    assert not [seen for seen in walked if seen[0] == 7]


def test_stats():
    world = World(running=2)
    for i in range(3):
        world.add(request(f"r{i}", [i] * 5, stop_ids=()))
    world.step()
    stats = world.scheduler.stats()
    assert (stats.waiting, stats.running, stats.steps, stats.preemptions) == (1, 2, 1, 0)
    assert stats.pages_used == {"full": 4, "sliding": 4}
    assert stats.pages_total == {kind.value: book.num_pages - 1 for kind, book in world.ledger.books.items()}
