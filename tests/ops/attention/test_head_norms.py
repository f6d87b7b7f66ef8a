"""qkv_norm_ and k_eq_v_norm: references against HF's modules, kernels against references, interpreted too."""

import pytest
import torch
from interpreter import interpret
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemcutter.ops.attention.k_eq_v_norm import k_eq_v_norm, k_eq_v_norm_launch, k_eq_v_norm_reference
from gemcutter.ops.attention.qkv_norm import qkv_norm_, qkv_norm_launch, qkv_norm_reference
from gemcutter.verify.compare import POISON, count_differing
from gemcutter.verify.inputs import Draw, Kind

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 2, 32), (16, 8, 256), (8, 1, 512), (6, 3, 128), (5, 3, 80), (4, 2, 96), (3, 1, 33)]  # heads, kv, D


def make(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype, device="cpu", kind=Kind.NORMAL, pad=3):
    """Buffer of q | k | v | `pad` columns of POISON; both weights."""
    count = heads + 2 * kv_heads
    buffer = torch.full((tokens, count * head_dim + pad), POISON, dtype=dtype, device=device)
    drawn = Draw(tokens * count, kind, dtype, device).rows(head_dim)
    buffer[:, : count * head_dim] = drawn.view(tokens, count * head_dim)
    draw = Draw(tokens, Kind.NORMAL, dtype, device)
    return buffer, draw.weight(head_dim), draw.weight(head_dim)


def views(buffer: torch.Tensor, heads: int, kv_heads: int, head_dim: int):
    count = heads + 2 * kv_heads
    return buffer[:, : count * head_dim].unflatten(1, (count, head_dim)).split([heads, kv_heads, kv_heads], 1)


def hf_norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    module = Gemma4RMSNorm(x.shape[-1], EPS, with_scale=weight is not None)
    if weight is not None:
        module.weight.data = weight
    return module(x)


def compare(shape, tokens: int, dtype, device: str, kind: Kind, launches, pad: int = 3) -> None:
    """Both ops' kernels against their references, the padding beside the heads included.

    Args:
        pad: 3 leaves no two rows aligned alike, a multiple of 16 all.
    """
    qkv_norm, k_eq_v_norm = launches
    buffer, q_weight, k_weight = make(tokens, *shape, dtype, device, kind, pad)
    for with_kv in (True, False):
        got, want = buffer.clone(), buffer.clone()
        for run, into in ((qkv_norm, got), (qkv_norm_reference, want)):
            q, k, v = views(into, *shape)
            run(q, *((k, v) if with_kv else (None, None)), q_weight, k_weight if with_kv else None, EPS)
        assert count_differing(got, want) == 0, (shape, tokens, dtype, kind, with_kv)
    k = views(buffer, *shape)[1]
    for a, b in zip(k_eq_v_norm(k, k_weight, EPS), k_eq_v_norm_reference(k, k_weight, EPS), strict=True):
        assert count_differing(a, b) == 0, (shape, tokens, dtype, kind)
        assert a.is_contiguous()


