"""qkv_rope_store: the reference against HF's modules, the kernel against the reference."""

import pytest
import torch
from interpreter import interpret
from store_cases import compare, make_store, poisoned
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, apply_rotary_pos_emb

from gemcutter.ops.qkv_rope_store import QkvMode, mode_of, qkv_rope_store, qkv_rope_store_reference
from gemcutter.spec import Kind, LayerSpec, RopeSpec

# heads, kv heads, head_dim, angles, mode
SHAPES = {
    "tiny": (4, 2, 32, 16, QkvMode.QKV),
    "sliding": (16, 8, 256, 128, QkvMode.QKV),
    "k-eq-v": (16, 2, 512, 64, QkvMode.Q_KEQV),
    "shared": (8, 2, 512, 64, QkvMode.Q_ONLY),
    "one-kv-head": (6, 1, 64, 8, QkvMode.QKV),
}


def by_hf(args: dict) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """q, k, v of HF's modules, [T, heads, D] each."""
    head_dim, angles = len(args["q_norm"]), args["cos"].shape[1]

    def norm(x, weight):
        module = Gemma4RMSNorm(head_dim, args["eps"], with_scale=weight is not None)
        if weight is not None:
            module.weight.data = weight
        return module(x)

    still = torch.zeros(len(args["positions"]), head_dim // 2 - angles, dtype=args["cos"].dtype)
    cos = torch.cat([args["cos"][args["positions"]], still + 1] * 2, -1)
    sin = torch.cat([args["sin"][args["positions"]], still] * 2, -1)
    heads = args["qkv"].unflatten(1, (-1, head_dim))
    n, kv = args["num_heads"], args["num_kv_heads"]
    q = apply_rotary_pos_emb(norm(heads[:, :n], args["q_norm"]), cos, sin)
    if args["mode"] is QkvMode.Q_ONLY:
        return q, None, None
    k = heads[:, n : n + kv]
    v = k if args["mode"] is QkvMode.Q_KEQV else heads[:, n + kv :]
    return q, apply_rotary_pos_emb(norm(k, args["k_norm"]), cos, sin), norm(v, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_reference_has_hfs_bits(name, dtype, hf_sums_as_we_do):
    args = make_store(*SHAPES[name], num_tokens=13, page_size=16, dtype=dtype)
    q = qkv_rope_store(**args)
    want_q, want_k, want_v = by_hf(args)
    assert torch.equal(q, want_q)
    if args["mode"] is QkvMode.Q_ONLY:
        return
    page, offset = args["slots"] // 16, args["slots"] % 16
    for cache, want in ((args["k_cache"], want_k), (args["v_cache"], want_v)):
        assert torch.equal(cache[page, :, offset], want)
        cache[page, :, offset] = float("nan")
        assert cache.isnan().all(), "a slot of nobody's was written"


def test_no_tokens():
    args = make_store(*SHAPES["sliding"], num_tokens=0, page_size=16, dtype=torch.bfloat16)
    assert qkv_rope_store(**args).shape == (0, 16, 256)
    assert args["k_cache"].isnan().all()


def test_shared_layers_leave_the_cache_alone():
    args = make_store(*SHAPES["shared"], num_tokens=5, page_size=16, dtype=torch.float32)
    cache = poisoned(3, 2, 16, 512, dtype=torch.float32, device="cpu")
    slots = torch.arange(5)
    qkv_rope_store(**args | dict(k_cache=cache, v_cache=cache, slots=slots, k_norm=args["q_norm"]))
    assert cache.isnan().all()


def test_mode_of():
    def layer(owner: int, k_eq_v: bool) -> LayerSpec:
        return LayerSpec(7, Kind.FULL, 16, 2, 512, None, RopeSpec(1e6, 64), owner, k_eq_v, 64, None)

    for owner, k_eq_v, mode in ((7, False, QkvMode.QKV), (7, True, QkvMode.Q_KEQV), (3, True, QkvMode.Q_ONLY)):
        assert mode_of(layer(owner, k_eq_v)) is mode


def test_a_row_of_the_wrong_width_is_our_bug():
    args = make_store(*SHAPES["tiny"], num_tokens=2, page_size=16, dtype=torch.float32)
    with pytest.raises(AssertionError, match="rows of 160"):
        qkv_rope_store(**args | dict(mode=QkvMode.Q_KEQV, num_heads=3))


def test_kernel_in_the_interpreter():
    run = interpret("store_cases.py")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_has_the_references_bits(name, dtype):
    for num_tokens in (1, 700):
        args = make_store(*SHAPES[name], num_tokens, 16, dtype, "cuda", pad=64)
        compare(qkv_rope_store, qkv_rope_store_reference, args)


@pytest.mark.gpu
def test_kernel_row_alone_is_row_in_a_crowd():
    args = make_store(*SHAPES["sliding"], 300, 16, torch.bfloat16, "cuda")
    crowd = qkv_rope_store(**args)
    k_cache = args["k_cache"].clone()
    for i in (0, 17, 299):
        one = {name: args[name][i : i + 1].clone() for name in ("qkv", "positions", "slots")}
        args["k_cache"].fill_(float("nan"))
        assert torch.equal(qkv_rope_store(**args | one)[0], crowd[i])
        page, offset = divmod(int(args["slots"][i]), 16)
        assert torch.equal(args["k_cache"][page, :, offset], k_cache[page, :, offset])
