"""Tables for people, and what stands between them."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDEST = 10_000  # columns: more than any table here needs


def table_of(*figures: str, words: Sequence[str] = ()) -> Table:
    """Columns of words, which begin at the left, and then of figures, which end at the right."""
    table = Table(box=SIMPLE_HEAD)
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def show(*parts: str | Table) -> None:
    """On stdout. For a narrow terminal rich would cut cells; here the terminal wraps lines."""
    console = Console()
    for part in parts:
        if isinstance(part, str):
            print(part)
            continue
        needed = Measurement.get(console, console.options.update(width=WIDEST, markup=False), part).maximum
        console.width = max(console.width, needed)
        console.print(part, markup=False, highlight=False)
