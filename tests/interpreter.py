"""Run a script whose kernels Triton interprets on the CPU, with a GPU's arithmetic.

In a process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

START = """
import runpy, sys
from gemcutter.verify.interpreter import install
install()
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def interpret(script: str | Path) -> subprocess.CompletedProcess:
    """The finished run, stdout and stderr as text."""
    path = Path(script)
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in (HERE.parent / "src", HERE, path.parent))
    return subprocess.run(
        [sys.executable, "-c", START, str(path)], env=env, capture_output=True, text=True, timeout=300
    )
