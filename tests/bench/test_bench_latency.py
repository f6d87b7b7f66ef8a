"""One batch, timed and taken apart: names by hand, times by a clock of our own, the whole over carat."""

import json
import random
import re
import time
from types import SimpleNamespace

import pytest
import torch

from gemcutter.bench import latency
from gemcutter.bench.kernels import PARTS, kernels_of_ops, parts_of
from gemcutter.bench.latency import STAGES, Driver, Latency, measure
from gemcutter.bench.latency_profile import Ran, Steps, watch
from gemcutter.bench.latency_roofline import decode_roofline, prefill_roofline
from gemcutter.bench.roof import Roof, measure_roof
from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.files import locate
from gemcutter.cli import main
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine
from gemcutter.model import cost
from gemcutter.model.cost import Part
from gemcutter.schedule.request import Update

L, E, A, H, N, R, O = Part  # noqa: E741

# Kernels of a GPU as its profiler names them, with their parts.
NVJET, SPLIT = (
    "nvjet_tst_64x8_64x16_4x1_v_bz_TNT",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::x)",
)
ATTENTION = [(NVJET, L), (SPLIT, L), ("_qkv_rope_store_kernel", N), ("_partial_kernel", A), ("_merge_kernel", A),
             ("_linear_kernel", L), ("_attention_seam_kernel", N)]  # fmt: skip
DENSE = [("void gemv2T_kernel_val<int, int, __nv_bfloat16>()", L), ("_gelu_mul_kernel", O), (NVJET, L)]
MOE = [*DENSE, (NVJET, L), ("_select_kernel", R), ("_rank_kernel", R), ("_place_kernel", R), ("_up_kernel", E),
       ("_down_kernel", E)]  # fmt: skip
BEGIN = [("Memcpy HtoD (Pinned -> Device)", O), ("_embed_kernel", O), ("_rms_norm_kernel", N)]
INDEX = ("void at::native::index_elementwise_kernel<128, 4>(long)", O)
END = [INDEX, (NVJET, H), (SPLIT, H), ("_softcap_kernel", H), ("void at::native::reduce_kernel<512, 1>()", O)]
CAPLESS = [INDEX, ("_linear_kernel", H), ("void at::native::reduce_kernel<512, 1>()", O)]
SEAM = [("_layer_seam_kernel", N)]
GATE = [
    *SEAM,
    (NVJET, L),
    ("void at::native::vectorized_elementwise_kernel<4>()", O),
    (NVJET, L),
]  # per-layer input


@pytest.mark.parametrize("end", [END, CAPLESS])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "layer", [ATTENTION + DENSE + SEAM, ATTENTION + MOE + SEAM, ATTENTION + DENSE + GATE + SEAM]
)
def test_the_head_is_the_product_that_no_layer_follows(layer, steps, end):
    whole = (BEGIN + layer * 4 + end) * steps
    assert parts_of([name for name, _ in whole]) == [part for _, part in whole]


def test_ops_of_a_cpu():
    names = ["gemcutter::rms_norm", "aten::linear", "gemcutter::qkv_rope_store", "aten::matmul", "aten::linear",
             "gemcutter::layer_seam", "aten::linear", "gemcutter::softcap_", "aten::sort"]  # fmt: skip
    assert parts_of(names) == [N, L, N, O, L, N, H, H, O]
    assert parts_of([]) == []


def test_every_kernel_of_ours_has_a_part_or_is_known_to_have_none():
    found = kernels_of_ops()
    assert {"_up_kernel": "experts_tiled", "_partial_kernel": "attend_decode"}.items() <= found.items()
    elsewhere = {"geglu", "geglu_fp8", "swiglu", "embed", "per_layer_inputs"}
    assert set(found.values()) - PARTS.keys() <= elsewhere, "give the new op's kernels a part, or name it here"


# The clock


class ScriptedEngine:
    """A step takes the seconds that its script says; the first `prefills` steps begin one request each."""

    def __init__(self, seconds, prefills, context=1000):
        self.seconds, self.prefills, self.now = iter(seconds), prefills, 50.0
        self.spec, self.config = SimpleNamespace(vocab=1024), SimpleNamespace(device="cpu")
        self.context_length, self.prompts = context, []
        self.waiting, self.running = [], {}

    @property
    def has_work(self):
        return bool(self.waiting or self.running)

    def submit(self, request):
        self.prompts.append(request.prompt_ids)
        self.waiting.append(request)

    def abort(self, id):
        self.waiting = [r for r in self.waiting if r.id != id]
        self.running.pop(id, None)

    def step(self):
        torch.ones(1)  # something for the profiler
        self.now += next(self.seconds)
        for _ in range(len(self.waiting) if not self.prefills else 1):
            if self.waiting:
                request = self.waiting.pop(0)
                self.running[request.id] = [request, 0]
        updates = []
        for id, state in list(self.running.items()):
            state[1] += 1
            room = self.context_length - len(state[0].prompt_ids)
            ends = state[1] >= min(state[0].params.max_tokens or room, room)
            updates.append(Update(id=id, token_ids=[7], finish_reason="length" if ends else None))
            if ends:
                del self.running[id]
        return updates


