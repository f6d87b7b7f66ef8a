"""seam_gate_up and seam_linear: a seam and the product behind it, with the bits of the ops one by one."""

import functools

import pytest
import torch
import torch.nn.functional as F

from gemcutter.ops.activations.geglu import gelu_mul
from gemcutter.ops.linears.gate_up import gate_up
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.linears.row_stream_hopper import stages_of, streams_behind_seam, x_bytes
from gemcutter.ops.quantize_fp8 import Quantized, pair_of, quantize_fp8
from gemcutter.ops.seams.attention_seam import attention_seam
from gemcutter.ops.seams.layer_seam import Routed, layer_seam
from gemcutter.ops.seams.seam_gate_up import seam_gate_up
from gemcutter.ops.seams.seam_linear import seam_linear
from gemcutter.verify.compare import count_differing

EPS = 1e-6
# hidden, MLP width, experts, columns of the next projection: E2B, E4B, 12B, 26B-A4B (sliding and full), 31B
RELEASED = [
    (1536, 6144, 0, 2560),
    (2560, 10240, 0, 3072),
    (3840, 15360, 0, 8192),
    (2816, 2112, 128, 8192),
    (2816, 2112, 128, 9216),
    (5376, 21504, 0, 16384),
]
ODD = [(256, 33, 0, 100), (512, 1000, 32, 1030), (768, 96, 16, 16), (320, 64, 10, 48)]
ADVERSE = {
    "inf": float("inf"), "nan": float("nan"), "huge": 3e38, "denormal": 1e-40, "minus zero": -0.0, "large": 1e4,
}  # fmt: skip


class Drawn:
    """Arguments of both, and what the ops one by one make of them. fp8: weights, but the router's, are pairs."""

    def __init__(
        self, rows, hidden, width, experts, columns, dtype=torch.bfloat16, device="cpu", seed=0, fp8=False
    ):
        self.generator, self.dtype, self.device = torch.Generator(device).manual_seed(seed), dtype, device
        self.rows, self.hidden, self.experts = rows, hidden, experts
        self.branch, self.residual = self.normal(rows, hidden), self.normal(rows, hidden, scale=3.0)
        self.norms = [1 + self.normal(hidden, scale=0.2) for _ in range(6)]
        self.gate_up = self.normal(2 * width, hidden, scale=hidden**-0.5)
        self.router = self.normal(experts, hidden) if experts else None
        self.next = self.normal(columns, hidden, scale=hidden**-0.5)
        self.gate, self.factor = self.normal(256, hidden, scale=hidden**-0.5), self.normal(rows, 256)
        self.readers = {}
        if fp8:
            scales = torch.logspace(-2, 1, 2 * width, device=device)[:, None]  # so that a lost scale is seen
            self.gate_up = quantize_fp8(self.gate_up.float() * scales)
            self.next, self.gate = quantize_fp8(self.next), quantize_fp8(self.gate)
            self.readers = dict(reader=self.next, expert_reader=self.next)  # any pair
        self.scalar = 1 + self.normal(1, scale=0.2)
        self.routed = None
        if experts:
            top_k = min(8, experts)
            ids = torch.rand(rows, experts, generator=self.generator, device=device).argsort(-1)[:, :top_k]
            weights = torch.rand(rows, top_k, generator=self.generator, device=device)
            slots = self.normal(rows, top_k, hidden)
            self.routed = Routed(slots, self.norms[4], self.norms[5], ids.contiguous(), weights)

    def normal(self, *shape, scale=1.0):
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def of_gate_up(self) -> tuple:
        post, pre, expert_pre, scale = self.norms[:4]
        more = (expert_pre, scale, self.router) if self.experts else (None, None, None)
        return self.branch, self.residual, post, pre, EPS, self.gate_up, *more

    def gate_up_one_by_one(self) -> list:
        branch, residual, post, pre, eps, weight, expert_pre, scale, router = self.of_gate_up()
        expert_reader, reader = self.readers.get("expert_reader"), self.readers.get("reader")
        hidden, mlp_in, expert_in, router_in = attention_seam(
            branch, residual, post, pre, eps, expert_pre, scale, weight, expert_reader
        )
        activated, logits = gate_up(mlp_in, weight, router_in, router, reader)
        return [hidden, activated, expert_in, logits]

    def of_linears(self) -> list[dict]:
        """To the next layer, behind experts or not, and to the gate of a per-layer input."""
        start = dict(out=self.branch, residual=self.residual, post=self.norms[0], eps=EPS)
        last = start | dict(weight=self.next, scalar=self.scalar, next_norm=self.norms[1])
        forms = [last, start | dict(weight=self.gate, factor=self.factor)]
        return forms if self.routed is None else [*forms, last | dict(routed=self.routed)]


