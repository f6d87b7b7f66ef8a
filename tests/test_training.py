"""The problems that carat is judged by: solvable, worked out rightly, and never met in training."""

import re
from itertools import islice
from random import Random

import pytest
import shapes
from corpus import CALCULATOR, SAID, Writer, pack
from exercise import extract_answer
from problems import KINDS, held_out, is_held_out, problem, training, unseen
from tokenizer import TEMPLATE
from transformers import AutoTokenizer
from working import add, divide, multiply, subtract

from gemcutter.checkpoint.files import BUILT_IN, locate

# A calculation of two numbers, not a part of one of three such as 15 - 5 - 1.
WRITTEN = re.compile(r"(?<![+×÷-] )\b(\d+) ([+×÷-]) (\d+)\b(?! [+×÷-])")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(locate("carat"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_solution_ends_in_its_answer(kind):
    rng = Random(3)
    for _ in range(200):
        drawn = problem(rng, kind)
        assert extract_answer(drawn.solution) == drawn.answer
        assert drawn.messages[-1]["role"] == "user"


@pytest.mark.parametrize(("work", "sign"), [(add, "+"), (subtract, "-"), (multiply, "*"), (divide, "//")])
def test_each_line_of_working_is_true(work, sign):
    """Every `… = n` in the working holds, read as Python."""
    rng = Random(5)
    for _ in range(300):
        b = rng.randint(1, 10)
        a = b * rng.randint(1, 99)
        text = work(a, b).text
        for left, right in re.findall(r"((?:\d+ [-+×÷] )+\d+) = (\d+)", text):
            assert eval(left.replace("×", "*").replace("÷", "//")) == int(right), text
        assert text.endswith(f"= {eval(f'{a} {sign} {b}')}.")


def test_held_out_problems_repeat_themselves():
    assert [p.text for p in held_out(50)] == [p.text for p in held_out(50)]
    assert len({p.text for p in held_out(500, "plain")}) == 500


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="remainder has only .* held-out problems, asked for 10000"):
        held_out(10_000, "remainder")


def test_no_training_text_writes_a_held_out_calculation():
    asked = {fact for drawn in held_out(2000) for fact in unseen(drawn)}
    met = set()
    for drawn in islice(training(1_000_000), 5000):
        assert not is_held_out(drawn)
        for message in [*drawn.messages, {"content": drawn.solution}]:
            for a, op, b in WRITTEN.findall(message["content"]):
                a, b = sorted((a, b), key=int) if op in "+×" else (a, b)
                met.add(f"{a}{op}{b}")
    assert len(asked) > 500
    assert len(met) > 5000
    assert not asked & met


def test_a_model_learns_only_what_it_says(tokenizer):
    """In a row of the corpus the marked tokens are the model's turns, without prompts or tool responses."""
    writer, rng = Writer(tokenizer), Random(7)
    chats = [writer.chat(drawn, rng) for drawn in islice(training(11), 200)]
    for chat in chats:
        said = tokenizer.decode([int(t) & (SAID - 1) for t in chat if t & SAID])
        unsaid = tokenizer.decode([int(t) & (SAID - 1) for t in chat if not t & SAID])
        assert extract_answer(said)
        assert said.rstrip().endswith("<turn|>")
        assert "<|turn>" not in said
        assert "response:" not in said
        assert "So " not in unsaid or "<|think|>" in unsaid
    rows = pack(chats)
    assert int((rows > 0).sum()) == sum(map(len, chats))


@pytest.mark.parametrize("model", BUILT_IN)
def test_shipped_configs_and_templates_are_those_of_training(model, tmp_path):
    shapes.save(model, tmp_path)
    (tmp_path / TEMPLATE.name).write_bytes(TEMPLATE.read_bytes())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (locate(model) / path.name).read_bytes(), path.name


def test_the_template_declares_calls_and_answers_tools(tokenizer):
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "47 + 38"}}}
    said = [
        {"role": "user", "content": "What is 47 + 38?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": "85"},
    ]
    text = tokenizer.apply_chat_template(said, tools=[CALCULATOR], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<bos><|turn>system\n<|tool>declaration:calculator{description:")
    assert text.endswith(
        '<|turn>model\n<|tool_call>call:calculator{expression:<|"|>47 + 38<|"|>}<tool_call|>'
        '<|tool_response>response:calculator{value:<|"|>85<|"|>}<tool_response|>'
    )


def test_the_template_forgets_past_thoughts(tokenizer):
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<|channel>thought\nhm<channel|>Hello!"},
        {"role": "user", "content": "1 + 1"},
    ]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert text == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n"
        "<|turn>user\n1 + 1<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("said", [
    [{"role": "oracle", "content": "42"}],
    [{"role": "tool", "content": "42"}],
    [{"role": "user", "content": "Hi"}, {"role": "system", "content": "late"}],
])  # fmt: skip
def test_the_template_refuses_what_it_cannot_render(tokenizer, said):
    with pytest.raises(Exception, match="role|must"):
        tokenizer.apply_chat_template(said, tokenize=False)


@pytest.mark.parametrize("text", ["What is 47 + 38?", "  héllo  wörld 日本\t\n 🎉", "<b>&amp;</b>", ""])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
