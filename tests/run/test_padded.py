"""Steps filled up to a bucket, as graphs run them, on a CPU without graphs: tokens and logprobs of plain steps."""

import itertools
import random

import pytest
import tiny_models
import torch
from drive import finish, request

from gemcutter.config import EngineConfig
from gemcutter.engine import Engine
from gemcutter.ops.tokens.sample import argmax_into
from gemcutter.run.bucket import PROMPTS, Bucket


class Padded:
    """What StepGraphs does, without its graphs, for buckets with more room than a plan needs."""

    def __init__(self, runner) -> None:
        self.runner, self.seen = runner, set()
        self.spare = itertools.cycle([(0, 0), (5, 30), (1, 0), (0, 1)])  # rows of decoding, tokens of prompts

    def bucket(self, plan) -> Bucket | None:
        whole = Bucket.of(plan)
        rows, tokens = next(self.spare)
        rows, tokens = min(whole.decodes + rows, 8), min(whole.prompt_tokens + tokens, 100)
        if whole.prompts >= PROMPTS:
            return None
        return Bucket(rows, PROMPTS, tokens) if whole.prompts else Bucket(rows, 0, 0)

    def replay(self, plan, bucket: Bucket) -> torch.Tensor:
        builder = self.runner._builder
        batch = builder.build_padded(plan, bucket)
        builder.look_up(bucket)
        logits = self.runner._model.forward(batch, self.runner._pool)
        argmax_into(builder.drawn[: bucket.rows], logits, None)
        whole = Bucket.of(plan)
        self.seen.add((bucket.prompts > whole.prompts, bucket.prompt_tokens > whole.prompt_tokens))
        return logits


@pytest.mark.parametrize("kind", ["moe", "ple_shared"])
def test_padded_steps_have_the_bits_of_plain_ones(kind, tmp_path):
    tiny_models.make(kind).save_pretrained(tmp_path)
    rng = random.Random(kind)
    requests = []
    for i in range(24):
        prompt = [rng.randrange(3, 100) for _ in range(rng.choice([1, 2, 9, 40, 90]))]
        requests.append(request(str(i), prompt, max_tokens=4, logprobs=2))
    outcomes = []
    for padded in (False, True):
        config = EngineConfig(
            model_path=str(tmp_path), device="cpu", page_size=8, context_length=100, max_running_requests=8,
            max_prefill_tokens=100, chunked_prefill_size=37, disable_radix_cache=True,
        )  # fmt: skip
        engine = Engine.start(config)
        if padded:
            engine._runner._graphs = graphs = Padded(engine._runner)
        outcomes.append(finish(engine, requests))
    assert outcomes[0] == outcomes[1]
    assert graphs.seen == {(False, False), (True, False), (True, True)}, "buckets full of prompts, and not"
