"""Bytes and pages: the released models' published sizes, and a budget that keeps its promises."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcutter.cache.budget import size_cache
from gemcutter.cache.layout import CacheLayout
from gemcutter.spec import Kind, LayerSpec, ModelSpec, RopeSpec

FULL, SLIDING = Kind.FULL, Kind.SLIDING
GIB, KIB = 2**30, 2**10


def make_spec(pattern: str, sliding_kv: int, full_kv: int, window: int, shared: int = 0) -> ModelSpec:
    """A model of layers S and F; the last `shared` of them read the last own layer of their kind."""
    layers = []
    for index, letter in enumerate(pattern):
        kind = FULL if letter == "F" else SLIDING
        owner = index
        if index >= len(pattern) - shared:
            owner = pattern.rindex(letter, 0, len(pattern) - shared)
        heads, dim = (full_kv, 512) if kind is FULL else (sliding_kv, 256)
        layers.append(
            LayerSpec(
                index=index,
                kind=kind,
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=dim,
                window=None if kind is FULL else window,
                rope=RopeSpec(1e4, 8),
                kv_owner=owner,
                k_eq_v=False,
                mlp_width=8,
                experts=None,
            )  # fmt: skip
        )
    return ModelSpec(
        hidden=8, vocab=64, layers=tuple(layers), eps=1e-6, softcap=None, context_length=262144, ple_width=0,
        ple_vocab=0, tied_head=True, dtype="bfloat16",
    )  # fmt: skip


E2B = make_spec("SSSSF" * 7, 1, 1, 512, shared=20)
E4B = make_spec("SSSSSF" * 7, 2, 2, 512, shared=18)
A4B = make_spec("SSSSSF" * 5, 8, 2, 1024)
B31 = make_spec("SSSSSF" * 10, 16, 4, 1024)
TINY = [make_spec("SSS", 1, 1, 64), make_spec("FFF", 1, 1, 64), make_spec("SF", 1, 1, 7)]


@pytest.mark.parametrize(
    ("spec", "full", "sliding"),
    [(E2B, 6, 12), (E4B, 16, 40), (A4B, 20, 200), (B31, 80, 800)],
    ids=["E2B", "E4B", "26B-A4B", "31B"],
)
def test_bytes_per_token_count_owners_only(spec, full, sliding):
    layout = CacheLayout.of(spec, 16, 2)
    assert layout.page_bytes == {FULL: 16 * full * KIB, SLIDING: 16 * sliding * KIB}


def size(layout, budget, **changes):
    settings = {
        "model_context": 262144, "context_length": None, "max_running_requests": 128,
        "chunked_prefill_size": 2048, "max_prefill_tokens": 8192, "max_total_tokens": None,
    }  # fmt: skip
    return size_cache(layout, budget, **(settings | changes))


def test_a4b_in_72_gb():
    layout = CacheLayout.of(A4B, 16, 2)
    got = size(layout, 72 * 10**9)
    assert got.context_length == 262144
    assert (got.pages[FULL] - 1) * 16 >= 1_150_000
    # 128 windows and a step's prompts, and something over for prefixes
    assert (got.pages[SLIDING] - 1) * 16 >= 128 * 1024 + 8192


def test_elements_of_one_byte_hold_twice_the_tokens():
    half, whole = (
        size(CacheLayout.of(A4B, 16, element), 72 * 10**9, max_running_requests=512) for element in (1, 2)
    )
    assert half.pages[SLIDING] >= whole.pages[SLIDING]
    assert half.pages[FULL] > 1.999 * whole.pages[FULL] > 10**5


def test_a_large_budget_stops_at_what_requests_can_use():
    got = size(CacheLayout.of(E2B, 16, 2), 10**13, context_length=4096, max_running_requests=3)
    assert got.pages[FULL] == 3 * 256 + 1
    assert got.pages[SLIDING] <= (3 * 256 + 512) * 1.25 + 1


@pytest.mark.parametrize("pattern", ["SSS", "FFF"])
def test_models_of_one_kind(pattern):
    spec = make_spec(pattern, 1, 1, 64)
    layout = CacheLayout.of(spec, 16, 2)
    got = size(layout, 2**30, context_length=4096, max_running_requests=8, max_prefill_tokens=512)
    assert got.pages.keys() == set(layout.kinds) and len(layout.kinds) == 1
    assert got.pages[layout.kinds[0]] > layout.one_request(4096, 512)[layout.kinds[0]]


def test_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="262145 is more than the 262144 positions of the model; lower it"):
        size(CacheLayout.of(A4B, 16, 2), 72 * 10**9, context_length=262145)


def test_max_total_tokens_caps_the_full_pages_and_the_context():
    layout = CacheLayout.of(A4B, 16, 2)
    got = size(layout, 72 * 10**9, max_total_tokens=10_000)
    assert got.pages[FULL] == 10_000 // 16 + 1
    assert got.context_length == 10_000
    with pytest.raises(ValueError, match="at most 10000 tokens, context_length asks for 10001"):
        size(layout, 72 * 10**9, max_total_tokens=10_000, context_length=10_001)


def test_no_room_at_all():
    with pytest.raises(ValueError, match="at most 0 tokens.*raise"):
        size(CacheLayout.of(A4B, 16, 2), 10**6)


@settings(max_examples=300, deadline=None)
@given(
    spec=st.sampled_from([E2B, A4B, *TINY]),
    page_size=st.sampled_from([8, 16, 64]),
    megabytes=st.integers(1, 20_000),
    context=st.one_of(st.none(), st.integers(2, 262144)),
    running=st.integers(1, 128),
    chunk=st.integers(1, 4096),
    step=st.integers(1, 8192),
    total=st.one_of(st.none(), st.integers(1, 10**6)),
)
def test_promises_hold(spec, page_size, megabytes, context, running, chunk, step, total):
    layout, budget = CacheLayout.of(spec, page_size, 2), megabytes * 10**6
    choices = dict(
        max_running_requests=running, chunked_prefill_size=chunk, max_prefill_tokens=step, max_total_tokens=total
    )
    try:
        got = size(layout, budget, context_length=context, **choices)
    except ValueError as error:
        fits = int(re.search(r"at most (\d+) tokens", str(error)).group(1))
        assert fits < (context or 2)
        if fits >= 2:  # the number in the message is right: it fits, and one more does not
            assert size(layout, budget, context_length=fits, **choices).context_length == fits
            with pytest.raises(ValueError):
                size(layout, budget, context_length=fits + 1, **choices)
        return
    assert context in (None, got.context_length)
    assert sum(count * layout.page_bytes[kind] for kind, count in got.pages.items()) <= budget
    for kind, need in layout.one_request(got.context_length, min(chunk, step)).items():
        assert got.pages[kind] - 1 >= need
    if FULL in got.pages:
        assert (got.pages[FULL] - 1) * page_size <= running * (got.context_length + page_size)
        assert total is None or (got.pages[FULL] - 1) * page_size <= total


@settings(max_examples=200, deadline=None)
@given(
    page_size=st.sampled_from([2, 4, 8]),
    window=st.integers(1, 40),
    chunk=st.integers(1, 40),
    context=st.integers(2, 120),
    start=st.integers(0, 119),
)
def test_one_request_suffices_for_every_chunk(page_size, window, chunk, context, start):
    layout = CacheLayout(page_size, window, {FULL: 1, SLIDING: 1})
    stop = min(start + chunk, context)
    touched = {j // page_size for q in range(start, stop) for j in range(max(0, q - window + 1), q + 1)}
    assert len(touched) <= layout.one_request(context, chunk)[SLIDING]
