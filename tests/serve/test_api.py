"""The routes, held by the openai client, over a fake engine whose every token is known."""

import concurrent.futures
import json
from types import SimpleNamespace

import fake_engine
import httpx
import openai
import pytest

MODEL = "test-model"
ABORTED = 'gemcutter_requests_total{finish_reason="abort"}'


def tokens_of(prompt_ids: list[int], seed: int, count: int) -> list[int]:
    request = SimpleNamespace(prompt_ids=prompt_ids, seed=seed)
    return [fake_engine.token(request, place) for place in range(count)]


@pytest.fixture(scope="module")
def client(fake):
    return fake.client()


def complete(fake, **body) -> dict:
    reply = fake.post("/v1/completions", {"model": MODEL, "seed": 5, "max_tokens": 9} | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def detokenize(fake, ids: list[int]) -> str:
    return fake.post("/detokenize", {"tokens": ids}).json()["prompt"]


def test_token_ids_in_and_out(fake):
    answer = complete(fake, prompt=[600, 601, 602], return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == tokens_of([600, 601, 602], 5, 9)
    assert choice["prompt_token_ids"] == [600, 601, 602]
    assert choice["text"] == detokenize(fake, choice["token_ids"])
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion" and answer["model"] == MODEL
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["usage"]["total_tokens"] == 12


def test_text_prompt_is_tokenized_as_tokenize_does(fake):
    ids = fake.post("/tokenize", {"prompt": "12 apples"}).json()["tokens"]
    assert ids[0] == 2  # <bos>
    by_text, by_ids = complete(fake, prompt="12 apples"), complete(fake, prompt=ids)
    assert by_text["choices"] == by_ids["choices"]


def test_completions_default_to_16_tokens_or_what_is_left(fake):
    body = {"model": MODEL, "seed": 5}
    assert fake.post("/v1/completions", body | {"prompt": [600]}).json()["usage"]["completion_tokens"] == 16
    long = fake.post("/v1/completions", body | {"prompt": [600] * 1017}).json()
    assert long["usage"]["completion_tokens"] == 7


def test_chat_defaults_to_the_rest_of_the_context(fake):
    reply = fake.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert reply.json()["usage"]["total_tokens"] == fake_engine.CONTEXT


def test_list_of_prompts_times_n(fake):
    answer = complete(fake, prompt=[[600], [601, 602]], n=2, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[600], [600], [601, 602], [601, 602]]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] != texts[1] and texts[2] != texts[3]
    assert answer["choices"][0]["token_ids"] == tokens_of([600], 5, 9)
    assert answer["usage"]["prompt_tokens"] == 3  # each prompt once
    assert answer["usage"]["completion_tokens"] == 4 * 9


def test_seed_decides(fake):
    one, same = complete(fake, prompt="a", seed=1), complete(fake, prompt="a", seed=1)
    other = complete(fake, prompt="a", seed=2)
    assert one["choices"] == same["choices"] != other["choices"]


@pytest.mark.parametrize("n", [1, 3])
def test_streaming_says_what_non_streaming_says(client, n):
    ask = dict(model=MODEL, prompt="Tell me", max_tokens=30, seed=3, n=n, logprobs=2)
    whole = client.completions.create(**ask)
    texts, reasons, offsets, ids = [""] * n, [None] * n, [[] for _ in range(n)], set()
    for chunk in client.completions.create(**ask, stream=True):
        ids.add(chunk.id)
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert len(ids) == 1
    assert texts == [choice.text for choice in whole.choices]
    assert all(texts)
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == ["length"] * n


def test_every_step_streams_a_chunk_and_usage_comes_last(client):
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="x", max_tokens=25, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len(chunks) == 26
    assert all(isinstance(chunk.choices[0].text, str) for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 25


def test_server_sent_events_end_with_done(fake):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3, "stream": True}
    reply = fake.post("/v1/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [event for event in reply.text.split("\n\n") if event]
    assert events[-1] == "data: [DONE]"
    assert len(events) == 4
    assert "usage" not in json.loads(events[-2].removeprefix("data: "))


def test_cached_tokens_in_usage(fake):
    prompt = list(range(600, 640))
    first, second = complete(fake, prompt=prompt, n=2), complete(fake, prompt=prompt, n=2)
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


def test_completion_logprobs(fake):
    entries = complete(fake, prompt=[600], logprobs=3)["choices"][0]["logprobs"]
    tokens = [detokenize(fake, [id]) for id in tokens_of([600], 5, 9)]
    assert [len(top) for top in entries["top_logprobs"]] == [3] * 9
    assert entries["token_logprobs"] == [-0.25] * 9
    assert [text.strip() for text in entries["tokens"]] == [text.strip() for text in tokens]
    starts = [sum(len(text) for text in entries["tokens"][:place]) for place in range(9)]
    assert entries["text_offset"] == starts
    assert complete(fake, prompt=[600])["choices"][0]["logprobs"] is None


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    joined = b"".join(bytes(entry.bytes) for entry in content).decode()
    assert joined.strip() == answer.choices[0].message.content.strip()
    plain = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=4, logprobs=True
    )
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_and_frees_the_engine(fake, client, stream):
    whole = complete(fake, prompt="stop me", max_tokens=60)["choices"][0]["text"]
    stop = whole[20:24]
    ask = dict(model=MODEL, prompt="stop me", max_tokens=900, seed=5, stop=[stop])
    if stream:
        parts = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
        text, reason = "".join(part.text for part in parts), parts[-1].finish_reason
    else:
        (choice,) = client.completions.create(**ask).choices
        text, reason = choice.text, choice.finish_reason
        assert choice.stop_reason == stop
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"
    fake.wait_for("gemcutter_requests_running", 0, seconds=0.5)  # 900 tokens take longer


def test_chat_streams_its_role_first(client):
    ask = dict(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_completion_tokens=6, seed=1)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.role == "assistant"


def prompt_of(fake, messages, **extra) -> list[int]:
    reply = fake.post("/tokenize", {"messages": messages} | extra)
    assert reply.status_code == 200, reply.text
    return reply.json()["tokens"]


def test_chat_content_may_be_text_parts(fake):
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "words"}]
    assert prompt_of(fake, [{"role": "user", "content": parts}]) == prompt_of(
        fake, [{"role": "user", "content": "twowords"}]
    )


