"""The order of work, the arithmetic and the report of `gemcutter bench ops`, with a clock that is told times."""

import json
import math

import pytest
import torch

import gemcutter.bench.ops as bench
from gemcutter.bench import report, timing, warm
from gemcutter.bench.ops import compare, geometric_mean, measure
from gemcutter.bench.peers import PEERS, Peer
from gemcutter.bench.timing import Ceiling, copies, held_bytes, plan_turns
from gemcutter.cli import main
from gemcutter.cli.ops_table import ops_table, rows_table
from gemcutter.cli.table import show
from gemcutter.ops.norms.rms_norm import rms_norm_reference
from gemcutter.verify import cases
from gemcutter.verify.case import Case
from gemcutter.verify.check import Result
from gemcutter.verify.inputs import Kind

CEILING = Ceiling(bandwidth=4e12, empty=2e-6)
CPU = torch.device("cpu")
L2 = 50_000_000


def norm_case(launch=rms_norm_reference, **changes) -> Case:
    values = dict(
        op="rms_norm",
        shape="width 64",
        arguments=lambda draw: (draw.rows(64), draw.weight(64), 1e-6),
        launch=launch,
        reference=rms_norm_reference,
        bytes_moved=lambda rows: rows * 64 * 4 + 128,
    )
    return Case(**(values | changes))


def truncated(x, weight, eps):
    """A rounding swapped: the norm is rounded before the weight."""
    return rms_norm_reference(x, None, eps) * weight


def peer(name, function=rms_norm_reference, needs=("torch",)) -> Peer:
    return Peer(name, needs, lambda *args: lambda: [function(*args)])


@pytest.fixture
def peers(monkeypatch):
    """Puts peers in place of the real ones; of packages, only torch is there."""
    for module in (bench, report, warm):
        absent = dict(torch=None, vllm="vllm is not installed")
        monkeypatch.setattr(module, "why_absent", absent.get)
    return lambda *found: monkeypatch.setitem(PEERS, "rms_norm", list(found))


class Clock:
    """Answers with seconds, in order, and remembers what it was asked to time."""

    def __init__(self, *seconds):
        self.seconds, self.contenders, self.turns = seconds, None, None

    def __call__(self, contenders, turns):
        self.contenders, self.turns = contenders, turns
        assert len(contenders) == len(self.seconds)
        for calls in contenders:
            assert len(calls) == turns.sets
            calls[-1]()
        return list(self.seconds)


def run(case, clock, rows=8):
    return measure(case, rows, CEILING, CPU, L2, clock)


def test_floor():
    assert CEILING.floor(4_000_000) == pytest.approx(1e-6 + 2e-6)
    assert CEILING.floor(0) == 2e-6


@pytest.mark.parametrize("moved", [1, 4_000, 3_000_000, 10_000_000, 99_999_999, 600_000_000, 20_000_000_000])
def test_turns_leave_nothing_in_the_cache_and_fit_memory(moved):
    for held in (moved, 5 * moved, 6_000_000_000):
        sets, calls = plan_turns(moved, held, L2, CEILING)
        assert calls % sets == 0 and 1 <= sets <= 32
        assert sets == 1 or sets * held <= 8e9
        if sets * moved < 2 * L2:  # then something hinders more copies
            assert sets == 32 or (sets + 1) * held > 8e9
        if moved > 2 * L2:
            assert sets == 1
        assert calls <= 231, "at most 200, up to the next multiple of 32"
        assert calls * moved <= 8e9 + sets * moved, "results are kept until the graph is dropped"
        if calls < 200 and calls * moved < 4e9:
            assert calls * CEILING.floor(moved) >= 4e-4, "else the start of the graph weighs more than 2 %"


def test_copies_keep_strides_and_shared_storage_and_are_apart():
    buffer = torch.randn(5, 12)
    args = (buffer[:, :4], buffer[:, 4:8], None, 3)
    sets = copies(args, 3)
    assert len(sets) == 3 and sets[0] is args
    for one in sets[1:]:
        assert one[2:] == (None, 3)
        for x, y in zip(one[:2], args[:2], strict=True):
            assert torch.equal(x, y) and x.stride() == y.stride()
        assert one[0].untyped_storage().data_ptr() == one[1].untyped_storage().data_ptr()
        one[0].fill_(7)
    assert not (buffer == 7).any() and not (sets[1][1] == 7).any()
    assert held_bytes(args) == 5 * 12 * 4


def test_a_row_with_peers(peers):
    peers(peer("slow"), peer("fast"), peer("absent", needs=("torch", "vllm")))
    row = run(norm_case(), Clock(2e-6, 5e-6, 3e-6))
    assert (row.op, row.shape, row.rows, row.refused) == ("rms_norm", "width 64", 8, "")
    assert row.seconds == 2e-6 and row.floor == pytest.approx((8 * 256 + 128) / 4e12 + 2e-6)
    assert row.of_floor == pytest.approx(row.floor / 2e-6)
    assert row.best.says == "fast" and row.best.number == 2 and row.best.difference == 0.0
    assert row.ratio == pytest.approx(1.5)


