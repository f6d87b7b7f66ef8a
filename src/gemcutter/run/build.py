"""StepBuilder: a plan of one step, in plain ints, becomes the tensors the model reads."""

from array import array
from collections.abc import Sequence as Many
from itertools import accumulate

import numpy as np
import torch

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.cache.ledger import Ledger
from gemcutter.schedule.plan import Plan
from gemcutter.spec import Kind

ALIGN = 4  # elements: 16 bytes of int32, 32 of int64


class StepBuilder:
    """Builds on the host with numpy and sends everything in two copies, one of int64 and one of int32."""

    def __init__(self, kinds: Many[Kind], page_size: int, device: torch.device) -> None:
        self._kinds = tuple(kinds)
        self._page_size = page_size
        self._device = device

    def build(self, plan: Plan, ledger: Ledger, pad_to: int = 0) -> StepBatch:
        """The batch of `plan`, decodes first. With `pad_to`, empty sequences of one token fill it up to that many.

        An empty sequence holds the one token it writes to page 0, so that its attention is finite.
        """
        chunks = plan.chunks
        assert not (pad_to and plan.prefills), "only decode batches are padded"
        padding = max(0, pad_to - len(chunks))
        rows = len(chunks) + padding
        start = np.array([c.start for c in chunks] + [0] * padding, np.int64)
        stop = np.array([c.stop for c in chunks] + [1] * padding, np.int64)
        query_len = stop - start
        query_start = np.zeros(rows + 1, np.int64)
        np.cumsum(query_len, out=query_start[1:])
        sequence_of = np.repeat(np.arange(rows), query_len)
        positions = np.arange(query_start[-1]) + (start - query_start[:-1])[sequence_of]
        known = array("i")
        for chunk in chunks:
            known += chunk.sequence.tokens[chunk.start : chunk.stop]
        tokens = np.zeros(query_start[-1], np.int64)
        tokens[: len(known)] = known
        max_kv_len = int(stop.max())
        max_pages = -(-max_kv_len // self._page_size)
        ids = [chunk.sequence.id for chunk in chunks]
        logical, offset = np.divmod(positions, self._page_size)
        pages, slots = {}, {}
        for kind in self._kinds:
            table = np.zeros((rows, max_pages), np.int32)
            table[: len(chunks)] = ledger.tables(ids, kind, max_pages)
            pages[kind] = table
            slots[kind] = table[sequence_of, logical].astype(np.int64) * self._page_size + offset
        sampled = [i for i, c in enumerate(chunks) if c.samples] + list(range(len(chunks), rows))
        logit_rows = query_start[1:][sampled] - 1

        wide = self._send([tokens, positions, logit_rows, *slots.values()], np.int64)
        narrow = self._send([query_start, stop, *pages.values()], np.int32)
        return StepBatch(
            token_ids=wide[0],
            positions=wide[1],
            logit_rows=wide[2],
            query_start=narrow[0],
            kv_len=narrow[1],
            kinds={
                kind: KindBatch(pages=narrow[2 + i].view(rows, max_pages), slots=wide[3 + i])
                for i, kind in enumerate(self._kinds)
            },
            num_decodes=len(plan.decodes) + padding,
            max_query_len=int(query_len[len(plan.decodes) + padding :].max(initial=0)),
            max_kv_len=max_kv_len,
        )

    def _send(self, parts: list[np.ndarray], dtype: type) -> list[torch.Tensor]:
        """One copy for all, each on a 16-byte border: kernels are compiled anew for pointers aligned otherwise."""
        room = [-(-part.size // ALIGN) * ALIGN for part in parts]
        begins = [0, *accumulate(room)]
        flat = np.zeros(begins[-1], dtype)
        for begin, part in zip(begins, parts, strict=False):
            flat[begin : begin + part.size] = part.ravel()
        sent = torch.from_numpy(flat)
        if self._device.type == "cuda":
            sent = sent.pin_memory().to(self._device, non_blocking=True)
        return [sent[begin : begin + part.size] for begin, part in zip(begins, parts, strict=False)]
