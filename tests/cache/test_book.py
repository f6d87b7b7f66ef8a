"""PageBook against a list-based model of the same rules."""

import random
from collections import Counter

import pytest

from gemcutter.cache.book import PageBook


def digest(n: int) -> bytes:
    return n.to_bytes(32, "little")


@pytest.mark.parametrize("seed", range(20))
def test_random_walk_agrees_with_lists(seed):
    rng = random.Random(seed)
    book = PageBook(rng.choice([2, 3, 6, 12]))
    held: list[int] = []  # one entry per holder
    cached: list[int] = []  # least recently held first
    content: dict[int, int] = {}  # page -> n of its digest
    taken_cached = 0
    for _ in range(600):
        action = rng.choice(["take", "take", "drop", "drop", "share", "register", "register", "find", "flush"])
        if action == "take" and book.available:
            untouched = book.total - len(set(held)) - len(cached)
            page = book.take()
            assert page not in held and page != 0
            if untouched:
                assert page not in cached
            else:
                assert page == cached.pop(0)
                del content[page]
                taken_cached += 1
            held.append(page)
        elif action == "drop" and held:
            page = held.pop(rng.randrange(len(held)))
            book.drop(page)
            if page not in held and page in content:
                cached.append(page)
        elif action == "share" and content:
            page = rng.choice(list(content))
            book.share(page)
            held.append(page)
            if page in cached:
                cached.remove(page)
        elif action == "register" and set(held) - content.keys():
            page, n = rng.choice(sorted(set(held) - content.keys())), rng.randrange(8)
            book.register(page, digest(n))
            if n not in content.values():
                content[page] = n
        elif action == "find":
            n = rng.randrange(8)
            pages = [page for page, known in content.items() if known == n]
            assert book.find(digest(n)) == (pages[0] if pages else None)
        elif action == "flush" and rng.random() < 0.05:
            book.flush()
            cached.clear()
            content.clear()
        assert book.used == len(set(held))
        assert book.cached == len(cached)
        assert book.available == book.total - len(set(held))
        assert all(book.is_held(page) == (page in held) for page in range(1, book.num_pages))
        book.check_invariants(Counter(held))
    assert taken_cached > 0


def test_misuse_is_noticed():
    book = PageBook(2)
    page = book.take()
    with pytest.raises(AssertionError, match="all 1 pages are held"):
        book.take()
    book.drop(page)
    with pytest.raises(AssertionError, match="nobody holds it"):
        book.drop(page)
    with pytest.raises(AssertionError, match="nobody holds it"):
        book.register(page, digest(1))


def test_invariants_show_both_sides():
    book = PageBook(4)
    page = book.take()
    with pytest.raises(AssertionError, match=rf"references \{{{page}: 1\}} != held by sequences \{{{page}: 2\}}"):
        book.check_invariants(Counter({page: 2}))
    book._free.append(page)
    with pytest.raises(AssertionError, match=r"!= pages 1\.\.3"):
        book.check_invariants(Counter({page: 1}))
