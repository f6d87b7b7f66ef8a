"""The examples run as a reader would run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_patch_transformers():
    out = run("examples/patch_transformers.py")
    assert "85" in out
    assert re.search(r"patched: \d+ of \d{4,} logits differ", out) and "unpatched again: 0 differ" in out


def check_speed(out: str, what: str) -> None:
    hf, patched = (int(re.search(rf"^{name} +(\d+) {what} a step", out, re.M)[1]) for name in ("HF", "patched"))
    print(out)
    assert 0 < patched < hf


def test_patch_speed():
    check_speed(run("examples/patch_speed.py", "--context", "16", "--steps", "2"), "(?:operators|launches)")


@pytest.mark.gpu
def test_patch_speed_on_a_gpu():
    check_speed(run("examples/patch_speed.py"), "launches")
