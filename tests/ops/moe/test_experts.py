"""Experts: the reference against HF's eager loop, the kernels against float64, a row alone against a crowd."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma4 import modeling_gemma4 as hf
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from gemcutter.ops.activations.activation import Activation
from gemcutter.ops.activations.geglu import geglu
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.moe.expert_slots import expert_slots
from gemcutter.ops.moe.experts import experts, experts_reference
from gemcutter.ops.moe.experts_stream_hopper import stream_experts, streams
from gemcutter.ops.moe.experts_table import Plan
from gemcutter.ops.moe.experts_tiles import built_in_plan, built_in_tiles
from gemcutter.ops.moe.select_experts import select_experts
from gemcutter.ops.seams.slot_sum import slot_sum_reference


def case(tokens, num_experts, top_k, hidden, width, dtype, device="cpu", seed=0, hot=None):
    """Inputs; with `hot`, every token goes to the first `hot` experts only."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*shape, scale):
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    x = randn(tokens, hidden, scale=1.0)
    scores = torch.rand(tokens, num_experts, generator=g, device=device)
    if hot:
        scores[:, hot:] -= 2
    ids = scores.topk(top_k, -1).indices
    gate_up = randn(num_experts, 2 * width, hidden, scale=hidden**-0.5)
    down = randn(num_experts, hidden, width, scale=width**-0.5)
    return x, ids, gate_up, down


def exact(x, ids, gate_up, down, settled=False, activation=Activation.GELU_TANH):
    """[T, k, H] of float64 without rounding, on the CPU's or GPU's float64 units."""
    out = torch.full((*ids.shape, x.shape[1]), float("nan"), dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        gate, up = (x[token].double() @ gate_up[expert].double().T).chunk(2, -1)
        gate = F.silu(gate) if activation == Activation.SILU else F.gelu(gate, approximate="tanh")
        out[token, slot] = (gate * up) @ down[expert].double().T
    return out


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens,num_experts,top_k", [(0, 8, 2), (1, 8, 4), (23, 16, 4), (40, 4, 4), (9, 128, 8)], ids=str
)
def test_experts_are_hf_eager(tokens, num_experts, top_k, dtype, activation, monkeypatch):
    """HF's own bits, once its products are made of 16 rows at a time as ours are, and ours are added up."""
    x, ids, gate_up, down = case(tokens, num_experts, top_k, 64, 44, dtype)
    weights = torch.rand(tokens, top_k) * 1.5 + 0.01
    shape = dict(hidden_size=64, moe_intermediate_size=44)
    if activation == Activation.SILU:
        config, module = Glm4MoeConfig(**shape, n_routed_experts=num_experts), Glm4MoeExperts
    else:
        config, module = (
            Gemma4TextConfig(**shape, num_experts=num_experts, enable_moe_block=True),
            hf.Gemma4TextExperts,
        )
    config._experts_implementation = "eager"
    module = module(config).to(dtype)
    module.gate_up_proj.data, module.down_proj.data = gate_up, down
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", sixteen_rows_at_a_time(torch.nn.functional.linear))
        want = module(x, ids, weights)
    slots = experts(x, ids, gate_up, down, activation=activation)
    assert torch.equal(slot_sum_reference(slots, ids, weights), want)
    assert torch.equal(experts(x, ids.int(), gate_up, down, activation=activation), slots)
    if tokens:
        assert error(slots, exact(x, ids, gate_up, down, activation=activation)) < (
            1e-6 if dtype == torch.float32 else 0.01
        )


def sixteen_rows_at_a_time(linear):
    def blockwise(x, weight):
        blocks = [
            linear(F.pad(x[i : i + 16], (0, 0, 0, max(0, i + 16 - len(x)))), weight) for i in range(0, len(x), 16)
        ]
        return torch.cat(blocks)[: len(x)]

    return blockwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hot", [None, 4], ids=["spread", "hot"])
def test_row_alone_equals_the_row_in_a_crowd(hot, dtype):
    x, ids, gate_up, down = case(100, 16, 4, 192, 64, dtype, hot=hot)
    crowd = experts(x, ids, gate_up, down)
    for some in (range(1), range(99, 100), range(3, 40), range(64), range(99, -1, -7)):
        rows = torch.tensor(some)
        assert torch.equal(experts(x[rows], ids[rows], gate_up, down), crowd[rows]), rows


def test_refusals():
    x, ids, gate_up, down = case(5, 8, 2, 64, 44, torch.float32)
    for change, error, message in (
        (dict(x=x.double()), TypeError, "x is torch.float64"),
        (dict(x=x[0]), ValueError, "two dims"),
        (dict(ids=ids.float()), TypeError, "ids are torch.float32"),
        (dict(ids=ids[:4]), ValueError, "each of 5 tokens"),
        (dict(ids=ids[:, ::2]), ValueError, "dense"),
        (dict(gate_up=gate_up.half()), TypeError, "gate_up is torch.float16"),
        (dict(gate_up=gate_up[:, 1:].contiguous()), ValueError, r"gate_up \(8, 87, 64\)"),
        (dict(down=down.transpose(1, 2)), ValueError, "are needed"),
        (dict(down=down[0]), ValueError, "are needed"),
        (dict(activation="relu"), ValueError, "activation is 'relu'"),
    ):
        args = dict(x=x, ids=ids, gate_up=gate_up, down=down) | change
        with pytest.raises(error, match=message):
            experts(**args)


