"""The experts' tuner with a clock that is told times: what it chooses, keeps, and takes up again."""

import contextlib
import json

import pytest
import torch
from triton.compiler import CompiledKernel

from gemcutter.bench.roof import Roof
from gemcutter.ops.moe.experts_table import Plan, Shape, Tile, read_table
from gemcutter.ops.moe.experts_tiled import _down_kernel, _up_kernel
from gemcutter.ops.moe.experts_tiled_fp8 import _down_fp8_kernel, _up_fp8_kernel
from gemcutter.ops.moe.experts_tiles import built_in_tiles
from gemcutter.run.ahead import compile_all
from gemcutter.tune import moe, search
from gemcutter.tune.candidates import SHARED, down_tiles, up_tiles
from gemcutter.tune.record import part_path, read_part
from gemcutter.tune.search import Found, decide, settle

SHAPE = Shape(128, 8, 2816, 704)
UPS = [Tile(16, n, 64, 4, 4) for n in (16, 32, 64)]
DOWNS = [Tile(16, n, 128, 8, 3) for n in (32, 64, 128)]


class Clock:
    """Times by the columns of the tiles; `broken` tiles do not run, or have other bits."""

    log: list = []
    broken: frozenset = frozenset()
    grouped = 1000.0
    dies_at = None
    up = staticmethod(lambda tokens, tile: 1 / tile.block_n)
    down = staticmethod(lambda tokens, tile: abs(tile.block_n - 65) / 1000 + tile.warps / 1e6)

    def __init__(self, shape, dtype, device, roof):
        self.shape, self.dtype = shape, dtype
        self.take(1)

    def take(self, tokens):
        if tokens == self.dies_at:
            raise KeyboardInterrupt
        self.tokens = tokens
        self.log.append(tokens)

    def built_in(self):
        return Plan("tiles", *built_in_tiles(self.dtype, self.tokens * 8 / 128))

    def failure(self, plan):
        return "bits" if {plan.up, plan.down, plan.kernel} & self.broken else ""

    def seconds(self, plans):
        assert not any(self.failure(plan) for plan in plans), "what failed is not timed"
        assert plans == list(dict.fromkeys(plans))
        return [1e-3 * (self.grouped if plan.up is None else self.one(plan)) for plan in plans]

    def one(self, plan):
        return self.up(self.tokens, plan.up) + self.down(self.tokens, plan.down)

    def floor(self):
        return 1e-6


@pytest.fixture
def clock(monkeypatch):
    """A kind of clock of the test's own, in a tuner with three tiles of each product beside the built-in one."""
    kind = type("Told", (Clock,), dict(log=[]))
    monkeypatch.setattr(moe, "Clock", kind)
    monkeypatch.setattr(moe, "measure_roof", lambda device, dtype: Roof(4e12, 8e14))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(moe, "compile_all", lambda works: 0)
    monkeypatch.setattr(moe, "launches", lambda shape, dtype, device, buckets: [])
    monkeypatch.setattr(search, "up_tiles", lambda dtype, rows, columns: UPS)
    monkeypatch.setattr(search, "down_tiles", lambda dtype, rows, columns: DOWNS)
    return kind


class Tasks(dict):
    """name: [total, done]"""

    def __call__(self, name, total):
        self[name] = [total, 0]

        def advance():
            self[name][1] += 1

        return advance


def tune(out, buckets, device="NVIDIA H200"):
    tasks = Tasks()
    table = moe.tune_moe(SHAPE, "bfloat16", device, out, buckets, tasks)
    assert all(total == done for total, done in tasks.values()), tasks
    assert not part_path(out).exists() and [path.name for path in out.parent.iterdir()] == [out.name]
    assert read_table(out) == table
    return table


