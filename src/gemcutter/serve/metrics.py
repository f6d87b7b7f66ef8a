"""Metrics: the server's figures for Prometheus, in a registry of their own."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gemcutter.schedule.request import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TO_FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160)  # seconds
_PER_TOKEN = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5,
)  # fmt: skip
_WHOLE = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 960)


class Metrics:
    """Counters and histograms are fed by the answers; gauges come from the engine's newest stats."""

    def __init__(self) -> None:
        self.stats: Stats | None = None
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"gemcutter_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"gemcutter_{name}", text, registry=self._registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered sequences")
        self.cached_tokens = counter("cached_prompt_tokens", "Prompt tokens taken from the prefix cache")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.finished = counter("requests", "Sequences ended, by reason", ("finish_reason",))
        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token", _TO_FIRST)
        self.per_token = histogram(
            "time_per_output_token_seconds", "Mean time of a sequence's tokens after its first", _PER_TOKEN
        )
        self.gap = histogram("inter_token_latency_seconds", "Time between two updates of a sequence", _PER_TOKEN)
        self.whole = histogram("e2e_request_latency_seconds", "Arrival to last token", _WHOLE)
        self._registry.register(self)

    def text(self) -> bytes:
        """The exposition that Prometheus scrapes."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for what the engine counts."""
        if self.stats is None:
            return
        stats = self.stats
        yield GaugeMetricFamily("gemcutter_requests_waiting", "Sequences queued in the engine", stats.waiting)
        yield GaugeMetricFamily("gemcutter_requests_running", "Sequences running in the engine", stats.running)
        yield CounterMetricFamily("gemcutter_preemptions", "Sequences sent back to the queue", stats.preemptions)
        yield CounterMetricFamily("gemcutter_engine_steps", "Steps of the engine", stats.steps)
        pages = GaugeMetricFamily(
            "gemcutter_kv_pages",
            "KV cache pages: used by running sequences, cached prefixes that may be evicted, total",
            labels=("kind", "state"),
        )
        for state, counts in (
            ("used", stats.pages_used),
            ("cached", stats.pages_cached),
            ("total", stats.pages_total),
        ):
            for kind, count in counts.items():
                pages.add_metric((str(kind), state), count)
        yield pages


class Stopwatch:
    """The times of one sequence. `now` is seconds of a monotonic clock."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._first = 0.0
        self._last = 0.0
        self._tokens = 0

    def tokens(self, count: int, now: float) -> None:
        if count == 0:
            return
        if self._tokens == 0:
            self._metrics.first_token.observe(now - self._arrival)
            self._first = now
        else:
            self._metrics.gap.observe(now - self._last)
        self._last = now
        self._tokens += count
        self._metrics.generation_tokens.inc(count)

    def finish(self, reason: str, prompt_tokens: int, cached_tokens: int, now: float) -> None:
        self._metrics.finished.labels(reason).inc()
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.cached_tokens.inc(cached_tokens)
        self._metrics.whole.observe(now - self._arrival)
        if self._tokens > 1:
            self._metrics.per_token.observe((self._last - self._first) / (self._tokens - 1))
