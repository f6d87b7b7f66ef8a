"""verify finds what a kernel gets wrong: faults are put into a copy of the package, one at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "gemcutter"

# Of an op: its kernel's line, what stands there instead, and the inputs that show the difference.
FAULTS = {
    "rounding left out": (
        "attention_seam",
        "y = (y * scales[part].to(tl.float32)).to(dtype).to(tl.float32)",
        "y = y * scales[part].to(tl.float32)",
        {"normal", "1e-4"},
    ),
    "rounding in another place": (
        "rms_norm",
        "y = xs[part].to(tl.float32) * factor",
        "y = (xs[part].to(tl.float32) * factor).to(y_ptr.dtype.element_ty).to(tl.float32)",
        {"normal", "1e-4", "1e4", "heavy tails", "ties"},
    ),
    "tie rule dropped": (
        "select_experts",
        "chosen = tl.min(candidate, axis=0)",
        "chosen = tl.max(tl.where(candidate < E, candidate, -1), axis=0)",
        {"ties", "constant", "zeros"},
    ),
    "tail mask off by one": (
        "rms_norm",
        "store_row(y_ptr + row.to(tl.int64) * H, ys, real, H, PARTS, PART)",
        "store_row(y_ptr + row.to(tl.int64) * H, ys, real, H - 1, PARTS, PART)",
        {"normal", "constant", "zeros", "one huge", "nan"},
    ),
}


def verify(package: Path, *ops: str) -> tuple[int, dict]:
    """Exit status and the JSON line, of the package in this folder, in the interpreter."""
    env = os.environ | {"PYTHONPATH": str(package.parent), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    chosen = [word for op in ops for word in ("--op", op)]
    command = [sys.executable, "-m", "gemcutter", "verify", *chosen, "--shape", "26B-A4B", "--rows", "2"]
    done = subprocess.run(command, env=env, cwd=package.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1) and done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def package(tmp_path) -> Path:
    return shutil.copytree(PACKAGE, tmp_path / "gemcutter", ignore=shutil.ignore_patterns("models", "__pycache__"))


def test_finds_none_where_none_is(package):
    status, found = verify(package, *(op for op, *_ in FAULTS.values()))
    assert status == 0 and found["different"] == 0 and found["compared"] > 100_000
    assert all(case["compared"] and not case["failures"] for case in found["cases"])


@pytest.mark.parametrize("name", FAULTS)
def test_finds(package, name):
    op, right, wrong, kinds = FAULTS[name]
    [source] = package.glob(f"ops/**/{op}.py")
    text = source.read_text()
    assert text.count(right) == 1, f"{op}.py: put the fault into what its kernel has become"
    source.write_text(text.replace(right, wrong))
    status, found = verify(package, op, "layer_seam")
    assert status == 1
    differ = {case["op"]: case["different"] for case in found["cases"] if case["different"]}
    assert list(differ) == [op] and found["different"] >= differ[op]
    failures = [failure for case in found["cases"] for failure in case["failures"]]
    assert not any("raised" in failure for failure in failures), failures
    assert kinds <= {failure["kind"] for failure in failures}
