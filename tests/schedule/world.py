"""A scheduler with a toy engine around it, and random requests for it."""

import random
import zlib
from array import array
from collections import Counter

from slot_memory import SlotMemory

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.params import SamplingParams
from gemcutter.schedule.plan import Plan
from gemcutter.schedule.planner import Scheduler
from gemcutter.schedule.request import Request
from gemcutter.schedule.sequence import Sequence
from gemcutter.spec import Kind

FULL, SLIDING = Kind.FULL, Kind.SLIDING
STOP = 9


def next_token(tokens: list[int], seed: int) -> int:
    """The toy model: a token that depends on all before it. About one in ten stops."""
    return zlib.crc32(bytes([seed, *tokens])) % 10


def request(id: str, prompt: list[int], max_tokens: int | None = 4, seed: int = 0, stop_ids=(STOP,)) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(id=id, prompt_ids=array("i", prompt), params=params, stop_ids=frozenset(stop_ids), seed=seed)


def expected(item: Request, context: int) -> tuple[list[int], str]:
    tokens = list(item.prompt_ids)
    while True:
        tokens.append(next_token(tokens, item.seed))
        if tokens[-1] in item.stop_ids:
            return tokens[len(item.prompt_ids) :], "stop"
        if len(tokens) - len(item.prompt_ids) == item.params.max_tokens or len(tokens) == context:
            return tokens[len(item.prompt_ids) :], "length"


class World:
    """Every step is checked against the memory's content. Its device computes at once what is launched."""

    def __init__(
        self, *, page_size=4, window: int | None = 6, full=True, context=32, running=4, chunk=8, step=16, spare=100,
        reuse=True, ahead=False,
    ) -> None:  # fmt: skip
        """`spare`: pages beyond those that one request alone needs. `ahead`: a step is launched before the tokens
        of the last are read.
        """
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
        self.ahead = ahead
        self.before: tuple[Plan, list[int]] | None = None  # a step that is not read
        self.tokens: dict[Sequence, array] = {}  # as the device knows them, read or not
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.started: dict[str, int] = {}  # step of the first chunk
        self.first_tokens: dict[str, int] = {}  # step of the first token
        self.steps = 0

    def add(self, item: Request):
        sequence = self.scheduler.add(item)
        self.tokens[sequence] = array("i", item.prompt_ids)
        self.outputs[item.id] = []
        return sequence

    def step(self, during=lambda plan: None, broken=False) -> None:
        """`during` may abort between launch and reading; a `broken` step raises while it is launched."""
        plan = self.scheduler.plan()
        self.scheduler.check_invariants()
        launched = None
        if plan is not None:
            self.steps += 1
            self._check_plan(plan)
            for sequence in plan.sequences:
                self.started.setdefault(sequence.id, self.steps)
            if broken:
                self._fail(plan)
            else:
                launched = plan, self._launch(plan)
                during(plan)
        before, self.before = self.before, None
        if before is not None:
            self._commit(*before)
        if launched is not None:
            if self.ahead:
                self.before = launched
            else:
                self._commit(*launched)

    def _launch(self, plan: Plan) -> list[int]:
        work = []
        for sequence, start, stop, _ in plan.chunks:
            work.append((sequence.id, self.tokens[sequence], sequence.prompt_length, start, stop))
        self.memory.step(self.ledger, work)
        drawn = [next_token(self.tokens[chunk.sequence], chunk.sequence.seed) for chunk in plan.samplers]
        self.scheduler.advance(plan)
        for row, (chunk, token) in enumerate(zip(plan.samplers, drawn, strict=True)):
            assert chunk.sequence.drawn_row == row
            self.tokens[chunk.sequence].append(token)
        self._check_pages()
        return drawn

    def _commit(self, plan: Plan, tokens: list[int]) -> None:
        for row in self.scheduler.commit(plan, tokens):
            sequence = plan.samplers[row].sequence
            self.first_tokens.setdefault(sequence.id, self.steps)
            self.outputs[sequence.id].append(tokens[row])
            assert sequence.output_ids.tolist() == self.outputs[sequence.id]
            if sequence.finish_reason is not None:
                self.finished[sequence.id] = sequence.finish_reason
        self._check_pages()

    def _fail(self, plan: Plan) -> None:
        self.finished |= {sequence.id: "error" for sequence in self.scheduler.fail(plan)}
        self._check_pages()

    def _check_pages(self) -> None:
        """Whatever is free now may be written by the next step, and by none before it."""
        self.scheduler.check_invariants()
        self.memory.poison_free_pages(self.ledger)

    def _check_plan(self, plan) -> None:
        assert 0 < len(plan.sequences) <= self.limits["running"]
        assert len(plan.decodes) <= self.limits["running"]
        assert sum(chunk.stop - chunk.start for chunk in plan.prefills) <= self.limits["step"]
        computed = {sequence.id: sequence.num_computed for sequence in plan.sequences}
        size = Counter()
        for chunk in plan.chunks:
            known, id = len(self.tokens[chunk.sequence]), chunk.sequence.id
            assert chunk.start == computed[id] < chunk.stop <= known == chunk.sequence.length
            assert chunk.samples == (chunk.stop == known)
            # A token that nobody has read is found by the row that drew it, alone.
            assert chunk.stop <= len(chunk.sequence.tokens) or chunk.stop == chunk.start + 1
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


def random_world(rng: random.Random, ahead: bool) -> World:
    window = rng.choice([None, 1, 2, 3, 5, 6, 9, 13])
    return World(
        page_size=rng.choice([1, 2, 4]), window=window, full=window is None or rng.random() < 0.85,
        context=rng.choice([6, 17, 24, 32, 40]), running=rng.choice([1, 2, 3, 6, 6]),
        chunk=rng.choice([1, 3, 4, 7, 16]), step=rng.choice([1, 4, 8, 20]),
        spare=rng.choice([0, 0, 1, 3, 6, 12, 40]), reuse=rng.random() < 0.8, ahead=ahead,
    )  # fmt: skip


def random_request(rng: random.Random, id: str, context: int, bases: list[list[int]]) -> Request:
    prompt = rng.choice(bases)[: rng.choice([2, rng.randrange(context)])]
    prompt = (prompt + [rng.randrange(2) for _ in range(rng.randrange(6))] or [0])[: context - 1]
    allowed = rng.choice([1, 2, 5, 12, 100, None])
    return request(id, prompt, allowed, rng.randrange(2), stop_ids=rng.choice([(STOP,), (), ()]))
