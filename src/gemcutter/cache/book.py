"""PageBook: who holds each page of one kind, and which pages still keep a prefix worth reusing."""

from collections import Counter, OrderedDict


class PageBook:
    """Every page but 0 is exactly one of used (held by sequences), cached (held by none, but its content can
    be found by digest) or free. Page 0 is a dump that is never given out. Every call is O(1).
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 1, f"page 0 must exist, got {num_pages} pages"
        self.num_pages = num_pages
        self._refs = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, 0, -1))  # a stack; the lowest id goes out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently held first

    @property
    def total(self) -> int:
        """Pages that can be held; the dump is none of them."""
        return self.num_pages - 1

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.available

    def take(self) -> int:
        """A page for new content, held once. Free pages go first, then the least recently held cached one."""
        if self._free:
            page = self._free.pop()
        else:
            assert self._cached, f"all {self.total} pages are held; ask `available` before taking"
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._refs[page] = 1
        return page

    def find(self, digest: bytes) -> int | None:
        """The page that keeps this content, used or cached."""
        return self._page_of.get(digest)

    def is_held(self, page: int) -> bool:
        return self._refs[page] > 0

    def share(self, page: int) -> None:
        """One more sequence holds a page that was found."""
        if self._refs[page] == 0:
            del self._cached[page]
        self._refs[page] += 1

    def drop(self, page: int) -> None:
        """One sequence less holds the page."""
        assert self._refs[page] > 0, f"page {page} is dropped but nobody holds it"
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if self._digests[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def register(self, page: int, digest: bytes) -> None:
        """Let a held page, full and computed, be found. If its content is known, the older page stays."""
        assert self._refs[page] > 0, f"page {page} is registered but nobody holds it"
        assert self._digests[page] in (None, digest), f"page {page} is registered for two contents"
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digests[page] = digest

    def flush(self) -> None:
        """Let no page be found any more. Cached pages become free; held ones stay held."""
        self._page_of.clear()
        self._digests = [None] * self.num_pages
        self._free.extend(self._cached)
        self._cached.clear()

    def check_invariants(self, held: Counter[int]) -> None:
        """Assert that the book agrees with itself and with `held`: page -> sequences that hold it."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page in range(self.num_pages) if self._refs[page]}
        assert len(free) == len(self._free), f"{len(self._free)} free entries, {len(free)} different pages"
        assert 0 not in free | cached | used, "page 0, the dump, is in the book"
        every = sorted([*free, *cached, *used])
        assert every == list(range(1, self.num_pages)), (
            f"free {sorted(free)} + cached {sorted(cached)} + used {sorted(used)} != pages 1..{self.total}"
        )
        refs = {page: self._refs[page] for page in used}
        assert refs == dict(held), f"references {refs} != held by sequences {dict(held)}"
        found = {page: digest for digest, page in self._page_of.items()}
        noted = {page: digest for page, digest in enumerate(self._digests) if digest is not None}
        assert found == noted, f"pages by digest {found} != digests by page {noted}"
        assert cached <= noted.keys(), f"cached pages without a digest: {sorted(cached - noted.keys())}"
        assert not free & noted.keys(), f"free pages with a digest: {sorted(free & noted.keys())}"

    def _forget(self, page: int) -> None:
        digest = self._digests[page]
        self._digests[page] = None
        del self._page_of[digest]
