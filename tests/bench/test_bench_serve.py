"""The load client: its arithmetic by hand and by brute force, its clock against an endpoint that keeps one too."""

import asyncio
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from gemcutter.bench.serve_client import Answer, Endpoint, Exchange, exchange, read_completion
from gemcutter.bench.serve_load import Ask, gaps, random_ids, shared_prefix
from gemcutter.bench.serve_metrics import figures
from gemcutter.cli import main
from gemcutter.cli.bench_serve import PRESETS

SRC = Path(__file__).parents[2] / "src"


def answer(start, stamps, end, tokens):
    return Answer(start, end, list(stamps), tokens)


# Figures


def test_figures_by_hand():
    asks = [Ask([1] * 10, 5), Ask([1] * 20, 3), Ask([1] * 40, 1), Ask([1] * 80, 9)]
    answers = [
        answer(100.0, [100.5, 100.7, 101.1], 101.5, 5),  # 3 chunks for 5 tokens, the last event later
        answer(101.0, [101.25, 101.5, 102.75], 102.75, 2),  # fewer tokens than asked
        answer(102.0, [102.1], 102.1, 1),  # one token has no time per token
        Answer(100.0, error="HTTP 500: no"),
    ]
    got = figures(asks, answers, 4.0)
    want = {
        "completed": 3, "failed": 1, "duration": 4.0, "total_input_tokens": 70, "total_output_tokens": 8,
        "total_output_tokens_asked": 9, "request_throughput": 0.75, "input_throughput": 17.5,
        "output_throughput": 2.0, "total_throughput": 19.5,
        "concurrency": (1.5 + 1.75 + 0.1) / 4,
        "max_output_tokens_per_s": 3,  # seconds 0, 1, 2 hold 2, 3, 2 chunks
        "max_concurrent_requests": 2,
        "mean_ttft_ms": 1e3 * (0.5 + 0.25 + 0.1) / 3, "median_ttft_ms": 250.0, "max_ttft_ms": 500.0,
        "mean_tpot_ms": (250.0 + 1500.0) / 2, "p90_tpot_ms": 250 + 0.9 * 1250, "std_tpot_ms": 625.0,
        "mean_itl_ms": 1e3 * (0.2 + 0.4 + 0.25 + 1.25) / 4, "median_itl_ms": 325.0,
        "mean_e2e_latency_ms": 1e3 * 3.35 / 3, "max_e2e_latency_ms": 1750.0,
    }  # fmt: skip
    assert {name: got[name] for name in want} == pytest.approx(want)
    assert got["errors"] == {"HTTP 500: no": 1}


def percentile(values, q):
    """Linear between the two nearest ranks."""
    values = sorted(values)
    place = q / 100 * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


@pytest.mark.parametrize("seed", range(5))
def test_figures_by_brute_force(seed):
    rng = random.Random(seed)
    asks, answers = [], []
    for _ in range(rng.randrange(1, 40)):
        start, now, stamps = 50 + 9 * rng.random(), 0.0, []
        now = start
        for _ in range(rng.randrange(1, 30)):
            now += rng.random() ** 4
            stamps.append(now)
        answers.append(answer(start, stamps, now + rng.random() / 10, rng.randrange(1, 50)))
        asks.append(Ask([0] * rng.randrange(1, 9), 50))
    got = figures(asks, answers, 20.0)
    ttft = [a.stamps[0] - a.start for a in answers]
    tpot = [(a.end - a.stamps[0]) / (a.output_len - 1) for a in answers if a.output_len > 1]
    itl = [after - before for a in answers for before, after in zip(a.stamps, a.stamps[1:], strict=False)]
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl)):
        if values:
            for q, kind in ((50, "median"), (90, "p90"), (95, "p95"), (99, "p99"), (100, "max")):
                assert got[f"{kind}_{name}_ms"] == pytest.approx(1e3 * percentile(values, q))
    begin = min(a.start for a in answers)
    seconds = range(100)
    assert got["max_output_tokens_per_s"] == max(
        sum(begin + s <= t < begin + s + 1 for a in answers for t in a.stamps) for s in seconds
    )
    assert got["max_concurrent_requests"] == max(
        sum(a.start < begin + s + 1 and a.end >= begin + s for a in answers) for s in seconds
    )


