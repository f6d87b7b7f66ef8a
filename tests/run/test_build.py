"""StepBuilder against loops: tokens, positions, slots, pages and sampled rows of random plans, read or not."""

import random

import numpy as np
import pytest
import torch
from drive import request

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.run.build import StepBuilder
from gemcutter.schedule.plan import Plan
from gemcutter.schedule.planner import Scheduler
from gemcutter.spec import Kind

PAGE, CONTEXT = 8, 200


def scheduler() -> Scheduler:
    layout = CacheLayout(PAGE, window=12, page_bytes={Kind.FULL: 1, Kind.SLIDING: 1})
    ledger = Ledger(layout, {Kind.FULL: 200, Kind.SLIDING: 120}, 8, CONTEXT)
    return Scheduler(
        ledger, context_length=CONTEXT, max_running_requests=8, chunked_prefill_size=13, max_prefill_tokens=40
    )


def test_empty_batch():
    """What graphs are captured with, and where their inputs lie ever after."""
    planner = scheduler()
    builder = StepBuilder(
        planner.ledger, torch.device("cpu"), max_prompt_tokens=40, max_sequences=8, context_length=CONTEXT
    )
    batch = build(builder, Plan((), ()), 8)
    check(batch, Plan((), ()), planner.ledger, 8, {})
    places = addresses(batch)
    for i in range(5):
        planner.add(request(str(i), [7] * 50, max_tokens=100))
    while not (plan := planner.plan()).decodes or plan.prefills:
        planner.advance(plan)
        planner.commit(plan, [1] * len(plan.samplers))
    assert addresses(build(builder, plan, 8)) == places
    assert all(where.pages.shape == (8, 28) for where in batch.kinds.values())  # 25 pages, rounded up to 16 bytes


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_loops(seed, ahead):
    """With `ahead` a step is built before the tokens of the last are read: they lie in `drawn` only."""
    rng = random.Random(seed)
    planner = scheduler()
    builder = StepBuilder(
        planner.ledger, torch.device("cpu"), max_prompt_tokens=40, max_sequences=11, context_length=CONTEXT
    )
    truth: dict[str, list[int]] = {}  # all tokens, read or not
    for i in range(12):
        prompt = [rng.randrange(100) for _ in range(rng.choice([1, 2, 8, 9, 40, 90]))]
        planner.add(request(str(i), prompt, max_tokens=rng.randint(1, 20)))
        truth[str(i)] = list(prompt)
    before, from_drawn, places = None, 0, {}
    while planner.has_work:
        plan = planner.plan()
        if plan is not None:
            pad_to = 0 if plan.prefills else rng.choice([0, len(plan.decodes) + 3])
            batch = build(builder, plan, pad_to)
            check(batch, plan, planner.ledger, pad_to, truth)
            from_drawn += sum(c.start == len(c.sequence.tokens) for c in plan.chunks)
            if pad_to:
                assert places.setdefault(pad_to, addresses(batch)) == addresses(batch)
            planner.advance(plan)
        if before is not None:
            planner.commit(*before)
            before = None
        if plan is not None:
            tokens = [rng.randrange(100) for _ in plan.samplers]
            builder.drawn[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            for chunk, token in zip(plan.samplers, tokens, strict=True):
                truth[chunk.sequence.id].append(token)
            before = plan, tokens
            if not ahead:
                planner.commit(*before)
                before = None
    assert (from_drawn > 50) == ahead and places


def build(builder, plan, pad_to):
    if not pad_to:
        return builder.build(plan)
    batch = builder.build_padded(plan, max(pad_to, len(plan.chunks)))
    builder.look_up(batch.num_decodes)
    return batch


def tensors(batch) -> list[torch.Tensor]:
    several = [tensor for where in batch.kinds.values() for tensor in (where.pages, where.slots)]
    return [batch.token_ids, batch.positions, batch.query_start, batch.kv_len, batch.logit_rows, *several]


def addresses(batch) -> list[tuple[int, tuple[int, ...]]]:
    return [(x.data_ptr(), x.stride()) for x in tensors(batch)]


def check(batch, plan, ledger, pad_to, truth) -> None:
    padding = max(0, pad_to - len(plan.chunks))
    assert all(x.storage_offset() * x.itemsize % 16 == 0 and x.is_contiguous() for x in tensors(batch))
    tokens, positions, sampled = [], [], []
    slots = {kind: [] for kind in batch.kinds}
    for i, chunk in enumerate(plan.chunks):
        assert batch.query_start[i] == len(tokens) and batch.kv_len[i] == chunk.stop
        for position in range(chunk.start, chunk.stop):
            tokens.append(truth[chunk.sequence.id][position])
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
            assert np.array_equal(where.pages[i, :width], row[:width])
            assert pad_to or not where.pages[i, width:].any()
            assert -(-chunk.stop // PAGE) <= where.pages.shape[1]
    total = len(tokens)
    assert batch.token_ids.tolist() == tokens + [0] * padding
    assert batch.positions.tolist() == positions + [0] * padding
    assert batch.query_start[-1] == total + padding
    assert batch.logit_rows.tolist() == sampled + list(range(total, total + padding))
    for kind, where in batch.kinds.items():
        assert where.slots.tolist() == slots[kind] + [0] * padding
        assert not where.pages[len(plan.chunks) :, 0].any()
    assert batch.kv_len[len(plan.chunks) :].tolist() == [1] * padding
    assert batch.num_decodes == len(plan.decodes) + padding
    lengths = [chunk.stop - chunk.start for chunk in plan.prefills]
    assert batch.max_query_len == max(lengths, default=0)
    assert batch.max_kv_len == (pad_to and 224 or int(batch.kv_len.max()))
