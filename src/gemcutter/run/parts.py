"""Parts: what a step is told, as pieces of one flat memory, on the host and on the device alike."""

import functools
from typing import Any, NamedTuple

ALIGN = 4  # elements: 16 bytes of int32, 32 of int64; kernels are compiled anew for pointers aligned otherwise


class Parts(NamedTuple):
    """NumPy's arrays on the host, PyTorch's tensors on the device."""

    ids: Any  # [tokens] int64: of the tokens that the host knows
    source: Any  # [tokens] int64: where in the device's memory the token's id lies
    positions: Any  # [tokens] int64
    slots: list[Any]  # by kind, [tokens] int64
    logit_rows: Any  # [sampled] int64
    query_start: Any  # [rows + 1] int32
    kv_len: Any  # [rows] int32
    tables: Any  # [kinds, rows, width] int32


class Shape(NamedTuple):
    """Of a step. Tables come last, for only their width changes from one step of decoding to the next."""

    kinds: int
    tokens: int
    rows: int
    sampled: int
    width: int  # of the page tables, a multiple of ALIGN

    @property
    def length(self) -> int:
        """Elements of int64."""
        return _places(self).length

    def cut(self, wide, narrow) -> Parts:
        """The parts of a memory, given as int64 and as int32; it may be longer."""
        ids, source, positions, *slots, logit_rows = (wide[place] for place in _places(self).wide)
        query_start, kv_len = (narrow[place] for place in _places(self).narrow)
        return Parts(ids, source, positions, slots, logit_rows, query_start, kv_len, self.cut_tables(narrow))

    def cut_tables(self, narrow):
        """The tables alone, of a memory given as int32."""
        return narrow[_places(self).tables].reshape(self.kinds, self.rows, self.width)


class _Places(NamedTuple):
    """Of the parts."""

    wide: list[slice]  # in elements of int64
    narrow: list[slice]  # in elements of int32
    tables: slice  # likewise
    length: int  # in elements of int64


@functools.lru_cache(maxsize=1024)
def _places(shape: Shape) -> _Places:
    wide, end = _row([*[shape.tokens] * (3 + shape.kinds), shape.sampled], 0)
    narrow, end = _row([shape.rows + 1, shape.rows], 2 * end)
    [tables], end = _row([shape.kinds * shape.rows * shape.width], end)
    return _Places(wide, narrow, tables, end // 2)


def _row(sizes: list[int], begin: int) -> tuple[list[slice], int]:
    """Pieces one after another, each aligned, and where they end."""
    pieces = []
    for size in sizes:
        pieces.append(slice(begin, begin + size))
        begin += rounded(size)
    return pieces, begin


def rounded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
