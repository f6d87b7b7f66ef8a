"""The attention kernels: in Triton's interpreter on any machine, compiled on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attend_cases import alone, as_it_stands_for, error, exact, make_case
from interpreter import interpret
from test_attend import hf_eager

from gemcutter.ops.attention import attend_decode, attend_prefill
from gemcutter.ops.attention.attend import attend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# q heads, kv heads, head_dim, window, page size, dtype
SHAPES = {
    "E4B-sliding": (8, 2, 256, 512, 16, BF16),
    "E2B-full": (8, 1, 512, None, 16, BF16),
    "26B-sliding": (16, 8, 256, 1024, 64, BF16),
    "26B-full": (16, 2, 512, None, 16, BF16),
    "31B-sliding": (32, 16, 256, 1024, 16, BF16),
    "12B-full": (16, 1, 512, None, 64, BF16),
    "tiny-sliding": (4, 2, 32, 16, 16, BF16),
    "fp16": (6, 2, 64, 100, 16, FP16),
    "fp32-tiny": (4, 1, 64, None, 16, FP32),
    "fp32": (8, 2, 256, 512, 16, FP32),
    "groups of 3, pages of 8": (6, 2, 256, 100, 8, BF16),
    "groups of 6, pages of 128": (12, 2, 512, None, 128, FP16),
    "window of one, pages of 256": (4, 4, 256, 1, 256, BF16),
    "windowed 512": (4, 2, 512, 65, 8, BF16),
    "GLM-4.7": (96, 8, 128, None, 16, BF16),
    "scaled 256": (8, 2, 256, 512, 16, BF16),
}
SCALES = {"GLM-4.7": 128**-0.5, "scaled 256": 0.3}
DECODES = [(1, 1), (1, 5), (1, 128), (1, 129), (1, 1024), (1, 1537), (1, 3000)]
CHUNKS = [(2, 2), (7, 400), (65, 65), (200, 1300), (300, 2100)]


def test_kernels_in_the_interpreter():
    run = interpret(Path(__file__).with_name("interpret_attend.py"))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_against_float64(name):
    heads, kv_heads, head_dim, window, page_size, dtype = SHAPES[name]
    lengths = DECODES + CHUNKS
    scale = SCALES.get(name, 1.0)
    case = make_case(lengths, heads, kv_heads, head_dim, page_size, window, dtype, "cuda", scale=scale)
    got, truth, eager = attend(*case.args), exact(case), hf_eager(case)
    wrong, hf_wrong = ((x.double() - truth).norm().item() / truth.norm().item() for x in (got, eager))
    print(f"{name}: relative error {wrong:.2e}, HF eager {hf_wrong:.2e}, worst row {error(got, truth):.2e}")
    assert wrong < {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}[dtype]
    assert wrong < 1.5 * hf_wrong + 1e-6
    assert error(got, truth) < {BF16: 3e-2, FP16: 4e-3, FP32: 3e-5}[dtype]
    for i in range(len(lengths)):
        args, rows = alone(case, i)
        assert torch.equal(attend(*args), got[rows]), f"sequence {i} {lengths[i]} differs in a crowd"


@pytest.mark.gpu
@pytest.mark.parametrize("other_cards", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_an_fp8_cache_has_the_bits_of_what_it_stands_for(name, other_cards, monkeypatch):
    heads, kv_heads, head_dim, window, page_size, dtype = SHAPES[name]
    by_triton = other_cards or dtype == FP16 or head_dim < 128
    if by_triton:
        monkeypatch.setattr(attend_decode, "takes_cache", lambda *_: False)
        monkeypatch.setattr(attend_prefill, "loads_pages", lambda *_: False)
    lengths = DECODES + CHUNKS
    case = make_case(lengths, heads, kv_heads, head_dim, page_size, window, dtype, "cuda", fp8=True)
    got, want = attend(*case.args), attend(*as_it_stands_for(case).args)
    assert error(got, exact(case)) < {BF16: 3e-2, FP16: 4e-3, FP32: 3e-5}[dtype]
    differ = (got != want).flatten(1).any(1)
    print(f"{name}: {differ.sum()} of {len(got)} rows differ")
    # Triton groups the dims of a product otherwise (kWidth 4 for 2) where an operand was loaded as 8 bits. On the
    # tensor cores of decode that is another order of sums, in float32, which fp32 tiles and wgmma do not have.
    allowed = case.batch.num_decodes if by_triton and dtype != FP32 else 0
    assert not differ[allowed:].any()
    for i in range(len(lengths)):
        args, rows = alone(case, i)
        assert torch.equal(attend(*args), got[rows]), f"sequence {i} {lengths[i]} differs in a crowd"


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", ["26B-sliding", "26B-full", "31B-sliding", "groups of 3, pages of 8"])
def test_a_chunk_has_the_bits_of_the_whole_prompt(name, fp8):
    heads, kv_heads, head_dim, window, page_size, dtype = SHAPES[name]
    case = make_case([(700, 1900)], heads, kv_heads, head_dim, page_size, window, dtype, "cuda", fp8=fp8)
    whole = attend(*case.args)
    for begin, end in ((0, 1), (1, 300), (300, 431), (431, 700)):
        batch = replace(
            case.batch,
            query_start=torch.tensor([0, end - begin], dtype=torch.int32, device="cuda"),
            kv_len=torch.tensor([1200 + end], dtype=torch.int32, device="cuda"),
            max_query_len=end - begin,
        )
        part = attend(
            case.q[begin:end].clone(),
            case.k_cache,
            case.v_cache,
            batch,
            case.pages,
            window,
            case.scale,
            case.kv_scales,
        )
        assert torch.equal(part, whole[begin:end]), f"tokens {begin} to {end}"


@pytest.mark.gpu
def test_more_splits_than_partials():
    lengths = [(1, 30000), (1, 8192), (1, 8193), (1, 70)]
    case = make_case(lengths, 16, 2, 512, 16, None, BF16, "cuda")
    got, truth = attend(*case.args), exact(case)
    assert error(got, truth) < 2e-2
    for i in range(len(lengths)):  # with a page table, and so a workspace, of its own width
        args, rows = alone(case, i)
        assert torch.equal(attend(*args), got[rows]), f"sequence {i}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["E4B-sliding", "26B-full"])
def test_a_graph_replays_at_other_lengths(name):
    heads, kv_heads, head_dim, window, page_size, dtype = SHAPES[name]
    short, long = ([(1, n) for n in lengths] for lengths in ((3, 40, 900), (2500, 41, 1300)))
    cases = [
        make_case(lengths, heads, kv_heads, head_dim, page_size, window, dtype, "cuda", seed)
        for seed, lengths in enumerate((short, long))
    ]
    # Room for both: the graph reads fixed tensors, padded to four rows, the last of which holds nothing.
    most_pages = max(len(case.k_cache) for case in cases)
    width = max(case.pages.shape[1] for case in cases)
    q = torch.zeros(4, heads, head_dim, dtype=dtype, device="cuda")
    k_cache = torch.full((most_pages, kv_heads, page_size, head_dim), float("nan"), dtype=dtype, device="cuda")
    v_cache = k_cache.clone()
    pages = torch.zeros(4, width, dtype=torch.int32, device="cuda")
    batch = replace(
        cases[0].batch,
        query_start=torch.arange(5, dtype=torch.int32, device="cuda"),
        kv_len=torch.zeros(4, dtype=torch.int32, device="cuda"),
        num_decodes=4,
        max_kv_len=width * page_size,
    )
    attend(q, k_cache, v_cache, batch, pages, window)  # compiled outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k_cache, v_cache, batch, pages, window)
    for case in (*cases, cases[0]):
        q[:3] = case.q
        k_cache[: len(case.k_cache)], v_cache[: len(case.v_cache)] = case.k_cache, case.v_cache
        pages.zero_()
        pages[:3, : case.pages.shape[1]] = case.pages
        batch.kv_len[:3] = case.batch.kv_len
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out[:3], attend(*case.args))
        assert torch.equal(out[3], torch.zeros_like(out[3]))


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31_elements():
    case = make_case([(1, 300), (90, 310)], 16, 2, 512, 16, None, BF16, "cuda")
    want = attend(*case.args)
    shift = 2**31 // case.k_cache[0].numel() + 5
    shape = (shift + len(case.k_cache), *case.k_cache.shape[1:])  # 4.3 GB each
    k_cache, v_cache = (torch.empty(shape, dtype=BF16, device="cuda") for _ in range(2))
    k_cache[shift:], v_cache[shift:] = case.k_cache, case.v_cache
    assert torch.equal(attend(case.q, k_cache, v_cache, case.batch, case.pages + shift, None), want)
