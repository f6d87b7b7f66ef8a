"""PrefixChain: equal names for equal prefixes, and for nothing else."""

import itertools

import pytest

from gemcutter.cache.prefix import PrefixChain


def test_equal_exactly_where_the_whole_prefix_is():
    names: dict[bytes, tuple[int, ...]] = {}
    for tokens in itertools.product(range(3), repeat=6):
        chain = PrefixChain(list(tokens), 2)
        for page in range(3):
            prefix = tokens[: 2 * (page + 1)]
            assert names.setdefault(chain.digest(page), prefix) == prefix
    assert len(names) == 9 + 81 + 729


def test_grows_with_its_tokens():
    tokens = [7, 8, 9]
    chain = PrefixChain(tokens, 4)
    with pytest.raises(AssertionError, match="page 0 of 3 tokens is not full"):
        chain.digest(0)
    tokens += [10, 11, 12, 13, 14]
    assert chain.digest(1) == PrefixChain([7, 8, 9, 10, 11, 12, 13, 14], 4).digest(1)


def test_large_token_ids_do_not_wrap():
    assert PrefixChain([1, 2**32 + 1], 2).digest(0) != PrefixChain([1, 1], 2).digest(0)
