"""FP8 experts: HF's eager loop with products of our own words, float64, a row alone against a crowd, refusals."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpret
from test_experts import case, error, exact
from transformers.models.gemma4 import modeling_gemma4 as hf
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

from gemcutter.ops import Quantized, experts, quantize_fp8
from gemcutter.ops.activations.activation import Activation
from gemcutter.ops.moe.expert_slots import expert_slots
from gemcutter.ops.moe.experts_fp8 import experts_fp8_reference
from gemcutter.ops.moe.experts_table import Plan, Tile
from gemcutter.ops.moe.experts_tiles import built_in_plan, built_in_tiles, takes
from gemcutter.ops.quantize_fp8 import quantize_fp8_reference
from gemcutter.ops.seams.slot_sum import slot_sum_reference


def quantized(weight: torch.Tensor) -> Quantized:
    """[E, N, K] with a scale for each of its rows."""
    rows = quantize_fp8(weight.flatten(0, 1))
    return Quantized(rows.q.view(weight.shape), rows.scale.view(*weight.shape[:2], 1))


def fp8_case(*args, **kwargs):
    """Positional as of `case`, but for the dtype."""
    x, ids, gate_up, down = case(*args, torch.bfloat16, **kwargs)
    return x, ids, quantized(gate_up), quantized(down)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows of x as FP8 keeps them, in float64; the scale as compressed-tensors has it."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-10 / 448)
    return (x / scale).to(torch.float8_e4m3fn).double() * scale


def exact_fp8(x, ids, gate_up, down) -> torch.Tensor:
    """[T, k, H]: sums in float64, rounded to x's dtype where HF does and once more to go into a product."""
    out = torch.full((*ids.shape, x.shape[1]), torch.nan, dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        both, low = (w.q[expert].double() * w.scale[expert] for w in (gate_up, down))
        gate, up = (rounded(x[token]) @ both.T).to(x.dtype).chunk(2, -1)
        out[token, slot] = rounded(F.gelu(gate, approximate="tanh") * up) @ low.T
    return out


@pytest.mark.parametrize("tokens,num_experts,top_k", [(0, 8, 2), (1, 8, 4), (23, 16, 4), (40, 4, 4)], ids=str)
def test_experts_are_hf_eager_on_rounded_values(tokens, num_experts, top_k, monkeypatch):
    """HF's loop on the dequantised weights, its linear made to round x, add up in float64 and round once."""
    x, ids, gate_up, down = fp8_case(tokens, num_experts, top_k, 64, 44)
    weights = torch.rand(tokens, top_k) * 1.5 + 0.01
    config = Gemma4TextConfig(
        hidden_size=64,
        num_experts=num_experts,
        top_k_experts=top_k,
        moe_intermediate_size=44,
        enable_moe_block=True,
    )
    config._experts_implementation = "eager"
    module = hf.Gemma4TextExperts(config)
    module.gate_up_proj.data, module.down_proj.data = (w.q.double() * w.scale for w in (gate_up, down))
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda x, w: (rounded(x) @ w.T).to(torch.bfloat16))
        want = module(x, ids, weights)
    got = slot_sum_reference(experts(x, ids, gate_up, down), ids, weights)
    assert got.dtype == want.dtype == torch.bfloat16 and got.shape == want.shape
    if tokens:
        # Float's sums differ from float64's in the last place, which seldom moves a bfloat16 or an e4m3.
        assert error(got, want.double()) < 2e-3 and (got == want).double().mean() > 0.9


