"""What `bench ops` measured, as tables: a line for each row timed, and one for each op."""

from collections.abc import Sequence

from rich.table import Table

from gemcutter.bench.ops import Row
from gemcutter.bench.report import LARGE, summary
from gemcutter.cli.table import table_of


def rows_table(rows: Sequence[Row]) -> Table:
    table = table_of("rows", "µs", "floor", "of floor", "peer", "its µs", "its diff", "x", words=("op", "shape"))
    for row in rows:
        if not row.timed:
            table.add_row(row.op, row.shape, f"{row.rows}", "REFUSED" if row.refused else "skipped", *["-"] * 6)
            continue
        peer = ["-"] * 4
        if row.best:
            difference = "-" if row.best.difference is None else f"{row.best.difference:.1e}"
            peer = [f"{row.best.number}", f"{row.best.seconds * 1e6:.2f}", difference, f"{row.ratio:.2f}"]
        table.add_row(
            row.op, row.shape, f"{row.rows}", f"{row.seconds * 1e6:.2f}", f"{row.floor * 1e6:.2f}",
            f"{row.of_floor:.0%}", *peer,
        )  # fmt: skip
    return table


def ops_table(rows: Sequence[Row]) -> Table:
    """One line an op, and one for all."""
    table = table_of(
        "timed", "refused", "with peers", "geo. mean x", "least x", "below 1", f"least of floor, M >= {LARGE}",
        words=("op",),
    )  # fmt: skip
    for op in [*dict.fromkeys(row.op for row in rows), "all"]:
        says = summary([row for row in rows if op in (row.op, "all")])
        table.add_row(
            op, f"{says['timed']}", f"{says['refused']}", f"{says['with_peers']}", _times(says["geometric_mean"]),
            _times(says["least_ratio"]), f"{says['below_1']}", _share(says["least_of_floor"]),
        )  # fmt: skip
    return table


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _share(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"
