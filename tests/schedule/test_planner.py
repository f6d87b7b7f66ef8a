"""Scheduler under random loads on tiny pools, run against brute-force memory and a toy model."""

import gc
import random
import zlib
from collections import Counter

import pytest
from slot_memory import SlotMemory

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.params import SamplingParams
from gemcutter.schedule.planner import Scheduler
from gemcutter.schedule.request import Request
from gemcutter.spec import Kind

FULL, SLIDING = Kind.FULL, Kind.SLIDING
STOP = 9


def next_token(tokens: list[int], seed: int) -> int:
    """The toy model: a token that depends on all before it. About one in ten stops."""
    return zlib.crc32(bytes([seed, *tokens])) % 10


def request(id: str, prompt: list[int], max_tokens: int | None = 4, seed: int = 0, stop_ids=(STOP,)) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(id=id, prompt_ids=prompt, params=params, stop_ids=frozenset(stop_ids), seed=seed)


def expected(item: Request, context: int) -> tuple[list[int], str]:
    tokens = list(item.prompt_ids)
    while True:
        tokens.append(next_token(tokens, item.seed))
        if tokens[-1] in item.stop_ids:
            return tokens[len(item.prompt_ids) :], "stop"
        if len(tokens) - len(item.prompt_ids) == item.params.max_tokens or len(tokens) == context:
            return tokens[len(item.prompt_ids) :], "length"


class World:
    """A scheduler with a toy engine around it. Every step is checked against the memory's content."""

    def __init__(
        self, *, page_size=4, window: int | None = 6, full=True, context=32, running=4, chunk=8, step=16, spare=100,
        reuse=True,
    ) -> None:  # fmt: skip
        """`spare`: pages beyond those that one request alone needs."""
        kinds = ([FULL] if full else []) + ([SLIDING] if window else [])
        layout = CacheLayout(page_size, window, dict.fromkeys(kinds, 64))
        need = layout.one_request(context, min(chunk, step))
        pages = {kind: count + 1 + spare for kind, count in need.items()}
        self.context, self.chunk = context, min(chunk, step)
        self.limits = {"running": running, "chunk": chunk, "step": step}
        self.ledger = Ledger(layout, pages, running, context, reuse)
        self.memory = SlotMemory(layout, pages)
        self.scheduler = Scheduler(
            self.ledger, context_length=context, max_running_requests=running, chunked_prefill_size=chunk,
            max_prefill_tokens=step,
        )  # fmt: skip
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.started: dict[str, int] = {}  # step of the first chunk
        self.first_tokens: dict[str, int] = {}  # step of the first token
        self.steps = 0

    def add(self, item: Request):
        sequence = self.scheduler.add(item)
        self.outputs[item.id] = []
        return sequence

    def step(self, during=lambda plan: None) -> None:
        plan = self.scheduler.plan()
        self.scheduler.check_invariants()
        if plan is None:
            return
        self.steps += 1
        self._check_plan(plan)
        for sequence in plan.sequences:
            self.started.setdefault(sequence.id, self.steps)
        work = [(c.sequence.id, c.sequence.tokens, c.sequence.prompt_length, c.start, c.stop) for c in plan.chunks]
        self.memory.step(self.ledger, work)
        samplers = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        tokens = [next_token(sequence.tokens, sequence.seed) for sequence in samplers]
        during(plan)
        for new in self.scheduler.commit(plan, tokens):
            assert samplers[new.row] is new.sequence and tokens[new.row] == new.token_id
            self.first_tokens.setdefault(new.sequence.id, self.steps)
            self.outputs[new.sequence.id].append(new.token_id)
            assert new.sequence.output_ids.tolist() == self.outputs[new.sequence.id]
            if new.sequence.finish_reason is not None:
                self.finished[new.sequence.id] = new.sequence.finish_reason
        self.scheduler.check_invariants()
        self.memory.poison_free_pages(self.ledger)

    def _check_plan(self, plan) -> None:
        assert 0 < len(plan.sequences) <= self.limits["running"]
        assert len(plan.decodes) <= self.limits["running"]
        assert sum(chunk.stop - chunk.start for chunk in plan.prefills) <= self.limits["step"]
        computed = {sequence.id: sequence.num_computed for sequence in plan.sequences}
        size = Counter()
        for chunk in plan.chunks:
            known, id = len(chunk.sequence.tokens), chunk.sequence.id
            assert chunk.start == computed[id] < chunk.stop <= known
            assert chunk.samples == (chunk.stop == known)
            computed[id], size[id] = chunk.stop, size[id] + chunk.stop - chunk.start
        assert max(size.values()) <= self.chunk
        # Prompts are prefilled and generated tokens are decoded, whatever comes.
        assert all(c.start >= c.sequence.prompt_length and c.stop == c.start + 1 for c in plan.decodes)
        assert all(c.stop <= c.sequence.prompt_length for c in plan.prefills)
        samples = [chunk.samples for chunk in plan.decodes]
        assert samples == sorted(samples, reverse=True)
        drawn = [chunk for chunk in plan.decodes if chunk.samples]
        replayed = list(dict.fromkeys(c.sequence.arrival for c in plan.decodes if not c.samples))
        once = [[c.sequence.arrival for c in part] for part in (drawn, plan.prefills)]
        for arrivals in (*once, replayed):
            assert arrivals == sorted(set(arrivals))

    def run(self, limit=2000) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.steps <= limit, f"not done after {limit} steps: {self.scheduler.stats()}"
        assert self.scheduler.plan() is None
        assert all(book.used == 0 for book in self.ledger.books.values())

    def check(self, items: list[Request]) -> None:
        for item in items:
            assert (self.outputs[item.id], self.finished[item.id]) == expected(item, self.context), item