def test_tools_reach_the_template_unless_refused_by_choice(fake):
    messages = [{"role": "user", "content": "weather?"}]
    tools = [{"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {}}}]
    plain, told = len(prompt_of(fake, messages)), len(prompt_of(fake, messages, tools=tools))
    assert told > plain
    ask = {"model": MODEL, "messages": messages, "tools": tools, "max_tokens": 1}
    used = [
        fake.post("/v1/chat/completions", ask | {"tool_choice": choice}).json()["usage"]["prompt_tokens"]
        for choice in ("auto", "none")
    ]
    assert used == [told, plain]


def test_tool_calls_and_their_results_are_rendered(fake):
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"town": "Rome"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    text = detokenize(fake, prompt_of(fake, messages))
    for piece in ("be brief", "look_up", "town", "Rome", "sunny"):
        assert piece in text


def test_tokenize_and_back(fake):
    ask = {"prompt": "Good day", "add_special_tokens": False, "return_token_strs": True}
    reply = fake.post("/tokenize", ask).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) > 0
    assert reply["max_model_len"] == fake_engine.CONTEXT
    assert detokenize(fake, reply["tokens"]) == "Good day"
    assert detokenize(fake, [2]) == "<bos>"


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == MODEL and card.max_model_len == fake_engine.CONTEXT
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-x")


def test_the_model_path_and_no_name_are_accepted_too(fake):
    for body in ({"model": "carat"}, {}):
        assert fake.post("/v1/completions", body | {"prompt": "x"}).status_code == 200


def test_unknown_fields_are_ignored(fake):
    complete(fake, prompt="x", user="me", frobnicate={"a": [1]}, response_format={"type": "text"}, echo=False)


def test_64_at_once(fake, client):
    def one(seed):
        ids = [600 + seed, 700]
        extra = {"return_token_ids": True}
        if seed % 2:
            answer = client.completions.create(model=MODEL, prompt=ids, seed=seed, max_tokens=40, extra_body=extra)
            return answer.choices[0].token_ids
        chunks = client.completions.create(
            model=MODEL, prompt=ids, seed=seed, max_tokens=40, stream=True, extra_body=extra
        )
        return [id for chunk in chunks for id in chunk.choices[0].token_ids]

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert answers == [tokens_of([600 + seed, 700], seed, 40) for seed in range(64)]
    fake.wait_for("gemcutter_requests_running", 0)


def test_32_dropped_streams_free_their_pages(fake):
    used = 'gemcutter_kv_pages{kind="full",state="used"}'
    fake.wait_for(used, 0)
    connections = []
    clients = [httpx.Client(base_url=fake.url) for _ in range(32)]  # which takes longer than some streams last
    for place, client in enumerate(clients):
        body = {"model": MODEL, "prompt": [600 + place], "max_tokens": 1000, "stream": True}
        request = client.build_request("POST", "/v1/completions", json=body)
        reply = client.send(request, stream=True)
        lines = reply.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        connections.append((client, reply, lines))
    fake.wait_for("gemcutter_requests_running", 32, seconds=1)
    assert fake.metric(used) >= 32
    aborted = fake.metric(ABORTED)
    for client, reply, _ in connections:
        reply.close()
        client.close()
    fake.wait_for("gemcutter_requests_running", 0, seconds=1)
    fake.wait_for(used, 0, seconds=1)
    fake.wait_for(ABORTED, aborted + 32)
    assert fake.get("/health").status_code == 200
    complete(fake, prompt="x")


def test_dropped_whole_request_frees_its_slot(fake):
    before = fake.metric(ABORTED)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{fake.url}/v1/completions", json={"model": MODEL, "prompt": [600], "max_tokens": 1000}, timeout=0.3
        )
    fake.wait_for("gemcutter_requests_running", 0, seconds=1)
    fake.wait_for(ABORTED, before + 1, seconds=1)


