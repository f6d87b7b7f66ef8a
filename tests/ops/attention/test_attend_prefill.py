"""Prefill attention: which kernel runs where, and scores far from the usual, compiled on a GPU."""

import pytest
import torch
from attend_cases import error, exact, make_case
from test_attend_kernels import BF16, CHUNKS, FP16, FP32, SHAPES

from gemcutter.ops.attention import attend_prefill
from gemcutter.ops.attention.attend import attend
from gemcutter.ops.attention.load_pages import loads_pages


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["26B-full", "31B-sliding"])
def test_prefill_without_tma(name, monkeypatch):
    """What other cards run, on this one."""
    heads, kv_heads, head_dim, window, page_size, dtype = SHAPES[name]
    case = make_case(CHUNKS, heads, kv_heads, head_dim, page_size, window, dtype, "cuda")
    monkeypatch.setattr(attend_prefill, "loads_pages", lambda *_: False)
    assert error(attend(*case.args), exact(case)) < 3e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["26B-full", "31B-sliding"])
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_prefill_of_ties_and_of_huge_scores(name, scale):
    heads, kv_heads, head_dim, window, page_size, dtype = SHAPES[name]
    case = make_case(CHUNKS, heads, kv_heads, head_dim, page_size, window, dtype, "cuda")
    case.q.mul_(scale)
    assert error(attend(*case.args), exact(case)) < 3e-2


def test_what_comes_by_tma():
    cache = torch.empty(3, 2, 16, 256, dtype=BF16)
    assert not loads_pages(cache, cache, cache), "a CPU has none"


@pytest.mark.gpu
def test_what_comes_by_tma_on_hopper():
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for page_size, head_dim, dtype, taken in (
        (16, 256, BF16, True), (8, 512, FP16, True), (256, 256, BF16, True),
        (4, 256, BF16, False), (24, 256, BF16, False), (16, 128, BF16, False), (16, 256, FP32, False),
    ):  # fmt: skip
        cache = torch.empty(3, 2, page_size, head_dim, dtype=dtype, device="cuda")
        assert loads_pages(cache, cache, cache) == (taken and hopper), (page_size, head_dim, dtype)
    odd = torch.empty(3 * 2 * 16 * 256 + 1, dtype=BF16, device="cuda")[1:].view(3, 2, 16, 256)
    assert not loads_pages(odd, odd, odd), "TMA wants 16 bytes"
