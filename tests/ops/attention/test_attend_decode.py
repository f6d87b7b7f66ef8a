"""Decode attention on Hopper: what it reads before the chain is joined, and whose bits it has."""

from dataclasses import replace

import pytest
import torch
from attend_cases import error, exact, make_case
from test_attend_kernels import SHAPES

from gemcutter.ops.attention import attend_decode
from gemcutter.ops.attention.attend import attend
from gemcutter.ops.attention.qkv_rope_store import QkvMode, qkv_rope_store
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.norms.rms_norm import rms_norm


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["26B-sliding", "26B-full", "E4B-sliding"])
def test_keys_of_this_step_are_waited_for(name):
    """A chained layer, as a graph: what the step writes is NaN before it, so a key read too early would show.

    The first four rows are one sequence's, each on the keys of those before it; page borders lie among them.
    """
    heads, kv_heads, head_dim, window, page_size, dtype = SHAPES[name]
    case = make_case([(1, 64), (1, 700), (4, 1026)], heads, kv_heads, head_dim, page_size, window, dtype, "cuda")
    rows = torch.tensor([2, 2, 2, 2, 0, 1], device="cuda")
    kv_len = torch.tensor([1023, 1024, 1025, 1026, 64, 700], dtype=torch.int32, device="cuda")
    pages, positions = case.pages[rows].contiguous(), kv_len.long() - 1
    slots = pages[torch.arange(6, device="cuda"), positions // page_size].long() * page_size + positions % page_size
    batch = replace(
        case.batch,
        query_start=torch.arange(7, dtype=torch.int32, device="cuda"),
        kv_len=kv_len,
        num_decodes=6,
        max_query_len=0,
    )
    hidden = torch.randn(6, 512, device="cuda").to(dtype)
    weight = torch.randn((heads + 2 * kv_heads) * head_dim, 512, device="cuda").to(dtype)
    norm = torch.rand(head_dim, device="cuda").to(dtype) / head_dim**0.25
    cos, sin = torch.randn(2, 1026, head_dim // 2, device="cuda").to(dtype)
    caches = case.k_cache, case.v_cache

    def layer(wait=lambda: None):
        qkv = linear(rms_norm(hidden, None, 1e-6), weight)
        q = qkv_rope_store(qkv, norm, norm, cos, sin, positions, 1e-6, heads, kv_heads, *caches, slots, QkvMode.QKV)
        wait()
        return attend(q, *caches, batch, pages, window)

    def forget():
        for cache in caches:
            cache[slots // page_size, :, slots % page_size] = float("nan")
        torch.cuda.synchronize()

    want = layer(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [layer() for _ in range(3)]
    for _ in range(20):
        forget()
        graph.replay()
        for out in got:
            assert torch.equal(out, want) and out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["26B-sliding", "26B-full", "E4B-sliding", "fp16"])
def test_what_other_cards_run(name, monkeypatch):
    """Triton's kernels, on this card: as exact, and as good as the same."""
    heads, kv_heads, head_dim, window, page_size, dtype = SHAPES[name]
    lengths = [(1, held) for held in (1, 63, 64, 65, 127, 128, 129, 1000, 1024, 1025, 1600, 9000)]
    case = make_case(lengths, heads, kv_heads, head_dim, page_size, window, dtype, "cuda")
    got, want = attend(*case.args), exact(case)
    monkeypatch.setattr(attend_decode, "takes_cache", lambda *_: False)
    plain = attend(*case.args)
    for out in (got, plain):
        assert error(out, want) < 3e-2
    assert (got != plain).float().mean() < 1e-2  # the partials are added up otherwise


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [8, 32, 128, 256])
@pytest.mark.parametrize("head_dim,window", [(64, 100), (128, None), (256, 1024), (512, None), (512, 65)])
def test_any_page_size_and_number_of_sequences(head_dim, window, page_size):
    """One to four sequences have deeper queues than more; the bits are a sequence's own."""
    lengths = [(1, held) for held in (700, 1, 129, 64, 2000, 8, 1024)]
    case = make_case(lengths, 8, 2, head_dim, page_size, window, torch.bfloat16, "cuda")
    got = attend(*case.args)
    assert error(got, exact(case)) < 3e-2
    for count in (1, 4, 5):
        batch = replace(
            case.batch,
            query_start=case.batch.query_start[: count + 1],
            kv_len=case.batch.kv_len[:count].clone(),
            num_decodes=count,
        )
        q, pages = case.q[:count].clone(), case.pages[:count].clone()
        assert torch.equal(attend(q, case.k_cache, case.v_cache, batch, pages, window), got[:count]), count