@pytest.fixture
def clock(monkeypatch):
    def use(engine):
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: engine.now))
        return engine

    return use


def test_times_of_a_batch_that_begins_one_by_one(clock):
    engine = clock(ScriptedEngine([1.0, 2.0, 0.5, 0.25], prefills=2))
    driver = Driver(engine, 2, 10, seed=0)
    batch = driver.finish(driver.submit(3))
    # first request: tokens after 1, 3, 3.5 s; second: 3, 3.5, 3.75
    assert batch.ttft() == pytest.approx((1 + 3) / 2)
    assert batch.tpot() == pytest.approx((2.5 / 2 + 0.75 / 2) / 2)
    assert (
        batch.ended == 2 and len(set(map(tuple, engine.prompts))) == 2 and {len(p) for p in engine.prompts} == {10}
    )


def test_the_median_of_the_runs_counts(clock):
    runs = [[9.0, 9.0, 9.0], [1.0, 0.5, 0.5], [5.0, 0.1, 0.1], [2.0, 0.2, 0.2]]  # the first only warms up
    engine = clock(ScriptedEngine([s for run in runs for s in run] + [1.0] * 7, prefills=0))
    stages = []
    got = measure(engine, 2, 10, 3, seed=0, stage=stages.append)
    assert (got.ttft, got.tpot) == (pytest.approx(2.0), pytest.approx(0.2)) and stages == list(STAGES)
    assert got.context == 10 + 2 + 2 and got.prefill.ran and got.decode.ran and not engine.has_work
    assert len({tuple(prompt) for prompt in engine.prompts}) == 2 * 6, (
        "a prompt came twice: the cache would know it"
    )


def test_refuses_what_cannot_be_timed(clock):
    engine = ScriptedEngine([], 0, context=30)
    with pytest.raises(ValueError, match="output length must be 2 or more"):
        measure(engine, 1, 10, 1, seed=0)
    with pytest.raises(ValueError, match="20 tokens in, 7 out and 4 profiled make 31, and the context holds 30"):
        measure(engine, 1, 20, 7, seed=0)
    engine = clock(ScriptedEngine([0.1] * 1000, prefills=30, context=30))
    with pytest.raises(ValueError, match="met the end of the context before the last had begun"):
        measure(engine, 25, 20, 6, seed=0)


# The profile


def test_watch_sees_what_runs_and_no_more():
    x, w = torch.randn(64, 256), torch.randn(256, 256)
    torch.nn.functional.linear(x, w)
    begin = time.perf_counter()
    with watch(torch.device("cpu")) as steps:
        for _ in range(5):
            torch.nn.functional.linear(x, w)
            torch.ops.gemcutter.rms_norm(x, None, 1e-6)
    elapsed = time.perf_counter() - begin
    assert [one.name for one in steps.ran] == ["aten::linear", "gemcutter::rms_norm"] * 5
    assert steps.launches() == {L: 5, N: 5}
    seconds = steps.seconds()
    assert min(seconds.values()) > 0 and sum(seconds.values()) < elapsed
    with pytest.raises(RuntimeError, match="saw nothing"), watch(torch.device("cpu")):
        pass


def test_roofline_by_hand():
    spec = read_spec(locate("carat"))
    step = [
        ("aten::linear", 0.003),
        ("gemcutter::layer_seam", 0.001),
        ("aten::linear", 0.004),
        ("aten::sort", 0.002),
    ]
    steps = Steps()
    steps.ran = [Ran(name, float(i), seconds) for i, (name, seconds) in enumerate(step * 4)]
    roof = Roof(bandwidth=1e9, flops=1e12)
    got = decode_roofline(spec, Latency(1.0, 0.02, steps, steps, 100), 3, 2, 2, roof)
    rows = {row.part: row for row in got.rows}
    work = cost.step_work(spec, 3, 1, 100, 2, 2)
    assert set(rows) == {L, E, A, H, N, O} and got.wall == 0.02 and got.measured == pytest.approx(0.010)
    # The last of the four steps ends with the head, the others too: a seam follows their next product only.
    assert rows[L].launches + rows[H].launches == 2 and rows[O].floor is None
    assert rows[N].measured == pytest.approx(0.001) and rows[N].share == pytest.approx(0.1)
    assert rows[E].measured == 0 and rows[E].floor == pytest.approx(work[E].bytes / 1e9)
    assert got.floor == pytest.approx(cost.decode_bytes(spec, 3, 100, 2, 2) / 1e9)
    slow = prefill_roofline(spec, Latency(1.0, 0.02, steps, steps, 100), 3, 50, 2, 2, Roof(1e30, 1e3))
    whole = 3 * cost.prefill_flops(spec, 50) + 3 * 2 * spec.vocab * spec.hidden
    assert slow.floor == pytest.approx(whole / 1e3) and slow.wall == 1.0
    assert sum(row.launches for row in slow.rows) == 16


def test_roof_of_this_cpu():
    got = measure_roof(torch.device("cpu"), torch.float32)
    assert 1e8 < got.bandwidth < 1e13 and 1e8 < got.flops < 1e14


# The command


