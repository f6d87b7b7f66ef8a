"""qkv_rope_store: the reference against HF's modules, the kernel against the reference."""

from pathlib import Path

import pytest
import torch
from interpreter import interpret
from store_cases import compare, make_store
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, apply_rotary_pos_emb

from gemcutter.ops.attention.qkv_rope_store import QkvMode, mode_of, qkv_rope_store, qkv_rope_store_reference
from gemcutter.spec import Kind, LayerSpec, RopeSpec
from gemcutter.verify.compare import POISON, count_differing
from gemcutter.verify.inputs import Kind as Values

# heads, kv heads, head_dim, angles, mode
SHAPES = {
    "tiny": (4, 2, 32, 16, QkvMode.QKV),
    "sliding": (16, 8, 256, 128, QkvMode.QKV),
    "k-eq-v": (16, 2, 512, 64, QkvMode.Q_KEQV),
    "shared": (8, 2, 512, 64, QkvMode.Q_ONLY),
    "one-kv-head": (6, 1, 64, 8, QkvMode.QKV),
    "80 dims": (5, 3, 80, 20, QkvMode.QKV),
    "96 dims": (4, 2, 96, 48, QkvMode.Q_KEQV),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


@pytest.mark.parametrize("values", Values, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_reference_has_hfs_bits(name, values, hf_sums_as_we_do):
    for dtype in DTYPES:
        args = make_store(*SHAPES[name], num_tokens=13, page_size=16, dtype=dtype, kind=values)
        want_q, want_k, want_v = by_hf(args)
        assert count_differing(qkv_rope_store(**args), want_q) == 0
        if args["mode"] is QkvMode.Q_ONLY:
            continue
        page, offset = args["slots"] // 16, args["slots"] % 16
        for cache, want in ((args["k_cache"], want_k), (args["v_cache"], want_v)):
            assert count_differing(cache[page, :, offset], want) == 0
            cache[page, :, offset] = POISON
            assert (cache == POISON).all(), "a slot of nobody's was written"


@pytest.mark.parametrize("name", ["tiny", "k-eq-v", "96 dims"])
def test_an_fp8_cache_takes_what_hf_makes(name, hf_sums_as_we_do):
    for values in Values:
        args = make_store(*SHAPES[name], num_tokens=13, page_size=16, dtype=torch.bfloat16, kind=values, fp8=True)
        want_q, *wanted = by_hf(args)
        assert count_differing(qkv_rope_store(**args), want_q) == 0
        page, offset = args["slots"] // 16, args["slots"] % 16
        for cache, want, scale in zip((args["k_cache"], args["v_cache"]), wanted, args["kv_scales"], strict=True):
            divided = (want.double() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert count_differing(cache[page, :, offset], divided) == 0
            cache.view(torch.uint8)[page, :, offset] = 1
            assert (cache.view(torch.uint8) == 1).logical_or(cache.float() == POISON).all()


def test_pairs_that_do_not_turn_are_multiplied():
    """Only there would a copy be possible, and its bits others: HF multiplies an infinity by sin 0."""
    args = make_store(*SHAPES["shared"], 5, 16, torch.float32, kind=Values.INF)
    q = qkv_rope_store(**args)
    still = torch.cat([q[..., 64:256], q[..., 320:]], -1)
    assert still.isnan().any()
    assert torch.equal(q[..., 64:256].isnan(), q[..., 320:].isnan()), "an infinity makes both of a pair NaN"


def test_no_tokens():
    args = make_store(*SHAPES["sliding"], num_tokens=0, page_size=16, dtype=torch.bfloat16)
    assert qkv_rope_store(**args).shape == (0, 16, 256)
    assert (args["k_cache"] == POISON).all()


def test_shared_layers_leave_the_cache_alone():
    args = make_store(*SHAPES["shared"], num_tokens=5, page_size=16, dtype=torch.float32)
    cache = torch.full((3, 2, 16, 512), float(POISON))
    slots = torch.arange(5)
    qkv_rope_store(**args | dict(k_cache=cache, v_cache=cache, slots=slots, k_norm=args["q_norm"]))
    assert (cache == POISON).all()


def test_mode_of():
    def layer(owner: int, k_eq_v: bool) -> LayerSpec:
        return LayerSpec(7, Kind.FULL, 16, 2, 512, None, RopeSpec(1e6, 64), owner, k_eq_v, 64, None)

    for owner, k_eq_v, mode in ((7, False, QkvMode.QKV), (7, True, QkvMode.Q_KEQV), (3, True, QkvMode.Q_ONLY)):
        assert mode_of(layer(owner, k_eq_v)) is mode


@pytest.mark.parametrize("name", ["tiny", "96 dims", "shared"])
@pytest.mark.parametrize("num_tokens, fp8", [(0, False), (3, False), (3, True)])
def test_pytorch_sees_through(name, num_tokens, fp8):
    args = make_store(*SHAPES[name], num_tokens, 16, torch.bfloat16, pad=8, fp8=fp8)
    args["mode"] = args["mode"].value
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not fp8:  # PyTorch compares what an op mutates with a product, and has none of FP8
        checks.append("test_schema")
    torch.library.opcheck(torch.ops.gemcutter.qkv_rope_store.default, tuple(args.values()), test_utils=checks)


T3 = torch.arange(3)
REFUSED = {
    "width": (dict(num_heads=3), ValueError, r"rows of 256: mode qkv with 3 heads .* of 32 needs 224"),
    "mode": (dict(mode=QkvMode.Q_KEQV), ValueError, r"mode q_keqv .* needs 192"),
    "heads": (dict(num_heads=0), ValueError, "at least 1"),
    "qkv dtype": (dict(qkv=torch.zeros(3, 256).double()), TypeError, "qkv is torch.float64"),
    "qkv dims": (dict(qkv=torch.zeros(3, 8, 32)), ValueError, "two dims"),
    "qkv strides": (dict(qkv=torch.zeros(256, 3).t()), ValueError, r"rows must be contiguous"),
    "odd head dim": (dict(q_norm=torch.ones(31)), ValueError, "31 elements: rope turns pairs"),
    "q_norm dtype": (dict(q_norm=torch.ones(32).half()), TypeError, "q_norm is torch.float16"),
    "k_norm": (dict(k_norm=torch.ones(16)), ValueError, "k_norm has shape"),
    "cos dtype": (dict(cos=torch.ones(4000, 16).bfloat16()), TypeError, "cos is torch.bfloat16"),
    "angles": (dict(cos=torch.ones(9, 17), sin=torch.ones(9, 17)), ValueError, "up to 16 angles"),
    "table strides": (dict(sin=torch.ones(16, 4000).t()), ValueError, "sin has strides"),
    "two tables": (dict(sin=torch.ones(4000, 8)), ValueError, "they are of one table"),
    "positions dtype": (dict(positions=T3.int()), TypeError, "positions is torch.int32"),
    "positions length": (dict(positions=torch.arange(4)), ValueError, "each of 3 rows"),
    "slots strides": (dict(slots=torch.arange(6)[::2]), ValueError, "slots has shape"),
    "no slots": (dict(slots=None), ValueError, "slots: in mode qkv they are needed"),
    "cache heads": (dict(k_cache=torch.zeros(4, 3, 16, 32)), ValueError, r"dense \[pages, 2, page size, 32\]"),
    "cache strides": (dict(v_cache=torch.zeros(4, 16, 2, 32).transpose(1, 2)), ValueError, "v_cache has shape"),
    "cache dtype": (dict(k_cache=torch.zeros(4, 2, 16, 32).half()), TypeError, "k_cache is torch.float16"),
    "no FP8 cache": (dict(kv_scales=torch.ones(2, 2)), TypeError, "with kv_scales torch.float8_e4m3fn"),
    "no scales": (dict(k_cache=torch.zeros(4, 2, 16, 32).to(torch.float8_e4m3fn)), TypeError, "without kv_scales"),
    "two caches": (dict(v_cache=torch.zeros(5, 2, 16, 32)), ValueError, "k_cache's"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    changed, error, words = REFUSED[name]
    args = make_store(*SHAPES["tiny"], 3, 16, torch.float32)
    with pytest.raises(error, match=words):
        qkv_rope_store(**args | changed)
    if args["k_cache"] is not None:
        assert (args["k_cache"] == POISON).all(), "something was written all the same"


def test_the_op_refuses_what_has_nowhere_to_go():
    """By its own name nothing takes the cache away from a layer without one."""
    args = make_store(*SHAPES["shared"], 3, 16, torch.float32)
    cache = torch.zeros(2, 2, 16, 512)
    args = args | dict(k_cache=cache, mode="q_only")
    scales = args | dict(k_cache=None, kv_scales=torch.ones(2, 2))
    with pytest.raises(ValueError, match="kv_scales: in mode q_only nothing is stored"):
        torch.ops.gemcutter.qkv_rope_store(*scales.values())
    with pytest.raises(ValueError, match="k_cache: in mode q_only nothing is stored"):
        torch.ops.gemcutter.qkv_rope_store(*args.values())
    with pytest.raises(ValueError, match="q_and_a"):
        torch.ops.gemcutter.qkv_rope_store(*(args | dict(mode="q_and_a")).values())


def test_kernel_interpreted():
    pytest.importorskip("triton")
    run = interpret(Path(__file__).with_name("store_cases.py"))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_has_the_references_bits(name, dtype):
    for num_tokens in (0, 1, 130, 700):  # both tiles
        for values in Values if num_tokens == 130 else (Values.NORMAL, Values.HEAVY):
            for fp8 in (False, True):
                args = make_store(*SHAPES[name], num_tokens, 16, dtype, "cuda", pad=64, kind=values, fp8=fp8)
                compare(qkv_rope_store, qkv_rope_store_reference, args)
    args = make_store(*SHAPES[name], 33, 16, dtype, "cuda", pad=3)  # rows that no vector is aligned to
    compare(qkv_rope_store, qkv_rope_store_reference, args)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sliding", "k-eq-v", "96 dims"])
def test_kernel_row_alone_is_row_in_a_crowd(name):
    args = make_store(*SHAPES[name], 300, 16, torch.bfloat16, "cuda", kind=Values.HEAVY)
    crowd = qkv_rope_store(**args)
    caches = {cache: args[cache].clone() for cache in ("k_cache", "v_cache")}
    for i in (0, 17, 299):
        one = {part: args[part][i : i + 1].clone() for part in ("qkv", "positions", "slots")}
        args["k_cache"].fill_(POISON), args["v_cache"].fill_(POISON)
        assert count_differing(qkv_rope_store(**args | one)[0], crowd[i]) == 0
        page, offset = divmod(int(args["slots"][i]), 16)
        for cache, want in caches.items():
            assert count_differing(args[cache][page, :, offset], want[page, :, offset]) == 0


@pytest.mark.gpu
def test_kernel_in_a_graph():
    args = make_store(*SHAPES["sliding"], 9, 16, torch.bfloat16, "cuda")
    want = qkv_rope_store(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = qkv_rope_store(**args)
    kept = args["k_cache"].clone()
    got.fill_(POISON), args["k_cache"].fill_(POISON)
    graph.replay()
    assert count_differing(got, want) == 0 and count_differing(args["k_cache"], kept) == 0


@pytest.mark.gpu
def test_kernel_past_2_to_the_31():
    """Elements of qkv's rows, of q and of the caches beyond what an int32 counts, in 17 GB."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    heads, kv_heads, head_dim, page_size = 16, 8, 256, 16
    width = (heads + 2 * kv_heads) * head_dim
    num_tokens = 2**31 // (heads * head_dim) + 5
    small = make_store(*SHAPES["sliding"], 3, page_size, torch.bfloat16, "cuda", kind=Values.HEAVY)
    num_pages = 2**31 // (kv_heads * page_size * head_dim) + 1
    caches = [
        torch.full((num_pages, kv_heads, page_size, head_dim), POISON, dtype=torch.bfloat16, device="cuda")
        for _ in range(2)
    ]
    large = (
        small
        | dict(
            qkv=small["qkv"][:1].expand(num_tokens, -1),  # one row for all: only results are large
            positions=small["positions"][:1].repeat(num_tokens),
            slots=torch.arange(num_tokens, device="cuda") + num_pages * page_size - num_tokens,
            k_cache=caches[0],
            v_cache=caches[1],
        )
    )
    q = qkv_rope_store(**large)
    want = qkv_rope_store_reference(**small)
    page, offset = divmod(int(small["slots"][0]), page_size)
    for token in (0, 1, num_tokens // 2, num_tokens - 2, num_tokens - 1):
        assert count_differing(q[token], want[0]) == 0
        at, place = divmod(int(large["slots"][token]), page_size)
        for name in ("k_cache", "v_cache"):
            assert count_differing(large[name][at, :, place], small[name][page, :, offset]) == 0
    assert (caches[0].view(-1)[: 2**30] == POISON).all(), "an offset came round"
    del q, large, caches
    far = torch.empty(2**31 + width, dtype=torch.bfloat16, device="cuda").as_strided((3, width), (2**30, 1))
    far.copy_(small["qkv"])
    assert count_differing(qkv_rope_store(**small | dict(qkv=far)), want) == 0
