"""KVPool: owners only, their shapes, and who reads whose tensors."""

import pytest
import torch

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.pool import KVPool
from gemcutter.spec import Kind, LayerSpec, ModelSpec, RopeSpec


def layer(index: int, kind: Kind, owner: int) -> LayerSpec:
    heads, dim = (1, 32) if kind is Kind.FULL else (2, 16)
    return LayerSpec(
        index=index, kind=kind, num_heads=4, num_kv_heads=heads, head_dim=dim,
        window=None if kind is Kind.FULL else 8, rope=RopeSpec(1e4, 8), kv_owner=owner, k_eq_v=False,
        mlp_width=8, experts=None,
    )  # fmt: skip


S, F = Kind.SLIDING, Kind.FULL
SPEC = ModelSpec(
    hidden=8, vocab=64, layers=(layer(0, S, 0), layer(1, S, 1), layer(2, F, 2), layer(3, S, 1), layer(4, F, 2)),
    eps=1e-6, softcap=None, context_length=64, ple_width=0, ple_vocab=0, tied_head=True, dtype="bfloat16",
)  # fmt: skip
PAGES = {S: 5, F: 7}


@pytest.fixture
def pool() -> KVPool:
    # Memory that was NaN before: freed blocks of this size come back from the allocator.
    trash = [torch.full((7, 2, 8, 32), float("nan"), dtype=torch.bfloat16) for _ in range(8)]
    del trash
    return KVPool(SPEC, CacheLayout.of(SPEC, 8, 2), PAGES, torch.bfloat16, torch.device("cpu"))


def test_shapes_and_zeros(pool):
    for index, kind in enumerate((S, S, F, S, F)):
        heads, dim = (1, 32) if kind is F else (2, 16)
        for cache in (pool.k(index), pool.v(index)):
            assert cache.shape == (PAGES[kind], heads, 8, dim) and cache.dtype == torch.bfloat16
            assert torch.equal(cache, torch.zeros_like(cache))


def test_shared_layers_read_their_owner(pool):
    pointers = [pool.k(index).data_ptr() for index in range(5)]
    assert pointers[3] == pointers[1] and pointers[4] == pointers[2]
    owned = [cache(index).data_ptr() for index in range(3) for cache in (pool.k, pool.v)]
    assert len(set(owned)) == 6


def test_an_fp8_cache_has_scales_by_owner():
    scales = {index: torch.full((2, 2 if index < 2 else 1), 2.0**-index) for index in range(3)}
    layout = CacheLayout.of(SPEC, 8, 1)
    pool = KVPool(SPEC, layout, PAGES, torch.float8_e4m3fn, torch.device("cpu"), scales)
    assert [pool.scales(index) is scales[owner] for index, owner in enumerate((0, 1, 2, 1, 2))] == [True] * 5
    caches = [cache(index) for index in range(3) for cache in (pool.k, pool.v)]
    assert not any(cache.float().any() for cache in caches)
    assert sum(cache.nbytes for cache in caches) == sum(PAGES[kind] * layout.page_bytes[kind] for kind in PAGES)


def test_without_scales(pool):
    assert [pool.scales(index) for index in range(5)] == [None] * 5


def test_bytes_are_what_the_layout_says(pool):
    layout = CacheLayout.of(SPEC, 8, 2)
    total = sum(cache(index).nbytes for index in range(3) for cache in (pool.k, pool.v))
    assert total == sum(PAGES[kind] * layout.page_bytes[kind] for kind in PAGES)
