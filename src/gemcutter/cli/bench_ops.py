"""Time every op at the released shapes, against its floor and its peers' kernels; needs a GPU.

A row is timed only after the kernel's results equal its reference's, bit for bit, on every kind of input; otherwise
it says REFUSED, and the status is 1. Peers are what is installed of SGLang's and vLLM's kernels. Floor: the bytes
that must move, at the bandwidth of a copy, and an empty kernel. x: the best peer's time over ours. The last line is
JSON.
"""

import argparse
import json

from rich.console import Console
from rich.progress import Progress

from gemcutter.cli.cases import add_case_flags, choose
from gemcutter.cli.flags import Parser
from gemcutter.cli.table import show

ROWS = (1, 8, 64, 256, 1024, 8192)


def add_arguments(parser: Parser) -> None:
    add_case_flags(parser, least=1)


def run(args: argparse.Namespace) -> int:
    import torch  # seconds, for which no --help should wait

    if not torch.cuda.is_available():
        args.parser.error("it times kernels, and PyTorch finds no GPU here; run it on a machine with one")
    from gemcutter.bench import report
    from gemcutter.bench.ops import measure
    from gemcutter.bench.timing import measure_ceiling
    from gemcutter.bench.warm import compile_ahead
    from gemcutter.cli.ops_table import ops_table, rows_table
    from gemcutter.verify.cases import all_cases

    cases = choose(args, [case for case in all_cases() if case.dtype is torch.bfloat16])
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    ceiling = measure_ceiling()
    print(report.ceiling_line(ceiling, properties.name))
    counts = sorted(set(args.rows or ROWS))
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("compile", total=len(cases))
        compile_ahead(cases, counts, lambda: progress.advance(task))
        task = progress.add_task("bench", total=len(cases) * len(counts))
        for case in cases:
            progress.update(task, description=case.op)
            for count in counts:
                rows.append(measure(case, count, ceiling, device, properties.L2_cache_size))
                progress.advance(task)
    show(rows_table(rows), *report.notes(rows), ops_table(rows))
    print(json.dumps(report.as_json(rows, ceiling, properties.name)), flush=True)
    return 1 if any(row.refused for row in rows) else 0