def test_sums_that_are_exact_have_exactly_these_bits():
    """Small integers: what differs is a scale, a row or a rounding astray."""
    torch.manual_seed(0)
    tokens, num_experts, top_k, hidden, width = 19, 5, 3, 48, 40
    ids = torch.rand(tokens, num_experts).topk(top_k, -1).indices
    q = torch.randint(-3, 4, (tokens, hidden)).to(torch.float8_e4m3fn)
    x = Quantized(q, torch.rand(tokens, 1) / 8)
    gate_up, down = (
        Quantized(torch.randint(-2, 3, size).to(torch.float8_e4m3fn), torch.rand(*size[:2], 1))
        for size in ((num_experts, 2 * width, hidden), (num_experts, hidden, width))
    )
    got = experts(x, ids, gate_up, down)
    for token in range(tokens):
        for slot, expert in enumerate(ids[token].tolist()):
            sums = (gate_up.q[expert].double() @ x.q[token].double()).float()
            gate, up = (sums * x.scale[token] * gate_up.scale[expert, :, 0]).bfloat16().chunk(2)
            activated = quantize_fp8((F.gelu(gate, approximate="tanh") * up)[None])
            sums = down.q[expert].double() @ activated.q[0].double()
            assert sums.abs().max() * 2**9 < 2**24, "e4m3's last place is 2^-9 at least: float32 holds such sums"
            want = (sums.float() * activated.scale[0] * down.scale[expert, :, 0]).bfloat16()
            assert torch.equal(got[token, slot], want), (token, slot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_stay_what_they_are(dtype):
    x, ids, gate_up, down = case(23, 16, 4, 64, 44, dtype)
    gate_up, down = quantized(gate_up), quantized(down)
    got = experts(x, ids, gate_up, down)
    assert got.dtype == dtype and error(got, exact_fp8(x, ids, gate_up, down)) < 2e-3


def test_a_pair_is_what_quantising_makes():
    x, ids, gate_up, down = fp8_case(23, 16, 4, 64, 44)
    want = experts(x, ids, gate_up, down)
    assert torch.equal(experts(quantize_fp8(x), ids.int(), gate_up, down, True), want)
    wide = torch.full((23, 80), torch.nan, dtype=torch.bfloat16)
    wide[:, 8:72] = x
    assert torch.equal(experts(wide[:, 8:72], ids, gate_up, down), want)


def test_rows_do_not_know_each_other():
    """One of inf, one of NaN and one of zeros among them."""
    x, ids, gate_up, down = fp8_case(100, 16, 4, 192, 64)
    x[3, 5], x[4, 6], x[5] = torch.inf, torch.nan, 0
    crowd = experts(x, ids, gate_up, down)
    assert (
        crowd[3:5].isnan().all() and not crowd[5].any() and crowd[6:].isfinite().all() and crowd[6:].all(-1).any()
    )
    for some in (range(1), range(99, 100), range(6, 40), range(5, 64), range(99, 4, -7)):
        rows = torch.tensor(some)
        assert torch.equal(experts(x[rows], ids[rows], gate_up, down), crowd[rows]), rows


def test_refusals():
    x, ids, gate_up, down = fp8_case(5, 8, 2, 64, 44)
    pair = quantize_fp8(x)
    for change, kind, message in (
        (dict(x=x.double()), TypeError, "x is torch.float64"),
        (dict(x=pair._replace(q=x)), TypeError, "x is torch.bfloat16"),
        (dict(x=pair._replace(scale=pair.scale[:, 0])), ValueError, "x has .*scale"),
        (dict(x=pair._replace(q=pair.q[:, ::2])), ValueError, "x has q"),
        (dict(x=pair._replace(q=pair.q[0])), ValueError, r"x \[T, H\]"),
        (dict(ids=ids[:4]), ValueError, "each of 5 tokens"),
        (dict(ids=ids.float()), TypeError, "ids are torch.float32"),
        (dict(down=down.dequantize(torch.bfloat16)), TypeError, "quantise both weights or neither"),
        (dict(gate_up=gate_up.q), TypeError, "quantise both weights or neither"),
        (dict(x=pair, gate_up=gate_up.q, down=down.q), TypeError, "x only for quantised ones"),
        (dict(gate_up=gate_up._replace(scale=gate_up.scale.bfloat16())), TypeError, "gate_up is .*bfloat16"),
        (dict(gate_up=gate_up._replace(q=gate_up.q[:, 1:].contiguous())), ValueError, "gate_up has"),
        (dict(down=down._replace(scale=down.scale[:, :, 0])), ValueError, "down has"),
        (dict(down=down._replace(q=down.q.transpose(1, 2))), ValueError, "down has|gate_up has"),
        (dict(down=down._replace(q=down.q[0])), ValueError, "down's q"),
    ):
        args = dict(x=x, ids=ids, gate_up=gate_up, down=down) | change
        with pytest.raises(kind, match=message):
            experts(*args.values())


def test_opcheck():
    x, ids, gate_up, down = fp8_case(5, 8, 2, 64, 44)
    args = (*quantize_fp8(x), ids, *gate_up, *down, False, "silu")
    checks = [f"test_{name}" for name in ("autograd_registration", "faketensor", "aot_dispatch_dynamic")]
    # Left out is test_schema, which compares arguments in arithmetic that PyTorch has not for e4m3.
    torch.library.opcheck(torch.ops.gemcutter.experts_fp8.default, args, test_utils=checks)


# Blocks of M, N and K; the experts below, 80 deep and 48 wide, leave a part of most of them empty.
BLOCKS = [(16, 32, 32), (32, 64, 128), (64, 128, 64)]


def test_interpreted_tiles_have_the_bits_of_the_reference():
    pytest.importorskip("triton")
    done = interpret(__file__)
    assert "tiles passed" in done.stdout, done.stdout + done.stderr


def check_tiles(dtype: torch.dtype) -> None:
    """Sums that are exact in any order: what differs is a row, a column, a scale or a step of K astray."""
    for tokens, num_experts, top_k, hot in ((1, 5, 3, None), (21, 4, 2, None), (37, 7, 2, 2)):
        hidden, width = 80, 48
        scores = torch.rand(tokens, num_experts)
        if hot:
            scores[:, hot:] -= 2
        ids = scores.topk(top_k, -1).indices
        x = torch.randint(0, 2, (tokens, hidden))
        x[:, 0] = 1
        both = torch.randint(-1, 2, (num_experts, 2 * width, hidden))
        both[:, :width, 0] = 40  # gates of 8 and more, which the activation leaves as they are
        low = torch.randint(-1, 2, (num_experts, hidden, width))
        x, gate_up, down = (
            Quantized(q.to(torch.float8_e4m3fn), 1 + torch.rand(*q.shape[:-1], 1)) for q in (x, both, low)
        )
        want = exact_slots(x, ids, gate_up, down, dtype)
        for up, last in zip(BLOCKS, BLOCKS[1:] + BLOCKS[:1], strict=True):
            plan = Plan("tiles", Tile(*up, 4, 2), Tile(*last, 4, 2))
            got = expert_slots(plan, x, ids, gate_up, down, False, dtype=dtype)
            assert torch.equal(got, want), f"{plan}: {(got != want).sum()} of {want.numel()} differ"


def exact_slots(x, ids, gate_up, down, dtype: torch.dtype) -> torch.Tensor:
    slots = []
    for slot, expert in enumerate(ids.flatten().tolist()):
        token = slot // ids.shape[1]
        sums = (gate_up.q[expert].double() @ x.q[token].double()).float()
        gate, up = (sums * x.scale[token] * gate_up.scale[expert, :, 0]).to(dtype).chunk(2)
        assert gate.min() >= 8
        q, scale = quantize_fp8_reference((gate * up)[None])
        slots.append(
            ((down.q[expert].double() @ q[0].double()).float() * scale[0] * down.scale[expert, :, 0]).to(dtype)
        )
    return torch.stack(slots)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "tokens,num_experts,top_k,hidden,width",
    [
        (0, 8, 2, 64, 32),
        (1, 128, 8, 2816, 704),
        (37, 128, 8, 2816, 704),
        (300, 8, 4, 200, 72),
        (900, 16, 3, 144, 48),
    ],
    ids=str,
)
def test_gpu_sums_are_as_exact_as_a_chain_is(tokens, num_experts, top_k, hidden, width, dtype):
    """Beside what e4m3 leaves of an activation, the bits that tensor cores cut off a sum do not count."""
    x, ids, gate_up, down = case(tokens, num_experts, top_k, hidden, width, dtype, "cuda")
    gate_up, down = quantized(gate_up), quantized(down)
    got = experts(x, ids, gate_up, down)
    assert got.dtype == dtype and got.shape == (tokens, top_k, hidden)
    if tokens:
        want = exact(x, ids, *(weight.q.double() * weight.scale for weight in (gate_up, down)))
        by_floats, by_doubles = (
            error(experts_fp8_reference(x, None, ids, *gate_up, *down, False, "gelu_tanh"), want),
            error(exact_fp8(x, ids, gate_up, down), want),
        )
        print(f"relative error {error(got, want):.2e}, in float32 {by_floats:.2e}, in float64 {by_doubles:.2e}")
        assert error(got, want) <= 1.1 * by_doubles and by_floats <= 1.1 * by_doubles
        assert torch.equal(experts(quantize_fp8(x), ids, gate_up, down), got.bfloat16()) or dtype != torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("hot", [None, 8], ids=["spread", "hot"])
