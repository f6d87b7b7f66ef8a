"""Tables of the experts' tiles: written and read back, refused when broken; found by device, dtype and shape."""

import json
import logging

import pytest
import torch

from gemcutter.ops.moe import experts_table, experts_tiles
from gemcutter.ops.moe.experts_table import Plan, Shape, Table, Tile, Times, read_table, table_path, write_table
from gemcutter.ops.moe.experts_tiles import built_in_plan, load_table, plan_for

SHAPE = Shape(16, 4, 64, 48)
TILES = Plan("tiles", Tile(16, 32, 128, 4, 3), Tile(32, 64, 64, 8, 2))
PLANS = {1: Plan("stream"), 8: TILES._replace(down=TILES.up), 64: TILES, 1024: Plan("grouped")}
TABLE = Table(
    "Test GPU/1", "bfloat16", SHAPE, "by hand", PLANS, {tokens: Times(3.5, 2.25, 1.0) for tokens in PLANS}
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(experts_table, "FOLDER", tmp_path)
    load_table.cache_clear()
    yield tmp_path
    load_table.cache_clear()


def put(table=TABLE, **changes):
    path = table_path(TABLE.device, TABLE.dtype, TABLE.shape)
    write_table(table._replace(**changes), path)
    return path


def test_what_is_written_is_read(folder):
    path = put()
    assert read_table(path) == TABLE == load_table("Test GPU/1", "bfloat16", SHAPE)
    assert [file.name for file in folder.iterdir()] == ["Test_GPU_1-E16-k4-H64-N48-bfloat16.json"]


def test_a_file_that_cannot_be_replaced_leaves_nothing(folder):
    path = table_path("a", "bfloat16", SHAPE)
    path.mkdir()
    with pytest.raises(OSError):
        write_table(TABLE, path)
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    "tokens,measured",
    [(1, [1]), (2, []), (5, [8]), (15, [8]), (16, []), (33, [64]), (127, [64]), (513, [1024]), (2048, [])],
)
def test_plans_are_for_numbers_of_tokens_near_those_measured(tokens, measured):
    assert TABLE.nearest(tokens) == [PLANS[other] for other in measured]


def test_the_nearest_comes_first():
    table = TABLE._replace(plans={8: PLANS[8], 14: PLANS[64], 20: PLANS[1024]})
    assert table.nearest(12) == [PLANS[64], PLANS[8], PLANS[1024]]  # 14 / 12, 12 / 8, 20 / 12
    assert table.nearest(16) == [PLANS[64], PLANS[1024]]


def test_every_table_of_the_package_is_whole():
    """Also that their names are those of what they hold: elsewhere nobody would find them."""
    paths = list(experts_table.FOLDER.glob("*"))
    assert paths
    for path in paths:
        table = read_table(path)
        assert path == table_path(table.device, table.dtype, table.shape)
        assert all(times.tuned <= times.built_in for times in table.times.values())


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda t: t.pop("tokens"), "no 'tokens'"),
        (lambda t: t.update(tokens={}), "it has no plan"),
        (lambda t: t.update(more=1), "unknown 'more'"),
        (lambda t: t.update(dtype="float32"), "dtype 'float32' is none of bfloat16, float16"),
        (lambda t: t.update(top_k=0), "top_k is 0"),
        (lambda t: t.update(hidden=2.5), "hidden is 2.5"),
        (lambda t: t["tokens"].update({"0": t["tokens"]["1"]}), "tokens is 0"),
        (lambda t: t["tokens"].update(few=t["tokens"]["1"]), "'few'"),
        (lambda t: t["tokens"]["8"].update(kernel="magic"), "kernel 'magic' is none of tiles"),
        (lambda t: t["tokens"]["8"].update(kernel="grouped"), "kernel 'grouped' has tiles of its own"),
        (lambda t: t["tokens"]["8"].pop("down"), "no 'down'"),
        (lambda t: t["tokens"]["8"].pop("us"), "no 'us'"),
        (lambda t: t["tokens"]["8"]["us"].pop("floor"), "no 'floor'"),
        (lambda t: t["tokens"]["8"].update(split_k=2), "unknown 'split_k'"),
        (lambda t: t["tokens"]["8"]["up"].update(block_m=8), "block_m is 8: a power of two from 16"),
        (lambda t: t["tokens"]["8"]["up"].update(block_k=96), "block_k is 96: a power of two"),
        (lambda t: t["tokens"]["8"]["up"].update(block_n="64"), "block_n is '64'"),
        (lambda t: t["tokens"]["8"]["up"].update(warps=3), "warps is 3"),
        (lambda t: t["tokens"]["8"]["up"].update(stages=True), "stages is True"),
        (lambda t: t["tokens"]["8"]["up"].pop("stages"), "no 'stages'"),
        (lambda t: t["tokens"].update({"1": []}), "list"),
    ],
)
def test_broken_tables_are_refused_by_name(folder, change, says):
    path = put()
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"{path.name} is not a table of experts' tiles: .*{says}"):
        load_table(TABLE.device, TABLE.dtype, SHAPE)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"tokens": 3}'])
