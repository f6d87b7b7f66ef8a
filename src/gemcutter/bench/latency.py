"""One batch through the engine, timed, then taken apart by kind of kernel."""

import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from gemcutter.bench.latency_profile import Steps, watch
from gemcutter.engine import Engine
from gemcutter.params import SamplingParams, resolve
from gemcutter.schedule.request import Request

RUNS = 3  # of which the median counts
PROFILED_STEPS = 4  # of decoding
STAGES = ("warm-up", *(f"run {place + 1}" for place in range(RUNS)), "profile")


@dataclass
class Batch:
    """Requests that were submitted together, and when each token of each came."""

    ids: list[str]
    begin: float
    stamps: dict[str, list[float]] = field(default_factory=dict)
    ended: int = 0

    @property
    def all_began(self) -> bool:
        return len(self.stamps) == len(self.ids)

    def ttft(self) -> float:
        """Mean over the requests."""
        return statistics.fmean(stamps[0] - self.begin for stamps in self.stamps.values())

    def tpot(self) -> float:
        return statistics.fmean((s[-1] - s[0]) / (len(s) - 1) for s in self.stamps.values())


@dataclass(frozen=True)
class Latency:
    ttft: float  # s
    tpot: float
    prefill: Steps  # all steps of a batch that answers one token each
    decode: Steps  # PROFILED_STEPS of them
    context: int  # tokens that a request held in the middle of those


class Driver:
    """Feeds made-up prompts to an engine; no two begin alike, so that no prefix is found in the cache."""

    def __init__(self, engine: Engine, batch_size: int, input_len: int, seed: int) -> None:
        self._engine = engine
        self._batch_size = batch_size
        self._input_len = input_len
        self._rng = np.random.default_rng(seed)
        self._count = 0

    def submit(self, output_len: int | None) -> Batch:
        """
        Raises:
            ValueError: such a request can never run.
        """
        params = resolve(SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True), {})
        vocab = self._engine.spec.vocab
        ids = []
        for _ in range(self._batch_size):
            prompt = array("i", self._rng.integers(vocab // 256, vocab, self._input_len).tolist())
            ids.append(str(self._count))
            self._count += 1
            self._engine.submit(Request(id=ids[-1], prompt_ids=prompt, params=params, stop_ids=frozenset(), seed=0))
        return Batch(ids, time.perf_counter())

    def step(self, batch: Batch) -> None:
        updates = self._engine.step()
        now = time.perf_counter()
        for update in updates:
            if update.token_ids:
                batch.stamps.setdefault(update.id, []).extend([now] * len(update.token_ids))
            batch.ended += update.finish_reason is not None

    def finish(self, batch: Batch) -> Batch:
        while self._engine.has_work:
            self.step(batch)
        return batch

    def drop(self, batch: Batch) -> None:
        for id in batch.ids:
            self._engine.abort(id)
        self.finish(batch)


def measure(
    engine: Engine,
    batch_size: int,
    input_len: int,
    output_len: int,
    seed: int,
    stage: Callable[[str], None] = lambda name: None,
) -> Latency:
    """Time RUNS batches after one that only warms up, then profile the prefill of one more and some decode steps of
    another: an engine that launches ahead would mix the two.

    Args:
        engine: idle.
        batch_size: requests that are submitted together.
        input_len: tokens of each prompt.
        output_len: tokens that each answers; half of them come before the profiled steps.
        seed: of the prompts.
        stage: told what begins, one of STAGES.

    Raises:
        ValueError: such requests can never run.
    """
    if output_len < 2:
        raise ValueError(f"output length must be 2 or more, for a time between tokens, got {output_len}")
    wanted = input_len + output_len + PROFILED_STEPS
    if wanted > engine.context_length:
        raise ValueError(
            f"{input_len} tokens in, {output_len} out and {PROFILED_STEPS} profiled make {wanted}, and the context "
            f"holds {engine.context_length}; ask for fewer, or raise the context length"
        )
    driver = Driver(engine, batch_size, input_len, seed)
    stage(STAGES[0])
    driver.finish(driver.submit(output_len))
    runs = []
    for name in STAGES[1:-1]:
        stage(name)
        runs.append(driver.finish(driver.submit(output_len)))
    stage(STAGES[-1])
    device = torch.device(engine.config.device)
    with watch(device) as prefill:
        driver.finish(driver.submit(1))
    batch = driver.submit(None)  # must outlive the profile
    while not batch.all_began:
        driver.step(batch)
    for _ in range((output_len - 1) // 2):
        driver.step(batch)
    held = input_len + statistics.fmean(map(len, batch.stamps.values()))
    with watch(device) as decode:
        for _ in range(PROFILED_STEPS):
            driver.step(batch)
    if batch.ended:
        raise ValueError(f"{batch.ended} requests met the end of the context before the last had begun; raise it")
    driver.drop(batch)
    return Latency(
        statistics.median(run.ttft() for run in runs),
        statistics.median(run.tpot() for run in runs),
        prefill,
        decode,
        round(held) + PROFILED_STEPS // 2,
    )
