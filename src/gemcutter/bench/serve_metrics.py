"""What `bench serve` reports, by the names and definitions of SGLang's bench_serving.

TTFT: first chunk with text - send. E2E: last event - send. TPOT: (E2E - TTFT) / (output tokens - 1), of requests
with more than one. ITL: gaps between chunks with text, pooled over all requests; a chunk may hold several tokens.
Throughputs: tokens of completed requests over the whole duration. Concurrency: the sum of E2E over the duration.
Peaks are taken over whole seconds from the first send: chunks that came in one, and requests alive in one.
"""

from collections import Counter

import numpy as np

from gemcutter.bench.serve_client import Answer
from gemcutter.bench.serve_load import Ask

SPREADS = ("ttft", "tpot", "itl", "e2e_latency")


def figures(asks: list[Ask], answers: list[Answer], duration: float) -> dict:
    """One flat dict, times in ms; None where there is no value. Failed requests are counted and left out else."""
    good = [(ask, answer) for ask, answer in zip(asks, answers, strict=True) if answer.error is None]
    inputs = sum(len(ask.prompt) for ask, _ in good)
    outputs = sum(answer.output_len for _, answer in good)
    values = _values([answer for _, answer in good])
    result = {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_output_tokens_asked": sum(ask.output_len for ask, _ in good),
        "request_throughput": len(good) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (inputs + outputs) / duration,
        "concurrency": sum(values["e2e_latency"]) / duration,
    }
    result["max_output_tokens_per_s"], result["max_concurrent_requests"] = _peaks([answer for _, answer in good])
    for name in SPREADS:
        result |= _spread(name, values[name])
    result["errors"] = dict(Counter(a.error for a in answers if a.error is not None).most_common(5))
    return result


def _values(answers: list[Answer]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in SPREADS}
    for answer in answers:
        ttft, latency = answer.stamps[0] - answer.start, answer.end - answer.start
        values["ttft"].append(ttft)
        values["e2e_latency"].append(latency)
        values["itl"] += np.diff(answer.stamps).tolist()
        if answer.output_len > 1:
            values["tpot"].append((latency - ttft) / (answer.output_len - 1))
    return values


def _spread(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Percentiles by linear interpolation, numpy's default, as bench_serving's."""
    ms = 1e3 * np.array(seconds)
    kinds = {
        "mean": np.mean,
        "median": np.median,
        "std": np.std,
        "p90": lambda x: np.percentile(x, 90),
        "p95": lambda x: np.percentile(x, 95),
        "p99": lambda x: np.percentile(x, 99),
        "max": np.max,
    }
    return {f"{kind}_{name}_ms": float(of(ms)) if len(ms) else None for kind, of in kinds.items()}


def _peaks(answers: list[Answer]) -> tuple[int, int]:
    """Most chunks, and most requests alive, in one second."""
    if not answers:
        return 0, 0
    begin = min(answer.start for answer in answers)
    chunks = Counter(int(stamp - begin) for answer in answers for stamp in answer.stamps)
    alive = Counter(second for a in answers for second in range(int(a.start - begin), int(a.end - begin) + 1))
    return max(chunks.values()), max(alive.values())
