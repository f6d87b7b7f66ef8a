"""Servers in processes of their own, on ports that the system picks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

HERE = Path(__file__).parent
SRC = HERE.parents[1] / "src"


class Server:
    """A running server. `log` is what it wrote to stderr."""

    def __init__(self, folder: Path, engine: str = "start", wait: bool = True, **config) -> None:
        config = {"port": 0, "model_path": "carat", "device": "cpu"} | config
        self._log, self._out = folder / "stderr", folder / "stdout"
        env = os.environ | {"PYTHONPATH": f"{SRC}:{HERE}", "OMP_NUM_THREADS": "1"}
        with open(self._log, "wb") as log, open(self._out, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "run_server.py"), engine, json.dumps(config)],
                env=env, stdout=out, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.key = config.get("api_key") or "none"
        if wait:
            self.url = self._wait_until_ready()

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def out(self) -> str:
        return self._out.read_text()

    def client(self, **kwargs) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60, **kwargs)

    def get(self, path: str, **kwargs) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **kwargs)

    def post(self, path: str, body: dict, **kwargs) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **kwargs)

    def metric(self, name: str) -> float:
        """The value of one line of /metrics, labels included in the name; 0 where it is not there yet."""
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)

    def wait_for(self, name: str, value: float, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while (seen := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {seen}, not {value}, after {seconds} s"
            time.sleep(0.02)

    def cpu_seconds(self) -> float:
        """Spent so far by all threads of the API process."""
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def engine_pid(self) -> int:
        """The child that is the engine, not multiprocessing's resource tracker."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
                command = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == self.process.pid and "spawn_main" in command:
                found.append(int(pid))
        assert len(found) == 1, found
        return found[0]

    def stop(self, seconds: float = 15) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _wait_until_ready(self) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = re.search(r"at (http://\S+:\d+)", self.out)
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"no server: {self.log}")


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """One server over the fake engine for all tests that leave it as they found it."""
    limits = {"max_body_bytes": 200_000, "max_queued_requests": 300}
    server = Server(tmp_path_factory.mktemp("fake"), served_model_name="test-model", **limits)
    yield server
    server.kill()


@pytest.fixture
def launch(tmp_path):
    """Start a server of one's own: launch(engine="start", **config)."""
    servers = []

    def one(engine: str = "start", **config) -> Server:
        servers.append(Server(tmp_path, engine, **config))
        return servers[-1]

    yield one
    for server in servers:
        server.kill()
