"""Engine: requests of token ids in, updates of token ids out. One `step` plans, launches, reads and commits."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator

import numpy as np
import torch

from gemcutter.cache.budget import size_cache
from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.cache.pool import KVPool
from gemcutter.checkpoint.config import read_generation_config, read_spec
from gemcutter.checkpoint.files import locate
from gemcutter.checkpoint.load import load, quantize_on_load
from gemcutter.config import EngineConfig
from gemcutter.model.kv_scales import scales_of
from gemcutter.model.models import MODELS
from gemcutter.run.build import StepBuilder
from gemcutter.run.device import kv_byte_budget, resolve_device
from gemcutter.run.graphs import StepGraphs
from gemcutter.run.runner import Flight, Runner
from gemcutter.run.warm import warm_up
from gemcutter.schedule.pace import Pace
from gemcutter.schedule.plan import Plan
from gemcutter.schedule.planner import Scheduler
from gemcutter.schedule.request import Request, Stats, Update
from gemcutter.spec import Family, ModelSpec

MAX_RUNNING = {"cuda": 128, "cpu": 16}  # requests in a step, where the user does not say
LONGEST_WAIT = 0.001  # seconds, until `patience` sees that a step took less than others of its kind


class Engine:
    """Knows nothing of text. Not thread-safe: one thread submits, aborts and steps."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, scheduler: Scheduler, runner: Runner) -> None:
        """`config` is resolved: no "auto" and no None where the engine reads it."""
        self.config = config
        self.spec = spec
        self._scheduler = scheduler
        self._runner = runner
        self._ahead = config.device != "cpu"  # a step is launched before the tokens of the last are read
        self._flight: Flight | None = None  # the step that is not read
        self._pace = Pace()
        self._news: list[Update] = []  # for the next step to tell

    @classmethod
    def start(cls, config: EngineConfig) -> "Engine":
        """Load the checkpoint, size the cache, capture the graphs.

        Raises:
            ValueError: the checkpoint, the device or its memory do not do; the message says what to change.
        """
        folder = locate(config.model_path, config.revision, config.reads_weights)
        spec = read_spec(folder) if config.quantization == "auto" else quantize_on_load(read_spec(folder), folder)
        device = resolve_device(config.device)
        config = _resolved(config, spec, device)
        dtype = getattr(torch, config.dtype)
        weights = load(spec, folder, device, dtype, config.load_format, config.random_seed)
        is_fp8 = config.kv_cache_dtype == "fp8_e4m3"
        kv_dtype = torch.float8_e4m3fn if is_fp8 else dtype
        layout = CacheLayout.of(spec, config.page_size, kv_dtype.itemsize)
        size = size_cache(
            layout,
            kv_byte_budget(device, config.mem_fraction_static),
            model_context=spec.context_length,
            context_length=config.context_length,
            max_running_requests=config.max_running_requests,
            chunked_prefill_size=config.chunked_prefill_size,
            max_prefill_tokens=config.max_prefill_tokens,
            max_total_tokens=config.max_total_tokens,
        )
        config = dataclasses.replace(config, context_length=size.context_length)
        scales = scales_of(spec, weights) if is_fp8 else None
        pool = KVPool(spec, layout, size.pages, kv_dtype, device, scales)
        ledger = Ledger(
            layout, size.pages, config.max_running_requests, size.context_length, not config.disable_radix_cache
        )
        scheduler = Scheduler(
            ledger,
            context_length=size.context_length,
            max_running_requests=config.max_running_requests,
            chunked_prefill_size=config.chunked_prefill_size,
            max_prefill_tokens=config.max_prefill_tokens,
        )
        model = MODELS[spec.family](spec, weights, size.context_length)
        builder = StepBuilder(
            ledger,
            device,
            max_prompt_tokens=config.max_prefill_tokens,
            max_sequences=config.max_running_requests,
            context_length=size.context_length,
        )
        suppress = [id for id in read_generation_config(folder).get("suppress_tokens", ()) if id < spec.vocab]
        suppressed = torch.tensor(suppress, device=device) if suppress else None
        graphs = None
        if device.type == "cuda":
            progress = sys.stderr.isatty()
            longest = min(config.max_prefill_tokens, size.context_length)
            warm_up(model, pool, longest, config.page_size, progress)
            if largest := config.cuda_graph_max_bs:
                chunk = min(config.chunked_prefill_size, longest)
                graphs = StepGraphs(model, pool, builder, suppressed, largest, longest, chunk, progress)
        runner = Runner(model, pool, builder, graphs, suppressed)
        return cls(config, spec, scheduler, runner)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer that a request may have."""
        return self.config.context_length

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._news)

    @property
    def patience(self) -> float:
        """Seconds for which `step` may be put off, 0 if not at all: whoever has requests to come waits so long for
        them, and then asks again. The device has work until then, and what arrives joins the very next step.
        """
        if self._flight is None or self._flight.is_done:
            return 0.0
        return min(self._pace.left, LONGEST_WAIT)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it can never run.
        """
        vocab = self.spec.vocab
        if np.frombuffer(request.prompt_ids, np.uint32).max(initial=0) >= vocab:  # negative ones are the largest
            outside = [id for id in request.prompt_ids if not 0 <= id < vocab]
            raise ValueError(f"token ids {outside[:5]} are not in the vocabulary of {vocab}")
        self._scheduler.add(request)

    def abort(self, id: str) -> None:
        """End a request; the next step reports it with finish_reason "abort". Unknown ids are ignored."""
        if self._scheduler.abort(id):
            self._news.append(Update(id=id, token_ids=[], finish_reason="abort"))

    def step(self) -> list[Update]:
        """Launch a step of all that fit into it, and tell what is new.

        On a GPU the news is of the step launched by the call before: while the host reads its tokens and does all
        else that it must, the device works on the next. A request that so turns out to have ended has a row too
        many in that next step, which is dropped. On a CPU, where launching is computing, it is of this step.

        An exception out of the forward pass, Ctrl-C included, ends the requests of this step, and one while tokens
        are read those of both: the next call reports them with finish_reason "error", and the others go on.
        """
        self._pace.planning(idle=self._flight is None)
        plan = self._scheduler.plan()
        flight = None
        if plan is not None:
            with self._ends_if_broken(plan):
                flight = self._runner.forward(plan)
            self._pace.launched(plan, at_once=flight.has_argmax)
            self._scheduler.advance(plan)
        before, self._flight = self._flight, None
        with self._ends_if_broken(*(one.plan for one in (before, flight) if one is not None)):
            if before is not None:
                self._commit(before)
            if flight is not None:
                self._runner.draw(flight)
                if not self._ahead:
                    self._commit(flight)
                elif self._scheduler.has_work:
                    self._flight = flight
        news, self._news = self._news, []
        return news

    def _commit(self, flight: Flight) -> None:
        just_now = not flight.is_done
        sampled = flight.read()
        self._pace.ended(just_now)
        samplers = flight.plan.samplers
        for row in self._scheduler.commit(flight.plan, sampled.token_ids):
            sequence, logprobs = samplers[row].sequence, sampled.logprobs[row]
            self._news.append(
                Update(
                    id=sequence.id,
                    token_ids=[sampled.token_ids[row]],
                    logprobs=None if logprobs is None else [logprobs],
                    finish_reason=sequence.finish_reason,
                    stop_id=sequence.stop_id,
                    cached_tokens=sequence.cached_tokens,
                )
            )

    @contextlib.contextmanager
    def _ends_if_broken(self, *plans: Plan) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            last = {"token_ids": [], "finish_reason": "error", "error": f"a step broke: {error!r}"}
            for plan in plans:
                self._news += [Update(id=sequence.id, **last) for sequence in self._scheduler.fail(plan)]
            raise

    def stats(self) -> Stats:
        return self._scheduler.stats()

    def check_invariants(self) -> None:
        """Assert that the books of pages and the order of service hold."""
        self._scheduler.check_invariants()


def _resolved(config: EngineConfig, spec: ModelSpec, device: torch.device) -> EngineConfig:
    """Without "auto", and with numbers where the user left the choice; the cache decides the context later."""
    if config.kv_cache_dtype == "fp8_e4m3" and spec.family is not Family.GEMMA4:
        raise ValueError(
            f"kv_cache_dtype fp8_e4m3 takes its scales from the norms of K and V, which {spec.family} has not; "
            "leave it at auto"
        )
    running = config.max_running_requests or MAX_RUNNING[device.type]
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    if kv_dtype not in (dtype, "fp8_e4m3"):
        raise ValueError(f"kv_cache_dtype must be auto, {dtype} (as the activations) or fp8_e4m3, got {kv_dtype!r}")
    largest = running if config.cuda_graph_max_bs is None else min(config.cuda_graph_max_bs, running)
    return dataclasses.replace(
        config,
        device=str(device),
        dtype=dtype,
        kv_cache_dtype=kv_dtype,
        max_running_requests=running,
        cuda_graph_max_bs=0 if config.disable_cuda_graph or device.type == "cpu" else largest,
    )
