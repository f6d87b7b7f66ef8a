"""Tables of the command line."""

from gemcutter.cli.table import show, table_of


def test_no_cell_is_cut_and_none_is_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = table_of("figure", "µs", words=("word",))
    table.add_row("[red]" * 20, "9" * 60, "1")
    table.add_row("w", "7", "2.5")
    show("before " * 10, table, "behind")
    first, *_, last = lines = capsys.readouterr().out.splitlines()
    assert first == "before " * 10 and last == "behind"
    head, long, short = (line.split() for line in lines if "µs" in line or "9" in line or "7" in line)
    assert (head, long, short) == (["word", "figure", "µs"], ["[red]" * 20, "9" * 60, "1"], ["w", "7", "2.5"])
    [line] = [line for line in lines if "7" in line]
    assert line.startswith("  w ") and line.endswith("7   2.5  ")  # words begin at the left