def test_gpu_row_alone_equals_the_row_in_a_crowd(hot):
    """All kernels at 26B shapes."""
    x, ids, gate_up, down = fp8_case(3000, 128, 8, 2816, 704, device="cuda", hot=hot)
    crowd = experts(x, ids, gate_up, down)
    values = gate_up.q, down.q
    assert len({built_in_plan(quantize_fp8(x[:n]).q, 8, *values).kernel for n in (1, 100, 3000)}) == 3
    for count in (1, 3, 16, 100, 400, 700):
        rows = torch.randperm(3000, device="cuda")[:count]
        same = (experts(x[rows], ids[rows], gate_up, down) == crowd[rows]).flatten(1).all(-1)
        assert same.all(), f"{count} rows: {int((~same).sum())} differ"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_experts,top_k,hidden,width,activation",
    [
        (128, 8, 2816, 704, Activation.GELU_TANH),
        (8, 4, 208, 80, Activation.GELU_TANH),
        (16, 3, 160, 96, Activation.SILU),
        (5, 1, 64, 288, Activation.GELU_TANH),
    ],
    ids=str,
)
def test_gpu_kernels_have_one_result(num_experts, top_k, hidden, width, activation):
    """Streams, grouped products and tiles; strange rows and an expert named twice among the others."""
    for tokens in (1, 2, 7, 8, 9, 16, 100, 700):
        for seed, hot in ((1, None), (2, top_k)):
            x, ids, gate_up, down = fp8_case(
                tokens, num_experts, top_k, hidden, width, device="cuda", seed=seed, hot=hot
            )
            if hot and top_k > 1:
                ids[-1, -1] = ids[-1, 0]
            x[0, 0] = torch.inf
            x[tokens // 2] = 0
            args = quantize_fp8(x), ids, gate_up, down
            plans = [Plan("grouped")] * (width % 32 == 0) + [Plan("stream")] * (tokens <= 16)
            plans += [Plan("tiles", *built_in_tiles(gate_up.q.dtype, rows)) for rows in (1, 30, 100)]
            assert all(takes(plan, args[0].q, gate_up.q, down.q) for plan in plans)
            assert takes(Plan("grouped"), args[0].q, gate_up.q, down.q) == (width % 32 == 0)
            want = expert_slots(plans[-1], *args, False, activation)
            rest = want.view(tokens, top_k, hidden)[1:]
            assert rest.isfinite().all() and (tokens < 3 or rest.any())
            for plan in plans:
                for settled in (False, True):
                    poison = [want.new_full((len(want), columns), torch.nan) for columns in (width, hidden)]
                    del poison  # whose memory comes back for the results
                    torch.cuda.synchronize()
                    got = expert_slots(plan, args[0], ids.int() if settled else ids, *args[2:], settled, activation)
                    same = (got == want) | (got.isnan() & want.isnan())
                    assert same.all(), f"{tokens} tokens, hot {hot}, {plan}: {int((~same).sum())} differ"


@pytest.mark.gpu
def test_gpu_experts_in_a_cuda_graph():
    """Captured once, replayed with other rows and routes: no host decision may depend on the data."""
    for tokens in (4, 40):
        x, ids, gate_up, down = fp8_case(tokens, 128, 8, 2816, 704, device="cuda")
        experts(x, ids, gate_up, down)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(x, ids, gate_up, down, settled=True)
        for seed, hot in ((1, None), (2, 8)):
            other = fp8_case(tokens, 128, 8, 2816, 704, device="cuda", seed=seed, hot=hot)
            for static, new in zip((x, ids), other[:2], strict=True):
                static.copy_(new)
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, experts(x, ids, gate_up, down))


if __name__ == "__main__":
    # Poisoned, so that an unwritten output cannot pass for one of zeros.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    torch.manual_seed(0)
    check_tiles(torch.bfloat16)
    print("tiles passed")
