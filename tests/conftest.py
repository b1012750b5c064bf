"""Set before anything imports Triton (transformers does): without a GPU its kernels run in the interpreter."""

import os
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "toy")]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SMALL = {
    "CYCLES": "1",
    "CLINIC_FLAGS": "--sizes 12 6 8 8 8",
    "REWARD_FLAGS": "--resamples 1 --steps 50",
    "SFT_FLAGS": "--epochs 1",
    "GRPO_FLAGS": "--steps 1 --prompts 2 --group 4 --watch-items 8",
    "PYTHON": sys.executable,
}


def cycle(out, **more):
    return subprocess.run(
        ["bash", "cycle.sh"],
        cwd=ROOT,
        env=os.environ | SMALL | {"OUT": str(out)} | more,
        capture_output=True,
        text=True,
    )


def guarded(log):
    """The environment in which no Python process reaches a network, and `log` tells which were guarded and what they tried."""
    path = os.pathsep.join(
        filter(None, [os.path.join(ROOT, "tests", "offline"), os.environ.get("PYTHONPATH")])
    )
    # they are not told
    return {"PYTHONPATH": path, "OFFLINE_LOG": str(log), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(folder, the finished process) of one whole cycle on a very small clinic, for all tests that look at one.

    Beside the folder, network.log of its guard.
    """
    out = tmp_path_factory.mktemp("cycle") / "my run"
    return out, cycle(out, **guarded(out.parent / "network.log"))


# before pytest-xdist's own, which looks for these marks
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """For tests/run.sh: a file's tests share a process, because they share its fixtures; those of `finished` share that one."""
    for item in items:
        item.add_marker(
            pytest.mark.xdist_group("cycle" if "finished" in item.fixturenames else item.path.name)
        )
    # the longest first: no waiting at the end
    items.sort(key=lambda item: ("finished" not in item.fixturenames, item.path.name != "test_kill.py"))
