import pytest
import tiny_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemcutter.params import SamplingParams
from gemcutter.schedule.request import Update
from gemcutter.text.stream import Detokenizer, TextStream
from gemcutter.text.tokens import Tokenizer


@pytest.fixture(scope="module", params=list(tiny_tokenizers.KINDS))
def tokenizer(request, tmp_path_factory):
    return Tokenizer.load(tiny_tokenizers.KINDS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return Tokenizer.load(tiny_tokenizers.byte_fallback(tmp_path_factory.mktemp("gemma")))


def chunked(ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, at = [], 0
    for size in [*sizes, len(ids)]:
        chunks.append(ids[at : at + size])
        at += size
    return chunks


def run(tokenizer, ids, sizes=(), reason="length", stop_id=None, **params):
    """Push in chunks; returns the deltas. Stops pushing where the stream ends."""
    stream = TextStream(tokenizer, SamplingParams(**params))
    deltas = []
    chunks = chunked(ids, list(sizes))
    for i, chunk in enumerate(chunks):
        last = i == len(chunks) - 1
        deltas.append(
            stream.push(
                Update(
                    id="r",
                    token_ids=chunk,
                    finish_reason=reason if last else None,
                    stop_id=stop_id if last else None,
                )
            )
        )
        if stream.finished:
            break
    return deltas


def joined(deltas) -> str:
    return "".join(delta.text for delta in deltas)


ids_of = st.lists(st.integers(0, 320), max_size=40)
utf8 = st.text(alphabet=st.sampled_from("a €😀é\u200d中ab."), max_size=12)
sizes_of = st.lists(st.integers(0, 4), max_size=40)


@settings(deadline=None, max_examples=150)
@given(ids=ids_of, sizes=sizes_of, skip=st.booleans())
def test_any_chunking_gives_the_text_of_decoding_at_once(tokenizer, ids, sizes, skip):
    deltas = run(tokenizer, ids, sizes, skip_special_tokens=skip)
    assert joined(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert joined(run(tokenizer, ids, [1] * len(ids), skip_special_tokens=skip)) == joined(deltas)
    assert sum((delta.token_ids for delta in deltas), []) == ids


@settings(deadline=None, max_examples=100)
@given(text=utf8, noise=st.lists(st.integers(0, 255), max_size=3), at=st.integers(0, 20), sizes=sizes_of)
@example(text="€", noise=[0xFF], at=3, sizes=[1] * 9)
def test_bytes_of_characters_and_invalid_runs(gemma, text, noise, at, sizes):
    """One invalid byte turns every byte of its run into U+FFFD, those of whole characters before it included."""
    raw = list(text.encode())
    raw[at:at] = noise
    ids = [6 + byte for byte in raw]  # byte pieces follow the six specials
    ids = ids[:at] + [7 + 256 + 1] + ids[at:] if at % 2 else ids
    assert joined(run(gemma, ids, sizes)) == gemma.decode(ids)


@settings(deadline=None, max_examples=100)
@given(text=utf8, sizes=sizes_of)
def test_no_broken_character_is_emitted_from_valid_text(tokenizer, text, sizes):
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    if "\ufffd" in whole:
        return  # the vocabulary lacks a character
    for delta in run(tokenizer, ids, sizes):
        assert "\ufffd" not in delta.text


def test_text_is_not_held_without_a_reason(gemma):
    detokenizer = Detokenizer(gemma, skip_special_tokens=True)
    ids = gemma.encode("abc ab", add_special_tokens=False)
    assert [detokenizer.push(id) for id in ids] == [gemma.token(id) for id in ids]


def brute_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text by one character; the first end that a stop string matches wins, the longest of several."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return text, None


FIRST_PIECE = len(tiny_tokenizers.SPECIAL) + 256
WORDS = ["▁", "a", "b", "c", "ab", "▁ab", "bc", "abc", "."]


@settings(deadline=None, max_examples=300)
@given(
    ids=st.lists(st.sampled_from([FIRST_PIECE + tiny_tokenizers.PIECES.index(w) for w in WORDS]), max_size=16),
    stops=st.lists(st.text(alphabet="abc ", min_size=1, max_size=5), max_size=4),
    sizes=sizes_of,
)
@example(ids=[FIRST_PIECE + tiny_tokenizers.PIECES.index("abc")], stops=["abc", "b"], sizes=[])
@example(ids=[FIRST_PIECE + tiny_tokenizers.PIECES.index("abc")], stops=["c", "abc"], sizes=[])
def test_stop_strings_by_brute_force(gemma, ids, stops, sizes):
    text = gemma.decode(ids)
    deltas = run(gemma, ids, sizes, stop=tuple(stops))
    expected, stop = brute_stop(text, stops)
    assert joined(deltas) == expected
    assert deltas[-1].stop_reason == stop
    assert deltas[-1].finish_reason == ("stop" if stop else "length")
    taken = sum((delta.token_ids for delta in deltas), [])
    assert taken == ids[: len(taken)]
    if stop:  # the tokens end with the one that completed the stop string
        assert stop in gemma.decode(taken) and brute_stop(gemma.decode(taken[:-1]), stops)[1] is None


def test_an_emoji_of_bytes_as_stop_string(gemma):
    ids = [gemma.encode("a", False)[0], *(6 + byte for byte in "😅".encode())]
    deltas = run(gemma, ids, [1] * 5, reason="length", stop=("😅",))
    assert joined(deltas) == "a" and deltas[-1].stop_reason == "😅"


def test_the_held_start_of_a_stop_string_comes_with_the_end(gemma):
    ids = gemma.encode("ab", add_special_tokens=False)
    deltas = run(gemma, ids, [len(ids)], stop=("abc",))
    assert [delta.text for delta in deltas] == ["", "ab"]
    assert deltas[-1].finish_reason == "length" and deltas[-1].stop_reason is None


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_token_is_no_text(gemma, skip):
    ids = [*gemma.encode("ab", add_special_tokens=False), 5]
    [delta] = run(gemma, ids, reason="stop", stop_id=5, skip_special_tokens=skip)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", None)
    assert delta.token_ids == ids
    [delta] = run(gemma, ids, reason="stop", stop_id=5, stop_token_ids=(5,))
    assert delta.stop_reason == 5


def test_a_stop_token_that_the_engine_ran_over_is_text(gemma):
    ids = [*gemma.encode("a", add_special_tokens=False), 5, *gemma.encode("b", add_special_tokens=False)]
    assert joined(run(gemma, ids, ignore_eos=True, skip_special_tokens=False)) == "a<turn|>b"


def test_logprobs_follow_the_tokens_up_to_the_stop_string(gemma):
    ids = gemma.encode("a.b.c", add_special_tokens=False)
    tables = [{id: -0.5, 300: -0.1, 301: -3.0} for id in ids]
    stream = TextStream(gemma, SamplingParams(stop=("b",), logprobs=2))
    delta = stream.push(Update(id="r", token_ids=ids, logprobs=tables))
    assert delta.text == "a." and delta.token_ids == ids[:3]
    assert [(entry.id, entry.logprob, entry.top) for entry in delta.tokens] == [
        (id, -0.5, ((300, -0.1), (id, -0.5))) for id in ids[:3]
    ]
    with pytest.raises(AssertionError, match="after the end"):
        stream.push(Update(id="r", token_ids=[7]))


def test_no_tokenizer_no_text():
    [delta] = run(None, [1, 2, 3], reason="stop", stop_id=3)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [1, 2, 3], "stop")


def test_long_byte_runs_stay_linear(gemma):
    """A run costs one decode at its end, not one a byte; the window does not grow with the text."""
    calls = []
    detokenizer = Detokenizer(gemma, True)
    decode = gemma.decode
    try:
        gemma.decode = lambda ids, **kw: calls.append(len(ids)) or decode(ids, **kw)
        for _ in range(2000):
            detokenizer.push(6 + 0xE2)
        for _ in range(50):
            detokenizer.push(gemma.encode("a", False)[0])
    finally:
        del gemma.decode
    assert len(calls) <= 2 * 51 and sum(calls) < 4 * 2100
