"""Engine over carat: what it takes in, what it tells of requests that do not end by themselves."""

import json
import shutil

import pytest
import torch
from drive import Outcome, collect, finish, request

from gemcutter.checkpoint.files import locate
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine
from gemcutter.schedule.pace import Pace


@pytest.fixture(scope="module")
def engine():
    return Engine.start(EngineConfig(device="cpu", context_length=64))


def test_suppressed_tokens_outside_the_vocabulary_harm_nobody(engine, tmp_path):
    """They were written over another request's logits, or behind the last one's."""
    folder = shutil.copytree(locate("carat"), tmp_path / "carat")
    path = folder / "generation_config.json"
    vocab = engine.spec.vocab
    suppressed = {"suppress_tokens": [vocab, *range(vocab + 500, vocab + 3000), 258883]}
    path.write_text(json.dumps(json.loads(path.read_text()) | suppressed))
    other = Engine.start(EngineConfig(model_path=str(folder), device="cpu", context_length=64))
    requests = [request(str(i), [2, 300 + i, 500], max_tokens=8) for i in range(3)]
    assert finish(other, requests) == finish(engine, requests)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_of_the_cache(dtype, monkeypatch):
    """auto is the model's; FP8 has half the bytes or a quarter, and so twice the pages or four times."""
    monkeypatch.setattr("gemcutter.engine.kv_byte_budget", lambda *_: 2**19)
    pages = {}
    for asked, got in (("auto", dtype), (dtype, dtype), ("fp8_e4m3", "fp8_e4m3")):
        one = Engine.start(EngineConfig(device="cpu", dtype=dtype, kv_cache_dtype=asked, context_length=64))
        assert one.config.kv_cache_dtype == got
        pages[got] = sum(one.stats().pages_total.values())
    times = getattr(torch, dtype).itemsize
    assert times * pages[dtype] - 16 <= pages["fp8_e4m3"] <= times * pages[dtype] + 16, pages
    other = {"bfloat16": "float32", "float32": "float16"}[dtype]
    with pytest.raises(ValueError, match=f"auto, {dtype} .* or fp8_e4m3, got '{other}'"):
        Engine.start(EngineConfig(device="cpu", dtype=dtype, kv_cache_dtype=other))


def test_impossible_requests_are_refused_and_leave_nothing(engine):
    wrong = [([], "no tokens"), ([5] * 64, "context holds 64"), ([5, engine.spec.vocab], "vocab"), ([-1], "vocab")]
    for prompt, why in wrong:
        with pytest.raises(ValueError, match=why):
            engine.submit(request("a", prompt))
    assert not engine.has_work


def test_every_aborted_request_gets_one_last_word(engine):
    """Waiting, in the middle of its prompt, or decoding; a second abort and an unknown id say nothing."""
    requests = [request(str(i), [2, 300 + i], max_tokens=40) for i in range(20)]  # 16 run, 4 wait
    outcomes: dict[str, Outcome] = {}
    for item in requests:
        engine.submit(item)
    collect(engine, outcomes)
    for id in ("3", "19", "3", "nobody"):
        engine.abort(id)
    words = [update.id for update in engine.step() if update.finish_reason == "abort"]
    assert sorted(words) == ["19", "3"]
    while engine.has_work:
        collect(engine, outcomes)
    assert {id for id, outcome in outcomes.items() if outcome.finish_reason != "length"} == {"3"}
    assert len(outcomes) == 19 and not any(engine.stats().pages_used.values())


def test_a_step_ahead_gives_the_same_and_leaves_nothing(engine, monkeypatch):
    """Ends that are foreseen and that are not; aborts before and after the last token is drawn."""
    requests = [request(str(i), [2, 300 + i], max_tokens=1 + i % 7, logprobs=i % 3 or None) for i in range(20)]
    wanted = finish(engine, requests)
    stops = [request(f"s{i}", [2, 300 + i], stop_ids=one.token_ids[-1:]) for i, one in enumerate(wanted)]
    wanted += finish(engine, stops)
    assert {outcome.finish_reason for outcome in wanted} == {"stop", "length"}
    monkeypatch.setattr(engine, "_ahead", True)
    assert finish(engine, requests + stops) == wanted
    for steps in range(4):
        engine.submit(request("a", [2, 300], max_tokens=2))
        engine.submit(request("b", [2, 301], max_tokens=5))
        got = [update for _ in range(steps) for update in engine.step()]
        engine.abort("a")
        engine.submit(request("a", [2, 305], max_tokens=1))  # the id is free at once
        outcomes: dict[str, list] = {}
        while engine.has_work:
            for update in engine.step():
                outcomes.setdefault(update.id, []).append(update)
        reasons = [update.finish_reason for update in [*got, *outcomes["a"]] if update.id == "a"]
        assert [reason for reason in reasons if reason] == (["abort", "length"] if steps < 3 else ["length"] * 2)
        assert outcomes["b"][-1].finish_reason == "length"
        assert engine._flight is None and not any(engine.stats().pages_used.values())


