"""GLM's attention entry: the reference against HF's own module, the kernel against the reference."""

import pytest
import torch
from interpreter import interpret

from gemcutter.ops.attention.rope import rope_table
from gemcutter.ops.attention.rope_store import rope_store, rope_store_launch, rope_store_reference
from gemcutter.spec import RopeSpec
from gemcutter.verify.compare import POISON, count_differing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
# tokens, q heads, kv heads, head dim, angles
SHAPES = [(0, 4, 2, 64, 16), (1, 96, 8, 128, 32), (9, 12, 1, 128, 32), (5, 4, 4, 64, 32), (3, 2, 1, 32, 8)]
ODD = [(4, 2, 1, 48, 24), (4, 2, 1, 64, 12), (3, 2, 1, 24, 4), (3, 1, 1, 64, 1)]  # no kernel of their own


def case(shape, dtype, normed=True, device="cpu", page_size=16):
    tokens, heads, kv_heads, dim, angles = shape
    g = torch.Generator().manual_seed(sum(shape))
    columns = (heads + 2 * kv_heads) * dim
    qkv = (torch.randn(tokens, columns + 8, generator=g) * 3).to(device, dtype)[:, :columns]
    norms = (
        [(torch.randn(dim, generator=g) * 0.3 + 1).to(device, dtype) for _ in range(2)] if normed else [None] * 2
    )
    tables = rope_table(RopeSpec(1e6, angles), 2 * angles, 500, dtype, device)
    positions = torch.randint(0, 500, (tokens,), generator=g).to(device)
    pages = tokens // page_size + 2
    caches = torch.full((2, pages, kv_heads, page_size, dim), POISON, dtype=dtype, device=device)
    slots = torch.randperm(pages * page_size, generator=g)[:tokens].to(device)
    return qkv, *norms, *tables, positions, EPS, *caches, slots


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *ODD], ids=str)
def test_is_hf(shape, dtype, normed):
    from test_t5_norm import hf_norm
    from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb

    qkv, q_norm, k_norm, cos, sin, positions, eps, k_cache, v_cache, slots = args = case(shape, dtype, normed)
    tokens, heads, kv_heads, dim, angles = shape
    q = rope_store(*args)
    parts = qkv.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    want_q, want_k = parts[:2] if not normed else (hf_norm(parts[0], q_norm), hf_norm(parts[1], k_norm))
    tables = (torch.cat([table[positions]] * 2, -1) for table in (cos, sin))
    want_q, want_k = apply_rotary_pos_emb(want_q, want_k, *tables)
    assert torch.equal(q, want_q)
    page, offset = slots // 16, slots % 16
    assert torch.equal(k_cache[page, :, offset], want_k) and torch.equal(v_cache[page, :, offset], parts[2])
    for cache in (k_cache, v_cache):  # nothing else is written
        cache[page, :, offset] = POISON
        assert (cache == POISON).all()


def test_the_table_is_hfs():
    from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    config = Glm4MoeConfig(head_dim=128, max_position_embeddings=3000, rope_parameters=rope)
    for dtype in DTYPES:
        cos, sin = Glm4MoeRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), torch.arange(3000)[None])
        ours = rope_table(RopeSpec(1e6, 32), 64, 3000, dtype, "cpu")
        assert torch.equal(ours[0], cos[0, :, :32]) and torch.equal(ours[1], sin[0, :, :32])


def test_refusals():
    names = "qkv q_norm k_norm cos sin positions eps k_cache v_cache slots".split()
    good = dict(zip(names, case((5, 4, 2, 64, 16), torch.bfloat16), strict=True))
    for change, error, message in (
        (dict(qkv=good["qkv"].double()), TypeError, "qkv is torch.float64"),
        (dict(qkv=good["qkv"][:, :-1]), ValueError, "rows of 511"),
        (dict(qkv=good["qkv"][:, : 4 * 64]), ValueError, "some of q's"),
        (dict(q_norm=None), ValueError, "come together"),
        (dict(k_norm=good["k_norm"][:32]), ValueError, "k_norm has shape"),
        (dict(cos=good["cos"].float()), TypeError, "cos is torch.float32"),
        (dict(sin=good["sin"][:, :8]), ValueError, "sin has shape"),
        (dict(cos=good["cos"].repeat(1, 4), sin=good["sin"].repeat(1, 4)), ValueError, "64 angles: 1 to 32"),
        (dict(positions=good["positions"].int()), TypeError, "positions is torch.int32"),
        (dict(slots=good["slots"][:4]), ValueError, "slots has shape"),
        (dict(v_cache=good["v_cache"][:1]), ValueError, "v_cache has shape"),
        (dict(k_cache=good["k_cache"].half()), TypeError, "k_cache is torch.float16"),
    ):
        with pytest.raises(error, match=message):
            rope_store(*(good | change).values())


def test_opcheck():
    for normed in (True, False):
        torch.library.opcheck(
            torch.ops.gemcutter.rope_store.default, case((5, 4, 2, 64, 16), torch.bfloat16, normed)
        )


def test_kernel_in_the_interpreter():
    done = interpret(__file__)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def check(shape, dtype, normed, device="cpu", special=True) -> None:
    got, want = case(shape, dtype, normed, device), case(shape, dtype, normed, device)
    for args in (got, want):
        if special and len(args[0]) > 2:
            args[0][0, 3], args[0][1, 5], args[0][2, 1] = float("inf"), float("nan"), torch.finfo(dtype).max
            args[0][2, 7:9] = torch.tensor([0.0, -0.0])
    q, other = rope_store_launch(*got), rope_store_reference(*want)
    assert count_differing(q, other) == 0, (shape, dtype, normed)
    assert count_differing(got[7], want[7]) == 0 and count_differing(got[8], want[8]) == 0, (shape, dtype, normed)


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_kernel(dtype, normed):
    for shape in (*SHAPES, *ODD, (37, 96, 8, 128, 32), (700, 96, 8, 128, 32)):
        check(shape, dtype, normed, "cuda")


if __name__ == "__main__":
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    for dtype in DTYPES:
        for normed in (True, False):
            for shape in (SHAPES[0], *SHAPES[2:], *ODD[:1]):
                check(shape, dtype, normed)
    print("passed")
