"""Every bad request gets OpenAI's error object, and the server goes on."""

import concurrent.futures
import json
import socket
import time

import httpx
import pytest

USER = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def check(reply: httpx.Response, status: int, *words: str) -> dict:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    return error


CHATS = {
    "no messages": ({}, "messages"),
    "empty messages": ({"messages": []}, "empty"),
    "messages a string": ({"messages": "hi"}, "messages"),
    "message a string": ({"messages": ["hi"]}, "messages"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "hi"}]}, "wizard"),
    "no role": ({"messages": [{"content": "hi"}]}, "role"),
    "no content": ({"messages": [{"role": "user"}]}, "content"),
    "content a number": ({"messages": [{"role": "user", "content": 3}]}, "content"),
    "part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "only text",
    ),
    "bad tool arguments": (
        {
            "messages": USER
            + [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{not json"}}]}]
        },
        "JSON",
    ),
    "system in the middle": ({"messages": USER + [{"role": "system", "content": "x"}]}, "system"),
    "forced tool": ({"messages": USER, "tools": [], "tool_choice": "required"}, "tool_choice"),
    "named tool": ({"messages": USER, "tool_choice": {"type": "function", "function": {}}}, "tool_choice"),
    "JSON mode": ({"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
    "regex": ({"messages": USER, "regex": "a+"}, "regex"),
    "ebnf": ({"messages": USER, "ebnf": "root ::= 'a'"}, "ebnf"),
    "top_logprobs alone": ({"messages": USER, "top_logprobs": 2}, "logprobs"),
    "top_logprobs too many": ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    "too long": ({"messages": [{"role": "user", "content": "12 " * 3000}]}, "1024"),
    "too many tokens asked": ({"messages": USER, "max_completion_tokens": 1024}, "max_tokens"),
    "template override": ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
}


@pytest.mark.parametrize("name", CHATS)
def test_bad_chats(fake, name):
    body, word = CHATS[name]
    check(fake.post(CHAT, body), 400, word)


PARAMS = [
    ("temperature", -0.1), ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_p", 1.5),
    ("top_k", -2), ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", -2.5),
    ("repetition_penalty", 0), ("n", 0), ("n", 129), ("n", 1.5), ("seed", "x"), ("max_tokens", 0),
    ("max_tokens", -5), ("max_tokens", 1024), ("logprobs", 21), ("logprobs", -1), ("stop", [""]),
    ("stop", ["a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a"]),
    ("stop", [1]), ("logit_bias", {"5": 101}), ("logit_bias", {"x": 1}), ("logit_bias", {"1024": 1}),
    ("stop_token_ids", [1024]), ("stop_token_ids", [-1]), ("stop_token_ids", [10**30]), ("stream", "yes"),
    ("stream_options", {"include_usage": True}), ("best_of", 3), ("echo", True), ("suffix", "x"),
    ("prompt_logprobs", 1), ("min_tokens", 4), ("guided_json", {"type": "object"}), ("seed", 10**30),
    ("max_tokens", 10**30),
]  # fmt: skip


@pytest.mark.parametrize("name, value", PARAMS, ids=[f"{name}={str(value)[:20]}" for name, value in PARAMS])
def test_bad_values_name_the_field(fake, name, value):
    error = check(fake.post(COMPLETIONS, {"prompt": "x", name: value}), 400)
    assert name in error["message"] or "stop" in error["message"], error


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_values_that_are_not_finite(fake, literal):
    body = '{"prompt": "x", "temperature": LITERAL}'.replace("LITERAL", literal)
    reply = httpx.post(fake.url + COMPLETIONS, content=body, headers={"content-type": "application/json"})
    check(reply, 400)


PROMPTS = [
    None, [], [[]], ["a", 1], [1, "a"], [[1], "a"], {"a": 1}, [True], [1.5], 7, [1024], [-1], [10**30],
    [[5], [99999]], [600] * 1024, ["x"] * 129, "12 " * 3000,
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS, ids=[repr(prompt)[:20] for prompt in PROMPTS])
def test_bad_prompts(fake, prompt):
    check(fake.post(COMPLETIONS, {"prompt": prompt}), 400)


BODIES = [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"prompt": "\\ud800"}']


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_malformed_bodies(fake, body):
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        check(httpx.post(fake.url + path, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_content_types(fake, kind):
    headers = {} if kind is None else {"content-type": kind}
    check(httpx.post(fake.url + COMPLETIONS, content=b'{"prompt": "x"}', headers=headers), 400, "application/json")


def test_content_type_with_a_charset_is_json(fake):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert httpx.post(fake.url + COMPLETIONS, content=b'{"prompt": "x"}', headers=headers).status_code == 200


@pytest.mark.parametrize("body", [{"prompt": "a", "messages": USER}, {}, {"messages": []}])
def test_bad_tokenize(fake, body):
    check(fake.post("/tokenize", body), 400)


@pytest.mark.parametrize("tokens", [[1024], [-1], ["a"], [10**30], "abc", [600] * 1025])
def test_bad_detokenize(fake, tokens):
    check(fake.post("/detokenize", {"tokens": tokens}), 400)


def test_text_that_cannot_fit_is_not_tokenized(fake):
    text = "a" * 100_000
    for path, body in (
        (COMPLETIONS, {"prompt": text}),
        ("/tokenize", {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}),
        (CHAT, {"messages": USER, "tools": [{"function": {"name": "f", "description": text, "parameters": {}}}]}),
    ):
        check(fake.post(path, body), 400, "characters are more than the context")


def slowest_answer(server, work) -> float:
    """While `work` goes on. In the server's own seconds of CPU, which a busy machine does not lengthen."""
    slowest = 0.0
    with concurrent.futures.ThreadPoolExecutor(1) as pool, httpx.Client() as other:
        long = pool.submit(work)
        while not long.done():
            begin = server.cpu_seconds()
            assert other.get(f"{server.url}/health").status_code == 200
            slowest = max(slowest, server.cpu_seconds() - begin)
    long.result()
    return slowest


def test_long_work_holds_no_one_up(launch):
    """Megabytes of text and a million tokens, one by one and joined, while others are answered."""
    server = launch(context_length=2_000_000)
    text = "Tom has 3 apples. " * 165_000
    for path, body in (
        ("/tokenize", {"prompt": text, "return_token_strs": True}),
        ("/detokenize", {"tokens": [600, 601, 3, 700] * 500_000}),
    ):

        def work(path=path, body=body) -> None:
            assert server.post(path, body).status_code == 200

        assert slowest_answer(server, work) < 0.3, path


@pytest.mark.parametrize("stream", [False, True])
def test_long_answers_hold_no_one_up(launch, stream):
    """25,000 tokens with 20 logprobs each, which take 1.2 s to write: at once, or to a client that reads late."""
    server = launch(max_running_requests=128)
    body = {"prompt": [600], "n": 128, "max_tokens": 200, "logprobs": 20, "stream": stream}

    def work() -> None:
        with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60) as reply:
            if stream:
                server.wait_for("gemcutter_requests_running", 0, seconds=60)
            reply.read()
        assert reply.status_code == 200 and reply.content.count(b"token_logprobs") == (25_600 if stream else 128)

    assert slowest_answer(server, work) < 0.3


def test_unknown_model_and_routes(fake):
    error = check(fake.post(COMPLETIONS, {"model": "gpt-x", "prompt": "x"}), 404, "gpt-x", "test-model")
    assert error["code"] == "model_not_found" and error["param"] == "model"
    check(fake.get("/v1/nothing"), 404)
    check(fake.get(COMPLETIONS), 405)


def test_body_too_large_by_announcement(fake):
    check(fake.post(COMPLETIONS, {"prompt": "x" * 300_000}), 413, "200000")


def test_body_too_large_in_chunks(fake):
    def pieces():
        yield b'{"prompt": "'
        for _ in range(300):
            yield b"x" * 1000
        yield b'"}'

    begin = time.monotonic()
    check(httpx.post(fake.url + COMPLETIONS, content=pieces(), headers={"content-type": "application/json"}), 413)
    assert time.monotonic() - begin < 2, "it waited for more than the client sends"


def test_too_large_waits_for_no_body(fake):
    host, port = fake.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999999999\r\nExpect: 100-continue\r\n\r\n"
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_client_that_leaves_in_its_body(fake):
    host, port = fake.url.removeprefix("http://").split(":")
    before = fake.log
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
    assert fake.get("/health").status_code == 200
    assert fake.log == before


def test_full_queue(launch):
    server = launch(max_queued_requests=4, max_running_requests=2)
    check(server.post(COMPLETIONS, {"prompt": ["x"] * 2, "n": 3}), 400, "4")
    body = {"prompt": [[600], [601]], "n": 2, "max_tokens": 1000, "stream": True}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=30) as reply:
        lines = reply.iter_lines()  # dropping it would close the connection
        next(lines)
        server.wait_for("gemcutter_requests_waiting", 2)
        error = check(server.post(COMPLETIONS, {"prompt": "x"}), 503)
        assert error["type"] == "server_error" and error["code"] == "queue_full"
    server.wait_for("gemcutter_requests_waiting", 0, seconds=1)
    server.wait_for("gemcutter_requests_running", 0, seconds=1)
    assert server.post(COMPLETIONS, {"prompt": "x"}).status_code == 200


def test_prompts_of_all_choices_together_are_bounded(launch):
    server = launch(context_length=100_000)
    check(server.post(COMPLETIONS, {"prompt": [600] * 90_000, "n": 50, "max_tokens": 1}), 400, "4500000", "4194304")
    assert server.post(COMPLETIONS, {"prompt": [600] * 90_000, "n": 2, "max_tokens": 1}).status_code == 200


def test_errors_do_not_repeat_huge_values(fake):
    for body in ({"model": "m" * 100_000, "prompt": "x"}, {"prompt": "x", "temperature": "t" * 100_000}):
        assert len(fake.post(COMPLETIONS, body).content) < 2000
    assert len(fake.post(CHAT, {"messages": [{"role": "r" * 100_000, "content": ""}]}).content) < 2000
    assert json.loads(fake.get("/v1/" + "x" * 5000).content)["error"]
