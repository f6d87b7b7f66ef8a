"""carat and carat-edge as instruments: the engine solves the held-out problems HF solves.

Wrong numerics show as wrong answers. HF's side is `transformers` in bf16, greedy, eager, on the same device.
"""

import pytest
import torch
from problems import extract_answer, held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemcutter import LLM, SamplingParams
from gemcutter.checkpoint.files import locate

MODELS = ["carat", "carat-edge"]
LONGEST = 320  # tokens of an answer


def hf_replies(model: str, problems: list, device: str, batch: int = 100) -> list[str]:
    """HF's greedy answers, batched with padding on the left."""
    folder = locate(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    ).to(device)
    replies = []
    for start in range(0, len(problems), batch):
        inputs = tokenizer.apply_chat_template(
            [p.messages for p in problems[start : start + batch]],
            add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True,
        ).to(device)  # fmt: skip
        with torch.no_grad():
            out = theirs.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        replies += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def our_replies(model: str, problems: list, device: str, kv_cache_dtype: str = "auto") -> list[str]:
    with LLM(model=model, device=device, kv_cache_dtype=kv_cache_dtype, max_running_requests=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=LONGEST)
        return [r.outputs[0].text for r in llm.chat([p.messages for p in problems], params)]


def share_right(replies: list[str], problems: list) -> float:
    return sum(extract_answer(r) == p.answer for r, p in zip(replies, problems, strict=True)) / len(problems)


@pytest.mark.parametrize("model", MODELS)
def test_solves_what_it_was_trained_for(model):
    """Sixty problems in the quick run; the full comparison with HF is below."""
    problems = held_out(60)
    assert share_right(our_replies(model, problems, "cpu"), problems) >= 0.9


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu),
])  # fmt: skip
@pytest.mark.parametrize("model", MODELS)
def test_accuracy_is_that_of_hf(model, device):
    problems = held_out(500)
    ours = our_replies(model, problems, device)
    theirs = hf_replies(model, problems, device)
    mine, hf = share_right(ours, problems), share_right(theirs, problems)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{model} on {device}: gemcutter {mine:.1%}, HF {hf:.1%}; {same} of {len(problems)} replies the same")
    assert abs(mine - hf) <= 0.005


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu),
])  # fmt: skip
@pytest.mark.parametrize("model", MODELS)
def test_an_fp8_cache_costs_a_point_at_most(model, device):
    problems = held_out(500)
    plain, fp8 = (our_replies(model, problems, device, cache) for cache in ("auto", "fp8_e4m3"))
    right, still = share_right(plain, problems), share_right(fp8, problems)
    same = sum(a == b for a, b in zip(plain, fp8, strict=True))
    print(f"{model} on {device}: {right:.1%}, with an FP8 cache {still:.1%}; {same} of {len(problems)} the same")
    assert still >= right - 0.01
