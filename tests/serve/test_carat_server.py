"""The server over the real engine and carat, the small model that ships inside."""

import concurrent.futures

import httpx
import pytest
from conftest import Server

QUESTIONS = [f"What is {a} + {b}?" for a, b in ((2, 3), (4, 5), (6, 1), (7, 2), (3, 3), (8, 1), (5, 2), (1, 1))]
USED = [f'gemcutter_kv_pages{{kind="{kind}",state="used"}}' for kind in ("full", "sliding")]


@pytest.fixture(scope="module")
def carat(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("carat"), "real", max_running_requests=32)
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture(scope="module")
def client(carat):
    return carat.client()


def chat(client, question: str, **extra):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="carat", messages=messages, temperature=0, max_tokens=48, **extra)


def test_chat(client):
    answer = chat(client, "What is 7 + 5?")
    assert answer.choices[0].finish_reason == "stop"
    assert "12" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def test_completion_of_text_equals_that_of_its_tokens(carat, client):
    ids = carat.post("/tokenize", {"prompt": "12 apples and"}).json()["tokens"]
    by_text, by_ids = (
        client.completions.create(model="carat", prompt=prompt, temperature=0, max_tokens=12).choices[0].text
        for prompt in ("12 apples and", ids)
    )
    assert by_text == by_ids != ""


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 11, "top_p": 0.9}])
def test_streaming_says_what_non_streaming_says(client, sampling):
    ask = {"model": "carat", "prompt": "Tom has 3 apples", "max_tokens": 40, "logprobs": 2} | sampling
    whole = client.completions.create(**ask).choices[0]
    parts = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    assert [lp for part in parts for lp in part.logprobs.token_logprobs] == whole.logprobs.token_logprobs
    assert parts[-1].finish_reason == whole.finish_reason


def test_64_at_once_say_what_each_says_alone(carat, client):
    alone = [chat(client, question).choices[0].message.content for question in QUESTIONS]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        crowd = list(
            pool.map(lambda place: chat(client, QUESTIONS[place % 8]).choices[0].message.content, range(64))
        )
    assert crowd == alone * 8
    carat.wait_for("gemcutter_requests_running", 0)


def test_a_repeated_prompt_comes_from_the_cache(client):
    question = "Count the sheep. " * 12
    chat(client, question)
    usage = chat(client, question).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_32_dropped_streams_give_their_pages_back(carat, client):
    for name in USED:
        carat.wait_for(name, 0)
    replies = []
    for place in range(32):
        dropped = httpx.Client(base_url=carat.url, timeout=60)
        body = {"prompt": [600 + place] * 40, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        reply = dropped.send(dropped.build_request("POST", "/v1/completions", json=body), stream=True)
        lines = reply.iter_lines()
        next(lines)
        replies.append((dropped, reply, lines))
    assert carat.metric(USED[0]) >= 32
    for dropped, reply, _ in replies:
        reply.close()
        dropped.close()
    carat.wait_for("gemcutter_requests_running", 0)
    for name in USED:
        carat.wait_for(name, 0)
    assert carat.get("/health").status_code == 200
    assert "12" in chat(client, "What is 7 + 5?").choices[0].message.content
