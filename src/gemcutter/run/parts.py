"""Parts: what a step is told, as pieces of one flat memory, on the host and on the device alike."""

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
        return self._before_tables + self.kinds * self.rows * self.width // 2

    def cut(self, wide, narrow) -> Parts:
        """The parts of a memory, given as int64 and as int32; it may be longer."""
        ids, source, positions, *slots, logit_rows = _pieces(wide, 0, self._wide_sizes)
        begin = 2 * sum(map(rounded, self._wide_sizes))
        query_start, kv_len = _pieces(narrow, begin, self._narrow_sizes)
        return Parts(ids, source, positions, slots, logit_rows, query_start, kv_len, self.cut_tables(narrow))

    def cut_tables(self, narrow):
        """The tables alone, of a memory given as int32."""
        begin = 2 * self._before_tables
        return narrow[begin : 2 * self.length].reshape(self.kinds, self.rows, self.width)

    @property
    def _wide_sizes(self) -> list[int]:
        return [*[self.tokens] * (3 + self.kinds), self.sampled]

    @property
    def _narrow_sizes(self) -> list[int]:
        return [self.rows + 1, self.rows]

    @property
    def _before_tables(self) -> int:
        """Elements of int64."""
        return sum(map(rounded, self._wide_sizes)) + sum(map(rounded, self._narrow_sizes)) // 2


def rounded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _pieces(memory, begin: int, sizes: list[int]) -> list:
    pieces = []
    for size in sizes:
        pieces.append(memory[begin : begin + size])
        begin += rounded(size)
    return pieces