def test_figures_of_nothing_but_failures_are_json():
    got = figures([Ask([1], 1)], [Answer(0.0, error="x")], 1.0)
    assert got["mean_ttft_ms"] is got["p99_itl_ms"] is None and got["completed"] == 0
    json.loads(json.dumps(got, allow_nan=False))


# Load


def test_random_lengths_and_ids():
    asks = random_ids(np.random.default_rng(1), 500, 40, 10, 0.5, 1024)
    assert {len(a.prompt) for a in asks} == set(range(20, 41)) and {a.output_len for a in asks} == set(range(5, 11))
    ids = {id for a in asks for id in a.prompt}
    assert min(ids) == 4 and max(ids) == 1023
    assert asks == random_ids(np.random.default_rng(1), 500, 40, 10, 0.5, 1024)
    assert asks != random_ids(np.random.default_rng(2), 500, 40, 10, 0.5, 1024)
    exact = random_ids(np.random.default_rng(1), 9, 40, 10, 1.0, 1024)
    assert {(len(a.prompt), a.output_len) for a in exact} == {(40, 10)}
    assert min(len(a.prompt) for a in random_ids(np.random.default_rng(1), 900, 5, 1, 0.0, 9)) == 1


def test_shared_prefixes():
    make = lambda ordered: shared_prefix(np.random.default_rng(3), 4, 5, 30, 7, 2, 1.0, ordered, 5000)  # noqa: E731
    asks = make(True)
    groups = [tuple(a.prompt[:30]) for a in asks]
    assert groups == [group for group in dict.fromkeys(groups) for _ in range(5)] and len(set(groups)) == 4
    assert len({tuple(a.prompt[30:]) for a in asks}) == 20 and {len(a.prompt) for a in asks} == {37}
    shuffled = make(False)
    assert shuffled != asks and sorted(a.prompt for a in shuffled) == sorted(a.prompt for a in asks)


def test_gaps():
    rng = np.random.default_rng(0)
    assert gaps(rng, 3, float("inf")) == [0, 0, 0]
    first, *waits = gaps(rng, 20_000, 8.0)
    waits = np.array(waits)
    assert first == 0
    # Exponential: mean and deviation are both 1/rate, and a share e^-2 exceeds twice the mean.
    assert waits.mean() == pytest.approx(1 / 8, rel=0.03) and waits.std() == pytest.approx(1 / 8, rel=0.05)
    assert (waits > 0.25).mean() == pytest.approx(math.exp(-2), abs=0.01)


# Reading what was recorded


def stream(events: list[str], chunked: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if not chunked:
        return head + b"Connection: close\r\n\r\n" + "".join(events).encode()
    parts = [f"{len(e.encode()):x}\r\n".encode() + e.encode() + b"\r\n" for e in events]
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(parts) + b"0\r\n\r\n"


def event(text: str | None = None, **fields) -> str:
    choices = [] if text is None else [{"index": 0, "text": text}]
    return f"data: {json.dumps({'choices': choices} | fields, ensure_ascii=False)}\n\n"


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_chunk_has_the_time_of_the_piece_that_completed_it(seed, chunked):
    rng = random.Random(seed)
    texts = [rng.choice(["a", "", "é\n", "ß" * 50]) for _ in range(30)] + ["end"]
    events = [event(text) for text in texts] + [event(usage={"completion_tokens": 77}), "data: [DONE]\n\n"]
    wire = stream(events, chunked)
    cuts = sorted({0, len(wire), *(rng.randrange(len(wire)) for _ in range(rng.choice([3, 40, 400])))})
    pieces = [(1.0 + i, wire[a:b]) for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))]
    got = read_completion(Exchange(0.5, pieces), asked=99)

    def time_of(index: int) -> float:
        """When the byte came that ends the line of an event: h11 hands out what it has, so no later one counts."""
        line = events[index].encode()[:-1]
        place = 0
        for each in events[: index + 1]:
            place = wire.index(each.encode(), place) + len(each.encode())
        last = place - (len(events[index].encode()) - len(line)) - 1
        return next(
            stamp for stamp, a, b in zip((s for s, _ in pieces), cuts, cuts[1:], strict=False) if a <= last < b
        )

    assert got.error is None and got.output_len == 77 and got.start == 0.5
    assert got.stamps == [time_of(i) for i, text in enumerate(texts) if text]
    assert got.end == time_of(len(events) - 1)


