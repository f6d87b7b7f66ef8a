"""PrefixChain: names for the content of a sequence's pages, so that equal prefixes find each other."""

from array import array
from hashlib import blake2b

DIGEST_BYTES = 32


class PrefixChain:
    """Digest i covers tokens [0, (i + 1) * page_size), for K/V of a page depend on all tokens before it too.

    Two prefixes are taken as equal when their 256-bit BLAKE2b digests are; tokens are not compared again. Not
    even prompts made on purpose (2^128 attempts) can so reach another prompt's K/V.
    """

    def __init__(self, tokens: array, page_size: int) -> None:
        """`tokens`, of C ints, is kept, not copied: it may grow, but what it holds must not change.

        What it holds now is the prompt, what it grows by is generated.
        """
        self.tokens = tokens
        self.prompt_length = len(tokens)
        self._page_size = page_size
        self._digests: list[bytes] = []

    def digest(self, page: int) -> bytes:
        """Digest of logical page `page`, which must be full; earlier ones are computed once, on the way."""
        digests = self._digests
        while len(digests) <= page:
            start = len(digests) * self._page_size
            content = self.tokens[start : start + self._page_size]
            assert len(content) == self._page_size, f"page {page} of {len(self.tokens)} tokens is not full"
            parent = digests[-1] if digests else b""
            digests.append(blake2b(parent + content.tobytes(), digest_size=DIGEST_BYTES).digest())
        return digests[page]
