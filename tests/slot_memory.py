"""Brute-force model of the K/V memory: what every slot holds, as the exact token prefix it was computed from, and
which of those tokens were prefilled and which decoded: that makes other bits.
"""

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.spec import Kind


class SlotMemory:
    def __init__(self, layout: CacheLayout, pages: dict[Kind, int]) -> None:
        self.layout = layout
        self.slots = {kind: [[None] * layout.page_size for _ in range(count)] for kind, count in pages.items()}
        self._prefixes: dict[tuple[int, int, bool], int] = {}

    def contents(self, tokens: list[int], prompt_length: int) -> list[int]:
        """Per position a number that stands for tokens[: position + 1] with the first prompt_length of them
        prefilled and the others decoded, the same for equal prefixes only.
        """
        node, out = 0, []
        for position, token in enumerate(tokens):
            key = node, token, position >= prompt_length
            node = self._prefixes.setdefault(key, len(self._prefixes) + 1)
            out.append(node)
        return out

    def step(self, ledger: Ledger, chunks: list[tuple[str, list[int], int, int, int]]) -> None:
        """Forward pass over chunks (seq_id, tokens, prompt_length, start, stop): all write, then every query reads
        all it sees.
        """
        size = self.layout.page_size
        for kind, slots in self.slots.items():
            owners: dict[int, list[str]] = {}
            for seq_id in ledger.holders:
                for page in ledger.table(seq_id, kind).tolist():
                    owners.setdefault(page, []).append(seq_id)
            for seq_id, tokens, prompt_length, start, stop in chunks:
                table, contents = ledger.table(seq_id, kind).tolist(), self.contents(tokens, prompt_length)
                for j in range(start, stop):
                    page = table[j // size]
                    assert page != 0, f"{seq_id} writes token {j} to the dump"
                    assert owners[page] == [seq_id], f"{seq_id} writes token {j} to a page of {owners[page]}"
                    slots[page][j % size] = contents[j]
            for seq_id, tokens, prompt_length, start, stop in chunks:
                table, contents = ledger.table(seq_id, kind).tolist(), self.contents(tokens, prompt_length)
                seen = range(stop)
                if kind is Kind.SLIDING:
                    queries = range(start, stop)
                    seen = sorted({j for q in queries for j in range(max(0, q - self.layout.window + 1), q + 1)})
                for j in seen:
                    page = table[j // size]
                    got = None if page == 0 else slots[page][j % size]
                    assert got == contents[j], (
                        f"{kind.value}: queries [{start}, {stop}) of {seq_id} see key {j} on page {page} as {got}, "
                        f"not {contents[j]}"
                    )

    def poison_free_pages(self, ledger: Ledger) -> None:
        """Overwrite what nobody holds or can find, so that a later read of it is noticed."""
        for kind, slots in self.slots.items():
            for page in (0, *ledger.books[kind]._free):
                slots[page] = [None] * self.layout.page_size

    def longest_prefix(self, ledger: Ledger, tokens: list[int], prompt_length: int | None = None) -> int:
        """Tokens of the longest reusable prefix of the prompt, by trying every length against the content of every
        page. None: all tokens are the prompt's.
        """
        size = self.layout.page_size
        prompt_length = len(tokens) if prompt_length is None else prompt_length
        contents = self.contents(tokens, prompt_length)
        known = {
            kind: {tuple(slots[page]) for page in ledger.books[kind]._page_of.values()}
            for kind, slots in self.slots.items()
        }
        for length in range(min(len(tokens) - 1, prompt_length) // size * size, 0, -size):
            oldest = {kind: 0 for kind in known}
            if Kind.SLIDING in known:
                oldest[Kind.SLIDING] = max(0, length - (self.layout.window - 1))
            if all(
                tuple(contents[j : j + size]) in pages
                for kind, pages in known.items()
                for j in range(0, length, size)
                if j + size > oldest[kind]
            ):
                return length
        return 0
