"""Draws TPOT and throughput against concurrency from what `gemcutter bench serve` printed, a file an engine:

for c in 1 2 4 8 16 32 64; do
    gemcutter bench serve --max-concurrency $c --num-prompts $((2 * c)) --random-output-len 128 | tail -1
done > ours
python bench/plot_serve.py docs/serve.svg gemcutter=ours SGLang=theirs      (needs matplotlib)
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

FIGURES = (("mean_tpot_ms", "TPOT, ms, mean"), ("output_throughput", "output tokens a second"))


def named(text: str) -> tuple[str, list[dict]]:
    name, _, path = text.partition("=")
    lines = [line for line in Path(path).read_text().splitlines() if line.startswith("{")]
    return name, sorted(map(json.loads, lines), key=lambda run: run["max_concurrency"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("engines", type=named, nargs="+", metavar="NAME=FILE", help="JSON lines, one a run")
    args = parser.parse_args()
    figure, both = plt.subplots(1, len(FIGURES), figsize=(10, 4))
    for axes, (key, title) in zip(both, FIGURES, strict=True):
        for name, runs in args.engines:
            counts = [run["max_concurrency"] for run in runs]
            axes.plot(counts, [run[key] for run in runs], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, counts)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.set_xlabel("requests at once")
        axes.set_title(title, fontsize=10)
    both[0].legend()
    figure.tight_layout()
    figure.savefig(args.picture)


if __name__ == "__main__":
    main()