def test_no_peer_no_ratio(peers):
    peers()
    row = run(norm_case(), Clock(2e-6))
    assert row.best is None and row.ratio is None


def test_a_wrong_kernel_is_refused_and_not_timed(peers):
    peers(peer("any"))
    never = Clock()
    row = run(norm_case(truncated), never, rows=64)
    assert "elements differ from the reference" in row.refused and never.contenders is None
    assert row.ratio is None and math.isnan(row.seconds)


def test_what_does_not_fit_is_neither_timed_nor_refused(peers, monkeypatch):
    peers(peer("any"))
    monkeypatch.setattr(bench, "check", lambda case, rows, device: Result(case, left_out=list(rows)))
    row = run(norm_case(), Clock())
    assert row.skipped and not row.refused and not row.timed and row.ratio is None
    assert any("skipped" in line for line in report.notes([row]))
    assert "skipped" in report.as_json([row], CEILING, "card")["rows"][0]
    assert report.summary([row])["refused"] == report.summary([row])["timed"] == 0


def test_a_kernel_that_raises_is_refused(peers):
    def broken(*args):
        raise RuntimeError("out of registers")

    assert run(norm_case(broken), Clock()).refused


def test_a_peer_that_rounds_elsewhere_stays_and_says_how_far(peers):
    peers(peer("rounds twice", truncated))
    row = run(norm_case(), Clock(1e-6, 1e-6), rows=64)
    assert not row.best.failure and 0 < row.best.difference < 0.2


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda x, w, eps: rms_norm_reference(x, w + 1, eps), "far from"),
        (lambda x, w, eps: rms_norm_reference(x, w, eps) * torch.nan, "far from"),
        (lambda x, w, eps: rms_norm_reference(x, w, eps)[1:], "not (64, 64)"),
        (lambda x, w, eps: x.no_such_thing, "AttributeError"),
    ],
)
def test_a_peer_that_does_another_job_is_not_timed(peers, function, says):
    peers(peer("other", function), peer("right"))
    row = run(norm_case(), Clock(1e-6, 4e-6), rows=64)
    assert says in row.peers[0].failure
    assert row.best.says == "right" and row.ratio == pytest.approx(4.0)
    assert any(says in line and "peer 1" in line for line in report.notes([row]))


def test_peers_that_cannot_be_captured_do_not_end_the_run(peers):
    peers(peer("a"), peer("b"))

    def clock(contenders, turns):
        if len(contenders) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return [3e-6]

    row = run(norm_case(), clock)
    assert row.seconds == 3e-6 and row.best is None and row.ratio is None
    assert all("stream is capturing" in p.failure for p in row.peers)
    peers()
    with pytest.raises(RuntimeError, match="capturing"):  # ours alone: the run cannot go on
        run(norm_case(), lambda contenders, turns: clock([*contenders, None], turns))


def test_a_peer_without_counterpart_is_left_out(peers):
    peers(Peer("no", ("torch",), lambda *args: None))
    assert run(norm_case(), Clock(1e-6)).peers == []


def test_checks_see_inputs_that_no_contender_has_changed(peers):
    """A peer may work in place; what it wrote is neither our input in the check nor another peer's."""

    def in_place(x, weight, eps):
        result = rms_norm_reference(x, weight, eps)
        return x.copy_(result)

    seen = []
    peers(peer("in place", in_place), peer("after", lambda *a: seen.append(a[0].clone()) or rms_norm_reference(*a)))
    row = run(norm_case(), Clock(1e-6, 1e-6, 1e-6))
    assert not any(p.failure for p in row.peers)
    assert torch.equal(seen[0], norm_case().make(8, Kind.NORMAL, CPU)[0])


def test_compare_leaves_ids_out_of_the_distance_but_not_out_of_the_check():
    ids = torch.arange(100).view(10, 10)
    weights = torch.rand(10, 10)
    swapped = ids.clone()
    swapped[0, 0] = 99
    assert compare([swapped, weights + 0.001], [ids, weights])[0] == pytest.approx(0.001, rel=1e-3)
    assert compare([None, None], [ids, weights]) == (None, "")
    assert "far" in compare([ids.flip(0), weights], [ids, weights])[1]
    zeros = torch.zeros(4)
    assert compare([zeros], [zeros]) == (0.0, "")
    assert "far" in compare([zeros + 1], [zeros])[1]


def test_geometric_mean():
    assert geometric_mean([]) is None
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1.0)


def rows_of_a_run(peers):
    peers(peer("a"), peer("b"), peer("gone", needs=("vllm",)))
    rows = [run(norm_case(), Clock(2e-6, 6e-6, 4e-6)), run(norm_case(), Clock(4e-6, 2e-6, 9e-6), rows=1024)]
    rows.append(run(norm_case(truncated, shape="broken"), Clock(), rows=64))
    return rows