@pytest.mark.parametrize("kind", Kind, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_references_are_hfs(shape, kind, hf_sums_as_we_do):
    for dtype in DTYPES:
        buffer, q_weight, k_weight = make(5, *shape, dtype, kind=kind)
        q, k, v = (x.clone() for x in views(buffer, *shape))
        got_k, got_v = k_eq_v_norm(views(buffer, *shape)[1], k_weight, EPS)
        assert count_differing(got_k, hf_norm(k, k_weight)) == 0
        assert count_differing(got_v, hf_norm(k, None)) == 0
        qkv_norm_(*views(buffer, *shape), q_weight, k_weight, EPS)
        for x, raw, weight in zip(views(buffer, *shape), (q, k, v), (q_weight, k_weight, None), strict=True):
            assert count_differing(x, hf_norm(raw, weight)) == 0
        assert (buffer[:, -3:] == POISON).all()


def test_without_kv_only_q_changes():
    buffer, q_weight, _ = make(3, 4, 2, 32, torch.float32)
    before = buffer.clone()
    q, k, v = views(buffer, 4, 2, 32)
    qkv_norm_(q, None, None, q_weight, None, EPS)
    assert torch.equal(buffer[:, 128:], before[:, 128:])
    assert torch.equal(q, hf_like(views(before, 4, 2, 32)[0], q_weight))


def hf_like(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reference through the other op."""
    return k_eq_v_norm(x, weight, EPS)[0]


def test_heads_outside_tokens():
    """A transposed view, as of [B, heads, T, D]: any order of strides is taken."""
    x = Draw(4, Kind.NORMAL, torch.float32, "cpu").rows(7, 32)
    weight = torch.rand(32) + 0.5
    want = k_eq_v_norm(x.transpose(0, 1).contiguous(), weight, EPS)[0]
    qkv_norm_(x.transpose(0, 1), None, None, weight, None, EPS)
    assert torch.equal(x.transpose(0, 1), want)


@pytest.mark.parametrize("tokens", [0, 3])
def test_pytorch_sees_through(tokens):
    buffer, q_weight, k_weight = make(tokens, 4, 2, 32, torch.bfloat16)
    q, k, v = views(buffer, 4, 2, 32)
    if tokens == 0:  # of an empty view PyTorch's check makes a copy of negative size
        q, k, v = (x.new_empty(x.shape) for x in (q, k, v))
    torch.library.opcheck(torch.ops.gemcutter.k_eq_v_norm.default, (k, k_weight, EPS))
    for args in ((q, k, v, q_weight, k_weight, EPS), (q, None, None, q_weight, None, EPS)):
        torch.library.opcheck(torch.ops.gemcutter.qkv_norm_.default, args)


X, W = torch.ones(3, 2, 32), torch.ones(32)
REFUSED = {
    "two dims": ((torch.ones(3, 64), None, None, W, None), ValueError, r"q has shape \(3, 64\): \[tokens, heads"),
    "no heads": ((torch.ones(3, 0, 32), None, None, W, None), ValueError, "q has shape"),
    "dtype": ((X.double(), None, None, W, None), TypeError, "q is torch.float64"),
    "k's dtype": ((X, X.half(), X.half(), W, W), TypeError, "k is torch.float16"),
    "rows": ((X.transpose(1, 2), None, None, torch.ones(2), None), ValueError, "must be contiguous"),
    "weight": ((X, None, None, torch.ones(16), None), ValueError, "q_weight has shape"),
    "tokens": ((X, X[:2], X[:2], W, W), ValueError, "k has 2 tokens of head dim 32: 3 and 32"),
    "head dim": ((X, X[..., :16], X[..., :16], W, W), ValueError, "k has 3 tokens of head dim 16: 3 and 32"),
    "v's heads": ((X, X, X[:, :1], W, W), ValueError, "v has 1 heads: 2"),
    "v alone": ((X, None, X, W, None), ValueError, "only v given"),
    "k without weight": ((X, X, X, W, None), ValueError, "only k, v given"),
    "shared memory": ((X[:1].expand(3, 2, 32), None, None, W, None), ValueError, "its heads share memory"),
    "overlap": ((torch.ones(200).as_strided((3, 2, 32), (40, 32, 1)), None, None, W, None), ValueError, "q has st"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    args, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        qkv_norm_(*args, EPS)


def test_k_eq_v_refuses():
    with pytest.raises(ValueError, match="k has shape"):
        k_eq_v_norm(torch.ones(3, 64), W, EPS)
    with pytest.raises(TypeError, match="k_weight is torch.float16"):
        k_eq_v_norm(X, W.half(), EPS)


def test_kernels_interpreted():
    pytest.importorskip("triton")
    run = interpret(__file__)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_have_the_references_bits(shape, dtype):
    ops = (qkv_norm_, k_eq_v_norm)
    for tokens in (0, 1, 3, 140, 1500):  # both tiles
        for kind in Kind if tokens == 140 else (Kind.NORMAL, Kind.HEAVY):
            compare(shape, tokens, dtype, "cuda", kind, ops, pad=64)
        compare(shape, tokens, dtype, "cuda", Kind.HEAVY, ops, pad=3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_head_alone_is_head_in_a_crowd(shape):
    buffer, q_weight, k_weight = make(1500, *shape, torch.bfloat16, "cuda", Kind.HEAVY)
    raw = buffer.clone()
    qkv_norm_(*views(buffer, *shape), q_weight, k_weight, EPS)
    for token in (0, 700, 1499):
        alone = raw[token : token + 1].clone()
        qkv_norm_(*views(alone, *shape), q_weight, k_weight, EPS)
        assert count_differing(alone[0], buffer[token]) == 0


@pytest.mark.gpu
def test_kernels_past_2_to_the_31():
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    small = Draw(3 * 2, Kind.HEAVY, torch.bfloat16, "cuda").rows(256).view(3, 2, 256)
    weight = torch.full((256,), 1.5, dtype=torch.bfloat16, device="cuda")
    want_k, want_v = k_eq_v_norm_reference(small, weight, EPS)
    memory = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    for strides in ((2**30, 2**19, 1), (512, 2**31, 1)):  # far tokens; far heads
        far = memory.as_strided((3, 2, 256), strides)
        far.copy_(small)
        for got, want in zip(k_eq_v_norm(far, weight, EPS), (want_k, want_v), strict=True):
            assert count_differing(got, want) == 0
        qkv_norm_(far, None, None, weight, None, EPS)
        assert count_differing(far, want_k) == 0


if __name__ == "__main__":
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(POISON)
    kernels = (qkv_norm_launch, k_eq_v_norm_launch)
    for shape in ((3, 2, 32), (2, 1, 256), (1, 1, 512), (2, 1, 80)):
        for kind in Kind:
            compare(shape, 1, torch.bfloat16, "cpu", kind, kernels)
        for dtype in DTYPES:
            compare(shape, 3, dtype, "cpu", Kind.HEAVY, kernels)
        compare(shape, 0, torch.bfloat16, "cpu", Kind.NORMAL, kernels)
    compare((1, 1, 32), 4100, torch.bfloat16, "cpu", Kind.HEAVY, kernels)  # large tiles in both, the last not full