def test_the_fastest_of_up_and_of_down_is_kept(tmp_path, clock):
    table = tune(tmp_path / "t.json", [1, 8])
    up, down = built_in_tiles(torch.bfloat16, 1 / 2)
    assert table.plans == {n: Plan("tiles", UPS[2], down) for n in (1, 8)}, "64 columns, and 4 warps rather than 8"
    least = 1e3 * (1 / 1000 + 4 / 1e6)
    assert table.times[8] == pytest.approx((1e3 / up.block_n + least, 1e3 / 64 + least, 1.0), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_tile_is_compiled_before_it_is_timed(dtype, monkeypatch, hopper):
    """For a card that is not there. One of the tiles does not compile, which stops no other."""
    ups = [Tile(16, 64, k, 4, 2) for k in (64, 128)]
    downs = [Tile(16, 64, k, 4, 3) for k in (64, 128, 48, 256)]  # 48 is no power of two
    monkeypatch.setattr(search, "built_in_tiles", lambda dtype, rows: (ups[0], downs[0]))
    monkeypatch.setattr(search, "up_tiles", lambda dtype, rows, columns: ups)
    monkeypatch.setattr(search, "down_tiles", lambda dtype, rows, columns: downs)
    kernels = (_up_kernel, _down_kernel) if dtype == torch.bfloat16 else (_up_fp8_kernel, _down_fp8_kernel)

    works = moe.launches(Shape(4, 2, 256, 128), dtype, torch.device("cpu"), [1, 8])
    assert compile_all(works) >= 5
    found = [list(kernel.device_caches[hopper][0].values()) for kernel in kernels]
    assert [sum(isinstance(one, CompiledKernel) for one in each) for each in found] == [2, 3]
    for kernel in kernels:
        kernel.device_caches.pop(hopper)
    assert compile_all(works) == 0, "on disk for the process that times them"


def test_what_fails_is_never_taken(tmp_path, clock):
    clock.broken = frozenset({UPS[2], DOWNS[0], "grouped"})
    clock.down = staticmethod(lambda tokens, tile: tile.block_n / 1000)
    plan = tune(tmp_path / "t.json", [1]).plans[1]
    assert plan.up.block_n == 32 and plan.down.block_n == 64


def test_another_kernel_where_it_is_faster(tmp_path, clock):
    clock.grouped, clock.broken = 1e-5, frozenset({"stream"})
    assert tune(tmp_path / "t.json", [1]).plans[1] == Plan("grouped")


def test_built_in_tiles_stay_where_nothing_is_clearly_faster(tmp_path, clock):
    clock.up = clock.down = staticmethod(lambda tokens, tile: 1 - tile.block_n / 1e6)
    assert tune(tmp_path / "t.json", [1]).plans[1] == Plan("tiles", *built_in_tiles(torch.bfloat16, 1 / 16))


def test_few_tiles_serve_many_numbers_of_tokens():
    a, b, c = UPS
    found = {
        1: Found({a: 1.000, b: 1.009, c: 2.0}, {a: 1.0}),
        2: Found({a: 1.020, b: 1.000, c: 2.0}, {a: 1.0}),
        4: Found({a: 3.000, b: 1.020, c: 1.0}, {a: 1.0}),  # b is 2 % slower: not near
        8: Found({b: 1.001, c: 1.0}, {b: 1.0, a: 2.0}),
    }
    plans = settle(found)
    assert {n: plan.up for n, plan in plans.items()} == {1: b, 2: b, 8: b, 4: c}
    assert {n: plan.down for n, plan in plans.items()} == {1: a, 2: a, 4: a, 8: b}


def test_a_tuning_broken_off_goes_on(tmp_path, clock):
    out = tmp_path / "t.json"
    clock.dies_at = 4
    with pytest.raises(KeyboardInterrupt):
        tune(out, [1, 2, 4])
    assert not out.exists()
    head = json.loads(part_path(out).read_text())["of"]
    kept = read_part(part_path(out), head)
    assert list(kept) == [1, 2] and set(kept[1].ups) == {*UPS, built_in_tiles(torch.bfloat16, 1)[0]}
    assert kept[2].ups[UPS[2]] == pytest.approx(1e-3 * (1 / 64 + 1 / 1000 + 4 / 1e6))
    clock.dies_at, clock.log = None, []
    resumed = tune(out, [1, 2, 4])
    assert clock.log == [1, 4, 1, 2, 4], "measured: 4 alone; decided: all"
    assert resumed == tune(tmp_path / "t.json", [1, 2, 4])


def test_a_part_of_the_buckets_leaves_the_others(tmp_path, clock):
    out = tmp_path / "t.json"
    first = tune(out, [1, 2])
    clock.down = staticmethod(lambda tokens, tile: tile.block_n / 1000)
    second = tune(out, [2, 4])
    assert second.plans[1] == first.plans[1] and second.times[1] == first.times[1]
    assert second.plans[2].down == second.plans[4].down == DOWNS[0] != first.plans[2].down


def test_files_of_another_tuning_are_refused(tmp_path, clock):
    out = tmp_path / "t.json"
    tune(out, [1])
    with pytest.raises(ValueError, match="t.json is for NVIDIA H200, bfloat16"):
        tune(out, [1], device="NVIDIA H100")
    other = tmp_path / "o.json"
    clock.dies_at = 2
    with contextlib.suppress(KeyboardInterrupt):
        tune(other, [2])
    with pytest.raises(ValueError, match="o.json.part is a tuning of .*H200.*, this one of .*H100"):
        tune(other, [1], device="NVIDIA H100")
    for text in ("", "[]", '{"of": 1}', '{"of": {}, "found": {"1": {"ups": [[1]]}}}'):
        part_path(other).write_text(text)
        with pytest.raises(ValueError, match="o.json.part is no tuning broken off"):
            tune(other, [1])


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, clock):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        tune(tmp_path / "file" / "t.json", [1])
    assert clock.log == []


def test_built_in_plan_alone_is_no_failure(clock):
    """Kernels that do not run here leave the choice to the rest."""
    one = clock(SHAPE, torch.bfloat16, None, None)
    one.broken = frozenset({"grouped", UPS[0]})
    plan, times = decide(one, Plan("tiles", UPS[0], DOWNS[0]))
    assert plan == one.built_in() and times.built_in == times.tuned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 512, 1024, 8192, 100_000])
def test_candidates_fit_the_card(tokens, dtype):
    rows = tokens * 8 / 128
    for tiles, blocks in ((up_tiles(dtype, rows, 704), 2), (down_tiles(dtype, rows, 2816), 1)):
        assert 10 < len(tiles) < 200 and len(set(tiles)) == len(tiles)
        for m, n, k, warps, stages in tiles:
            assert (m + blocks * n) * k * dtype.itemsize * stages <= SHARED and m * n * blocks / warps / 32 <= 128
            assert dtype.itemsize == 2 or (blocks * n >= 64 and warps >= 4), "wgmma"
    assert all(tile.block_n <= 32 for tile in up_tiles(dtype, rows, 32)), "no more than twice the columns there are"