def test_what_is_no_table_is_refused(folder, text):
    path = put()
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path.name} is not a table"):
        read_table(path)


def test_a_table_under_another_name_is_refused(folder):
    put(shape=SHAPE._replace(top_k=2))
    with pytest.raises(ValueError, match=r"says that it is for Test GPU/1, bfloat16, \(16, 2, 64, 48\)"):
        load_table(TABLE.device, TABLE.dtype, SHAPE)


def test_without_a_table_one_notice_says_so(folder, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert load_table("Test GPU/1", "bfloat16", SHAPE) is None
    [record] = caplog.records
    command = "gemcutter tune moe --num-experts 16 --top-k 4 --hidden 64 --intermediate 48 --dtype bfloat16`"
    assert "no tuned tiles for 16 experts" in record.message and command in record.message
    put()
    caplog.clear()
    load_table.cache_clear()
    assert load_table("Test GPU/1", "bfloat16", SHAPE) == TABLE and not caplog.records


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def weights(dtype=torch.bfloat16, kind=OnGpu):
    e, _, h, n = SHAPE
    return [torch.zeros(size, dtype=dtype).as_subclass(kind) for size in ((e, 2 * n, h), (e, h, n))]


def test_the_plan_is_the_tables(folder, monkeypatch, caplog):
    put()
    monkeypatch.setattr(experts_tiles, "_device_name", lambda device: TABLE.device)
    monkeypatch.setattr(experts_tiles, "takes_groups", lambda *matrices: True)
    monkeypatch.setattr(experts_tiles, "streams", lambda x, *weights: len(x) <= 4)
    assert plan(1) == Plan("stream") and plan(2000) == Plan("grouped")
    assert plan(5) == PLANS[8] and plan(40) == TILES
    # Where the kernel of the nearest does not run, the next nearest counts.
    put(plans={4: Plan("stream"), 6: PLANS[8]}, times={n: TABLE.times[8] for n in (4, 6)})
    load_table.cache_clear()
    assert plan(4) == Plan("stream")
    monkeypatch.setattr(experts_tiles, "takes_groups", lambda *matrices: False)
    monkeypatch.setattr(experts_tiles, "streams", lambda x, *weights: False)
    assert plan(4) == PLANS[8]
    # And what no table is for goes by the rule.
    monkeypatch.setattr(experts_tiles, "groups", lambda *args: False)
    with caplog.at_level(logging.WARNING):
        for other in (
            plan(2000, 2),
            plan(2000, dtype=torch.float16),
            plan(2000, dtype=torch.float32),
            plan(2000, kind=torch.Tensor),
        ):
            assert other.kernel == "tiles" and other.up not in (TILES.up, TILES.down)
    assert len(caplog.records) == 2, "top 2, and float16; float32 and a CPU have no tables"


def plan(tokens, top_k=4, dtype=torch.bfloat16, kind=OnGpu):
    return plan_for(torch.zeros(tokens, SHAPE.hidden, dtype=dtype), top_k, *weights(dtype, kind))


def test_the_rule_follows_rows_an_expert(folder):
    def rule(rows, dtype):
        return built_in_plan(torch.zeros(rows * 4, 64, dtype=dtype), 4, *weights(dtype, torch.Tensor))

    plans = [rule(rows, torch.bfloat16) for rows in (1, 8, 9, 64, 65, 10**4)]
    assert [plan.up.block_m for plan in plans] == [16, 16, 64, 64, 128, 128]
    assert len({rule(rows, torch.float32) for rows in (1, 10**4)}) == 1
