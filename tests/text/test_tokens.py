import subprocess
import sys
import threading
import time

import pytest
import tiny_tokenizers
from transformers import AutoTokenizer

from gemcutter.checkpoint.files import locate
from gemcutter.text.tokens import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizers.byte_fallback(tmp_path_factory.mktemp("gemma"))


TEXTS = ["", "ab  abc", "a😀é\n\n中", "<bos>ab<turn|>x", " leading", "€" * 5]


@pytest.mark.parametrize("model", ["carat", "carat-edge"])
@pytest.mark.parametrize("text", TEXTS + ["What is 47 + 38?"])
def test_agrees_with_autotokenizer(model, text):
    """AutoTokenizer rebuilds a Gemma tokenizer from its parts; we read the file as it stands."""
    folder = locate(model)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids) == text.replace("<bos>", "").replace("<turn|>", "")


def test_long_texts_do_not_hold_up_other_threads():
    tokenizer = Tokenizer.load(locate("carat"))
    text = "the sum of 4 and 5, <turn|> 😀 " * 20_000  # 0.2 s
    ids: list[list[int]] = []
    thread = threading.Thread(target=lambda: ids.append(tokenizer.encode(text)))
    thread.start()
    naps = 0
    while not ids:
        time.sleep(0.001)
        naps += 1
    thread.join()
    assert naps > 10, "encoding kept Python's lock"
    assert ids[0] == AutoTokenizer.from_pretrained(locate("carat"))(text)["input_ids"]


def test_bytes_of_tokens_join_to_the_text(folder):
    tokenizer = Tokenizer.load(folder)
    text = "ab é😀€ 中."
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert any(id in tokenizer.byte_ids for id in ids) and any(id not in tokenizer.byte_ids for id in ids)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_single_tokens(folder):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(" ab<turn|>é")
    assert [tokenizer.token(id) for id in ids] == ["<bos>", " ab", "<turn|>", "<0xC3>", "<0xA9>"]
    assert tokenizer.token(10**6) == "" and tokenizer.token_bytes(10**6) == b"" and not tokenizer.knows(10**6)
    assert tokenizer.special_ids == set(range(6))


def test_no_tokenizer(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)


def test_lone_surrogate(folder):
    with pytest.raises(ValueError, match="surrogate at character 1"):
        Tokenizer.load(folder).encode("a\ud800")


def test_the_text_layer_needs_no_torch(folder):
    code = (
        "import sys; from gemcutter.text import chat, intake, stream, tokens;"
        f"t = tokens.Tokenizer.load({str(folder)!r}); t.decode(t.encode('ab')); sys.exit('torch' in sys.modules)"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_the_repository_s_code_never_runs(tmp_path):
    """auto_map points at Python in the folder; it must not be imported."""
    folder = tiny_tokenizers.byte_fallback(
        tmp_path / "evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert Tokenizer.load(folder).encode("ab", False)
    assert not (tmp_path / "ran").exists()