def in_order(steps: dict[str, int], items: list[Request]) -> bool:
    order = [steps[item.id] for item in items]
    return order == sorted(order)


def random_world(rng: random.Random) -> World:
    window = rng.choice([None, 1, 2, 3, 5, 6, 9, 13])
    return World(
        page_size=rng.choice([1, 2, 4]), window=window, full=window is None or rng.random() < 0.85,
        context=rng.choice([6, 17, 24, 32, 40]), running=rng.choice([1, 2, 3, 6, 6]),
        chunk=rng.choice([1, 3, 4, 7, 16]), step=rng.choice([1, 4, 8, 20]),
        spare=rng.choice([0, 0, 1, 3, 6, 12, 40]), reuse=rng.random() < 0.8,
    )  # fmt: skip


def random_request(rng: random.Random, id: str, context: int, bases: list[list[int]]) -> Request:
    prompt = rng.choice(bases)[: rng.choice([2, rng.randrange(context)])]
    prompt = (prompt + [rng.randrange(2) for _ in range(rng.randrange(6))] or [0])[: context - 1]
    allowed = rng.choice([1, 2, 5, 12, 100, None])
    return request(id, prompt, allowed, rng.randrange(2), stop_ids=rng.choice([(STOP,), (), ()]))


def test_random_loads_finish_exactly():
    seen: Counter[str] = Counter()  # what the loads exercised
    for seed in range(400):
        rng = random.Random(seed)
        world = random_world(rng)
        bases = [[rng.randrange(2) for _ in range(world.context)] for _ in range(2)]
        items = [random_request(rng, f"r{i}", world.context, bases) for i in range(rng.randrange(1, 14))]
        arriving, sequences = list(items), []
        while arriving:
            for _ in range(rng.randrange(1, 5)):
                if arriving:
                    sequences.append(world.add(arriving.pop(0)))
            for _ in range(rng.randrange(4)):
                world.step()
        # The oldest request computes a whole chunk in every step, whatever happens to the younger ones.
        bound = sum(-(-len(item.prompt_ids) // world.chunk) + 1 for item in items)
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


def test_random_loads_with_aborts():
    in_flight = 0
    for seed in range(150):
        rng = random.Random(1000 + seed)
        world = random_world(rng)
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


def test_abort_between_plan_and_commit_drops_the_token():
    world = World()
    world.add(request("a", [1, 2, 3]))
    world.add(request("b", [1, 2, 3, 4]))

    def abort(plan):
        assert world.scheduler.abort("a")
        assert world.scheduler.stats().pages_used["full"] == 2  # the step still writes there
        with pytest.raises(ValueError, match="'a' is still running"):
            world.scheduler.add(request("a", [5]))

    world.step(during=abort)
    assert world.outputs["a"] == [] and len(world.outputs["b"]) == 1
    assert world.scheduler.stats().pages_used["full"] == 1
    world.run()


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
