"""Put load on any OpenAI endpoint, and report TTFT, TPOT, ITL and throughput.

Flags, figures and their definitions are those of SGLang's bench_serving. Prompts are token ids, so no tokenizer is
needed and lengths are exact; answers are greedy and go on after the end token. The last line is JSON.
"""

import argparse
import contextlib
import json
import time
import zlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from gemcutter.cli.flags import Parser, blame_user
from gemcutter.cli.table import show, table_of

# flag: type, default, help. A preset stands in for defaults, and what is given stands over both.
OPTIONS = {
    "num_prompts": (int, 100, "requests of random-ids"),
    "request_rate": (float, float("inf"), "requests a second, a Poisson process; inf sends all at once"),
    "max_concurrency": (int, None, "requests under way at once; default: any number"),
    "random_input_len": (int, 1024, "tokens of a prompt"),
    "random_output_len": (int, 256, "tokens of an answer"),
    "random_range_ratio": (float, 1.0, "lengths are uniform in [ratio * length, length]; bench_serving's is 0"),
    "gsp_num_groups": (int, 64, "system prompts of shared-prefix"),
    "gsp_prompts_per_group": (int, 16, "requests with the same system prompt"),
    "gsp_system_prompt_len": (int, 2048, "tokens of a system prompt"),
    "gsp_question_len": (int, 128, "tokens after it"),
    "gsp_output_len": (int, 256, "tokens of an answer"),
    "gsp_range_ratio": (float, 1.0, "as --random-range-ratio"),
    "vocab_size": (int, 262_144, "token ids are drawn below it; the default is Gemma 4's, carat's is 1024"),
    "warmup_requests": (int, 1, "requests sent before the clock runs"),
    "seed": (int, 42, "same seed and options, same prompts and gaps; other options, other prompts"),
}
# The workloads of docs/performance.md, every option that differs from its default.
PRESETS = {
    "single": {"num_prompts": 4, "max_concurrency": 1, "warmup_requests": 2},
    "rate8": {"num_prompts": 80, "max_concurrency": 64, "warmup_requests": 8, "request_rate": 8.0},
    "crowd": {
        "num_prompts": 200, "max_concurrency": 100, "warmup_requests": 16, "random_input_len": 512,
        "random_output_len": 512,
    },
    "prefill8k": {"num_prompts": 3, "max_concurrency": 1, "random_input_len": 8192, "random_output_len": 16},
    "long32k": {"num_prompts": 2, "max_concurrency": 1, "random_input_len": 32768, "random_output_len": 64},
}  # fmt: skip
SHOW_EVERY = 0.5  # seconds; drawing the bar takes about a millisecond in which no chunk is stamped
BUSY_CLIENT = 0.5  # of one core


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:30000", metavar="URL", help="(default: %(default)s)"
    )
    parser.add_argument("--model", metavar="STR", help="name at the API; default: the first of /v1/models")
    parser.add_argument("--api-key", metavar="STR", help="sent as a bearer token")
    parser.add_argument("--dataset-name", choices=("random-ids", "shared-prefix"), default="random-ids")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="one of the workloads of docs/performance.md")
    for name, (kind, default, says) in OPTIONS.items():
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(
            "--" + name.replace("_", "-"), type=kind, metavar=kind.__name__.upper(), help=says + shown
        )
    parser.add_argument("--gsp-ordered", action="store_true", help="send a group's prompts one after another")
    parser.add_argument("--disable-ignore-eos", action="store_true", help="let the end token end an answer")
    parser.add_argument("--extra-request-body", type=_object, default={}, metavar="JSON", help="added to requests")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from gemcutter.bench import serve, serve_load
    from gemcutter.bench.serve_client import Endpoint

    chosen = {name: default for name, (_, default, _) in OPTIONS.items()}
    chosen |= PRESETS.get(args.preset, {})
    chosen |= {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    with blame_user(args.parser):
        _check(args, chosen)
        endpoint = Endpoint.of(args.base_url, args.api_key)
        model = args.model or serve.served_model(endpoint)
    # Drawn from one stream of ids, a workload's prompts would begin another's and lie in the server's prefix cache.
    workload = zlib.crc32(repr((args.dataset_name, chosen)).encode())
    rng = np.random.default_rng([chosen["seed"], workload])
    if args.dataset_name == "random-ids":
        shape = [chosen[name] for name in (
            "num_prompts", "random_input_len", "random_output_len", "random_range_ratio"
        )]  # fmt: skip
        asks = serve_load.random_ids(rng, *shape, chosen["vocab_size"])
    else:
        shape = [chosen["gsp_" + name] for name in (
            "num_groups", "prompts_per_group", "system_prompt_len", "question_len", "output_len", "range_ratio"
        )]  # fmt: skip
        asks = serve_load.shared_prefix(rng, *shape, args.gsp_ordered, chosen["vocab_size"])
    gaps = serve_load.gaps(rng, len(asks), chosen["request_rate"])
    # Prompts of their own: the measured ones must not lie in the server's prefix cache.
    longest = max(len(ask.prompt) for ask in asks), max(ask.output_len for ask in asks)
    warmup = serve_load.random_ids(rng, chosen["warmup_requests"], *longest, 1.0, chosen["vocab_size"])
    target = serve.Target(endpoint, model, not args.disable_ignore_eos, args.extra_request_body)
    with blame_user(args.parser):
        serve.warm_up(target, warmup)
    with _bar(len(asks)) as done:
        result = serve.measure(target, asks, gaps, chosen["max_concurrency"], done)
    rate = chosen["request_rate"]
    head = {
        "model": model,
        "dataset_name": args.dataset_name,
        "preset": args.preset,
        "seed": chosen["seed"],
        "request_rate": "inf" if rate == float("inf") else rate,  # JSON has no infinity
        "max_concurrency": chosen["max_concurrency"],
    }
    _show(result)
    print(json.dumps(head | {name: _short(value) for name, value in result.items()}))
    return 1 if result["failed"] else 0


def _object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def _check(args: argparse.Namespace, chosen: dict) -> None:
    least = {"max_concurrency": 1, "vocab_size": 2, "warmup_requests": 0, "seed": 0}
    for name, value in chosen.items():
        flag = "--" + name.replace("_", "-")
        if name.endswith("ratio"):
            if not 0 <= value <= 1:
                raise ValueError(f"{flag} must be in [0, 1], got {value}")
        elif name == "request_rate":
            if not value > 0:
                raise ValueError(f"{flag} must be over 0, or inf, got {value}")
        elif value is not None and value < least.get(name, 1):
            raise ValueError(f"{flag} must be {least.get(name, 1)} or more, got {value}")
    if args.preset and args.dataset_name != "random-ids":
        raise ValueError(f"--preset {args.preset} is a workload of random-ids; leave --dataset-name out")


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar of finished requests on stderr, if that is a terminal. Gives what to call after each."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn())
    shown = time.monotonic()
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("Requests", total=total)

        def done() -> None:
            nonlocal shown
            progress.advance(task)
            if time.monotonic() - shown > SHOW_EVERY:
                progress.refresh()
                shown = time.monotonic()

        yield done
        progress.refresh()


def _show(result: dict) -> None:
    totals = Table("", "", box=None, show_header=False)
    for name, key, unit in (
        ("completed requests", "completed", ""),
        ("failed requests", "failed", ""),
        ("duration", "duration", "s"),
        ("requests", "request_throughput", "/s"),
        ("input tokens", "input_throughput", "/s"),
        ("output tokens", "output_throughput", "/s"),
        ("peak output, chunks", "max_output_tokens_per_s", "/s"),
        ("concurrency", "concurrency", ""),
        ("peak concurrency", "max_concurrent_requests", ""),
        ("client, share of one core", "client_cpu_share", ""),
    ):
        totals.add_row(name, f"{_text(result[key])} {unit}".rstrip())
    kinds = ("mean", "median", "p90", "p99", "max")
    times = table_of(*kinds, words=("ms",))
    for name, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2e_latency")):
        times.add_row(name, *(_text(result[f"{kind}_{key}_ms"]) for kind in kinds))
    show(totals, times)
    for error, count in result["errors"].items():
        print(f"failed, {count} of them: {error}")
    asked, came = result["total_output_tokens_asked"], result["total_output_tokens"]
    if asked != came:
        print(f"{asked} output tokens were asked for, {came} came.")
    if result["completed"] and result["client_cpu_share"] > BUSY_CLIENT:
        print("The client was busy more than half of the time: its own delays are in these figures.")


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _short(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value
