"""StepBuilder against loops: tokens, positions, slots, pages and sampled rows of random plans, read or not."""

import random

import numpy as np
import pytest
import torch
from drive import request

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.run.bucket import PROMPTS, Bucket
from gemcutter.run.build import StepBuilder
from gemcutter.schedule.plan import Chunk, Plan
from gemcutter.schedule.planner import Scheduler
from gemcutter.spec import Kind

PAGE, CONTEXT = 8, 200


def scheduler() -> Scheduler:
    layout = CacheLayout(PAGE, window=12, page_bytes={Kind.FULL: 1, Kind.SLIDING: 1})
    ledger = Ledger(layout, {Kind.FULL: 200, Kind.SLIDING: 120}, 8, CONTEXT)
    return Scheduler(
        ledger, context_length=CONTEXT, max_running_requests=8, chunked_prefill_size=13, max_prefill_tokens=40
    )


@pytest.mark.parametrize("bucket", [Bucket(8, 0, 0), Bucket(4, PROMPTS, 40)])
def test_empty_batch(bucket):
    """What graphs are captured with, and where their inputs lie ever after."""
    planner = scheduler()
    builder = StepBuilder(
        planner.ledger, torch.device("cpu"), max_prompt_tokens=40, max_sequences=8, context_length=CONTEXT
    )
    batch = build(builder, Plan((), ()), bucket)
    check(batch, Plan((), ()), planner.ledger, bucket, True, {})
    places = addresses(batch)
    for i in range(3):
        planner.add(request(str(i), [7] * (10 + 20 * i), max_tokens=100))
    while not (plan := planner.plan()).decodes or bool(plan.prefills) != bool(bucket.prompts):
        planner.advance(plan)
        planner.commit(plan, [1] * len(plan.samplers))
    assert addresses(build(builder, plan, bucket)) == places
    # 25 pages, rounded up to 16 bytes
    assert all(where.pages.shape == (8, 28) for where in batch.kinds.values())


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
            bucket = padded = chosen(rng, plan)
            batch = build(builder, plan, padded)
            check(batch, plan, planner.ledger, bucket or Bucket.of(plan), padded is not None, truth)
            from_drawn += sum(c.start == len(c.sequence.tokens) for c in plan.chunks)
            if padded:
                assert places.setdefault(padded, addresses(batch)) == addresses(batch)
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
    assert (from_drawn > 50) == ahead and {bool(bucket.prompts) for bucket in places} == {True, False}


def test_the_largest_step_fits():
    """As many rows to decode as there may be sequences, of one that is computed again, and the others' prompts."""
    planner = scheduler()
    builder = StepBuilder(
        planner.ledger, torch.device("cpu"), max_prompt_tokens=40, max_sequences=8, context_length=CONTEXT
    )
    first = planner.add(request("0", [7] * 9, max_tokens=191))
    while first.num_computed < CONTEXT - 2:
        planner.advance(plan := planner.plan())
        planner.commit(plan, [1] * len(plan.samplers))
    truth = {"0": list(first.tokens)}
    for i, length in enumerate([6, 6, 6, 6, 6, 5, 5], 1):
        truth[str(i)] = [i] * length
        planner.add(request(str(i), truth[str(i)]))
    plan = planner.plan()
    rows = [Chunk(first, at, at + 1, samples=False) for at in range(CONTEXT - 9, CONTEXT - 2)]
    plan = Plan((*plan.decodes, *rows), plan.prefills)
    assert Bucket.of(plan) == Bucket(8, 7, 40)
    check(build(builder, plan, None), plan, planner.ledger, Bucket.of(plan), False, truth)


def chosen(rng, plan) -> Bucket | None:
    """None: as it is."""
    whole = Bucket.of(plan)
    if rng.random() < 0.4 or whole.prompts >= PROMPTS:
        return None
    if not plan.prefills:
        return Bucket(min(whole.decodes + 3, 11), 0, 0) if whole.decodes <= 11 else None
    return Bucket(11, PROMPTS, 40) if whole.decodes <= 11 else None


def build(builder, plan, bucket):
    if bucket is None:
        return builder.build(plan)
    batch = builder.build_padded(plan, bucket)
    builder.look_up(bucket)
    return batch


def tensors(batch) -> list[torch.Tensor]:
    several = [tensor for where in batch.kinds.values() for tensor in (where.pages, where.slots)]
    return [batch.token_ids, batch.positions, batch.query_start, batch.kv_len, batch.logit_rows, *several]


def addresses(batch) -> list[tuple[int, tuple[int, ...]]]:
    return [(x.data_ptr(), x.stride()) for x in tensors(batch)]


def check(batch, plan, ledger, bucket, padded, truth) -> None:
    """Against loops: sequences in the bucket's order, what fills it up in page 0, logits of samplers first."""
    assert all(x.storage_offset() * x.itemsize % 16 == 0 and x.is_contiguous() for x in tensors(batch))
    left = bucket.prompt_tokens - sum(chunk.stop - chunk.start for chunk in plan.prefills)
    rows = [*plan.decodes, *[range(1)] * (bucket.decodes - len(plan.decodes)), *plan.prefills]
    rows += [range(left), *[range(0)] * bucket.prompts][: bucket.prompts - len(plan.prefills)]
    tokens, positions, sampled = [], [], []
    slots = {kind: [] for kind in batch.kinds}
    for i, chunk in enumerate(rows):
        empty = isinstance(chunk, range)
        assert batch.query_start[i] == len(tokens) and batch.kv_len[i] == max(chunk.stop, 1)
        for position in range(chunk.start, chunk.stop):
            tokens.append(0 if empty else truth[chunk.sequence.id][position])
            positions.append(position)
            for kind in slots:
                page = 0 if empty else int(ledger.table(chunk.sequence.id, kind)[position // PAGE])
                assert empty or page != 0, "a token of the step has no page"
                slots[kind].append(page * PAGE + position % PAGE)
        if not empty and chunk.samples:
            sampled.append(i)
        for kind, where in batch.kinds.items():
            held = -(-chunk.stop // PAGE)
            row = np.zeros(held, np.int32) if empty else ledger.table(chunk.sequence.id, kind)
            width = min(len(row), where.pages.shape[1])
            assert np.array_equal(where.pages[i, :width], row[:width]) and held <= where.pages.shape[1]
            assert padded or not where.pages[i, width:].any()
    assert batch.token_ids.tolist() == tokens and batch.positions.tolist() == positions
    assert batch.query_start[-1] == len(tokens) == bucket.tokens
    assert batch.logit_rows[: len(sampled)].tolist() == sampled
    assert len(batch.logit_rows) == (bucket.rows if padded else len(sampled))
    assert all(0 <= row < bucket.rows for row in batch.logit_rows.tolist())
    assert all(batch.kinds[kind].slots.tolist() == slots[kind] for kind in slots)
    assert batch.num_decodes == bucket.decodes
    longest = max((chunk.stop - chunk.start for chunk in rows[bucket.decodes :]), default=0)
    assert batch.max_query_len >= longest and (padded or batch.max_query_len == longest)
    assert batch.max_kv_len == (224 if padded else int(batch.kv_len.max()))
