"""Time one batch in this process, and show where a step's time goes beside what it must take.

First the ceiling: bandwidth of a copy, and FLOP/s of a large matrix product. Then time to the first token, time per
token, and for each kind of kernel its floor at that ceiling and its time. A floor is the bytes that must move or
the FLOPs that must run, whichever takes longer; experts are taken as chosen uniformly. On a CPU, which runs plain
PyTorch, attention and sampling are among "other". The last line is JSON.
"""

import argparse
import dataclasses
import json

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.files import locate
from gemcutter.cli.flags import Parser, add_config, add_model, blame_user, read_config, whole
from gemcutter.cli.table import show, table_of
from gemcutter.model.cost import DTYPE_BYTES


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument(
        "--batch-size", type=whole(1), default=1, metavar="INT", help="requests at once (default: 1)"
    )
    parser.add_argument("--input-len", type=whole(1), default=1024, metavar="INT", help="of each (default: 1024)")
    parser.add_argument("--output-len", type=whole(1), default=64, metavar="INT", help="of each (default: 64)")
    add_config(parser, "engine")


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    if config.max_running_requests is None:
        config = dataclasses.replace(config, max_running_requests=args.batch_size)
    if config.max_running_requests < args.batch_size:
        args.parser.error(
            f"--batch-size {args.batch_size} is over --max-running-requests {config.max_running_requests}; "
            "they would not run together"
        )
    with blame_user(args.parser):
        folder = locate(config.model_path, config.revision, config.reads_weights)
        spec = read_spec(folder)
    import torch  # seconds, for which no --help should wait

    from gemcutter.bench import latency as bench
    from gemcutter.bench import latency_roofline as roofline
    from gemcutter.bench.roof import measure_roof
    from gemcutter.checkpoint.load import quantize_on_load
    from gemcutter.engine import Engine
    from gemcutter.run.device import resolve_device

    with blame_user(args.parser):
        device = resolve_device(config.device)
        if config.quantization == "fp8":
            spec = quantize_on_load(spec, folder)
    dtype_name = spec.dtype if config.dtype == "auto" else config.dtype
    dtype = getattr(torch, dtype_name)
    roof = measure_roof(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine counts what is free
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}: copy {roof.bandwidth / 1e12:.3g} TB/s, {dtype_name} matmul {roof.flops / 1e12:.3g} TFLOP/s")
    with blame_user(args.parser):
        engine = Engine.start(config)
        # Drawn between the stages only: a thread that draws takes time from the step.
        with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
            task = progress.add_task("", total=len(bench.STAGES))

            def stage(what: str) -> None:
                progress.update(task, description=what, completed=bench.STAGES.index(what), refresh=True)

            latency = bench.measure(
                engine, args.batch_size, args.input_len, args.output_len, config.random_seed, stage
            )
    batch, input_len = args.batch_size, args.input_len
    elements = dtype.itemsize, DTYPE_BYTES[engine.config.kv_cache_dtype]
    parts = {
        "decode": roofline.decode_roofline(spec, latency, batch, *elements, roof),
        "prefill": roofline.prefill_roofline(spec, latency, batch, input_len, *elements, roof),
    }
    says = {"decode": "one step: time per token", "prefill": "all of the prompts: time to first token"}
    for phase, one in parts.items():
        show(
            f"{phase}, {says[phase]} {one.wall * 1e3:.2f} ms, floor {one.floor * 1e3:.2f} ms, "
            f"all kernels {one.measured * 1e3:.2f} ms",
            _table(one),
        )
    result = {
        "model": config.model_path,
        "device": name,
        "dtype": dtype_name,
        "kv_cache_dtype": engine.config.kv_cache_dtype,
        "batch_size": batch,
        "input_len": input_len,
        "output_len": args.output_len,
        "context": latency.context,
        "copy_bytes_per_s": roof.bandwidth,
        "matmul_flops_per_s": roof.flops,
        "ttft_ms": latency.ttft * 1e3,
        "tpot_ms": latency.tpot * 1e3,
        **{phase: _plain(one) for phase, one in parts.items()},
    }
    print(json.dumps(result), flush=True)
    return 0


def _table(one) -> Table:
    table = table_of("launches", "MB", "GFLOP", "floor, ms", "ms", "of floor", "share", words=("part",))
    for row in one.rows:
        needed = ["-"] * 3 if row.floor is None else [
            f"{row.bytes / 1e6:.1f}", f"{row.flops / 1e9:.2f}", f"{row.floor * 1e3:.3f}"
        ]  # fmt: skip
        reached = "-" if not row.floor or not row.measured else f"{row.floor / row.measured:.0%}"
        table.add_row(
            row.part, f"{row.launches:g}", *needed, f"{row.measured * 1e3:.3f}", reached, f"{row.share:.1%}"
        )
    return table


def _plain(one) -> dict:
    rows = [
        {
            "part": row.part,
            "launches": row.launches,
            "bytes": row.bytes,
            "flops": row.flops,
            "floor_ms": None if row.floor is None else row.floor * 1e3,
            "measured_ms": row.measured * 1e3,
            "share": row.share,
        }
        for row in one.rows
    ]
    return {
        "floor_ms": one.floor * 1e3, "wall_ms": one.wall * 1e3, "kernels_ms": one.measured * 1e3, "parts": rows
    }  # fmt: skip
