"""LLM over the real engine and the shipped models, on the CPU."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gemcutter
from gemcutter import LLM, SamplingParams
from gemcutter.checkpoint.files import locate

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SUMS = ["What is 47 + 38?", "What is 5 + 4?", "Tom has 3 apples and buys 5 more. How many has he?"]


@pytest.fixture(scope="module")
def llm():
    with LLM(model="carat", device="cpu") as llm:
        yield llm


def talk(text):
    return [{"role": "user", "content": text}]


def idle(llm) -> bool:
    engine = llm._engine
    while engine.has_work:  # words about aborted requests
        engine.step()
    engine.check_invariants()
    stats = engine.stats()
    return stats.waiting == stats.running == 0 and not any(stats.pages_used.values()) and not llm._flights


def test_greedy_text_is_hf_s(llm):
    """HF in the checkpoint's dtype on the same rendered ids. bf16 sums may be ordered differently: compare fp32."""
    folder = locate("carat")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with LLM(model="carat", device="cpu", dtype="float32") as exact:
        for result in exact.chat([talk(text) for text in SUMS], GREEDY):
            prompt = torch.tensor([result.prompt_token_ids])
            out = model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :].tolist()
            assert result.outputs[0].token_ids == out
            assert result.outputs[0].text == llm.tokenizer.decode(out)


def test_results_in_order_whatever_the_lengths(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (17, 1, 9)]
    results = llm.generate(SUMS, params)
    assert [result.prompt for result in results] == SUMS
    assert [len(result.outputs[0].token_ids) for result in results] == [17, 1, 9]
    alone = [llm.generate(text, one)[0] for text, one in zip(SUMS, params, strict=True)]
    assert [r.outputs[0].token_ids for r in alone] == [r.outputs[0].token_ids for r in results]
    assert all(result.finished and result.outputs[0].finish_reason == "length" for result in results)
    assert idle(llm)


def test_forms_of_prompts(llm):
    ids = llm.tokenizer.encode(SUMS[0])
    given = [SUMS[0], {"prompt": SUMS[0]}, {"prompt_token_ids": ids}]
    results = llm.generate(given, GREEDY)
    assert [result.prompt for result in results] == [SUMS[0], SUMS[0], None]
    assert all(result.prompt_token_ids == ids for result in results)
    assert len({result.outputs[0].text for result in results}) == 1
    assert llm.generate({"prompt_token_ids": ids}, GREEDY)[0].outputs[0].text == results[0].outputs[0].text
    assert llm.generate([], GREEDY) == []
    for wrong in (3, [3], {"text": "x"}, [["x"]]):
        with pytest.raises(TypeError, match="a prompt is a text"):
            llm.generate(wrong)


def test_chat_of_one_and_of_many(llm):
    [one] = llm.chat(talk(SUMS[1]), GREEDY)
    many = llm.chat([talk(SUMS[1]), talk(SUMS[0])], GREEDY)
    assert one.outputs[0].text == many[0].outputs[0].text != many[1].outputs[0].text
    assert one.prompt == "<bos><|turn>user\nWhat is 5 + 4?<turn|>\n<|turn>model\n"
    assert "9" in one.outputs[0].text and one.outputs[0].finish_reason == "stop"
    assert one.outputs[0].token_ids[-1] == 106 and "<turn|>" not in one.outputs[0].text
    with pytest.raises(ValueError, match="role"):
        llm.chat([talk("x"), [{"role": "wizard", "content": "x"}]], GREEDY)
    assert idle(llm)


def test_n_gives_several_answers_that_repeat_by_seed(llm):
    params = SamplingParams(n=4, temperature=2.0, seed=11, max_tokens=12)
    [first], [again] = llm.generate(SUMS[0], params), llm.generate(SUMS[0], params)
    texts = [answer.text for answer in first.outputs]
    assert texts == [answer.text for answer in again.outputs] and len(set(texts)) > 1
    assert [answer.index for answer in first.outputs] == [0, 1, 2, 3]
    [second] = llm.generate(SUMS[0], SamplingParams(temperature=2.0, seed=12, max_tokens=12))
    assert second.outputs[0].text == texts[1], "answer i has seed + i"


