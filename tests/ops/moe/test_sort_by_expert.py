"""Sort by expert: the reference against a plain loop, the kernels against the reference."""

import pytest
import torch
from interpreter import interpret

from gemcutter.ops.moe.sort_by_expert import (
    SPAN,
    sort_by_expert,
    sort_by_expert_launch,
    sort_by_expert_reference,
)

KINDS = ["spread", "one", "last", "few", "descending"]


def draw(kind: str, tokens: int, top_k: int, experts: int, dtype=torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 31 + experts)
    match kind:
        case "spread":
            ids = torch.randint(experts, (tokens, top_k), generator=generator)
        case "one":
            ids = torch.zeros(tokens, top_k)
        case "last":
            ids = torch.full((tokens, top_k), experts - 1)
        case "few":  # most experts get nothing, some tokens the same one twice
            ids = torch.randint(experts, (3,), generator=generator)[
                torch.randint(3, (tokens, top_k), generator=generator)
            ]
        case "descending":
            ids = torch.arange(tokens * top_k).flip(0).view(tokens, top_k) % experts
    return ids.to(dtype)


def by_loop(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    buckets = [[] for _ in range(experts)]
    for slot, expert in enumerate(ids.flatten().tolist()):
        buckets[expert].append(slot)
    starts = [0]
    for bucket in buckets:
        starts.append(starts[-1] + len(bucket))
    return torch.tensor(sum(buckets, []), dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def same(got: tuple, want: tuple) -> None:
    for name, g, w in zip(("order", "starts"), got, want, strict=True):
        assert g.dtype == w.dtype == torch.int32 and g.shape == w.shape, (name, g.dtype, g.shape, w.shape)
        wrong = g.cpu() != w.cpu()
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()} differ"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens, top_k, experts", [(0, 8, 128), (1, 8, 128), (33, 3, 5), (700, 8, 128), (9, 1, 1)])
def test_reference_is_a_plain_loop(tokens, top_k, experts, kind, dtype):
    ids = draw(kind, tokens, top_k, experts, dtype)
    same(sort_by_expert(ids, experts), by_loop(ids, experts))


def test_refusals():
    ids = draw("spread", 4, 2, 8)
    with pytest.raises(TypeError, match="ids are torch.float32"):
        sort_by_expert(ids.float(), 8)
    with pytest.raises(ValueError, match="two dims"):
        sort_by_expert(ids[0], 8)
    with pytest.raises(ValueError, match="dense"):
        sort_by_expert(ids.T, 8)
    for experts in (0, 1025):
        with pytest.raises(ValueError, match=f"num_experts is {experts}"):
            sort_by_expert(ids, experts)


def test_opcheck():
    ids = draw("spread", 4, 2, 8)
    torch.library.opcheck(torch.ops.gemcutter.sort_by_expert.default, (ids, 8))


@pytest.fixture(scope="module")
def report() -> str:
    done = interpret(__file__)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_interpreted(report, kind):
    assert f"{kind} passed" in report, report[-4000:]


def check_interpreted(kind: str) -> None:
    """Both roads and their edges, one launch and three; counts of more blocks than a program scans at once."""
    span = SPAN.value
    for slots in (0, 1, 8, 511, 512, 513, span - 1, span, span + 1, 4097):
        for experts in (128, 160) if slots in (8, span + 1) else (128,):
            for dtype in (torch.int64, torch.int32) if slots in (8, span + 1) else (torch.int64,):
                ids = draw(kind, slots, 1, experts, dtype)
                same(sort_by_expert_launch(ids, experts), sort_by_expert_reference(ids, experts))
    large = 128 * 1024 + 300
    for experts in (1, 5, 1024):
        for slots in (40, span + 200, large) if (kind, experts) == ("few", 5) else (40, span + 200):
            ids = draw(kind, slots // 4, 4, experts)
            same(sort_by_expert_launch(ids, experts), sort_by_expert_reference(ids, experts))


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [1, 8, 128, 160, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_is_the_reference(kind, experts):
    span = SPAN.value
    for slots in (0, 1, 8, 64, 511, 512, 513, span - 1, span, span + 1, 4096, 9999, 65_536, 300_001):
        for dtype in (torch.int64, torch.int32):
            ids = draw(kind, slots, 1, experts, dtype).cuda()
            want = sort_by_expert_reference(ids, experts)
            for _ in range(2):
                same(sort_by_expert(ids, experts), want)


if __name__ == "__main__":
    # Poisoned, so that an unwritten output cannot pass for one of zeros.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(-7)
    for name in KINDS:
        check_interpreted(name)
        print(f"{name} passed", flush=True)
