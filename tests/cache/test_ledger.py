"""Ledger against brute force: every key that a query sees must hold exactly the content it should."""

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from slot_memory import SlotMemory

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.cache.prefix import PrefixChain
from gemcutter.spec import Kind

FULL, SLIDING = Kind.FULL, Kind.SLIDING


def make_layout(page_size: int, window: int | None, full: bool = True) -> CacheLayout:
    kinds = ([FULL] if full else []) + ([SLIDING] if window else [])
    return CacheLayout(page_size, window, dict.fromkeys(kinds, 64))


class World:
    """Sequences that compute on a ledger, checked by SlotMemory."""

    def __init__(self, layout: CacheLayout, pages: dict[Kind, int], context: int = 64, reuse: bool = True) -> None:
        self.ledger = Ledger(layout, pages, max_sequences=6, context_length=context, reuse=reuse)
        self.memory = SlotMemory(layout, pages)
        self.computed: dict[str, int] = {}
        self.tokens: dict[str, array] = {}
        self.prompt_length: dict[str, int] = {}

    def admit(
        self, seq_id: str, tokens: list[int], chunk: int = 1, reserve: dict | None = None, generated: list[int] = ()
    ) -> int | None:
        """`generated` are known too, of a request that was put back."""
        chain = PrefixChain(array("i", tokens), self.ledger.layout.page_size)
        chain.tokens.extend(generated)
        cached = self.ledger.admit(seq_id, chain, chunk, reserve or {})
        if cached is not None:
            self.tokens[seq_id], self.computed[seq_id] = chain.tokens, cached
            self.prompt_length[seq_id] = len(tokens)
        return cached

    def compute(self, seq_id: str, stop: int) -> bool:
        if not self.ledger.extend(seq_id, stop):
            return False
        known = self.tokens[seq_id], self.prompt_length[seq_id]
        self.memory.step(self.ledger, [(seq_id, *known, self.computed[seq_id], stop)])
        self.ledger.commit(seq_id, stop)
        self.computed[seq_id] = stop
        self.memory.poison_free_pages(self.ledger)
        return True

    def run(self, seq_id: str, tokens: list[int], chunk: int = 3) -> int:
        """Admit, compute in chunks, release. Returns tokens reused."""
        cached = self.admit(seq_id, tokens)
        while self.computed[seq_id] < len(tokens):
            assert self.compute(seq_id, min(len(tokens), self.computed[seq_id] + chunk))
            self.ledger.check_invariants()
        self.release(seq_id)
        return cached

    def release(self, seq_id: str) -> None:
        self.ledger.release(seq_id)
        del self.tokens[seq_id], self.computed[seq_id], self.prompt_length[seq_id]
        self.memory.poison_free_pages(self.ledger)


