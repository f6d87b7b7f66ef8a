"""StepBuilder: a plan of one step, in plain ints, becomes the tensors the model reads."""

from array import array

import numpy as np
import torch

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.cache.ledger import Ledger
from gemcutter.run.parts import Parts, Shape, rounded
from gemcutter.schedule.plan import Chunk, Plan


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
        self._kinds = ledger.layout.kinds
        self._page_size = ledger.layout.page_size
        self._pin = device.type == "cuda"
        width = rounded(ledger.layout.num_pages(context_length))
        tokens, rows = max_prompt_tokens + max_sequences, 2 * max_sequences
        self._begin = rounded(max_sequences)  # of what is sent
        room = self._begin + Shape(len(self._kinds), tokens, rows, rows, width).length
        self._memory = torch.zeros(room, dtype=torch.int64, device=device)
        self._sent = self._memory[self._begin :]
        self._sent_narrow = self._sent.view(torch.int32)
        self._token_ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        # Padded batches are for graphs, which know one place and one width.
        wide = len(self._kinds), max_sequences, width
        self._wide_tables = torch.zeros(wide, dtype=torch.int32, device=device)
        self._padded: dict[int, tuple[StepBatch, torch.Tensor]] = {}
        # [max_sequences] int64: what the latest step drew, in the order of its samplers. The runner writes it.
        self.drawn = self._memory[:max_sequences]

    def build(self, plan: Plan) -> StepBatch:
        """The batch of `plan`, decodes first. It lives until the next is built."""
        parts = self._send(plan, len(plan.chunks)).cut(self._sent, self._sent_narrow)
        torch.index_select(self._memory, 0, parts.source, out=self._token_ids[: len(parts.source)])
        longest = max((c.stop - c.start for c in plan.prefills), default=0)
        return self._batch(parts, parts.tables, len(plan.decodes), longest, max(c.stop for c in plan.chunks))

    def build_padded(self, plan: Plan, rows: int) -> StepBatch:
        """The batch of a plan that only decodes, filled up to `rows` with empty sequences of one token.

        It is one and the same for all plans of so many rows, for a CUDA graph to read: bounds are those of the
        longest context, page tables are as wide and keep old ids past what a sequence holds, which no kernel reads.
        Token ids are there only after `look_up`. An empty sequence holds the one token that it writes to page 0, so
        that its attention is finite.
        """
        assert not plan.prefills, "only decode batches are padded"
        shape = self._send(plan, rows)
        if rows not in self._padded:
            parts = shape.cut(self._sent, self._sent_narrow)
            longest = self._wide_tables.shape[2] * self._page_size
            self._padded[rows] = self._batch(parts, self._wide_tables[:, :rows], rows, 0, longest), parts.source
        self._wide_tables[:, :rows, : shape.width].copy_(shape.cut_tables(self._sent_narrow))
        return self._padded[rows][0]

    def look_up(self, rows: int) -> None:
        """Fetch the token ids of the batch last built with so many rows, from what was sent and what was drawn."""
        batch, source = self._padded[rows]
        torch.index_select(self._memory, 0, source, out=batch.token_ids)

    def _batch(
        self, parts: Parts, tables: torch.Tensor, num_decodes: int, max_query_len: int, max_kv_len: int
    ) -> StepBatch:
        where = zip(self._kinds, tables, parts.slots, strict=True)
        return StepBatch(
            token_ids=self._token_ids[: len(parts.source)],
            positions=parts.positions,
            query_start=parts.query_start,
            kv_len=parts.kv_len,
            logit_rows=parts.logit_rows,
            kinds={kind: KindBatch(pages, slots) for kind, pages, slots in where},
            num_decodes=num_decodes,
            max_query_len=max_query_len,
            max_kv_len=max_kv_len,
        )

    def _send(self, plan: Plan, rows: int) -> Shape:
        """Write and send a step, with empty sequences up to `rows`."""
        chunks, padding = plan.chunks, rows - len(plan.chunks)
        start = np.array([c.start for c in chunks] + [0] * padding, np.int64)
        stop = np.array([c.stop for c in chunks] + [1] * padding, np.int64)
        query_start = np.zeros(rows + 1, np.int64)
        np.cumsum(stop - start, out=query_start[1:])
        sampled = [i for i, c in enumerate(chunks) if c.samples] + list(range(len(chunks), rows))
        width = rounded(self._ledger.layout.num_pages(int(stop.max())))
        shape = Shape(len(self._kinds), int(query_start[-1]), rows, len(sampled), width)
        host = torch.empty(shape.length, dtype=torch.int64, pin_memory=self._pin)
        flat = host.numpy()
        parts = shape.cut(flat, flat.view(np.int32))
        self._write_tokens(parts, chunks, query_start.tolist())
        sequence_of = np.repeat(np.arange(rows), stop - start)
        parts.positions[:] = np.arange(shape.tokens) + (start - query_start[:-1])[sequence_of]
        parts.logit_rows[:] = query_start[1:][sampled] - 1
        parts.query_start[:], parts.kv_len[:] = query_start, stop
        self._write_places(parts, chunks, sequence_of)
        self._sent[: shape.length].copy_(host, non_blocking=True)
        return shape

    def _write_tokens(self, parts: Parts, chunks: tuple[Chunk, ...], begins: list[int]) -> None:
        """Ids that the host knows, and for every token where in the device's memory its id lies."""
        known = array("i")
        parts.source[:] = np.arange(self._begin, self._begin + len(parts.source))  # in ids, which are sent first
        at, drawn_rows = [], []
        for (sequence, start, stop, _), begin in zip(chunks, begins, strict=False):
            if start < len(sequence.tokens):
                known += sequence.tokens[start:stop]
            else:
                assert sequence.num_unread == 1 == stop - start, f"{sequence}: token {start} was not drawn"
                known.append(0)
                at.append(begin)
                drawn_rows.append(sequence.drawn_row)
        parts.source[at] = drawn_rows
        parts.ids[: len(known)] = known
        parts.ids[len(known) :] = 0

    def _write_places(self, parts: Parts, chunks: tuple[Chunk, ...], sequence_of: np.ndarray) -> None:
        """Pages of every sequence and the slot of every token, by kind; the dump's for empty sequences."""
        held = self._ledger.layout.num_pages(int(parts.kv_len.max()))
        parts.tables[:, len(chunks) :] = 0
        parts.tables[:, :, held:] = 0
        self._ledger.read_tables([c.sequence.id for c in chunks], parts.tables[:, : len(chunks), :held])
        logical, offset = np.divmod(parts.positions, self._page_size)
        for slots, table in zip(parts.slots, parts.tables, strict=True):
            np.multiply(table[sequence_of, logical], self._page_size, out=slots, dtype=np.int64)
            slots += offset