def test_one_request_that_breaks_submit_fails_alone(fake, client):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        good = pool.submit(complete, fake, prompt=[600], max_tokens=200)
        with pytest.raises(openai.InternalServerError, match="submit broke"):
            client.completions.create(model=MODEL, prompt=[fake_engine.BREAK_SUBMIT])
        with pytest.raises(openai.BadRequestError, match="more pages"):
            client.completions.create(model=MODEL, prompt=[fake_engine.REFUSE], stream=True)
        assert good.result()["usage"]["completion_tokens"] == 200
    fake.wait_for("gemcutter_requests_running", 0)


def test_metrics_count_what_happens(fake):
    names = ("gemcutter_prompt_tokens_total", "gemcutter_generation_tokens_total",
             "gemcutter_time_to_first_token_seconds_count", "gemcutter_time_per_output_token_seconds_count",
             "gemcutter_inter_token_latency_seconds_count", "gemcutter_e2e_request_latency_seconds_count",
             'gemcutter_requests_total{finish_reason="length"}')  # fmt: skip
    before = [fake.metric(name) for name in names]
    complete(fake, prompt=[600, 601], max_tokens=11)
    assert [fake.metric(name) - old for name, old in zip(names, before, strict=True)] == [2, 11, 1, 1, 10, 1, 1]
    assert fake.metric('gemcutter_kv_pages{kind="sliding",state="total"}') == 500
    assert fake.metric("gemcutter_preemptions_total") == 0
    assert fake.metric("gemcutter_requests_waiting") == 0