def bench(capsys, *argv) -> tuple[int, dict, str]:
    status = main(["bench", "latency", *argv])
    out = capsys.readouterr().out
    return status, json.loads(out.splitlines()[-1]), out


def test_carat_on_a_cpu(capsys):
    status, got, out = bench(capsys, "carat", "--device", "cpu", "--batch-size", "2", "--input-len", "40",
                             "--output-len", "6")  # fmt: skip
    assert status == 0 and re.match(r"CPU, 1 threads: copy [\d.]+ TB/s, bfloat16 matmul [\d.]+ TFLOP/s", out)
    assert 0 < got["tpot_ms"] < got["ttft_ms"] and got["context"] == 40 + 3 + 2
    assert (got["decode"]["wall_ms"], got["prefill"]["wall_ms"]) == (got["tpot_ms"], got["ttft_ms"])
    spec = read_spec(locate("carat"))
    for phase in ("decode", "prefill"):
        parts = {row["part"]: row for row in got[phase]["parts"]}
        layers = len(spec.layers)
        launches = {part: parts[part]["launches"] for part in (L, E, R, H)}
        assert launches == {L: 4 * layers, E: layers, R: layers, H: 2}  # qkv, o, gate_up with router, down
        assert sum(row["share"] for row in parts.values()) == pytest.approx(1)
        assert sum(row["measured_ms"] for row in parts.values()) == pytest.approx(got[phase]["kernels_ms"])
        # Within a factor of the unprofiled time: what was profiled is that step, not a part of it nor several.
        assert 0.3 < got[phase]["kernels_ms"] / got[phase]["wall_ms"] < 3
        assert 0 < got[phase]["floor_ms"] < got[phase]["wall_ms"]


def test_dummy_weights_and_chunks(capsys):
    status, got, _ = bench(capsys, "carat-edge", "--device", "cpu", "--load-format", "dummy", "--input-len", "50",
                           "--output-len", "2", "--chunked-prefill-size", "20")  # fmt: skip
    parts = {row["part"]: row for row in got["prefill"]["parts"]}
    assert status == 0 and E not in parts and R not in parts
    # Three chunks of 20, 20 and 10 tokens, one after the other through three layers, the fourth's K/V and the
    # projection of the per-layer inputs. The last one's last token, projected for the fourth, goes on through five
    # layers and the head.
    assert parts[L]["launches"] == 3 * (3 * 6 + 1 + 1) + 5 * 6 - 1 and parts[H]["launches"] == 2


def test_floors_of_what_is_quantised_on_load(capsys):
    _, got, _ = bench(capsys, "carat-edge", "--device", "cpu", "--quantization", "fp8", "--input-len", "4",
                      "--output-len", "2")  # fmt: skip
    linears = next(row for row in got["decode"]["parts"] if row["part"] == L)
    spec = read_spec(locate("carat-edge"))
    plain = cost.step_work(spec, 1, 1, got["context"], 2, 2)[Part.LINEARS].bytes
    assert 0.5 * plain < linears["bytes"] < 0.55 * plain


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--batch-size", "0"], "must be a whole number, 1 or more, got 0"),
        (["--output-len", "1"], "output length must be 2 or more"),
        (["--input-len", "5000"], "the context holds 4096"),
        (["--batch-size", "4", "--max-running-requests", "3"], "over --max-running-requests 3"),
        (["nowhere"], "no checkpoint 'nowhere'"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_refusals(argv, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "latency", "--device", "cpu", *argv])
    assert caught.value.code == 2 and re.search(says, capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"disable_cuda_graph": True}])
def test_parts_on_a_gpu(options):
    """Graph or not, every part of carat is found, and found apart."""
    engine = Engine.start(EngineConfig(device="cuda", max_running_requests=2, **options))
    got = measure(engine, 2, 300, 8, seed=0)
    layers = len(engine.spec.layers)
    for steps, count in ((got.prefill, 1), (got.decode, latency.PROFILED_STEPS)):
        launches, seconds = steps.launches(), steps.seconds()
        assert set(launches) == set(Part) and min(seconds.values()) > 0
        assert launches[A] >= layers * count and launches[R] >= layers * count and launches[E] >= 2 * layers * count
        assert launches[N] >= 3 * layers * count and launches[L] >= 4 * layers * count
        assert launches[H] <= 4 * count
    assert sum(got.decode.seconds().values()) / latency.PROFILED_STEPS < 3 * got.tpot


@pytest.mark.gpu
def test_roof_of_a_gpu():
    got = measure_roof(torch.device("cuda"), torch.bfloat16)
    assert 1e11 < got.bandwidth < 2e13 and 1e13 < got.flops < 1e16


def test_random_orders_keep_one_part_for_each_name():
    """However kernels are shuffled, only products change sides, and only between linears and head."""
    rng = random.Random(0)
    whole = BEGIN + ATTENTION + MOE + SEAM + END
    for _ in range(50):
        rng.shuffle(whole)
        for (name, part), got in zip(whole, parts_of([name for name, _ in whole]), strict=True):
            assert got == part or {got, part} == {L, H} and name in (NVJET, SPLIT, DENSE[0][0], "_linear_kernel")