class LedgerMachine(RuleBasedStateMachine):
    """Random sequences over two tokens, so that prefixes are often equal."""

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 4]),
        window=st.sampled_from([None, 1, 2, 3, 5, 8]),
        full=st.booleans(),
        pages=st.tuples(st.integers(4, 24), st.integers(4, 24)),
        reuse=st.sampled_from([True, True, True, False]),
    )
    def start(self, page_size, window, full, pages, reuse):
        layout = make_layout(page_size, window, full or window is None)
        counts = dict(zip((FULL, SLIDING), pages, strict=True))
        counts = {kind: counts[kind] for kind in layout.kinds}
        self.world = World(layout, counts, context=40, reuse=reuse)
        self.reuse, self.count = reuse, 0

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        generated=st.one_of(st.just([]), st.lists(st.integers(0, 1), max_size=8)),
        chunk=st.integers(1, 6),
        reserve=st.integers(0, 3),
    )
    @precondition(lambda self: len(self.world.tokens) < 6)
    def admit(self, tokens, generated, chunk, reserve):
        world, seq_id = self.world, f"s{self.count}"
        self.count += 1
        best = world.memory.longest_prefix(world.ledger, tokens + generated, len(tokens))
        before = {kind: book.available for kind, book in world.ledger.books.items()}
        cached = world.admit(seq_id, tokens, chunk, dict.fromkeys(before, reserve), generated)
        after = {kind: book.available for kind, book in world.ledger.books.items()}
        if cached is None:
            assert after == before
        else:
            assert cached == (best if self.reuse else 0)
            assert all(count >= reserve for count in after.values())

    @rule(data=st.data(), size=st.integers(1, 7), more=st.lists(st.integers(0, 1), max_size=6))
    @precondition(lambda self: self.world.tokens)
    def compute(self, data, size, more):
        world = self.world
        seq_id = data.draw(st.sampled_from(sorted(world.tokens)))
        tokens = world.tokens[seq_id]
        tokens.extend(more[: 40 - len(tokens)])
        stop = min(len(tokens), world.computed[seq_id] + size)
        missing = world.ledger.missing(seq_id, stop)
        enough = all(book.available >= missing for book in world.ledger.books.values())
        assert world.compute(seq_id, stop) == enough

    @rule(data=st.data())
    @precondition(lambda self: self.world.tokens)
    def release(self, data):
        self.world.release(data.draw(st.sampled_from(sorted(self.world.tokens))))

    @rule()
    def flush(self):
        self.world.ledger.flush()
        self.world.memory.poison_free_pages(self.world.ledger)
        assert all(book.cached == 0 for book in self.world.ledger.books.values())

    @invariant()
    def books_agree(self):
        if hasattr(self, "world"):
            self.world.ledger.check_invariants()

    def teardown(self):
        if hasattr(self, "world"):
            for seq_id in list(self.world.tokens):
                self.world.release(seq_id)
            self.world.ledger.check_invariants()
            assert all(book.used == 0 for book in self.world.ledger.books.values())


LedgerMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase


def world(page_size=4, window=6, full=30, sliding=30, **kwargs) -> World:
    layout = make_layout(page_size, window)
    counts = {FULL: full, SLIDING: sliding}
    return World(layout, {kind: counts[kind] for kind in layout.kinds}, **kwargs)


@pytest.mark.parametrize(
    ("length", "reused"),
    [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)],
    ids=lambda n: str(n),
)
def test_same_prompt_again_leaves_the_last_token_to_compute(length, reused):
    w = world()
    tokens = list(range(length))
    assert w.run("first", tokens) == 0
    assert w.run("second", tokens) == reused


def test_prefix_that_ends_earlier_needs_its_own_window():
    """Sliding pages behind the first sequence's window were given up but stay reusable until evicted."""
    w = world(window=6)
    w.run("first", list(range(24)))
    assert w.run("second", list(range(12)) + [99] * 6) == 12
    # Evict what is oldest in the sliding book: the pages of tokens 0..7, given up first.
    book = w.ledger.books[SLIDING]
    pages = [book.take() for _ in range(len(book._free) + 2)]
    for page in pages:
        book.drop(page)
    w.memory.poison_free_pages(w.ledger)
    tokens = list(range(8)) + [77] * 4
    assert w.memory.longest_prefix(w.ledger, tokens) == 0
    assert w.run("third", tokens) == 0
    assert w.run("fourth", list(range(24)) + [5]) == 24


def test_generated_tokens_are_reused_by_nobody():
    """By no later turn, whose prompt they are part of, and not by their request; their pages are free at once."""
    w = world()
    prompt, answer = list(range(10)), list(range(50, 61))
    w.admit("first", prompt)
    assert w.compute("first", 10)
    w.tokens["first"].extend(answer)
    for stop in range(11, 22):
        assert w.compute("first", stop)
    w.release("first")
    assert all(book.cached == 2 for book in w.ledger.books.values())
    assert w.run("next turn", prompt + answer + [7]) == 8
    w.ledger.flush()
    w.run("prompt", prompt)
    assert w.admit("put back", prompt, generated=answer) == 8


def test_a_prompt_is_reused_whole_by_one_that_knows_how_it_goes_on():
    w = world()
    assert w.run("first", list(range(8))) == 0
    assert w.run("same", list(range(8))) == 4
    assert w.admit("put back", list(range(8)), generated=[9]) == 8


