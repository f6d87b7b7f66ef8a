"""`gemcutter tune moe`: what it asks for, refuses and shows. The tuning itself is in tests/tune."""

import json
import re
from pathlib import Path

import fp8_checkpoints
import pytest
import released
import torch

from gemcutter.cli import main
from gemcutter.cli import tune as command
from gemcutter.ops.moe import experts_table
from gemcutter.ops.moe.experts_table import Plan, Shape, Table, Tile, Times, table_path, write_table

SIZES = ["--num-experts", "128", "--top-k", "8", "--hidden", "2816", "--intermediate", "704"]
SHAPE = Shape(128, 8, 2816, 704)
TABLE = Table(
    "NVIDIA H200", "bfloat16", SHAPE, "gemcutter 0.1.0, torch 2.11.0+cu130, triton 3.6.0",
    {1: Plan("tiles", Tile(16, 32, 128, 4, 3), Tile(16, 64, 64, 8, 2)), 8192: Plan("grouped")},
    {1: Times(31.0, 29.5, 21.9), 8192: Times(2000.0, 1000.0, 800.0)},
)  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    """A machine with a card of this name; gives what is asked to be tuned."""
    asked = []

    def tuned(shape, dtype, device, out, buckets, task):
        task("measure", 1)()
        asked.append((shape, dtype, device, out, buckets))
        return TABLE._replace(dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("gemcutter.tune.moe.tune_moe", tuned)
    return asked


def checkpoint(folder, name):
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(released.config(name)))
    return str(folder / name)


def fails(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["tune", "moe", *argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.strip().count("\n") == 0
    return err


def test_sizes_come_from_flags_or_from_a_checkpoint(tmp_path, card, capsys):
    assert main(["tune", "moe", *SIZES]) == main(["tune", "moe", checkpoint(tmp_path, "26b")]) == 0
    assert card[0] == card[1] == (
        SHAPE, "bfloat16", "NVIDIA H200", table_path("NVIDIA H200", "bfloat16", SHAPE), list(command.BUCKETS),
    )  # fmt: skip
    assert command.BUCKETS[0] == 1 and command.BUCKETS[-1] == 8192
    out = tmp_path / "here.json"
    argv = ["--dtype", "float16", "--buckets", "64", "1", "64", "--out", str(out)]
    assert main(["tune", "moe", *SIZES, *argv]) == 0
    assert card[2] == (SHAPE, "float16", "NVIDIA H200", out, [1, 64])
    assert f"Written to {out}\n" in capsys.readouterr().out


def test_experts_in_fp8_have_a_table_of_their_own(tmp_path, card):
    path = Path(checkpoint(tmp_path, "26b")) / "config.json"
    whole = json.loads(path.read_text())
    ignored = [*fp8_checkpoints.IGNORE, "re:.*layers.3.*experts.*"]
    for ignore in (fp8_checkpoints.IGNORE, ignored):
        config = {"quantization_config": fp8_checkpoints.quantization_config(ignore=ignore)}
        path.write_text(json.dumps(whole | config))
        assert main(["tune", "moe", str(path.parent)]) == 0
    assert main(["tune", "moe", *SIZES, "--dtype", "float8_e4m3fn"]) == 0
    assert [dtype for _, dtype, *_ in card] == ["float8_e4m3fn", "bfloat16", "float8_e4m3fn"]
    assert card[0][3] == table_path("NVIDIA H200", "float8_e4m3fn", SHAPE)


def test_times_are_shown_beside_the_built_in_ones_and_the_floor(card, capsys):
    main(["tune", "moe", *SIZES])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    up, down = ["16x32x128", "w4", "s3"], ["16x64x64", "w8", "s2"]
    assert ["1", "tiles", *up, *down, "31.0", "29.5", "1.05", "21.9", "74%"] in rows
    assert ["8192", "grouped", "-", "-", "2000.0", "1000.0", "2.00", "800.0", "80%"] in rows


@pytest.mark.parametrize(
    "argv,says",
    [
        ([], "name a checkpoint, or give all of --num-experts, --top-k, --hidden, --intermediate"),
        (SIZES[:6], "name a checkpoint, or give all"),
        (["carat", *SIZES], "name a checkpoint, or give all"),
        (["/nowhere"], "/nowhere"),
        ([*SIZES[:3], "129", *SIZES[4:]], "--top-k is 129, of 128 experts"),
        ([*SIZES, "--buckets", "0"], "must be a whole number, 1 or more, got 0"),
        ([*SIZES, "--buckets"], "expected at least one argument"),
        ([*SIZES, "--dtype", "float32"], "invalid choice"),
        (["--list", *SIZES], "--list shows all tables"),
        (SIZES, "it times kernels, and PyTorch finds no GPU here"),
    ],
)
def test_refusals(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(says, fails(capsys, *argv))


def test_models_that_have_no_tiles_to_tune(tmp_path, card, capsys):
    assert "has no kinds of experts" in fails(capsys, checkpoint(tmp_path, "e2b"))
    config = released.config("26b")
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is in float32, whose tiles are fixed; give --dtype bfloat16 or float16" in fails(capsys, str(tmp_path))
    assert card == []


def test_what_the_user_can_mend_is_one_line(card, capsys, monkeypatch):
    def broken(*args):
        raise ValueError("it.json is for another card")

    monkeypatch.setattr("gemcutter.tune.moe.tune_moe", broken)
    assert "it.json is for another card" in fails(capsys, *SIZES)


def test_list(tmp_path, card, capsys, monkeypatch):
    monkeypatch.setattr(experts_table, "FOLDER", tmp_path)
    for device in ("NVIDIA H200", "NVIDIA H100"):
        write_table(TABLE._replace(device=device), table_path(device, "bfloat16", SHAPE))
    write_table(TABLE, tmp_path / "misnamed.json")
    assert main(["tune", "moe", "--list"]) == 0
    out = capsys.readouterr().out
    shown = f"bfloat16 128 8 2816 704 2 from 1 to 8192 {TABLE.made_with}".split()
    rows = [line.split() for line in out.splitlines()]
    assert [row for row in rows if row[:1] == ["NVIDIA"]] == [
        ["NVIDIA", "H100", *shown, "no"], ["NVIDIA", "H200", *shown, "yes"], ["NVIDIA", "H200", *shown, "no"],
    ]  # fmt: skip
    assert out.endswith(f"In {tmp_path}; this machine has NVIDIA H200\n") and card == []
    (tmp_path / "misnamed.json").write_text("{}")
    assert "misnamed.json is not a table" in fails(capsys, "--list")
