"""Engine over carat: what it takes in, what it tells of requests that do not end by themselves."""

import json
import shutil

import pytest
from drive import Outcome, collect, finish, request

from gemcutter.checkpoint.files import locate
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine


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
