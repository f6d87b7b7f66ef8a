"""StepBatch.last_tokens against a loop."""

import torch

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.spec import Kind


def step(lengths: list[int], held: list[int], num_decodes: int) -> StepBatch:
    tokens = sum(lengths)
    places = {kind: KindBatch(torch.randint(9, (len(held), 5)), torch.randperm(99)[:tokens]) for kind in Kind}
    return StepBatch(
        token_ids=torch.randperm(500)[:tokens],
        positions=torch.cat([torch.arange(h - n, h) for n, h in zip(lengths, held, strict=True)]),
        query_start=torch.tensor([0, *lengths]).cumsum(0).int(),
        kv_len=torch.tensor(held, dtype=torch.int32),
        logit_rows=torch.tensor([2, 0]),
        kinds=places,
        num_decodes=num_decodes,
        max_query_len=max(lengths[num_decodes:], default=0),
        max_kv_len=max(held),
    )


def test_last_tokens():
    lengths, held = [1, 1, 7, 1, 30], [40, 3, 7, 12, 60]
    whole = step(lengths, held, num_decodes=2)
    assert whole.has_prompts
    rows, last = whole.last_tokens()
    assert rows.tolist() == [sum(lengths[: i + 1]) - 1 for i in range(5)]
    assert last.token_ids.tolist() == [whole.token_ids[row] for row in rows]
    assert last.positions.tolist() == [h - 1 for h in held] and last.kv_len.tolist() == held
    assert last.query_start.tolist() == list(range(6)) and last.query_start.dtype == torch.int32
    assert last.num_decodes == 2 and last.max_query_len == 1 and last.max_kv_len == 60
    assert last.logit_rows is whole.logit_rows and list(last.kinds) == list(Kind)
    for kind, where in last.kinds.items():
        assert where.pages is whole.kinds[kind].pages
        assert where.slots.tolist() == [whole.kinds[kind].slots[row] for row in rows]


def test_a_sequence_without_tokens_gets_a_row_that_is_there():
    rows, last = step([1, 4, 0, 0], [9, 4, 1, 1], num_decodes=1).last_tokens()
    assert rows.tolist() == [0, 4, 4, 4] and last.query_start.tolist() == [0, 1, 2, 3, 4]
    assert last.kv_len.tolist() == [9, 4, 1, 1]


def test_steps_of_decoding_have_no_prompts():
    assert not step([1, 1], [5, 6], num_decodes=2).has_prompts
