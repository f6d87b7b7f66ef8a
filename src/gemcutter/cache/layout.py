"""CacheLayout: which kinds of KV pages a model needs, what a page weighs, which pages a query sees."""

from dataclasses import dataclass

from gemcutter.spec import Kind, ModelSpec


@dataclass(frozen=True)
class CacheLayout:
    """Pages of a model's cache. Every kind has the same page size; a kind without layers has no entry."""

    page_size: int  # tokens
    window: int | None  # tokens a sliding query sees, itself included; None without sliding layers
    page_bytes: dict[Kind, int]  # K and V of one page in all layers of the kind that own a cache

    @classmethod
    def of(cls, spec: ModelSpec, page_size: int, element_bytes: int) -> "CacheLayout":
        """Layers that read another layer's K/V weigh nothing: in E2B that is 20 of 35."""
        weights = {kind: page_size * spec.kv_bytes_per_token(kind, element_bytes) for kind in Kind}
        return cls(page_size, spec.window, {kind: weight for kind, weight in weights.items() if weight})

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(self.page_bytes)

    def num_pages(self, tokens: int) -> int:
        """Pages that tokens [0, tokens) touch."""
        return -(-tokens // self.page_size)

    def first_page(self, kind: Kind, position: int) -> int:
        """Logical page of the oldest key a query at `position` sees: j > position - window if sliding."""
        if kind is Kind.FULL:
            return 0
        return max(0, position - self.window + 1) // self.page_size

    def next_turn(self, position: int) -> int:
        """The first position after this one whose query stands in another page or, under a window, first sees
        another page.
        """
        size, hidden = self.page_size, (self.window or 1) - 1
        return position + min(size - position % size, size - (position - hidden) % size)

    def one_request(self, context_length: int, chunk: int) -> dict[Kind, int]:
        """Pages that suffice for any request of `context_length` tokens, run alone in chunks of `chunk`.

        A sliding chunk needs its own tokens and window - 1 before its first: n tokens anywhere touch at most
        ceil(n / page_size) + 1 pages.
        """
        pages = dict.fromkeys(self.kinds, self.num_pages(context_length))
        if Kind.SLIDING in pages:
            pages[Kind.SLIDING] = min(pages[Kind.SLIDING], self.num_pages(self.window - 1 + chunk) + 1)
        return pages
