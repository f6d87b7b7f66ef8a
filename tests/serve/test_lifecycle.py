"""How a server starts, drains, dies and says why."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import fake_engine
import httpx
import openai
import pytest
from conftest import HERE, SRC

BODY = {"prompt": [600], "seed": 1}


def events(server, seen: list, **extra) -> None:
    """Stream a completion and keep its events as they come."""
    body = BODY | {"stream": True} | extra
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                seen.append(json.loads(line.removeprefix("data: ")))


def in_flight(server, **extra) -> tuple[threading.Thread, list]:
    seen: list = []
    thread = threading.Thread(target=events, args=(server, seen), kwargs=extra)
    thread.start()
    deadline = time.monotonic() + 10
    while not seen:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return thread, seen


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_first_chunk_does_not_wait_for_an_acknowledgement(launch):
    """With Nagle's algorithm on, a used connection gets the chunk behind the headers 40 ms late, every time."""
    server, delays = launch(), []
    body = {"prompt": [600] * 900, "stream": True, "max_tokens": 12}
    with httpx.Client() as client:
        for _ in range(8):
            start, first = time.monotonic(), None
            with client.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
                for line in reply.iter_lines():
                    first = first or (time.monotonic() - start if line else None)
            delays.append(first)
    assert min(delays[2:]) < 0.035, delays


def test_api_key_guards_every_route_but_health(launch):
    server = launch(api_key="sésame-1")
    right = {"authorization": "Bearer sésame-1".encode()}
    for wrong in (None, "", "Bearer", "Bearer wrong", "sésame-1".encode(), "Bearer sésame-12".encode()):
        headers = {} if wrong is None else {"authorization": wrong}
        for path in ("/v1/models", "/metrics", "/nothing", "/docs", "//health", "/health/"):
            reply = server.get(path, headers=headers)
            assert reply.status_code == 401, path
            assert reply.json()["error"]["code"] == "invalid_api_key"
        assert server.post("/v1/completions", BODY, headers=headers).status_code == 401
        assert server.get("/health", headers=headers).status_code == 200
    assert server.get("/v1/models", headers=right).status_code == 200
    assert server.post("/v1/completions", BODY, headers=right).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0).models.list()
    assert server.stop() == 0


def test_sigterm_lets_requests_finish_and_takes_no_more(launch):
    server = launch()
    engine = server.engine_pid()
    thread, seen = in_flight(server, max_tokens=500)  # about 1.5 s
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert server.get("/health").status_code == 503
    refused = server.post("/v1/completions", BODY)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    assert server.process.wait(10) == 0
    thread.join()
    assert len(seen) == 500 and seen[-1]["choices"][0]["finish_reason"] == "length"
    assert not alive(engine)
    assert server.log == ""


def test_sigterm_aborts_what_takes_too_long(launch):
    server = launch(context_length=100_000)
    engine = server.engine_pid()
    thread, seen = in_flight(server, max_tokens=90_000)
    begin = time.monotonic()
    assert server.stop(10) == 0
    assert 3 < time.monotonic() - begin < 10
    thread.join()
    assert seen[-1]["error"]["code"] == "shutting_down"
    assert not alive(engine)


def test_second_signal_hurries(launch):
    server = launch(context_length=100_000)
    thread, seen = in_flight(server, max_tokens=90_000)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert server.stop() == 0
    assert time.monotonic() - begin < 4
    thread.join()
    assert seen[-1]["error"]


def test_signal_to_the_whole_group_drains_too(launch):
    server = launch()
    thread, seen = in_flight(server, max_tokens=300)
    os.killpg(server.process.pid, signal.SIGTERM)
    assert server.process.wait(10) == 0
    thread.join()
    assert len(seen) == 300


def test_killed_engine_fails_its_requests_and_ends_the_server(launch):
    server = launch(context_length=100_000)
    thread, seen = in_flight(server, max_tokens=90_000)
    whole: list = []
    ask = BODY | {"max_tokens": 90_000}
    waiting = threading.Thread(target=lambda: whole.append(server.post("/v1/completions", ask)))
    waiting.start()
    server.wait_for("gemcutter_requests_running", 2)
    os.kill(server.engine_pid(), signal.SIGKILL)
    thread.join(5)
    waiting.join(5)
    assert "SIGKILL" in seen[-1]["error"]["message"]
    assert whole[0].status_code == 500 and "SIGKILL" in whole[0].json()["error"]["message"]
    health = server.get("/health")
    assert health.status_code == 503 and health.json() == {"status": "dead"}
    assert server.post("/v1/completions", BODY).status_code == 503
    assert server.process.wait(10) == 1
    assert "gemcutter: the engine died" in server.log and "SIGKILL" in server.log


def test_exception_in_a_step_ends_the_server_with_its_message(launch):
    server = launch()
    reply = server.post("/v1/completions", {"prompt": [fake_engine.BREAK_STEP]})
    assert reply.status_code == 500 and "step broke" in reply.json()["error"]["message"]
    assert server.process.wait(10) == 1
    assert "gemcutter: the engine died: RuntimeError: step broke" in server.log


def test_killed_server_leaves_nothing_behind(launch, monkeypatch):
    folder = tempfile.mkdtemp()  # not tmp_path: a socket's path is at most 107 characters
    monkeypatch.setenv("TMPDIR", folder)
    server = launch()
    engine = server.engine_pid()
    server.process.kill()
    deadline = time.monotonic() + 5
    while alive(engine):
        assert time.monotonic() < deadline, "the engine outlives its server"
        time.sleep(0.05)
    os.rmdir(folder)  # raises unless it is empty


def test_engine_that_cannot_start(launch):
    server = launch("start_broken", wait=False)
    assert server.process.wait(20) == 2
    assert server.log == "gemcutter: cannot start: there is no memory for this model\n"


def test_signal_while_loading(launch):
    server = launch("start_slowly", wait=False)
    deadline = time.monotonic() + 20
    while True:
        try:
            engine = server.engine_pid()
            break
        except AssertionError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    time.sleep(0.5)
    assert server.stop(10) == 0
    assert not alive(engine)


def test_engine_that_breaks_as_it_starts(launch):
    server = launch("start_buggy", wait=False)
    assert server.process.wait(20) == 1
    assert server.log.endswith("gemcutter: cannot start: RuntimeError: our bug\n")


def test_sigterm_does_not_wait_for_a_thread(tmp_path):
    """Python joins its worker threads at exit; one that tokenizes or loads for long must not hold the server."""
    code = (
        "import time, fake_engine; from gemcutter.config import EngineConfig; from gemcutter.serve import app\n"
        "def load(config): print('loading', flush=True); time.sleep(60)\n"
        "app._load_text = load; app.serve(EngineConfig(port=0), fake_engine.start)"
    )
    script = tmp_path / "hangs.py"
    script.write_text(f"if __name__ == '__main__':\n    exec({code!r})")
    env = os.environ | {"PYTHONPATH": f"{SRC}:{HERE}"}
    process = subprocess.Popen([sys.executable, script], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10.5) == 0
    finally:
        process.kill()


def test_port_in_use(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = launch(port=port, wait=False)
        assert server.process.wait(20) == 2
    assert server.log.startswith(f"gemcutter: cannot listen on 127.0.0.1:{port}")
    assert server.log.count("\n") == 1


def test_unknown_checkpoint(launch):
    server = launch(model_path="/nowhere/at/all", wait=False)
    assert server.process.wait(30) == 2
    assert "/nowhere/at/all" in server.log
    assert "Traceback" not in server.log


def test_listens_on_loopback_only(launch):
    server = launch()
    port = int(server.url.rpartition(":")[2])
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