def test_runs_repeat_by_random_seed():
    def texts(seed):
        params = SamplingParams(temperature=2.0, max_tokens=12)
        with LLM(device="cpu", random_seed=seed) as llm:
            return [result.outputs[0].text for result in llm.generate(SUMS, params)]

    assert texts(3) == texts(3) != texts(4)


def test_logprobs(llm):
    [result] = llm.generate(SUMS[0], SamplingParams(temperature=0, max_tokens=8, logprobs=3))
    answer = result.outputs[0]
    assert len(answer.logprobs) == len(answer.token_ids) == 8
    for id, table in zip(answer.token_ids, answer.logprobs, strict=True):
        assert sorted(entry.rank for entry in table.values()) == [1, 2, 3]
        assert table[id].rank == 1 and table[id].decoded_token == llm.tokenizer.token(id)
        assert sum(torch.tensor([entry.logprob for entry in table.values()]).exp()) <= 1.0 + 1e-5
    chosen = [table[id].logprob for id, table in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen))
    [result] = llm.generate(SUMS[0], SamplingParams(temperature=0, max_tokens=3, logprobs=0))
    assert [[entry.rank for entry in table.values()] for table in result.outputs[0].logprobs] == [[None]] * 3
    [result] = llm.generate(SUMS[0], GREEDY)
    assert result.outputs[0].logprobs is None and result.outputs[0].cumulative_logprob is None


def test_stop_string_ends_the_request(llm):
    [plain] = llm.generate(SUMS[0], GREEDY)
    text = plain.outputs[0].text
    stop = text[8:11]
    [result] = llm.generate(SUMS[0], SamplingParams(temperature=0, max_tokens=24, stop=(stop,)))
    answer = result.outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == text[: text.index(stop)]
    assert plain.outputs[0].token_ids[: len(answer.token_ids)] == answer.token_ids
    assert stop in llm.tokenizer.decode(answer.token_ids)
    assert idle(llm)


def test_stop_token_id(llm):
    [plain] = llm.generate(SUMS[0], GREEDY)
    stop = plain.outputs[0].token_ids[5]
    end = plain.outputs[0].token_ids.index(stop)
    [result] = llm.generate(
        SUMS[0], SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(stop,), ignore_eos=True)
    )
    answer = result.outputs[0]
    assert (answer.finish_reason, answer.stop_reason, len(answer.token_ids)) == ("stop", stop, end + 1)
    assert answer.text == llm.tokenizer.decode(answer.token_ids[:-1])


def test_max_tokens_stops_at_the_context():
    with LLM(device="cpu", context_length=32) as llm:
        ids = [5 + i for i in range(28)]
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        [result] = llm.generate({"prompt_token_ids": ids}, params)
        assert len(result.outputs[0].token_ids) == 4 and result.outputs[0].finish_reason == "length"
        with pytest.raises(ValueError, match="32 tokens, but the context holds 32"):
            llm.generate({"prompt_token_ids": ids + ids[:4]})


def test_nothing_starts_if_one_prompt_is_bad(llm):
    steps = llm._engine.stats().steps
    with pytest.raises(ValueError, match="empty"):
        llm.generate([SUMS[0], {"prompt_token_ids": []}], GREEDY)
    with pytest.raises(ValueError, match="logit_bias"):
        llm.generate(SUMS, [GREEDY, GREEDY, SamplingParams(logit_bias={10**6: 1.0})])
    with pytest.raises(ValueError, match="2 params for 3 prompts"):
        llm.generate(SUMS, [GREEDY, GREEDY])
    assert llm._engine.stats().steps == steps and idle(llm)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 4])