def linear_one_by_one(out, residual, post, eps, weight, scalar=None, next_norm=None, routed=None, factor=None):
    hidden, next_in = layer_seam(out, residual, post, eps, scalar, next_norm, routed, weight)
    product = linear(hidden if next_in is None else next_in, weight)
    return [hidden, product if factor is None else gelu_mul(product, factor)]


def check(drawn: Drawn) -> None:
    found, want = [seam_gate_up(*drawn.of_gate_up(), **drawn.readers)], [drawn.gate_up_one_by_one()]
    for form in drawn.of_linears():
        found += [seam_linear(**form, settled=settled) for settled in (False, True)]
        want += [linear_one_by_one(**form)] * 2
    for i, (got, ref) in enumerate(zip(found, want, strict=True)):
        for j, (x, y) in enumerate(zip(flat(got), flat(ref), strict=True)):
            if y is None:
                assert x is None
            else:
                differing = count_differing(x, y)
                assert not differing, f"result {j} of form {i}: {differing} of {y.numel()}, {drawn.rows} rows"


def flat(results) -> list:
    """Pairs as two."""
    return [each for x in results for each in (x if isinstance(x, Quantized) else (x,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 19])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(256, 48, 0, 40), (64, 16, 12, 24)], ids=str)
def test_are_the_ops_one_by_one(shape, fp8, rows, dtype):
    drawn = Drawn(rows, *shape, dtype, fp8=fp8)
    check(drawn)
    if rows:
        # Not test_schema, which compares copies by arithmetic that PyTorch has not for e4m3.
        tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        opcheck = functools.partial(torch.library.opcheck, test_utils=tests if fp8 else ("test_schema", *tests))
        *start, weight, expert_pre, scale, router = drawn.of_gate_up()
        pair = fp8 and router is not None and dtype == torch.bfloat16
        given = *start, *pair_of(weight), expert_pre, scale, router, pair
        opcheck(torch.ops.gemcutter.seam_gate_up.default, given)
        form = dict(next_norm=None, scalar=None, routed=None, factor=None) | drawn.of_linears()[-1]
        given = [*(form[name] for name in ("out", "residual", "post", "eps")), *pair_of(form["weight"])]
        given += [form["scalar"], form["next_norm"], *(form["routed"] or (None,) * 5), form["factor"], False]
        opcheck(torch.ops.gemcutter.seam_linear.default, given)


@pytest.mark.parametrize("parts", [("weight",), ("expert_reader",), ("reader",), ("weight", "reader")], ids=str)
@pytest.mark.parametrize("rows", [1, 18])
def test_weights_of_either_kind_beside_each_other(rows, parts):
    """Layers and their parts may differ in that."""
    drawn, plain = Drawn(rows, 64, 16, 12, 24, fp8=True), Drawn(rows, 64, 16, 12, 24)
    if "weight" not in parts:
        drawn.gate_up = plain.gate_up
    for name in ("reader", "expert_reader"):
        if name not in parts:
            drawn.readers[name] = plain.next
    check(drawn)
    found = seam_gate_up(*drawn.of_gate_up(), **drawn.readers)
    assert isinstance(found[2], Quantized) == ("expert_reader" in parts)


def test_are_the_layer_in_float64():
    """The whole of both in double precision, so that no error of the ops one by one is repeated."""

    def norm(x, weight=None):
        x = x * (x.square().mean(-1, keepdim=True) + EPS) ** -0.5
        return x if weight is None else x * weight

    drawn = Drawn(3, 128, 64, 16, 40, torch.float32)
    x, residual, post, pre, _, weight, expert_pre, scale, router = (
        value.double() if isinstance(value, torch.Tensor) else value for value in drawn.of_gate_up()
    )
    close = residual + norm(x, post)
    gate, up = (norm(close, pre) @ weight.T).chunk(2, -1)
    want = [close, F.gelu(gate, approximate="tanh") * up, norm(close, expert_pre)]
    want.append((norm(close) * scale * 128**-0.5) @ router.T)
    for got, ref in zip(seam_gate_up(*drawn.of_gate_up()), want, strict=True):
        torch.testing.assert_close(got.double(), ref, rtol=1e-4, atol=1e-5)
    routed = drawn.routed
    mixed = (routed.out.double() * routed.weights.double()[..., None]).sum(1)
    branch = norm(x, routed.dense_post.double()) + norm(mixed, routed.expert_post.double())
    close = (residual + norm(branch, post)) * drawn.scalar.double()
    want = close, norm(close, drawn.norms[1].double()) @ drawn.next.double().T
    for got, ref in zip(seam_linear(**drawn.of_linears()[-1]), want, strict=True):
        torch.testing.assert_close(got.double(), ref, rtol=1e-4, atol=1e-5)


