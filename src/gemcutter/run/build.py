"""StepBuilder: a plan of one step, in plain ints, becomes the tensors the model reads."""

import numpy as np
import torch

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.cache.ledger import Ledger
from gemcutter.run.bucket import PROMPTS, Bucket
from gemcutter.run.parts import Parts, Shape, rounded
from gemcutter.schedule.plan import Plan

MULTIPLE = 16  # rows: others cuBLASLt's products in FP8 refuse, and copying them took 97 MB a layer for 8191 tokens


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
        tokens, rows = max_prompt_tokens + max_sequences + MULTIPLE - 1, 2 * max_sequences + PROMPTS
        most_drawn = max_sequences + PROMPTS  # by a padded step; others draw one a sequence
        self._begin = rounded(most_drawn)  # of what is sent
        room = self._begin + Shape(len(self._kinds), tokens, rows, rows, width).length
        self._count = np.arange(self._begin + tokens + 1)
        self._memory = torch.zeros(room, dtype=torch.int64, device=device)
        self._sent = self._memory[self._begin :]
        self._sent_narrow = self._sent.view(torch.int32)
        self._token_ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        # Padded batches are for graphs, which know one place and one width.
        wide = len(self._kinds), max_sequences + PROMPTS, width
        self._wide_tables = torch.zeros(wide, dtype=torch.int32, device=device)
        self._padded: dict[Bucket, tuple[StepBatch, torch.Tensor]] = {}
        # [max_sequences + PROMPTS] int64: what the latest step drew, in the order of its samplers, and behind it
        # what a padded step drew besides. The runner writes it.
        self.drawn = self._memory[:most_drawn]

    def build(self, plan: Plan) -> StepBatch:
        """The batch of `plan`, decodes first, which lives until the next is built. On a GPU a step with prompts is
        filled up as in `build_padded`, to a multiple of MULTIPLE.
        """
        bucket, fill = Bucket.of(plan), 0
        if self._pin and plan.prefills:
            fill = -bucket.tokens % MULTIPLE
            bucket = bucket.with_prompt(fill)
        parts = self._send(plan, bucket, len(plan.samplers)).cut(self._sent, self._sent_narrow)
        torch.index_select(self._memory, 0, parts.source, out=self._token_ids[: len(parts.source)])
        longest = max((c.stop - c.start for c in plan.prefills), default=0)
        most_held = max(c.stop for c in plan.chunks)
        return self._batch(parts, parts.tables, bucket.decodes, max(longest, fill), max(most_held, fill))

    def build_padded(self, plan: Plan, bucket: Bucket) -> StepBatch:
        """The batch of `plan`, filled up to the bucket: with empty sequences of one token to decode, and with one
        prompt of all tokens that are left. These write to page 0, and hold what they write there, so that their
        attention is finite.

        It is one and the same for all plans of a bucket, for a CUDA graph to read: bounds are those of the longest
        context, page tables are as wide and keep old ids past what a sequence holds, which no kernel reads. Token
        ids are there only after `look_up`. Logits are asked for as many rows as there are sequences, the samplers'
        first.
        """
        shape = self._send(plan, bucket, bucket.rows)
        if bucket not in self._padded:
            parts = shape.cut(self._sent, self._sent_narrow)
            longest = self._wide_tables.shape[2] * self._page_size
            tables = self._wide_tables[:, : bucket.rows]
            batch = self._batch(parts, tables, bucket.decodes, bucket.prompt_tokens, longest)
            self._padded[bucket] = batch, parts.source
        self._wide_tables[:, : bucket.rows, : shape.width].copy_(shape.cut_tables(self._sent_narrow))
        return self._padded[bucket][0]

    def look_up(self, bucket: Bucket) -> None:
        """Fetch the token ids of the batch last built for the bucket, from what was sent and what was drawn."""
        batch, source = self._padded[bucket]
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

    def _send(self, plan: Plan, bucket: Bucket, num_logits: int) -> Shape:
        """Write and send a step, filled up to the bucket; the logits asked for beyond the samplers' are any."""
        decodes, prefills = plan.decodes, plan.prefills
        empty, unused = bucket.decodes - len(decodes), bucket.prompts - len(prefills)
        left = bucket.prompt_tokens - sum([c.stop - c.start for c in prefills])
        assert min(empty, left, unused) >= 0 and (unused or not left), f"{plan} is over {bucket}"
        start, stop = [c.start for c in decodes] + [0] * empty, [c.stop for c in decodes] + [1] * empty
        start += [c.start for c in prefills] + [0] * unused
        stop += [c.stop for c in prefills] + [left, *[0] * unused][:unused]
        held = self._ledger.layout.num_pages(max(stop))
        shape = Shape(len(self._kinds), bucket.tokens, bucket.rows, num_logits, rounded(held))
        host = torch.empty(shape.length, dtype=torch.int64, pin_memory=self._pin)
        flat = host.numpy()
        parts = shape.cut(flat, flat.view(np.int32))
        parts.kv_len[:] = [max(length, 1) for length in stop] if unused else stop  # for StepBatch.last_tokens
        sequence_of = self._write_positions(parts, bucket, np.array(start), np.array(stop))
        self._write_tokens(parts, plan, bucket)
        rows = [i for i, c in enumerate(decodes) if c.samples]
        rows += [i for i, c in enumerate(prefills, bucket.decodes) if c.samples]
        parts.logit_rows[: len(rows)] = rows
        parts.logit_rows[len(rows) :] = 0
        # Pages of every sequence and the slot of every token; the dump's for what fills up.
        ids = [c.sequence.id for c in decodes] + [None] * empty
        ids += [c.sequence.id for c in prefills] + [None] * unused
        self._ledger.read_tables(ids, parts.tables[:, :, :held])
        parts.tables[:, :, held:] = 0
        logical, offset = np.divmod(parts.positions, self._page_size)
        for slots, table in zip(parts.slots, parts.tables, strict=True):
            np.multiply(table[sequence_of, logical], self._page_size, out=slots, dtype=np.int64)
            slots += offset
        self._sent[: shape.length].copy_(host, non_blocking=True)
        return shape

    def _write_positions(self, parts: Parts, bucket: Bucket, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Of every token its position, of every sequence its first token. Returns every token's sequence."""
        if not bucket.prompts:
            parts.positions[:], parts.query_start[:] = start, self._count[: bucket.rows + 1]
            return self._count[: bucket.rows]
        parts.query_start[0] = 0
        np.cumsum(stop - start, out=parts.query_start[1:])
        sequence_of = self._count[: bucket.rows].repeat(stop - start)
        np.add(self._count[: bucket.tokens], (start - parts.query_start[:-1])[sequence_of], out=parts.positions)
        return sequence_of

    def _write_tokens(self, parts: Parts, plan: Plan, bucket: Bucket) -> None:
        """Ids that the host knows, and for every token where in the device's memory its id lies."""
        parts.ids[:] = 0
        parts.source[:] = self._count[self._begin : self._begin + bucket.tokens]  # in ids, which are sent first
        drawn = [i for i, c in enumerate(plan.decodes) if c.start == len(c.sequence.tokens)]
        parts.source[drawn] = [plan.decodes[i].sequence.drawn_row for i in drawn]
        known = [] if len(drawn) == len(plan.decodes) else sorted({*range(len(plan.decodes))}.difference(drawn))
        parts.ids[known] = [plan.decodes[i].sequence.tokens[plan.decodes[i].start] for i in known]
        at = bucket.decodes
        for sequence, start, stop, _ in plan.prefills:
            parts.ids[at : at + stop - start] = sequence.tokens[start:stop]
            at += stop - start
