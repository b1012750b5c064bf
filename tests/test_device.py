"""What a machine without a GPU can say about one: no tensor on the wrong device, bf16, the dtype of weights.

test_triton_ops.py compiles the kernels for GPUs that are not there.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_stage_runs_on_a_device_that_refuses_tensors_of_the_cpu():
    """In a process of its own: autograd knows only devices that were there at its first backward pass."""
    checks = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "tests/device_checks.py",
    ]
    done = subprocess.run(checks, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
