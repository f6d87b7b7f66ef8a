"""Run a script whose kernels Triton interprets on the CPU.

In a process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def interpret(script: str) -> subprocess.CompletedProcess:
    """The finished run, stdout and stderr as text. `script` is a file's path, or a name beside this one."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)])
    return subprocess.run(
        [sys.executable, str(HERE / script)], env=env, capture_output=True, text=True, timeout=300
    )