def test_nothing_stays_in_the_engine_after_an_exception(llm, monkeypatch, error, at):
    """Also not after Ctrl-C in the middle of a step, between the plan and its commit."""
    [before] = llm.generate(SUMS[0], GREEDY)
    runner, calls = llm._engine._runner, []
    run = runner.forward

    def breaks(*args):
        calls.append(1)
        if len(calls) == at:
            raise error("in the middle")
        return run(*args)

    monkeypatch.setattr(runner, "forward", breaks)
    with pytest.raises(error):
        llm.generate([*SUMS, {"prompt_token_ids": [2, *range(300, 700)]}], GREEDY)
    monkeypatch.undo()
    assert idle(llm)
    assert llm.generate(SUMS[0], GREEDY)[0].outputs[0].token_ids == before.outputs[0].token_ids


def test_a_broken_step_is_told_to_every_stream(llm, monkeypatch):
    stream = llm.stream(SUMS[0], GREEDY)
    next(stream)

    def breaks(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._engine._runner, "forward", breaks)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(SUMS[1], GREEDY)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="failed: a step broke: KeyboardInterrupt"):
        list(stream)
    assert idle(llm)


def test_stream_gives_the_text_of_generate(llm):
    deltas = list(llm.stream(SUMS[0], GREEDY))
    [result] = llm.generate(SUMS[0], GREEDY)
    assert "".join(delta.text for delta in deltas) == result.outputs[0].text
    assert len(deltas) > 5 and deltas[-1].finish_reason == result.outputs[0].finish_reason
    with pytest.raises(ValueError, match="one answer"):
        llm.stream(SUMS[0], SamplingParams(n=2))
    with pytest.raises(ValueError, match="empty"):
        llm.stream({"prompt_token_ids": []})


def test_streams_side_by_side(llm):
    """Steps taken for one call bring news of another."""
    [expected] = llm.generate(SUMS[0], GREEDY)
    stream = llm.stream(SUMS[0], GREEDY)
    text = next(stream).text
    [between] = llm.generate(SUMS[1], GREEDY)
    assert between.outputs[0].text == llm.generate(SUMS[1], GREEDY)[0].outputs[0].text
    assert text + "".join(delta.text for delta in stream) == expected.outputs[0].text
    half = llm.stream(SUMS[0], GREEDY)
    next(half)
    half.close()
    assert idle(llm)


def test_cached_prefix_is_told(llm):
    ids = [2, *range(200, 290)]
    [cold] = llm.generate({"prompt_token_ids": ids}, GREEDY)
    [warm] = llm.generate({"prompt_token_ids": ids}, GREEDY)
    assert cold.num_cached_tokens == 0 < warm.num_cached_tokens < len(ids)
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


def test_edge_model_too():
    with LLM(model="carat-edge", device="cpu") as llm:
        [result] = llm.chat(talk(SUMS[1]), GREEDY)
        assert result.outputs[0].finish_reason == "stop" and re.search(r"\d", result.outputs[0].text)


def test_without_tokenizer(tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(locate("carat") / name)
    with LLM(model=str(tmp_path), device="cpu") as llm:
        [result] = llm.generate({"prompt_token_ids": [2, 100, 200]}, SamplingParams(max_tokens=3, logprobs=1))
        assert result.outputs[0].text == "" and len(result.outputs[0].token_ids) == 3
        with pytest.raises(ValueError, match="no tokenizer"):
            llm.chat(talk("x"))


def test_options(tmp_path):
    with pytest.raises(TypeError, match="no option max_model_len; there are .*context_length"):
        LLM(model="carat", max_model_len=3)
    with pytest.raises(ValueError, match="page_size"):
        LLM(model="carat", page_size=3)
    with pytest.raises(ValueError, match="config.json"):
        LLM(model=str(tmp_path))


def test_closed(llm):
    with LLM(device="cpu") as other:
        assert other.config.context_length == 4096 and other.config.dtype == "bfloat16"
    with pytest.raises(RuntimeError, match="closed"):
        other.generate("x")


def test_import_is_cheap_and_lazy():
    code = (
        "import sys, gemcutter; assert 'torch' not in sys.modules;gemcutter.LLM; sys.exit('torch' in sys.modules)"
    )
    env = {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 1
    with pytest.raises(AttributeError, match="nothing"):
        gemcutter.nothing  # noqa: B018


def test_version_is_the_project_s():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert gemcutter.__version__ == project["version"]