def test_refusals():
    drawn = Drawn(3, 64, 16, 12, 24)
    branch, residual, post, pre, eps, weight, expert_pre, scale, router = drawn.of_gate_up()
    for arguments, error, message in (
        ((branch.double(), residual, post, pre, eps, weight), TypeError, "attended is torch.float64"),
        ((branch, residual[:2], post, pre, eps, weight), ValueError, "residual has shape"),
        ((branch, residual, post, pre, eps, weight[:31]), ValueError, "31 rows"),
        ((branch, residual, post, pre, eps, weight, expert_pre), ValueError, "come together"),
        ((branch, residual, post, pre, eps, weight, expert_pre, scale), ValueError, "come together"),
        ((branch, residual, post, pre, eps, weight, expert_pre, scale, router[:, :32]), ValueError, "rows of 32"),
    ):
        with pytest.raises(error, match=message):
            seam_gate_up(*arguments)
    last, gated, routed = drawn.of_linears()
    for form, error, message in (
        (last | dict(scalar=None), ValueError, "come together"),
        (last | dict(weight=drawn.next.float()), TypeError, "both must agree"),
        (last | dict(weight=drawn.next[:, :32]), ValueError, "rows of 32"),
        (gated | dict(factor=drawn.factor[:, :5]), ValueError, "factor has rows of 5"),
        (gated | dict(factor=drawn.factor[:2]), ValueError, "factor has 2 rows"),
        (gated | dict(factor=drawn.factor.float()), ValueError, "factor has 3 rows of torch.float32"),
        (routed | dict(routed=drawn.routed._replace(weights=None)), ValueError, "come together"),
    ):
        with pytest.raises(error, match=message):
            seam_linear(**form)
    pair = quantize_fp8(weight)
    for wrong, error, message in (
        (Quantized(pair.q, pair.scale[:, 0]), ValueError, r"scale \(32, 1\) are needed"),
        (Quantized(pair.q[:, :32], pair.scale), ValueError, r"dense q \(32, 64\)"),
        (Quantized(pair.q.float(), pair.scale), TypeError, "weight is torch.float32"),
    ):
        for rows in (1, 3):
            start = branch[:rows], residual[:rows], post, pre, eps, wrong
            with pytest.raises(error, match=message):
                seam_gate_up(*start)
        with pytest.raises(error, match=message):
            seam_linear(**last | dict(weight=wrong))
    given = branch, residual, post, pre, eps, weight, None, None, None, None, True
    with pytest.raises(ValueError, match="no experts' input to quantise"):
        torch.ops.gemcutter.seam_gate_up(*given)


