"""Scheduler: which tokens of which requests the next step computes. No torch.

First come, first served. Every running request is older than every waiting one, and where pages are short
the older takes them from the youngest. So the oldest always goes on, and as the cache holds any one request
alone, all of them end.

Steps run on the device one after another, in the order in which they are launched. So what a launched step writes
counts as written, and a page that it uses may go to another request at once: whoever gets it writes later.
"""

from collections import deque
from dataclasses import dataclass

from gemcutter.cache.ledger import Ledger
from gemcutter.schedule.plan import Chunk, Plan
from gemcutter.schedule.request import Request, Stats
from gemcutter.schedule.sequence import Sequence
from gemcutter.spec import Kind


@dataclass
class _Room:
    """What a step still has place for."""

    rows: int  # of decoding
    prompt_tokens: int


class Scheduler:
    """Of each step first `plan`, then, once it is launched, `advance`, and once its tokens are read, `commit`.

    The next step may be planned before that commit: a sequence goes on from a token that only the device knows.
    If it turns out to have ended with that token, the step computes one row too many, whose token is dropped.
    `add` and `abort` may come at any time but between `plan` and `advance`.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        context_length: int,
        max_running_requests: int,
        chunked_prefill_size: int,
        max_prefill_tokens: int,
    ) -> None:
        chunk = min(chunked_prefill_size, max_prefill_tokens)
        for kind, need in ledger.layout.one_request(context_length, chunk).items():
            total = ledger.books[kind].total
            assert total >= need, f"{total} {kind.value} pages; {context_length} tokens need {need}"
        self.ledger = ledger
        self._context_length = context_length
        self._max_running = max_running_requests
        self._chunk = chunk
        self._max_prefill_tokens = max_prefill_tokens
        self._live: dict[str, Sequence] = {}  # whose end nobody was told
        self._waiting: deque[Sequence] = deque()  # in order of arrival, as is running
        self._running: list[Sequence] = []
        self._leaving: set[Sequence] = set()  # their last token is drawn but not read; they hold nothing
        self._arrivals = 0
        self._preemptions = 0
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: Request) -> Sequence:
        """Queue a request.

        Raises:
            ValueError: it can never run, or its id is taken.
        """
        length = len(request.prompt_ids)
        if length == 0:
            raise ValueError("the prompt has no tokens; send at least one")
        if length >= self._context_length:
            raise ValueError(
                f"the prompt has {length} tokens, the context holds {self._context_length} with the answer; "
                f"shorten the prompt to at most {self._context_length - 1}"
            )
        if request.id in self._live:
            raise ValueError(f"a request with id {request.id!r} is still running; choose another id")
        sequence = Sequence(request, self._arrivals, self.ledger.layout.page_size, self._context_length)
        self._arrivals += 1
        self._live[request.id] = sequence
        self._waiting.append(sequence)
        return sequence

    def abort(self, request_id: str) -> bool:
        """End a request; False if there is none. What launched steps still draw for it is dropped."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        sequence.finish_reason = "abort"
        self._end(sequence)
        return True

    def plan(self) -> Plan | None:
        """Claim pages for the next step and say what it computes; None if there is nothing before the next commit.

        Running requests come before waiting ones, decodes before prompts. Generated tokens to compute again, after
        a preemption, are rows of decoding, of which a step has at most max_running_requests; prompts share
        max_prefill_tokens.
        """
        chosen: dict[str, Chunk] = {}
        decoding: list[Sequence] = []
        others: list[Sequence] = []
        for sequence in self._running:
            at = sequence.num_computed
            in_turn = at + 1 == sequence.length and at >= sequence.prompt_length
            (decoding if in_turn else others).append(sequence)
        for sequence in decoding:
            stop = sequence.length
            if stop <= sequence.quiet:
                chosen[sequence.id] = Chunk(sequence, stop - 1, stop, True)
            else:
                self._choose(sequence, 1, chosen)
        room = _Room(rows=self._max_running - len(decoding), prompt_tokens=self._max_prefill_tokens)
        for sequence in others:
            self._choose_more(sequence, room, chosen)
        self._admit(room, chosen)
        if not chosen:
            stuck = not any(sequence.num_unread for sequence in self._live.values())
            assert not self._live or not stuck, f"no step for {list(self._live.values())}"
            return None
        drawn, known, prefills = [], [], []
        for chunk in chosen.values():
            sequence, start, stop, samples = chunk
            if start < sequence.prompt_length:
                prefills.append(chunk)
            elif samples:
                drawn.append(chunk)
            else:
                known += [Chunk(sequence, at, at + 1, samples=False) for at in range(start, stop)]
        self._steps += 1
        return Plan(decodes=(*drawn, *known), prefills=tuple(prefills))

    def advance(self, plan: Plan) -> None:
        """The step is launched: count its K/V as written, and its draws as tokens that nobody has read.

        Whose last token is drawn for certain gives its pages and its place back.
        """
        row = 0
        for sequence, _, stop, samples in plan.chunks:
            sequence.num_computed = stop
            if stop > sequence.quiet:
                sequence.quiet = self.ledger.commit(sequence.id, stop)
            if not samples:
                continue
            sequence.drawn_row = row
            sequence.length = stop + 1
            row += 1
            if stop + 1 >= sequence.max_length:
                self._running.remove(sequence)
                self.ledger.release(sequence.id)
                self._leaving.add(sequence)

    def commit(self, plan: Plan, token_ids: list[int]) -> list[int]:
        """Take in what a step drew, one token per sampler. Steps come in the order of their launch.

        Tokens of requests that ended meanwhile are dropped. Those that end now give their pages back.

        Returns:
            Which samplers' tokens count. Their sequences' finish_reason says whether they were the last.
        """
        assert len(token_ids) == len(plan.samplers), f"{len(token_ids)} tokens for {len(plan.samplers)} samplers"
        new = []
        for row, (chunk, token_id) in enumerate(zip(plan.samplers, token_ids, strict=True)):
            sequence = chunk.sequence
            if sequence.finish_reason is None:
                sequence.append(token_id)
                new.append(row)
                if sequence.finish_reason is not None:
                    self._end(sequence)
        return new

    def fail(self, plan: Plan) -> list[Sequence]:
        """The step broke, before it was launched or later: end its requests with "error"."""
        failed = [sequence for sequence in plan.sequences if sequence.finish_reason is None]
        for sequence in failed:
            sequence.finish_reason = "error"
            self._end(sequence)
        return failed

    def stats(self) -> Stats:
        books = self.ledger.books.items()
        return Stats(
            waiting=len(self._waiting),
            running=len(self._running),
            pages_used={kind.value: book.used for kind, book in books},
            pages_cached={kind.value: book.cached for kind, book in books},
            pages_total={kind.value: book.total for kind, book in books},
            preemptions=self._preemptions,
            steps=self._steps,
        )

    def check_invariants(self) -> None:
        """Assert the order of service, and that exactly the running sequences hold pages."""
        order = [sequence.arrival for sequence in (*self._running, *self._waiting)]
        assert order == sorted(set(order)), f"running then waiting {order} != order of arrival"
        here = sorted(sequence.id for sequence in (*self._running, *self._waiting, *self._leaving))
        assert here == sorted(self._live), f"running, waiting and leaving {here} != live {sorted(self._live)}"
        running = {sequence.id for sequence in self._running}
        assert running == self.ledger.holders, f"running {running} != holding pages {self.ledger.holders}"
        started = [sequence for sequence in self._waiting if sequence.num_computed]
        assert not started, f"waiting {started} have K/V but no pages"
        assert len(running) <= self._max_running, f"{len(running)} running > {self._max_running}"
        self.ledger.check_invariants()

    def _choose_more(self, sequence: Sequence, room: "_Room", chosen: dict[str, Chunk]) -> None:
        """Put as much of a sequence that is not decoding into the step as there is room and there are pages for."""
        if sequence.in_prompt:
            size = min(sequence.prompt_length - sequence.num_computed, self._chunk, room.prompt_tokens)
        else:
            # Of several the newest waits a step, to be decoded as ever.
            size = min(max(1, sequence.num_to_compute - 1), self._chunk, room.rows)
        if size and self._choose(sequence, size, chosen):
            if sequence.in_prompt:
                room.prompt_tokens -= size
            else:
                room.rows -= size

    def _choose(self, sequence: Sequence, size: int, chosen: dict[str, Chunk]) -> bool:
        """Put the sequence's next `size` tokens into the step if it gets the pages.

        It takes them from younger sequences. The youngest keeps what it holds and waits for the next step.
        """
        if self._waits(sequence):
            return False  # put back by an older one in this very step
        stop = sequence.num_computed + size
        while not self.ledger.extend(sequence.id, stop):
            youngest = self._running[-1]
            if youngest is sequence:
                return False
            self._preempt(youngest)
            chosen.pop(youngest.id, None)
        assert stop - size <= len(sequence.tokens), f"{sequence} is planned while two of its tokens are not read"
        chosen[sequence.id] = Chunk(sequence, stop - size, stop, stop == sequence.length)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Put the youngest running sequence back. Its tokens stay; their K/V are computed again, or the prompt's
        found cached.
        """
        self.ledger.release(self._running.pop().id)
        sequence.num_computed = sequence.quiet = 0
        sequence.preemptions += 1
        self._preemptions += 1
        self._waiting.appendleft(sequence)

    def _admit(self, room: "_Room", chosen: dict[str, Chunk]) -> None:
        """Start waiting sequences in order of arrival. One that does not fit keeps those behind it waiting."""
        if not self._waiting or len(self._running) >= self._max_running:
            return
        reserve = dict.fromkeys(self.ledger.layout.kinds, 0)
        for sequence in self._running:
            self._add_reserve(sequence, reserve)
        while self._waiting and len(self._running) < self._max_running and room.prompt_tokens:
            sequence = self._waiting[0]
            chunk = min(self._chunk, room.prompt_tokens)
            cached = self.ledger.admit(sequence.id, sequence.chain, chunk, reserve)
            if cached is None:
                return
            self._running.append(self._waiting.popleft())
            sequence.num_computed = cached
            if sequence.cached_tokens is None:
                sequence.cached_tokens = cached
            self._choose_more(sequence, room, chosen)
            self._add_reserve(sequence, reserve)

    def _add_reserve(self, sequence: Sequence, reserve: dict[Kind, int]) -> None:
        """Keep pages from newcomers: what a running sequence needs for its prompt, and one more to go on.

        Sliding pages behind the window come back, so there a prompt needs its next chunk at most.
        """
        length = sequence.length
        page_size = self.ledger.layout.page_size
        soon = min(length, sequence.num_computed + self._chunk)
        for kind in reserve:
            goal = (length if kind is Kind.FULL else soon) + page_size
            reserve[kind] += self.ledger.missing(sequence.id, goal)

    def _waits(self, sequence: Sequence) -> bool:
        """Every running one came before the first that waits."""
        return bool(self._waiting) and sequence.arrival >= self._waiting[0].arrival

    def _end(self, sequence: Sequence) -> None:
        del self._live[sequence.id]
        if sequence in self._leaving:
            self._leaving.remove(sequence)
        elif self._waits(sequence):
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self.ledger.release(sequence.id)
