"""Ledger: the pages of every running sequence, in both kinds at once, and the prefixes it can reuse."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from gemcutter.cache.book import PageBook
from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.prefix import PrefixChain
from gemcutter.spec import Kind


@dataclass(slots=True)
class _Holding:
    """What one sequence holds: logical pages [first, num_pages) of each kind; those before first are given up."""

    chain: PrefixChain
    row: int  # of the tables
    num_pages: int = 0
    num_registered: int = 0  # full pages of the prompt that were offered for reuse
    next_turn: int = 0  # tokens computed, from which on other pages are full or in sight
    first: dict[Kind, int] = field(default_factory=dict)


class Ledger:
    """Moves pages between sequences and books. Plans count on two promises: a call takes all it asks for or
    nothing, and a page is given up only when no later query of its sequence can see it.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pages: dict[Kind, int],
        max_sequences: int,
        context_length: int,
        reuse: bool = True,
    ) -> None:
        """`pages` counts the dump; `reuse` False keeps no prefixes."""
        self.layout = layout
        self.books = {kind: PageBook(pages[kind]) for kind in layout.kinds}
        self._reuse = reuse
        self._held: dict[str, _Holding] = {}
        self._rows = list(range(max_sequences - 1, -1, -1))
        self._nobody = max_sequences  # a row that holds no pages
        shape = (max_sequences + 1, layout.num_pages(context_length))
        self._tables = {kind: np.zeros(shape, np.int32) for kind in layout.kinds}

    @property
    def holders(self) -> set[str]:
        """Ids of the sequences that hold pages."""
        return set(self._held)

    def admit(self, seq_id: str, chain: PrefixChain, chunk: int, reserve: dict[Kind, int]) -> int | None:
        """Claim the longest reusable prefix of the prompt and pages for up to `chunk` tokens after it.

        The prefix ends on a page border and leaves at least the last known token to compute. A kind must have
        `reserve` pages to spare, and the full kind also those of the tokens that come after this chunk: a
        prompt that is put back halfway has wasted its work.

        Returns:
            Tokens that the prefix covers; None, and nothing is claimed, if pages are short.
        """
        assert seq_id not in self._held, f"sequence {seq_id} is admitted twice"
        known = len(chain.tokens)
        matched = self._match(chain)
        cached = matched * self.layout.page_size
        stop = min(cached + chunk, known)
        prefix: dict[Kind, list[int]] = {}
        for kind, book in self.books.items():
            first = self.layout.first_page(kind, cached)
            prefix[kind] = [book.find(chain.digest(j)) for j in range(first, matched)]
            end = self.layout.num_pages(known if kind is Kind.FULL else stop)
            idle = sum(not book.is_held(page) for page in prefix[kind])
            if book.available < end - matched + idle + reserve.get(kind, 0):
                return None
        held = _Holding(chain, self._rows.pop(), matched, matched, self.layout.next_turn(cached))
        self._held[seq_id] = held
        for kind, book in self.books.items():
            held.first[kind] = matched - len(prefix[kind])
            self._tables[kind][held.row, held.first[kind] : matched] = prefix[kind]
            for page in prefix[kind]:
                book.share(page)
        extended = self.extend(seq_id, stop)
        assert extended, f"sequence {seq_id} was admitted without room for its first chunk"
        return cached

    def missing(self, seq_id: str, length: int) -> int:
        """Pages of either kind that the sequence still needs in order to hold `length` tokens."""
        return max(0, self.layout.num_pages(length) - self._held[seq_id].num_pages)

    def extend(self, seq_id: str, length: int) -> bool:
        """Hold pages for tokens [0, length), all of them or none; False if a kind is short."""
        held = self._held[seq_id]
        if length <= held.num_pages * self.layout.page_size:
            return True
        end = self.layout.num_pages(length)
        need = end - held.num_pages
        for book in self.books.values():
            if book.available < need:
                return False
        for kind, book in self.books.items():
            row = self._tables[kind][held.row]
            for j in range(held.num_pages, end):
                row[j] = book.take()
        held.num_pages = end
        return True

    def commit(self, seq_id: str, computed: int) -> int:
        """Tokens [0, computed) have K/V now: offer the prompt's full pages, give up those behind the window.

        The next query stands at position `computed`. Pages given up stay reusable until they are evicted. Pages
        with a generated token are never offered: in a prompt it would be prefilled, with other last bits.

        Returns:
            Up to so many tokens neither this nor `extend` has anything to do: they need not be called.
        """
        held = self._held[seq_id]
        room = held.num_pages * self.layout.page_size
        assert computed <= room, f"{seq_id}: {computed} tokens computed, on pages for {room}"
        if computed >= held.next_turn:
            held.next_turn = self.layout.next_turn(computed)
            self._offer(held, computed)
            for kind, first in held.first.items():
                visible = min(self.layout.first_page(kind, computed), held.num_pages)
                if first < visible:
                    self._give_up(held, kind, range(first, visible))
                    held.first[kind] = visible
        return min(room, held.next_turn - 1)

    def release(self, seq_id: str) -> None:
        """The sequence holds nothing any more. What was offered stays reusable until it is evicted.

        The last page is dropped first, so that eviction takes a chain's tail before its head: a page is of
        use only together with those before it.
        """
        held = self._held.pop(seq_id)
        for kind, first in held.first.items():
            self._give_up(held, kind, range(held.num_pages - 1, first - 1, -1))
        self._rows.append(held.row)

    def table(self, seq_id: str, kind: Kind) -> np.ndarray:
        """[num_pages] int32: page id of logical page j; 0 where it was given up. A view: do not write."""
        held = self._held[seq_id]
        return self._tables[kind][held.row, : held.num_pages]

    def read_tables(self, seq_ids: list[str | None], out: np.ndarray) -> None:
        """Fill out [kinds, len(seq_ids), width] with the ids of pages 0 … width - 1; 0 where none is held. None
        holds none.
        """
        rows = np.array([self._nobody if seq_id is None else self._held[seq_id].row for seq_id in seq_ids])
        for table, target in zip(self._tables.values(), out, strict=True):
            target[:] = table[rows, : out.shape[2]]

    def flush(self) -> None:
        """Forget all reusable prefixes. Running sequences keep their pages."""
        for book in self.books.values():
            book.flush()

    def check_invariants(self) -> None:
        """Assert that tables, holdings and books agree; the message of a failure shows both sides."""
        rows = sorted([*self._rows, *(held.row for held in self._held.values())])
        assert rows == list(range(len(rows))), f"rows free and held {rows} != 0..{len(rows) - 1}"
        for kind, book in self.books.items():
            count: Counter[int] = Counter()
            table = self._tables[kind]
            for seq_id, held in self._held.items():
                row, first = table[held.row], held.first[kind]
                gap, own, rest = row[:first], row[first : held.num_pages], row[held.num_pages :]
                where = f"{seq_id}: {kind.value} pages {row.tolist()}, of which [{first}, {held.num_pages})"
                assert own.all(), f"{where} should be held"
                assert not gap.any() and not rest.any(), f"{where} alone should be held"
                oldest = min(self.layout.first_page(kind, held.next_turn - 1), held.num_pages)
                assert first == oldest, f"{where} should start at the first visible page, {oldest}"
                count.update(own.tolist())
            assert not table[self._rows].any(), f"{kind.value} rows without a sequence hold pages"
            book.check_invariants(count)

    def _match(self, chain: PrefixChain) -> int:
        """Pages of the longest prefix whose full pages are all cached, and its sliding pages as far as the
        next query sees them. Keeps the last token out, for its logits are wanted.
        """
        if not self._reuse:
            return 0
        matched = min(len(chain.tokens) - 1, chain.prompt_length) // self.layout.page_size
        if Kind.FULL in self.books:
            find = self.books[Kind.FULL].find
            matched = next((j for j in range(matched) if find(chain.digest(j)) is None), matched)
        if Kind.SLIDING in self.books:
            find = self.books[Kind.SLIDING].find
            j = matched - 1
            while j >= self.layout.first_page(Kind.SLIDING, matched * self.layout.page_size):
                # Any end from j + 1 to matched has page j in its window: if j is gone, the prefix ends at j.
                if find(chain.digest(j)) is None:
                    matched = j
                j -= 1
        return matched

    def _offer(self, held: _Holding, computed: int) -> None:
        full_pages = min(computed, held.chain.prompt_length) // self.layout.page_size
        if self._reuse and held.num_registered < full_pages:
            for j in range(held.num_registered, full_pages):
                digest = held.chain.digest(j)
                for kind, book in self.books.items():
                    book.register(int(self._tables[kind][held.row, j]), digest)
            held.num_registered = full_pages

    def _give_up(self, held: _Holding, kind: Kind, logical: range) -> None:
        book, row = self.books[kind], self._tables[kind][held.row]
        for j in logical:
            book.drop(int(row[j]))
            row[j] = 0