def test_report(peers, capsys):
    rows = rows_of_a_run(peers)
    show(rows_table(rows), ops_table(rows), *report.notes(rows))
    text = capsys.readouterr().out
    lines = text.splitlines()
    first = next(line for line in lines if "width 64" in line)
    assert first.split() == "rms_norm width 64 8 2.00 2.00 100% 2 4.00 0.0e+00 2.00".split()
    assert "REFUSED" in next(line for line in lines if "broken" in line)
    assert "1 a; 2 b; 3 gone" in text and "elements differ" in text
    assert "without vllm: vllm is not installed. To add it: pip install" in text
    total = next(line for line in lines if line.split()[:1] == ["all"]).split()
    assert total[1:] == ["2", "1", "2", "1.00", "0.50", "1", f"{rows[1].of_floor:.0%}"]
    assert "4.00 TB/s" in report.ceiling_line(CEILING, "card") and "2.00 µs" in report.ceiling_line(CEILING, "card")


def test_json(peers):
    rows = rows_of_a_run(peers)
    found = json.loads(json.dumps(report.as_json(rows, CEILING, "card"), allow_nan=False))
    assert found["bandwidth"] == 4e12 and found["empty_us"] == pytest.approx(2.0)
    assert found["all"]["geometric_mean"] == pytest.approx(1.0) and found["all"]["refused"] == 1
    first, second, third = found["rows"]
    assert first["us"] == 2.0 and first["peers_us"] == {"a": 6.0, "b": 4.0}
    assert first["best"] == dict(peer="b", difference=0.0, ratio=2.0)
    assert second["best"]["ratio"] == 0.5
    assert "refused" in third and "us" not in third


def test_every_op_with_a_case_has_peers_and_no_other():
    assert set(PEERS) == {case.op for case in cases.all_cases()}


def cli(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "ops", *words])
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    return stopped.value.code, captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu(capsys):
    status, says = cli(capsys)
    assert status == 2 and "no GPU" in says


@pytest.mark.parametrize("rows", ["0", "-1", "x", "1.5"])
def test_rows_are_refused(capsys, rows):
    status, says = cli(capsys, "--rows", rows)
    assert status == 2 and "--rows" in says and rows in says


class FakeCard:
    """What the command asks of torch.cuda."""

    name, L2_cache_size = "card", L2


@pytest.fixture
def card(monkeypatch):
    """The command on a machine that says it has a GPU, timing nothing: each row takes 2 µs, a peer 3."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeCard)
    monkeypatch.setattr(timing, "measure_ceiling", lambda: CEILING)
    monkeypatch.setattr(warm, "compile_ahead", lambda cases, counts, advance: [advance() for _ in cases])
    monkeypatch.setitem(PEERS, "rms_norm", [peer("a")])
    monkeypatch.setattr(bench, "measure", lambda case, rows, *_: run(case, Clock(2e-6, 3e-6), rows))
    return lambda *found: monkeypatch.setattr(cases, "all_cases", lambda: list(found))


def test_command(card, capsys):
    card(norm_case(), norm_case(op="other", shape="x"), norm_case(dtype=torch.float16))
    assert main(["bench", "ops", "--op", "rms_norm", "--rows", "8", "--rows", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("card: copies move 4.00 TB/s")
    found = json.loads(lines[-1])
    assert [row["rows"] for row in found["rows"]] == [3, 8]
    assert found["all"]["geometric_mean"] == pytest.approx(1.5)


def test_command_fails_where_a_kernel_is_wrong(card, capsys):
    card(norm_case(truncated))
    assert main(["bench", "ops", "--rows", "64"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("REFUSED" in line for line in lines) and "refused" in json.loads(lines[-1])["rows"][0]


@pytest.mark.parametrize("words, says", [(["--op", "rope"], "no op 'rope'"), (["--shape", "70B"], "'70B'")])
def test_names_that_do_not_exist(card, capsys, words, says):
    card(norm_case())
    status, error = cli(capsys, *words)
    assert status == 2 and says in error


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    """Times that a card can have, of an op whose every peer is optional."""
    assert main(["bench", "ops", "--op", "select_experts", "--shape", "26B", "--rows", "1", "--rows", "1024"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 2e11 < found["bandwidth"] < 2e13 and 0.3 < found["empty_us"] < 10
    for row in found["rows"]:
        assert row["floor_us"] < row["us"] < 200


@pytest.mark.gpu
def test_a_graph_times_what_it_holds():
    """Twice the bytes take twice the time, whatever is replayed between."""
    x = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    whole, half = torch.empty_like(x), torch.empty_like(x[: 1 << 27])
    turns = timing.Turns(1, 4)
    calls = [lambda: torch.neg(x, out=whole)], [lambda: torch.neg(x[: 1 << 27], out=half)]
    times = timing.time_calls(calls, turns)
    assert 1.8 < times[0] / times[1] < 2.2
    assert times[0] == pytest.approx((1 << 30) / timing.measure_ceiling().bandwidth, rel=0.1)


@pytest.mark.gpu
def test_compiling_ahead_runs_every_contender(peers):
    ran = []
    peers(peer("a", lambda *args: ran.append(args[0].shape)))
    case = next(case for case in cases.all_cases() if case.op == "rms_norm" and case.dtype is torch.bfloat16)
    warm._compile(case.op, case.shape, [1, 8])
    assert [shape[0] for shape in ran] == [1, 8]