def test_a_stream_of_token_ids_without_text_counts():
    one = json.dumps({"choices": [{"index": 0, "text": "", "token_ids": [5]}]})
    got = read_completion(Exchange(0.0, [(1.0, stream([f"data: {one}\n\n"]))]), asked=3)
    assert got.stamps == [1.0] and got.output_len == 3 and got.error is None


@pytest.mark.parametrize(
    "wire, says",
    [
        (b"", "without an answer"),
        (stream([event("a")])[:-5], "cut short"),
        (stream([event("")]), "no text"),
        (stream([event("a"), 'data: {"error": {"message": "it broke"}}\n\n']), "it broke"),
        (stream(["data: {nonsense\n\n"]), "JSON"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nfull", "HTTP 503: full"),
        (b"SSH-2.0-OpenSSH\r\n", "broken or cut short"),
    ],
)
def test_what_is_no_answer_is_an_error(wire, says):
    assert says in read_completion(Exchange(0.0, [(1.0, wire)] if wire else []), asked=3).error


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://a", "http://", ""])
def test_base_url(url):
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        Endpoint.of(url, None)


def test_a_base_url_may_have_a_path():
    endpoint = Endpoint.of("https://a.b/up/v1/", "k")
    head = endpoint.request("POST", "/v1/completions", {"a": 1}).decode()
    assert (endpoint.host, endpoint.port, endpoint.tls) == ("a.b", 443, True)
    assert head.startswith("POST /up/v1/completions HTTP/1.1\r\n") and head.endswith('\r\n\r\n{"a":1}')
    assert "Authorization: Bearer k\r\n" in head


def test_nobody_listens():
    assert "ConnectionRefusedError" in asyncio.run(exchange(Endpoint.of("http://127.0.0.1:1", None), b"")).error


# An endpoint that keeps its own time


class Clockwork:
    """Streams a chunk of two tokens after `first` seconds and then after every `gap`.

    Prompts of one token that ends in 9 get 500.
    """

    def __init__(self, first: float, gap: float) -> None:
        self.first, self.gap = first, gap
        self.bodies, self.sent, self.alive, self.most_alive = [], [], 0, 0
        self._loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
            ready.set()

        self._loop.create_task(start())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert ready.wait(10)

    @staticmethod
    def refuses(prompt: list[int]) -> bool:
        return len(prompt) == 1 and prompt[0] % 10 == 9

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader, writer) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(re.search(r"content-length: (\d+)", head, re.I)[1])
        body = await reader.readexactly(length)
        assert "connection: close" in head.lower()
        if "GET /v1/models" in head:
            text = b'{"data": [{"id": "clockwork"}]}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
        else:
            await self._answer(json.loads(body), writer)
        await writer.drain()
        writer.close()

    async def _answer(self, body: dict, writer) -> None:
        self.bodies.append(body)
        if self.refuses(body["prompt"]):
            writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 7\r\n\r\nno luck")
            return
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        times = []
        for place in range(body["max_tokens"] // 2):
            await asyncio.sleep(self.gap if place else self.first)
            times.append(time.perf_counter())
            writer.write(event("ab").encode())
        writer.write((event(usage={"completion_tokens": body["max_tokens"]}) + "data: [DONE]\n\n").encode())
        self.sent.append(times)
        self.alive -= 1


@pytest.fixture
def clockwork():
    servers = []

    def start(first: float, gap: float) -> Clockwork:
        servers.append(Clockwork(first, gap))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def bench(capsys, *argv) -> tuple[int, dict, str]:
    status = main(["bench", "serve", *argv])
    out = capsys.readouterr().out
    return status, json.loads(out.splitlines()[-1]), out


def test_times_are_those_of_the_endpoint(clockwork, capsys):
    server = clockwork(first=0.12, gap=0.03)
    status, got, out = bench(
        capsys, "--base-url", server.url, "--num-prompts", "6", "--random-input-len", "9",
        "--random-output-len", "12", "--max-concurrency", "2", "--warmup-requests", "1", "--vocab-size", "900",
    )  # fmt: skip
    assert status == 0 and got["model"] == "clockwork" and "TTFT" in out
    assert (got["completed"], got["total_input_tokens"], got["total_output_tokens"]) == (6, 54, 72)
    assert len(server.bodies) == 7 and server.most_alive == 2
    for body in server.bodies:
        assert (len(body["prompt"]), body["max_tokens"], body["temperature"]) == (9, 12, 0)
        assert body["stream"] and body["ignore_eos"] and max(body["prompt"]) < 900
    gaps = [b - a for times in server.sent[1:] for a, b in zip(times, times[1:], strict=False)]
    late = 10.0  # ms that a loaded machine may add to a mean
    assert got["mean_itl_ms"] == pytest.approx(1e3 * np.mean(gaps), abs=late) and got["mean_itl_ms"] >= 29.9
    assert 120 <= got["median_ttft_ms"] <= 120 + 1e3 * (max(gaps) - 0.03) + 3 * late
    # Five gaps for eleven tokens after the first: the time per token is less than half of that between chunks.
    assert got["mean_tpot_ms"] == pytest.approx(got["mean_itl_ms"] * 5 / 11, abs=late / 5)
    assert got["mean_e2e_latency_ms"] == pytest.approx(got["mean_ttft_ms"] + 5 * got["mean_itl_ms"], abs=late)
    assert 1.5 < got["concurrency"] <= 2.0
    assert got["duration"] >= 3 * (0.12 + 5 * 0.03)
    assert got["output_throughput"] == pytest.approx(72 / got["duration"], rel=1e-3)


def test_requests_come_at_their_rate(clockwork, capsys):
    """All at once would end after 0.02 s; a process of 20 requests at 40 a second takes about half a second."""
    server = clockwork(first=0.01, gap=0.01)
    ask = ("--base-url", server.url, "--num-prompts", "20", "--random-output-len", "4", "--warmup-requests", "0")
    status, got, _ = bench(capsys, *ask, "--request-rate", "40", "--seed", "5")
    assert status == 0 and 0.2 < got["duration"] < 1.5
    _, again, _ = bench(capsys, *ask, "--request-rate", "40", "--seed", "5")
    assert again["duration"] == pytest.approx(got["duration"], abs=0.2)  # the same gaps
    _, at_once, _ = bench(capsys, *ask, "--request-rate", "inf")
    assert at_once["duration"] < 0.5 * got["duration"] and at_once["request_rate"] == "inf"


def test_a_seed_gives_a_workload_its_prompts_and_another_others(clockwork, capsys):
    """Else the prompts of 8 tokens would be halves of those of 16, and come from a server's prefix cache."""
    server = clockwork(first=0.0, gap=0.0)

    def prompts(length, *more):
        server.bodies.clear()
        ask = ("--base-url", server.url, "--num-prompts", "4", "--random-output-len", "2", "--warmup-requests", "1")
        bench(capsys, *ask, "--random-input-len", length, *more)
        return [tuple(body["prompt"]) for body in server.bodies]

    short, long = prompts("8"), prompts("16")
    assert len({*short}) == 5 and prompts("8") == short and prompts("8", "--seed", "43") != short
    assert not {prompt[:8] for prompt in long} & {*short}


def test_failures_are_counted_and_shown(clockwork, capsys):
    server = clockwork(first=0.0, gap=0.0)
    ask = ("--base-url", server.url, "--model", "m", "--random-input-len", "1", "--random-output-len", "2")
    status, got, out = bench(capsys, *ask, "--num-prompts", "60", "--warmup-requests", "0",
                             "--extra-request-body", '{"prompt": [9]}')  # fmt: skip
    assert status == 1 and (got["completed"], got["failed"]) == (0, 60) and got["mean_ttft_ms"] is None
    assert "failed, 60 of them: HTTP 500: no luck" in out and got["errors"] == {"HTTP 500: no luck": 60}
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", *ask, "--extra-request-body", '{"prompt": [9]}'])
    assert caught.value.code == 2 and "warm-up request failed: HTTP 500" in capsys.readouterr().err


def test_some_fail_and_the_rest_is_measured(clockwork, capsys):
    server = clockwork(first=0.0, gap=0.0)
    status, got, _ = bench(
        capsys, "--base-url", server.url, "--random-input-len", "1", "--random-output-len", "2",
        "--num-prompts", "80",
        "--max-concurrency", "20", "--warmup-requests", "0",
    )  # fmt: skip
    unlucky = sum(server.refuses(body["prompt"]) for body in server.bodies)
    assert 0 < unlucky < 20, "another seed, please"
    assert status == 1 and got["failed"] == unlucky and got["completed"] == 80 - unlucky
    assert got["total_input_tokens"] == 80 - unlucky


def test_shared_prefix_from_the_command_line(clockwork, capsys):
    server = clockwork(first=0.0, gap=0.0)
    status, got, _ = bench(
        capsys, "--base-url", server.url, "--dataset-name", "shared-prefix", "--gsp-num-groups", "3",
        "--gsp-prompts-per-group", "2", "--gsp-system-prompt-len", "20", "--gsp-question-len", "5",
        "--gsp-output-len", "4", "--gsp-ordered", "--warmup-requests", "2", "--max-concurrency", "1",
    )  # fmt: skip
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert status == 0 and got["completed"] == 6 and got["dataset_name"] == "shared-prefix"
    measured = prompts[2:]
    assert [p[:20] for p in measured[::2]] == [p[:20] for p in measured[1::2]]
    assert not {p[:20] for p in prompts[:2]} & {p[:20] for p in measured}, "the warm-up would fill the prefix cache"


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--num-prompts", "0"], "--num-prompts must be 1 or more"),
        (["--request-rate", "0"], "--request-rate must be over 0"),
        (["--request-rate", "nan"], "--request-rate must be over 0"),
        (["--random-range-ratio", "1.5"], r"--random-range-ratio must be in \[0, 1\]"),
        (["--vocab-size", "1"], "--vocab-size must be 2 or more"),
        (["--max-concurrency", "0"], "--max-concurrency must be 1"),
        (["--preset", "crowd", "--dataset-name", "shared-prefix"], "leave --dataset-name out"),
        (["--preset", "nobody"], "invalid choice"),
        (["--extra-request-body", "[1]"], "must be a JSON object"),
        (["--base-url", "nowhere"], "http://HOST:PORT"),
        (["--base-url", "http://127.0.0.1:1"], "names no model.*start the server"),
    ],
)
def test_refusals(argv, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", *argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1 and re.search(says, err)


def test_a_flag_stands_over_its_preset(clockwork, capsys):
    server = clockwork(first=0.0, gap=0.0)
    status, got, _ = bench(
        capsys, "--base-url", server.url, "--preset", "crowd", "--num-prompts", "3", "--random-output-len", "2"
    )
    assert (
        status == 0 and got["preset"] == "crowd" and got["max_concurrency"] == PRESETS["crowd"]["max_concurrency"]
    )
    assert got["completed"] == 3 and got["total_input_tokens"] == 3 * 512 and len(server.bodies) == 3 + 16


# The server of this house


def test_against_carat(tmp_path, capsys):
    env = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "gemcutter", "serve", "carat", "--port", "0", "--device", "cpu"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        url = re.search(r"http://[\d.]+:\d+", process.stdout.readline())[0]
        status, got, _ = bench(
            capsys, "--base-url", url, "--num-prompts", "5", "--random-input-len", "40",
            "--random-output-len", "12", "--random-range-ratio", "0.5", "--vocab-size", "1024",
            "--max-concurrency", "3", "--warmup-requests", "0",
            # To prompts of noise carat may answer with control tokens alone: a stream without text is a failure.
            "--extra-request-body", '{"skip_special_tokens": false}',
        )  # fmt: skip
        metrics = urllib.request.urlopen(url + "/metrics", timeout=30).read().decode()
    finally:
        process.terminate()
        process.wait(30)
    count = {name: float(re.search(rf"^gemcutter_{name}_tokens_total (\S+)", metrics, re.M)[1]) for name in
             ("prompt", "generation")}  # fmt: skip
    assert status == 0 and got["model"] == "carat" and got["completed"] == 5
    assert got["total_input_tokens"] == count["prompt"] and got["total_output_tokens"] == count["generation"]
    assert got["total_output_tokens"] == got["total_output_tokens_asked"]
    assert 0 < got["mean_ttft_ms"] < got["mean_e2e_latency_ms"] and got["mean_tpot_ms"] > 0
