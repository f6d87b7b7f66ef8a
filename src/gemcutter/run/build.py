"""StepBuilder: a plan of one step, in plain ints, becomes the tensors the model reads."""

from array import array

import numpy as np
import torch

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.cache.ledger import Ledger
from gemcutter.schedule.plan import Chunk, Plan

ALIGN = 4  # elements: 16 bytes of int32, 32 of int64; kernels are compiled anew for pointers aligned otherwise


class StepBuilder:
    """Writes a step on the host with numpy and sends it in one copy, into device memory that all steps share.

    That memory begins with the tokens that the latest step drew, which the host need not know: a row that goes on
    from one of them is told where it lies. Copies run on the device in their turn, after the step before. The
    pinned memory that they read is each step's own; PyTorch gives it out again only when the copy is done.
    """

    def __init__(
        self,
        ledger: Ledger,
        device: torch.device,
        *,
        max_prompt_tokens: int,
        max_sequences: int,
        context_length: int,
    ) -> None:
        """A step has at most `max_prompt_tokens` to prefill, `max_sequences` sequences, as many rows to decode."""
        self._ledger = ledger
        self._page_size = ledger.layout.page_size
        self._pin = device.type == "cuda"
        width = _rounded(ledger.layout.num_pages(context_length))
        tokens, rows = max_prompt_tokens + max_sequences, 2 * max_sequences
        self._begin = _rounded(max_sequences)  # of what is sent
        room = self._begin + _length(*self._sizes(tokens, rows, rows, width))
        self._memory = torch.zeros(room, dtype=torch.int64, device=device)
        self._token_ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        # Padded batches are for graphs, which know one width.
        shape = len(ledger.layout.kinds), max_sequences, width
        self._wide_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        # [max_sequences] int64: what the latest step drew, in the order of its samplers. Written by the runner.
        self.drawn = self._memory[:max_sequences]

    def build(self, plan: Plan, pad_to: int = 0) -> StepBatch:
        """The batch of `plan`, decodes first. It lives until the next is built.

        With `pad_to`, empty sequences of one token fill it up to that many, and its tensors lie where those of
        every batch of that size do, for a CUDA graph. Page tables then keep old ids past what a sequence holds; no
        kernel reads them. An empty sequence holds the one token it writes to page 0, so that its attention is
        finite.
        """
        chunks = plan.chunks
        assert not (pad_to and plan.prefills), "only decode batches are padded"
        padding = max(0, pad_to - len(chunks))
        rows = len(chunks) + padding
        start = np.array([c.start for c in chunks] + [0] * padding, np.int64)
        stop = np.array([c.stop for c in chunks] + [1] * padding, np.int64)
        query_start = np.zeros(rows + 1, np.int64)
        np.cumsum(stop - start, out=query_start[1:])
        tokens, max_kv_len = int(query_start[-1]), int(stop.max())
        sampled = [i for i, c in enumerate(chunks) if c.samples] + list(range(len(chunks), rows))
        width = _rounded(self._ledger.layout.num_pages(max_kv_len))

        sizes = self._sizes(tokens, rows, len(sampled), width)
        host = torch.empty(_length(*sizes), dtype=torch.int64, pin_memory=self._pin)
        flat = host.numpy()
        ids, source, positions, *slots, logit_rows, starts, kv_len, tables = _cut(flat, flat.view(np.int32), *sizes)
        self._write_tokens(chunks, query_start, ids, source)
        sequence_of = np.repeat(np.arange(rows), stop - start)
        positions[:] = np.arange(tokens) + (start - query_start[:-1])[sequence_of]
        logit_rows[:] = query_start[1:][sampled] - 1
        starts[:], kv_len[:] = query_start, stop
        self._write_places(chunks, sequence_of, positions, tables.reshape(-1, rows, width), slots)

        sent = self._memory[self._begin : self._begin + len(host)]
        sent.copy_(host, non_blocking=True)
        parts = _cut(sent, sent.view(torch.int32), *sizes)
        _, source, positions, *slots, logit_rows, starts, kv_len, tables = parts
        token_ids = torch.index_select(self._memory, 0, source, out=self._token_ids[:tokens])
        tables = tables.view(-1, rows, width)
        if pad_to:
            self._wide_tables[:, :rows, :width].copy_(tables)
            tables = self._wide_tables[:, :rows]
        kinds = self._ledger.layout.kinds
        num_decodes = len(plan.decodes) + padding
        return StepBatch(
            token_ids=token_ids,
            positions=positions,
            query_start=starts,
            kv_len=kv_len,
            logit_rows=logit_rows,
            kinds={kind: KindBatch(*where) for kind, *where in zip(kinds, tables, slots, strict=True)},
            num_decodes=num_decodes,
            max_query_len=max((c.stop - c.start for c in plan.prefills), default=0),
            max_kv_len=max_kv_len,
        )

    def _write_tokens(
        self, chunks: tuple[Chunk, ...], query_start: np.ndarray, ids: np.ndarray, source: np.ndarray
    ) -> None:
        """Ids that the host knows, and for every token where in the device's memory its id lies."""
        known = array("i")
        source[:] = np.arange(self._begin, self._begin + len(ids))  # in ids, which are sent first
        for chunk, begin in zip(chunks, query_start.tolist(), strict=False):
            sequence = chunk.sequence
            if chunk.start < len(sequence.tokens):
                known += sequence.tokens[chunk.start : chunk.stop]
            else:
                assert sequence.num_unread == 1 == chunk.stop - chunk.start, f"{chunk} was neither read nor drawn"
                known.append(0)
                source[begin] = sequence.drawn_row
        ids[: len(known)] = known
        ids[len(known) :] = 0

    def _write_places(
        self,
        chunks: tuple[Chunk, ...],
        sequence_of: np.ndarray,
        positions: np.ndarray,
        tables: np.ndarray,
        slots: list[np.ndarray],
    ) -> None:
        """Pages of every sequence and the slot of every token, by kind; the dump's for empty sequences."""
        held = self._ledger.layout.num_pages(int(positions.max()) + 1)
        tables[:, len(chunks) :] = 0
        tables[:, :, held:] = 0
        self._ledger.read_tables([chunk.sequence.id for chunk in chunks], tables[:, : len(chunks), :held])
        logical, offset = np.divmod(positions, self._page_size)
        for slot, table in zip(slots, tables, strict=True):
            np.multiply(table[sequence_of, logical], self._page_size, out=slot, dtype=np.int64)
            slot += offset

    def _sizes(self, tokens: int, rows: int, sampled: int, width: int) -> tuple[list[int], list[int]]:
        """Elements of the parts of a step, of those of int64 and of those of int32, whose last are the tables."""
        kinds = len(self._ledger.layout.kinds)
        return [*[tokens] * (3 + kinds), sampled], [rows + 1, rows, kinds * rows * width]


def _rounded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _length(wide: list[int], narrow: list[int]) -> int:
    """Of both together, in elements of int64."""
    return sum(map(_rounded, wide)) + sum(map(_rounded, narrow)) // 2


def _cut(as_wide, as_narrow, wide: list[int], narrow: list[int]) -> list:
    """The parts of one memory, given as int64 and as int32, each on a border of ALIGN."""
    parts, at = [], 0
    for size in wide:
        parts.append(as_wide[at : at + size])
        at += _rounded(size)
    at *= 2
    for size in narrow:
        parts.append(as_narrow[at : at + size])
        at += _rounded(size)
    return parts