def test_window_one_reuses_without_any_sliding_page():
    w = world(window=1)
    w.run("first", list(range(9)))
    book = w.ledger.books[SLIDING]
    for page in [book.take() for _ in range(book.total)]:
        book.drop(page)
    assert w.run("second", list(range(9))) == 8


def test_two_running_sequences_share_full_and_sliding_pages():
    w = world()
    shared = list(range(12))
    w.admit("a", shared + [50])
    assert w.compute("a", 13)
    assert w.admit("b", shared + [60, 61]) == 12
    # Query 12 of b sees keys from 7 on, so b holds sliding pages 1 and 2; a, further on, has given up page 1.
    tables = {kind: (w.ledger.table("a", kind).tolist(), w.ledger.table("b", kind).tolist()) for kind in Kind}
    for kind, (a, b) in tables.items():
        assert a[2] == b[2] != 0 and a[3] != b[3], kind
    assert tables[FULL][0][:3] == tables[FULL][1][:3]
    assert tables[SLIDING][0][:2] == [0, 0] and tables[SLIDING][1][0] == 0 != tables[SLIDING][1][1]
    assert w.compute("b", 14)
    w.release("a")
    w.tokens["b"].extend(range(100, 120))
    for stop in range(15, 35):
        assert w.compute("b", stop)
        w.ledger.check_invariants()
    w.release("b")
    assert all(book.used == 0 for book in w.ledger.books.values())


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 11])
def test_sliding_pages_held_stay_within_the_window(window):
    w = world(window=window)
    w.admit("a", list(range(60)))
    for stop in range(1, 61):
        assert w.compute("a", stop)
        table = w.ledger.table("a", SLIDING)
        expected = [j for j in range(len(table)) if (j + 1) * 4 > stop - window + 1]
        assert table.nonzero()[0].tolist() == expected
        assert w.ledger.books[FULL].used == len(table) == -(-stop // 4)


def test_a_chain_is_evicted_from_its_tail():
    w = world(window=None)
    w.run("first", list(range(17)))
    book = w.ledger.books[FULL]
    extra = len(book._free)
    for gone in range(1, 5):
        pages = [book.take() for _ in range(extra + gone)]
        for page in pages:
            book.drop(page)
        chain = PrefixChain(array("i", range(17)), 4)
        assert [book.find(chain.digest(j)) is not None for j in range(4)] == [j < 4 - gone for j in range(4)]


def test_nothing_is_reused_with_reuse_off_but_windows_still_slide():
    w = world(reuse=False)
    tokens = list(range(25))
    assert w.run("first", tokens) == 0
    assert w.run("second", tokens) == 0
    assert all(book.cached == 0 for book in w.ledger.books.values())


def test_admission_wants_room_for_the_whole_prompt_but_claims_the_first_chunk():
    w = world(full=9, sliding=9)  # 8 pages, 32 tokens
    assert w.admit("a", list(range(20)), chunk=4) == 0
    assert w.ledger.books[FULL].used == w.ledger.books[SLIDING].used == 1
    assert w.admit("b", list(range(100, 129)), chunk=4) is None
    assert w.admit("b", list(range(100, 128)), chunk=4, reserve={FULL: 1}) is None
    assert w.admit("b", list(range(100, 128)), chunk=4) == 0
    assert w.ledger.missing("b", 28) == 6


def test_extend_takes_from_both_kinds_or_from_none():
    w = world(full=9, sliding=4)
    w.admit("a", list(range(20)), chunk=4)
    assert not w.ledger.extend("a", 20)
    assert {kind: book.used for kind, book in w.ledger.books.items()} == {FULL: 1, SLIDING: 1}
    assert w.ledger.extend("a", 12)


def test_invariants_notice_a_table_that_lies():
    w = world()
    w.admit("a", list(range(9)), chunk=9)
    w.ledger.table("a", FULL)[1] = 0
    with pytest.raises(AssertionError, match="should be held"):
        w.ledger.check_invariants()
