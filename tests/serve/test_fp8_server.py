"""The small models quantised, behind a real server: healthy, answering, and as right as they were in bfloat16.

A server that is healthy and writes nothing but <pad> is what experts that a loader passed over look like.
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import Server
from problems import extract_answer, held_out

from gemcutter.checkpoint.files import locate
from gemcutter.checkpoint.quantize import quantize_checkpoint

AT_ONCE = 32


@pytest.fixture(scope="module", params=["carat", "carat-edge"])
def model(request):
    return request.param


@pytest.fixture(scope="module")
def quantised(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(model)
    quantize_checkpoint(locate(model), folder / "fp8", [], lambda done, total: None)
    named = {"model_path": str(folder / "fp8"), "served_model_name": model}
    server = Server(folder, "real", **named, max_running_requests=AT_ONCE)
    yield server
    assert server.stop() == 0, server.log


def ask(server: Server, model: str, messages: list[dict]) -> str:
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 320}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=1200)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def share_right(server: Server, model: str, problems: list) -> float:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        replies = list(pool.map(lambda problem: ask(server, model, problem.messages), problems))
    return sum(extract_answer(r) == p.answer for r, p in zip(replies, problems, strict=True)) / len(problems)


def test_is_healthy_and_knows_what_7_and_5_are(quantised, model):
    assert quantised.get("/health").status_code == 200
    reply = ask(quantised, model, [{"role": "user", "content": "What is 7 + 5?"}])
    assert "12" in reply and "<pad>" not in reply


@pytest.mark.slow
def test_accuracy_is_that_of_bfloat16(quantised, model, tmp_path):
    problems = held_out(500)
    fp8 = share_right(quantised, model, problems)
    server = Server(tmp_path, "real", model_path=model, max_running_requests=AT_ONCE)
    try:
        half = share_right(server, model, problems)
    finally:
        server.kill()
    print(f"{model}: {fp8:.1%} in FP8, {half:.1%} in bfloat16")
    assert abs(fp8 - half) <= 0.01
