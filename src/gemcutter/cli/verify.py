"""Compare every kernel's results with its reference's, bit for bit.

On a GPU the kernels run there, at every released shape, on up to 8192 rows. Without one the same kernels run in
Triton's interpreter, at the shapes of three models, on few rows. NaN equals NaN, -0.0 is not 0.0. The last line is
JSON; status 1 says that an element differs.

--compile makes the kernels' binaries for sm_90, sm_100 and gfx942 instead, which needs none of these cards.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.progress import Progress

from gemcutter.cli.cases import add_case_flags, choose
from gemcutter.cli.flags import Parser
from gemcutter.cli.table import show, table_of

INTERPRETED_ROWS = (0, 2)
# Left out there unless --shape asks for one: E2B, 26B-A4B and GLM-4.7 have every form between them, in 2 minutes.
NOT_INTERPRETED = ("E4B", "12B", "31B")
COMPILERS = 2  # processes


def add_arguments(parser: Parser) -> None:
    add_case_flags(parser, least=0)
    parser.add_argument("--compile", action="store_true", help="compile the kernels for each target; runs nothing")


def run(args: argparse.Namespace) -> int:
    import torch  # seconds, for which no --help should wait

    on_gpu = torch.cuda.is_available()
    interpreted = not (on_gpu or args.compile)
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))  # read when a kernel is defined, by the imports below
    if args.compile:
        return _compile(args)
    if interpreted:
        torch.set_num_threads(1)  # PyTorch's scalar code, where threads cut a row, has other bits
    from gemcutter.verify.cases import all_cases
    from gemcutter.verify.check import check
    from gemcutter.verify.inputs import ROWS, Kind

    cases = all_cases()
    if not on_gpu and not args.shape:
        cases = [case for case in cases if not case.shape.startswith(NOT_INTERPRETED)]
    chosen = choose(args, cases)
    if not on_gpu:
        from gemcutter.verify.interpreter import install

        install()
    rows = sorted(set(args.rows or (ROWS if on_gpu else INTERPRETED_ROWS)))
    device = torch.device("cuda" if on_gpu else "cpu")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("verify", total=len(chosen) * len(rows) * len(Kind))
        results = []
        for case in chosen:
            progress.update(task, description=case.op)
            results.append(check(case, rows, device, lambda: progress.advance(task)))
    where = torch.cuda.get_device_name(device) if on_gpu else "Triton's interpreter"
    _print(results, where, rows, [kind.value for kind in Kind], on_gpu)
    return 0 if all(result.passed for result in results) else 1


def _print(results: Sequence, where: str, rows: list[int], kinds: list[str], on_gpu: bool) -> None:
    table = table_of("compared", "different", words=("op", "shape", "dtype"))
    table.add_column("note")
    records = []
    for result in results:
        case = result.case
        dtype = str(case.dtype).removeprefix("torch.")
        notes = ["against CUDA's arithmetic, written out"] if case.stand_in and not on_gpu else []
        if result.left_out:
            notes.append(f"no memory for rows {' '.join(map(str, result.left_out))}")
        table.add_row(case.op, case.shape, dtype, f"{result.compared}", f"{result.different}", "; ".join(notes))
        record = dict(op=case.op, shape=case.shape, dtype=dtype)
        record |= dict(compared=result.compared, different=result.different)
        records.append(record | dict(failures=result.failures, left_out=result.left_out))
    show(f"{where}, rows {' '.join(map(str, rows))}, inputs {', '.join(kinds)}", table)
    for record in records:
        for failure in record["failures"]:
            at = f"{record['op']} {record['shape']} {record['dtype']} rows {failure['rows']} {failure['kind']}"
            says = failure.get("raised") or f"{failure['different']} elements differ"
            print(f"{at}: {says}")
    totals = {name: sum(record[name] for record in records) for name in ("compared", "different")}
    print(json.dumps(dict(device=where, rows=rows, **totals, cases=records)), flush=True)


def _compile(args: argparse.Namespace) -> int:
    if args.op or args.shape or args.rows:
        args.parser.error("--compile takes every op at every shape; leave out --op, --shape and --rows")
    from gemcutter.verify.compiles import TARGETS, count_variants, launched_kernels, launches, targets_of

    jobs = [(op, target) for op in launches() for target in targets_of(op)]
    variants, errors = {kernel: {} for kernel in launched_kernels()}, []
    # Not forked: PyTorch's threads do not survive that.
    with (
        Progress(console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool,
    ):
        results = pool.map(count_variants, *zip(*jobs, strict=True))
        for (op, target), made in progress.track(zip(jobs, results, strict=True), total=len(jobs)):
            if isinstance(made, str):
                errors.append(f"{op} for {target}: {made}")
                continue
            for kernel, count in made.items():
                found = variants.setdefault(kernel, {})
                found[target] = found.get(target, 0) + count
    table = table_of(*TARGETS, words=("kernel",))
    for kernel, made in sorted(variants.items()):
        table.add_row(kernel, *(str(made.get(target, "-")) for target in TARGETS))
        errors += [
            f"{kernel} is launched, and not compiled for {target}"
            for target in targets_of(kernel)
            if target not in made
        ]
    show(table, *errors)
    print(json.dumps(dict(variants=variants, errors=errors)), flush=True)
    return 1 if errors else 0
