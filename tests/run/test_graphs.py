"""Graphs of steps: their buckets, and replay against eager steps on a GPU."""

import pytest
import torch
from drive import finish, request
from problems import held_out

from gemcutter.config import EngineConfig
from gemcutter.engine import Engine
from gemcutter.run import graphs
from gemcutter.run.bucket import Bucket
from gemcutter.run.graphs import StepGraphs, decode_sizes


def test_decode_sizes():
    assert decode_sizes(1) == [1]
    assert decode_sizes(3) == [1, 2, 3]
    assert decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    for largest in range(1, 200):
        sizes = decode_sizes(largest)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["carat", "carat-edge"])
def test_replay_equals_eager(model, monkeypatch):
    """Requests of many lengths: prompts in chunks beside decoding rows, in batches that shrink through the buckets,
    with page tables left stale; and one by itself, whose whole chunks have a graph that they fill.
    """
    replayed, replay = set(), StepGraphs.replay
    monkeypatch.setattr(graphs, "MOST_TOKENS", 20)
    monkeypatch.setattr(
        StepGraphs, "replay", lambda self, plan, bucket: (replayed.add(bucket), replay(self, plan, bucket))[1]
    )
    prompts = [[2, *p.solution.encode()[: 3 + 7 * i]] for i, p in enumerate(held_out(11))]
    outcomes = []
    for disabled in (False, True):
        config = EngineConfig(
            model_path=model,
            device="cuda",
            disable_cuda_graph=disabled,
            chunked_prefill_size=24,
            max_prefill_tokens=48,
        )
        engine = Engine.start(config)
        requests = [request(str(i), p, max_tokens=5 + 3 * i) for i, p in enumerate(prompts)]
        alone = request("alone", [2, *prompts[-1][:0:-1]], max_tokens=5)
        rounds = [finish(engine, some) for some in (requests, requests[::-1], [alone])]
        outcomes.append([[outcome.token_ids for outcome in one] for one in rounds])
        del engine
        torch.cuda.empty_cache()
    assert outcomes[0] == outcomes[1]
    assert Bucket(0, 1, 24) in replayed
