"""PrefixChain: equal names for equal prefixes, and for nothing else."""

import itertools
from array import array

import pytest

from gemcutter.cache.prefix import PrefixChain


def test_equal_exactly_where_the_whole_prefix_is():
    names: dict[bytes, tuple[int, ...]] = {}
    for tokens in itertools.product(range(3), repeat=6):
        chain = PrefixChain(array("i", tokens), 2)
        for page in range(3):
            prefix = tokens[: 2 * (page + 1)]
            assert names.setdefault(chain.digest(page), prefix) == prefix
    assert len(names) == 9 + 81 + 729


def test_grows_with_its_tokens():
    tokens = array("i", [7, 8, 9])
    chain = PrefixChain(tokens, 4)
    with pytest.raises(AssertionError, match="page 0 of 3 tokens is not full"):
        chain.digest(0)
    tokens.extend(range(10, 15))
    assert chain.digest(1) == PrefixChain(array("i", range(7, 15)), 4).digest(1)


def test_every_byte_of_a_token_counts():
    tokens = [1, 1 + 2**8, 1 + 2**16, 1 + 2**24, 2**31 - 1]
    assert len({PrefixChain(array("i", [1, token]), 2).digest(0) for token in tokens}) == 5
