import pytest
import tiny_tokenizers
from transformers import AutoTokenizer

from gemcutter.checkpoint.files import locate
from gemcutter.text.chat import ChatError, render
from gemcutter.text.tokens import Tokenizer

SIMPLE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n{% endfor %}"
    "{% if tools %}{{ tools | length }}{% endif %}{% if flag %}!{% endif %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


@pytest.fixture
def make(tmp_path):
    def make(template: str | None) -> Tokenizer:
        folder = tiny_tokenizers.byte_fallback(tmp_path / "t")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.load(folder)

    return make


def tokens(tokenizer, *args, **kwargs) -> list[int]:
    return tokenizer.encode(render(tokenizer, *args, **kwargs), add_special_tokens=False)


def user(text="ab"):
    return {"role": "user", "content": text}


def test_renders_the_checkpoint_s_template(make):
    tokenizer = make(SIMPLE)
    ids = tokens(tokenizer, [user("ab"), {"role": "assistant", "content": "c"}, user("a")])
    assert ids.count(2) == 1 and ids[0] == 2, "one <bos>, the template's"
    assert tokenizer.decode(ids, False) == (
        "<bos><|turn>user\nab<turn|>\n<|turn>assistant\nc<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n"
    )
    assert render(tokenizer, [user()], add_generation_prompt=False).endswith("<turn|>\n")
    assert render(tokenizer, [user()], flag=True).endswith("!<|turn>model\n")
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert render(tokenizer, [user()], tools=tools).endswith("1<|turn>model\n")


@pytest.mark.parametrize("model", ["carat", "carat-edge"])
def test_the_shipped_template_as_transformers_renders_it(model):
    folder = locate(model)
    call = {"id": "1", "function": {"name": "add", "arguments": '{"x": [1, "}"], "y": null}'}}
    parsed = {"id": "1", "function": {"name": "add", "arguments": {"x": [1, "}"], "y": None}}}
    declared = {"name": "add", "description": "d", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": declared}]

    def conversation(call):
        return [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "5"},
        ]

    ours = tokens(Tokenizer.load(folder), conversation(call), tools=tools)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        conversation(parsed), tools=tools, add_generation_prompt=True
    )
    assert ours == theirs["input_ids"]
    assert "call:add{x:[1," in Tokenizer.load(folder).decode(ours, False)


@pytest.mark.parametrize(
    "messages, says",
    [
        ([], "non-empty"),
        (None, "non-empty"),
        ("hello", "non-empty"),
        (["hello"], r"messages\[0\] must be an object"),
        ([user(), {"role": "wizard", "content": "x"}], r"messages\[1\].role .*'wizard'"),
        ([{"content": "x"}], "role must be"),
        ([{"role": ["user"], "content": "x"}], "role must be"),
        ([{"role": "user"}], "content is missing"),
        ([{"role": "assistant", "content": None}], "content is missing"),
        ([{"role": "user", "content": 3}], "got int"),
        ([user([{"type": "image_url", "image_url": {}}])], "image_url.*only text"),
        ([user([{"type": "text"}])], "without text"),
        ([user(["x"])], "only text"),
        ([{"role": "assistant", "content": "", "tool_calls": {}}], "must be a list"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "function with a name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"tool_calls\[0\].function.arguments is not valid JSON",
        ),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}], "an object"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 10**5}}]}],
            "not valid JSON",
        ),
        ([user()] * 10_001, "at most 10000"),
    ],
)
def test_malformed_conversations(make, messages, says):
    with pytest.raises(ChatError, match=says):
        render(make(SIMPLE), messages)


def test_no_template(make):
    with pytest.raises(ChatError, match="no chat template"):
        render(make(None), [user()])


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "bos_token", "documents", "continue_final_message"])
def test_a_client_cannot_reach_past_the_template(make, name):
    with pytest.raises(ChatError, match=f"{name} cannot be passed"):
        render(make(SIMPLE), [user()], **{name: "{{ 1 }}"})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% set x = messages.append(1) %}",
        "{% set x = messages[0].update({'role': 'x'}) %}",
        "{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('not in this order') }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% if %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_and_failing_templates(make, template):
    """Nothing but ChatError comes out, and no template reaches Python's own objects."""
    with pytest.raises(ChatError, match="refused"):
        render(make(template), [user()])


@pytest.mark.parametrize(
    "expression",
    ["''.__class__", "messages.__class__", "''|attr('__class__')|attr('__mro__')", "raise_exception.__globals__"],
)
def test_the_sandbox_shows_nothing(make, expression):
    """Attributes that are merely printed are undefined rather than refused: they render as nothing."""
    assert render(make(f"a{{{{ {expression} }}}}b"), [user()]) == "ab"


def test_user_text_is_not_a_template(make):
    assert "{{ 7 * 7 }}" in render(make(SIMPLE), [user("{{ 7 * 7 }}")])