def test_who_arrives_during_a_step_joins_the_next(engine, monkeypatch):
    """On a device of its own time: a step is done 1 s after it began. The host is patient until shortly before."""
    now, ends, joined = 0.0, [], []
    monkeypatch.setattr(engine, "_ahead", True)
    monkeypatch.setattr(engine, "_pace", Pace(lambda: now))
    forward, draw = engine._runner.forward, engine._runner.draw

    def launches(plan):
        joined.append([sequence.id for sequence in plan.sequences])
        ends.append(max([now, *ends[-1:]]) + 1.0)
        return forward(plan)

    def draws(flight):
        draw(flight)
        flight.done = Event(ends[len(joined) - 1])

    class Event:
        def __init__(self, end):
            self.end = end

        def query(self):
            return now >= self.end

        def synchronize(self):
            nonlocal now
            now = max(now, self.end)

    monkeypatch.setattr(engine._runner, "forward", launches)
    monkeypatch.setattr(engine._runner, "draw", draws)
    engine.submit(request("a", [2, 300], max_tokens=30))
    assert engine.patience == 0
    for _ in range(4):
        engine.step()
    assert joined == [["a"]] * 4 and now == 3.0  # the fourth has begun
    assert 0 < engine.patience <= 0.001
    now = 3.9
    assert 0 < engine.patience
    engine.submit(request("b", [2, 301], max_tokens=1))
    now = 3.998
    assert engine.patience == 0
    engine.step()
    assert joined[-1] == ["a", "b"]
    engine.step()  # a kind of step not seen before: its successor is planned at once
    assert joined[-1] == ["a"] and now == 5.0
    engine.step()
    now = 6.9
    assert engine.patience
    ends[-1] = engine._flight.done.end = 6.9  # sooner than those before
    assert engine.patience == 0
    engine.abort("a")
    while engine.has_work:
        engine.step()
    engine.check_invariants()


def test_a_broken_launch_spares_what_is_drawn_but_not_read(engine, monkeypatch):
    monkeypatch.setattr(engine, "_ahead", True)
    [wanted] = finish(engine, [request("a", [2, 300], max_tokens=1)])
    engine.submit(request("a", [2, 300], max_tokens=1))
    engine.submit(request("b", [2, 301], max_tokens=9))
    assert engine.step() == []

    def breaks(plan):
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "forward", breaks)
        with pytest.raises(RuntimeError, match="no room"):
            engine.step()
    engine.check_invariants()
    engine.submit(request("c", [2, 300], max_tokens=1))
    outcomes: dict[str, Outcome] = {}
    while engine.has_work:
        collect(engine, outcomes)
    assert outcomes["a"] == outcomes["c"] == wanted
    assert outcomes["b"] == Outcome(finish_reason="error")


def test_a_broken_reading_ends_both_steps(engine, monkeypatch):
    monkeypatch.setattr(engine, "_ahead", True)
    engine.submit(request("a", [2, 300], max_tokens=9))
    engine.step()
    engine.submit(request("b", [2, 301], max_tokens=9))

    def breaks(flight):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gemcutter.run.runner.Flight.read", breaks)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.check_invariants()
    assert [(update.id, update.finish_reason) for update in engine.step()] == [("a", "error"), ("b", "error")]
    assert not engine.has_work and not any(engine.stats().pages_used.values())


WAYS_TO_DRAW = [
    {},
    {"logprobs": 3},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.2, "min_p": 0.1, "logit_bias": {5: 3.0}},
]


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_ahead_gives_the_same_and_waits_for_nothing_on_a_gpu(graphs):
    """PyTorch raises if anything makes the host wait, but for the events of steps that are read."""
    options = {"device": "cuda", "context_length": 256, "disable_radix_cache": True}
    gpu = Engine.start(EngineConfig(**options, disable_cuda_graph=not graphs))
    requests = [
        request(str(i), [2, *range(300, 303 + i)], seed=i, max_tokens=40 + i, **WAYS_TO_DRAW[i % 5])
        for i in range(15)
    ]
    gpu._ahead = False
    wanted = finish(gpu, requests)
    stops = [
        request(
            f"s{one.id}", one.prompt_ids, seed=one.seed, stop_ids=outcome.token_ids[20:21], **WAYS_TO_DRAW[i % 5]
        )
        for i, (one, outcome) in enumerate(zip(requests, wanted, strict=True))
    ]
    wanted += finish(gpu, stops)
    assert {outcome.finish_reason for outcome in wanted} == {"stop", "length"}
    gpu._ahead = True
    assert finish(gpu, requests + stops) == wanted
    greedy = [i for i, one in enumerate(requests) if one.params.only_argmax]
    assert finish(gpu, [requests[i] for i in greedy]) == [wanted[i] for i in greedy]
    outcomes: dict[str, Outcome] = {}
    for item in [*requests, request("gone", [2, 300], max_tokens=200)]:
        gpu.submit(item)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(60):
            if step == 10:
                gpu.abort("gone")
            collect(gpu, outcomes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outcomes.pop("gone").finish_reason == "abort"
    assert [outcomes[item.id] for item in requests] == wanted[: len(requests)]
    assert not gpu.has_work and not any(gpu.stats().pages_used.values())
    gpu.check_invariants()
