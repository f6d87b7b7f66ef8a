"""StepBuilder against loops: positions, slots, pages and sampled rows of random plans."""

import random

import numpy as np
import pytest
import torch
from drive import request

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.run.build import StepBuilder
from gemcutter.schedule.planner import Scheduler
from gemcutter.spec import Kind

PAGE, CONTEXT = 8, 200


def scheduler() -> Scheduler:
    layout = CacheLayout(PAGE, window=12, page_bytes={Kind.FULL: 1, Kind.SLIDING: 1})
    ledger = Ledger(layout, {Kind.FULL: 200, Kind.SLIDING: 120}, 8, CONTEXT)
    return Scheduler(
        ledger, context_length=CONTEXT, max_running_requests=8, chunked_prefill_size=13, max_prefill_tokens=40
    )


@pytest.mark.parametrize("seed", range(5))
def test_equals_loops(seed):
    rng = random.Random(seed)
    planner = scheduler()
    builder = StepBuilder((Kind.FULL, Kind.SLIDING), PAGE, torch.device("cpu"))
    for i in range(12):
        prompt = [rng.randrange(100) for _ in range(rng.choice([1, 2, 8, 9, 40, 90]))]
        planner.add(request(str(i), prompt, max_tokens=rng.randint(1, 20)))
    while (plan := planner.plan()) is not None:
        pad_to = 0 if plan.prefills else rng.choice([0, len(plan.decodes) + 3])
        check(builder.build(plan, planner.ledger, pad_to), plan, planner.ledger, pad_to)
        planner.commit(plan, [rng.randrange(100) for chunk in plan.chunks if chunk.samples])


def check(batch, plan, ledger, pad_to) -> None:
    padding = max(0, pad_to - len(plan.chunks))
    tensors = [batch.token_ids, batch.positions, batch.query_start, batch.kv_len, batch.logit_rows]
    tensors += [tensor for where in batch.kinds.values() for tensor in (where.pages, where.slots)]
    assert all(x.storage_offset() * x.itemsize % 16 == 0 and x.is_contiguous() for x in tensors)
    tokens, positions, sampled = [], [], []
    slots = {kind: [] for kind in batch.kinds}
    for i, chunk in enumerate(plan.chunks):
        assert batch.query_start[i] == len(tokens) and batch.kv_len[i] == chunk.stop
        for position in range(chunk.start, chunk.stop):
            tokens.append(chunk.sequence.tokens[position])
            positions.append(position)
            for kind in slots:
                page = int(ledger.table(chunk.sequence.id, kind)[position // PAGE])
                assert page != 0, "a token of the step has no page"
                slots[kind].append(page * PAGE + position % PAGE)
        if chunk.samples:
            sampled.append(len(tokens) - 1)
        for kind, where in batch.kinds.items():
            row = ledger.table(chunk.sequence.id, kind)
            width = min(len(row), where.pages.shape[1])
            assert np.array_equal(where.pages[i, :width], row[:width]) and not where.pages[i, width:].any()
            assert -(-chunk.stop // PAGE) <= where.pages.shape[1]
    total = len(tokens)
    assert batch.token_ids.tolist() == tokens + [0] * padding
    assert batch.positions.tolist() == positions + [0] * padding
    assert batch.query_start[-1] == total + padding
    assert batch.logit_rows.tolist() == sampled + list(range(total, total + padding))
    for kind, where in batch.kinds.items():
        assert where.slots.tolist() == slots[kind] + [0] * padding
        assert not where.pages[len(plan.chunks) :].any()
    assert batch.kv_len[len(plan.chunks) :].tolist() == [1] * padding
    assert batch.num_decodes == len(plan.decodes) + padding
    lengths = [chunk.stop - chunk.start for chunk in plan.prefills]
    assert batch.max_query_len == max(lengths, default=0)
    assert batch.max_kv_len == int(batch.kv_len.max())