def test_opcheck():
    args = case(5, 8, 2, 64, 44, torch.bfloat16)
    for x in (args[0], args[0].repeat(1, 2)[:, :64]):
        torch.library.opcheck(torch.ops.gemcutter.experts.default, (x, *args[1:], False, "silu"))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "tokens,num_experts,top_k,hidden,width",
    [
        (0, 8, 2, 64, 32),
        (1, 128, 8, 2816, 704),
        (37, 128, 8, 2816, 704),
        (300, 8, 4, 200, 72),
        (900, 16, 3, 136, 40),
    ],
    ids=str,
)
def test_gpu_experts_are_as_exact_as_hf(tokens, num_experts, top_k, hidden, width, dtype, activation):
    args = *case(tokens, num_experts, top_k, hidden, width, dtype, "cuda"), False, activation
    got = experts(*args)
    assert got.dtype == dtype and got.shape == (tokens, top_k, hidden)
    if tokens:
        want = exact(*args)
        # The slack is for float32: one accumulator over 2816 products, where cuBLAS may split them.
        got_error, hf_error = error(got, want), error(experts_reference(*args), want)
        print(f"relative error {got_error:.2e}, HF eager's {hf_error:.2e}")
        assert got_error <= 1.5 * hf_error + 2e-6
        assert torch.equal(experts(args[0], args[1].int(), *args[2:]), got)


@pytest.mark.gpu
@pytest.mark.parametrize("hot", [None, 8], ids=["spread", "hot"])
def test_gpu_row_alone_equals_the_row_in_a_crowd(hot):
    """All kernels at 26B shapes; tiles of BLOCK_M = 16 run mma.sync, the larger ones wgmma."""
    x, ids, gate_up, down = case(5000, 128, 8, 2816, 704, torch.bfloat16, "cuda", hot=hot)
    crowd = experts(x, ids, gate_up, down)
    assert len({built_in_plan(x[:n], 8, gate_up, down) for n in (1, 100, 700, 5000)}) == 4
    for count in (1, 3, 100, 700):
        rows = torch.randperm(5000, device="cuda")[:count]
        got = experts(x[rows], ids[rows], gate_up, down)
        same = (got == crowd[rows]).flatten(1).all(-1)
        off = (got.double() - crowd[rows].double()).abs().max()
        assert same.all(), f"{count} rows: {int((~same).sum())} differ, by up to {off}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "num_experts,top_k,hidden,width",
    [(128, 8, 2816, 704), (8, 4, 200, 72), (16, 3, 136, 40), (5, 1, 64, 264)],
    ids=str,
)
@pytest.mark.parametrize("activation", Activation)
def test_gpu_streamed_experts_have_the_bits_of_the_sorted(num_experts, top_k, hidden, width, dtype, activation):
    for tokens in (1, 2, 7, 8, 9, 16):
        for seed, hot in ((1, None), (2, top_k)):
            x, ids, gate_up, down = case(tokens, num_experts, top_k, hidden, width, dtype, "cuda", seed, hot)
            if hot and top_k > 1:
                ids[-1, -1] = ids[-1, 0]  # an expert that a token names twice
            x[0, 0] = float("inf")  # and the tokens beside it are not to notice
            plan = Plan("tiles", *built_in_tiles(dtype, tokens * top_k / num_experts))
            want = expert_slots(plan, x, ids, gate_up, down, False, activation)
            assert streams(x, gate_up, down)
            for kind in (ids, ids.int()):
                for settled in (False, True):
                    torch.cuda.synchronize()
                    got = stream_experts(x, kind, gate_up, down, settled, activation)
                    same = (got == want) | (got.isnan() & want.isnan())
                    assert same.all(), f"{tokens} tokens, hot {hot}, {kind.dtype}, settled {settled}"


@pytest.mark.gpu
def test_gpu_experts_wait_for_a_choice_that_geglu_settles():
    """The chain of a layer, as a graph: were the choice read too early, it would be the one before."""
    tokens, shape = 4, (128, 8, 2816, 704)
    x, _, gate_up, down = case(tokens, *shape, torch.bfloat16, "cuda")
    logits, dense = x.new_empty(tokens, 128), torch.randn(2 * 2112, 2816, device="cuda").bfloat16()
    out, scale = torch.randn(2816, 2112, device="cuda").bfloat16(), torch.ones(128, device="cuda")

    def layer():
        ids, _ = select_experts(logits, scale, 8)
        mlp = linear(geglu(linear(x, dense)), out)
        return experts(x, ids, gate_up, down, settled=True), ids, mlp

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several = [layer() for _ in range(4)]
    for seed in range(20):
        logits.copy_(torch.randn(tokens, 128, generator=torch.Generator().manual_seed(seed)))
        for got, ids, _ in several:
            got.fill_(float("nan"))
            ids.copy_(torch.arange(8, device="cuda") + seed % 100)
        graph.replay()
        for got, ids, _ in several:
            assert torch.equal(ids, select_experts(logits, scale, 8)[0])
            assert torch.equal(got, experts(x, ids, gate_up, down)), seed


@pytest.mark.gpu
def test_gpu_experts_in_a_cuda_graph():
    """Captured once, replayed with other routes: no host decision may depend on the data."""
    args = case(16, 128, 8, 2816, 704, torch.bfloat16, "cuda")
    experts(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(*args)
    for seed, hot in ((1, None), (2, 8)):
        other = case(16, 128, 8, 2816, 704, torch.bfloat16, "cuda", seed=seed, hot=hot)
        for static, new in zip(args[:2], other[:2], strict=True):
            static.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, experts(*args))
