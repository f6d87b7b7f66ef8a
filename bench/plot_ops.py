"""Draws what `gemcutter bench ops` printed: python bench/plot_ops.py OUTPUT docs/ops.svg (needs matplotlib).

A cell is the geometric mean over an op's shapes: left the best peer's time over ours, right the share of the floor.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import TwoSlopeNorm


def cells(rows: list[dict], value) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if (number := value(row)) is not None:
            found.setdefault((row["op"], row["rows"]), []).append(number)
    return {at: statistics.geometric_mean(numbers) for at, numbers in found.items()}


def draw(axes, table: dict, ops: list[str], counts: list[int], form: str, title: str, **image) -> None:
    grid = [[table.get((op, count), float("nan")) for count in counts] for op in ops]
    axes.imshow(grid, aspect="auto", **image)
    for y, line in enumerate(grid):
        for x, number in enumerate(line):
            if number == number:
                axes.text(x, y, format(number, form), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(counts)), counts)
    axes.set_yticks(range(len(ops)), ops)
    axes.set_xlabel("rows")
    axes.set_title(title, fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="what bench ops printed; its last line is JSON")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    found = json.loads(args.output.read_text().splitlines()[-1])
    rows = [row for row in found["rows"] if row.get("us")]
    ops, counts = list(dict.fromkeys(row["op"] for row in rows)), sorted({row["rows"] for row in rows})
    ratio = cells(rows, lambda row: row["best"] and row["best"]["ratio"])
    share = cells(rows, lambda row: row["of_floor"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6), sharey=True)
    norm = TwoSlopeNorm(1.0, 0.5, 3.0)
    draw(left, ratio, ops, counts, ".2f", "best peer's time / ours (1: as fast)", cmap="RdYlGn", norm=norm)
    draw(right, share, ops, counts, ".0%", "share of the floor", cmap="YlGn", vmin=0, vmax=1)
    figure.suptitle(f"{found['device']}, bfloat16, means over the released shapes", fontsize=11)
    figure.tight_layout()
    figure.savefig(args.picture)


if __name__ == "__main__":
    main()
