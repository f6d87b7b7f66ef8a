"""Engine: requests of token ids in, updates of token ids out. One `step` plans, runs and commits."""

import dataclasses
import sys

import torch

from gemcutter.cache.budget import size_cache
from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.ledger import Ledger
from gemcutter.cache.pool import KVPool
from gemcutter.checkpoint.config import read_generation_config, read_spec
from gemcutter.checkpoint.files import locate
from gemcutter.checkpoint.load import load
from gemcutter.config import EngineConfig
from gemcutter.model.gemma4 import Gemma4
from gemcutter.run.build import StepBuilder
from gemcutter.run.device import kv_byte_budget, resolve_device
from gemcutter.run.graphs import DecodeGraphs
from gemcutter.run.runner import Runner
from gemcutter.run.warm import warm_up
from gemcutter.schedule.planner import Scheduler
from gemcutter.schedule.request import Request, Stats, Update
from gemcutter.spec import ModelSpec

MAX_RUNNING = {"cuda": 128, "cpu": 16}  # requests in a step, where the user does not say


class Engine:
    """Knows nothing of text. Not thread-safe: one thread submits, aborts and steps."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, scheduler: Scheduler, runner: Runner) -> None:
        """`config` is resolved: no "auto" and no None where the engine reads it."""
        self.config = config
        self.spec = spec
        self._scheduler = scheduler
        self._runner = runner
        self._ended: list[Update] = []  # last words of requests that no step will mention

    @classmethod
    def start(cls, config: EngineConfig) -> "Engine":
        """Load the checkpoint, size the cache, capture the graphs.

        Raises:
            ValueError: the checkpoint, the device or its memory do not do; the message says what to change.
        """
        folder = locate(config.model_path, config.revision, config.reads_weights)
        spec = read_spec(folder)
        device = resolve_device(config.device)
        config = _resolved(config, spec, device)
        dtype = getattr(torch, config.dtype)
        weights = load(spec, folder, device, dtype, config.load_format, config.random_seed)
        layout = CacheLayout.of(spec, config.page_size, dtype.itemsize)
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
        pool = KVPool(spec, layout, size.pages, dtype, device)
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
        model = Gemma4(spec, weights, size.context_length)
        graphs = None
        if device.type == "cuda":
            progress = sys.stderr.isatty()
            longest = min(config.max_prefill_tokens, size.context_length)
            warm_up(model, pool, longest, config.page_size, progress)
            if largest := config.cuda_graph_max_bs:
                graphs = DecodeGraphs(model, pool, largest, size.context_length, config.page_size, progress)
        builder = StepBuilder(layout.kinds, config.page_size, device)
        suppress = [id for id in read_generation_config(folder).get("suppress_tokens", ()) if id < spec.vocab]
        runner = Runner(model, pool, builder, graphs, suppress)
        return cls(config, spec, scheduler, runner)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer that a request may have."""
        return self.config.context_length

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._ended)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it can never run.
        """
        outside = [id for id in request.prompt_ids if not 0 <= id < self.spec.vocab]
        if outside:
            raise ValueError(f"token ids {outside[:5]} are not in the vocabulary of {self.spec.vocab}")
        self._scheduler.add(request)

    def abort(self, id: str) -> None:
        """End a request; the next step reports it with finish_reason "abort". Unknown ids are ignored."""
        if self._scheduler.abort(id):
            self._ended.append(Update(id=id, token_ids=[], finish_reason="abort"))

    def step(self) -> list[Update]:
        """Run one step of all that fit into it, and tell what is new.

        An exception out of the forward pass, Ctrl-C included, ends the requests of this step: the next call reports
        them with finish_reason "error", and the others go on.
        """
        updates, self._ended = self._ended, []
        plan = self._scheduler.plan()
        if plan is None:
            return updates
        try:
            sampled = self._runner.run(plan, self._scheduler.ledger)
        except BaseException as error:
            failed = self._scheduler.fail(plan)
            last = {"token_ids": [], "finish_reason": "error", "error": f"a step broke: {error!r}"}
            self._ended = updates + [Update(id=sequence.id, **last) for sequence in failed]
            raise
        for new in self._scheduler.commit(plan, sampled.token_ids):
            sequence, logprobs = new.sequence, sampled.logprobs[new.row]
            updates.append(
                Update(
                    id=sequence.id,
                    token_ids=[new.token_id],
                    logprobs=None if logprobs is None else [logprobs],
                    finish_reason=sequence.finish_reason,
                    stop_id=sequence.stop_id,
                    cached_tokens=sequence.cached_tokens,
                )
            )
        return updates

    def stats(self) -> Stats:
        return self._scheduler.stats()

    def check_invariants(self) -> None:
        """Assert that the books of pages and the order of service hold."""
        self._scheduler.check_invariants()


def _resolved(config: EngineConfig, spec: ModelSpec, device: torch.device) -> EngineConfig:
    """Without "auto", and with numbers where the user left the choice; the cache decides the context later."""
    running = config.max_running_requests or MAX_RUNNING[device.type]
    largest = running if config.cuda_graph_max_bs is None else min(config.cuda_graph_max_bs, running)
    return dataclasses.replace(
        config,
        device=str(device),
        dtype=spec.dtype if config.dtype == "auto" else config.dtype,
        max_running_requests=running,
        cuda_graph_max_bs=0 if config.disable_cuda_graph or device.type == "cpu" else largest,
    )