@pytest.mark.parametrize("itemsizes", [(2, 2), (1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("depth", [256, 512, 1536, 2560, 2816, 3072, 3840, 5376])
def test_stages_fit(depth, itemsizes):
    """Of weights and of x: FP8 beside a router takes x of 16 bits, too. More programs than SMs go in pairs."""
    x = x_bytes(depth, itemsizes[1])
    assert x >= depth * 8 * itemsizes[1]
    for programs in (1, 132, 133, 1000):
        stages = stages_of(depth, itemsizes[0], x, programs)
        assert 1 <= stages and stages * 256 <= depth
        size = x + stages * 64 * 256 * itemsizes[0] + 256  # and barriers
        assert size <= 227 * 1024
        assert size * 2 <= 226 * 1024 + 512 or programs <= 132 or 2 in itemsizes


def test_streams_what_was_measured(monkeypatch):
    monkeypatch.setattr("gemcutter.ops.linears.row_stream_hopper.loads_by_tma", lambda *matrices: True)
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    for hidden, *_ in RELEASED:
        x, weight = half(1, hidden), half(8, hidden)
        pair = torch.empty(8, hidden, dtype=torch.float8_e4m3fn)
        assert streams_behind_seam(x, weight) == (hidden <= 3072) and streams_behind_seam(x, pair)
        assert streams_behind_seam(x, pair, slots=True) == (hidden <= 3072)
        assert not streams_behind_seam(x.expand(2, -1), weight) and not streams_behind_seam(x.float(), pair)
    assert streams_behind_seam(half(1, 256), half(8, 256)) and not streams_behind_seam(half(1, 320), half(8, 320))


def poison() -> None:
    """What the allocator hands out next."""
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").fill_(255)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [*RELEASED, *ODD], ids=str)
def test_gpu_have_the_bits_of_the_ops_one_by_one(shape, fp8):
    for rows in (1, 2, 9, 65):
        for dtype in (torch.bfloat16, torch.float16) if rows == 1 else (torch.bfloat16,):
            drawn = Drawn(rows, *shape, dtype, "cuda", fp8=fp8)
            poison()
            check(drawn)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kind", ADVERSE)
def test_gpu_adverse_rows(kind, fp8):
    """Values of a kind here and there, and throughout, in what the seams read."""
    for shape in RELEASED[1], RELEASED[3]:
        for each in (slice(5, None, 700), slice(None)):
            drawn = Drawn(1, *shape, device="cuda", seed=len(kind), fp8=fp8)
            sources = [drawn.branch, drawn.residual]
            sources += [drawn.routed.out[:, 3], drawn.routed.out[:, 6]] if drawn.routed else []
            for x in sources:
                kept = [y.clone() for y in sources]
                x[:, each] = ADVERSE[kind]
                check(drawn)
                for y, old in zip(sources, kept, strict=True):
                    y.copy_(old)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_a_row_alone_and_in_a_crowd(fp8):
    drawn = Drawn(20, *RELEASED[3], device="cuda", fp8=fp8)
    drawn.readers.pop("reader", None)  # 20 rows activated would come quantised, one would not
    readers = drawn.readers
    crowd = [seam_gate_up(*drawn.of_gate_up(), **readers), *(seam_linear(**form) for form in drawn.of_linears())]
    for row in (0, 19):
        alone = Drawn(20, *RELEASED[3], device="cuda", fp8=fp8)
        one = slice(row, row + 1)
        alone.branch, alone.residual, alone.factor = (x[one] for x in (drawn.branch, drawn.residual, drawn.factor))
        out, dense_post, expert_post, ids, weights = drawn.routed
        alone.routed = Routed(out[one], dense_post, expert_post, ids[one], weights[one])
        found = [
            seam_gate_up(*alone.of_gate_up(), **readers),
            *(seam_linear(**form) for form in alone.of_linears()),
        ]
        for got, ref in zip(found, crowd, strict=True):
            for x, y in zip(flat(got), flat(ref), strict=True):
                assert not count_differing(x, y[one])


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_in_a_chain(fp8):
    """Results of the ops ahead, read by kernels that came before those were done; replayed on new inputs."""
    drawn = Drawn(1, *RELEASED[3], device="cuda", fp8=fp8)
    down, spread = drawn.normal(2816, 2112, scale=0.02), drawn.normal(8 * 2816, 2816, scale=0.02)
    if fp8:
        down, spread = quantize_fp8(down), quantize_fp8(spread)
    first = Quantized(spread.q[:2816], spread.scale[:2816]) if fp8 else spread[:2816]
    branch = drawn.branch.clone()

    def layer(fused: bool = True) -> list[torch.Tensor]:
        post, pre, expert_pre, scale = drawn.norms[:4]
        attended = linear(branch, first)
        start = attended, drawn.residual, post, pre, EPS
        if fused:
            hidden, activated, expert_in, logits = seam_gate_up(
                *start, drawn.gate_up, expert_pre, scale, drawn.router, down, spread
            )
        else:
            hidden, mlp_in, expert_in, router_in = attention_seam(*start, expert_pre, scale, drawn.gate_up, spread)
            activated, logits = gate_up(mlp_in, drawn.gate_up, router_in, drawn.router, down)
        slots = linear(expert_in, spread).view(1, 8, 2816)
        out = linear(activated, down)
        form = dict(
            out=out, residual=hidden, post=post, eps=EPS, weight=drawn.next, scalar=drawn.scalar, next_norm=pre
        )
        form |= dict(routed=drawn.routed._replace(out=slots))
        return [logits, *(seam_linear(**form, settled=True) if fused else linear_one_by_one(**form))]

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = layer()
    for turn in range(20):
        branch.copy_(drawn.normal(1, 2816, scale=turn + 1.0))
        drawn.residual.copy_(drawn.normal(1, 2816))
        want = [x.clone() for x in layer(fused=False)]
        for x in outs:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(outs, want, strict=True)), turn
