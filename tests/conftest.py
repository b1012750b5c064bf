"""Fixtures of several test files, and a whole cycle. Imported before every test file."""

import functools
import os
import signal
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "toy")]
# A job in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Set before anything imports Triton (transformers does): without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The settings of a very small cycle.
SMALL = {
    "CYCLES": "1",
    "CLINIC_FLAGS": "--sizes 12 6 8 8 8",
    "REWARD_FLAGS": "--resamples 1 --steps 50",
    "SCORE_FLAGS": "--keep 0.5",
    "SFT_FLAGS": "--epochs 1",
    "GRPO_FLAGS": "--steps 1 --prompts 2 --group 4 --watch-items 8 --min-spread -1",
    "PYTHON": sys.executable,
}


def cycle(out, **more):
    """Run a very small cycle into `out`; `more` is added to its environment. Returns the finished process."""
    env = os.environ | SMALL | {"OUT": str(out)} | more
    return subprocess.run(["bash", "cycle.sh"], cwd=ROOT, env=env, capture_output=True, text=True)


def guarded(log):
    """An environment in which no Python process reaches a network.

    `log` tells which processes were guarded and what they tried.
    """
    paths = [os.path.join(ROOT, "tests", "offline"), os.environ.get("PYTHONPATH")]
    # The libraries' own offline mode is off, so that only the guard stops them.
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OFFLINE_LOG": str(log)} | online


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(folder, finished process) of one very small cycle, for all tests that only read one.

    The log of its network guard is beside the folder: network.log.
    """
    out = tmp_path_factory.mktemp("cycle") / "my run"
    return out, cycle(out, **guarded(out.parent / "network.log"))


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *flags): run this module as its command line does → (exit status, stdout, stderr).

    A single text is split at its spaces.
    """
    from helpers import run_here

    def run(script, *flags):
        done = run_here(script, *(flags[0].split() if len(flags) == 1 else flags))
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def stage(call):
    """stage(*flags) calls generate.py."""
    import generate

    return functools.partial(call, generate)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a few records of each kind. Tests only read it."""
    import clinic

    folder = tmp_path_factory.mktemp("clinic")
    clinic.write_clinic(str(folder), (6, 4, 2, 1, 1), seed=7)
    return folder


@pytest.fixture
def serve(monkeypatch):
    """serve(script) starts a server of chat completions and returns it.

    script(body) returns (text, finish_reason), or (status, JSON or bytes), or (None, None) to hang up.
    """
    import huggingface_hub.constants
    from helpers import ChatHandler

    from medgr2 import endpoint

    # Its offline mode would refuse local servers too.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    servers = []

    def start(script):
        server = ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler)
        server.script, server.seen, server.lock = script, [], threading.Lock()
        server.busy = server.busiest = 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# Before pytest-xdist's own hook, which reads these marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """For tests/run.sh: the tests of a file share a process, because they share its fixtures.

    The tests of all files that use `finished` share one process.
    """
    for item in items:
        group = "cycle" if "finished" in item.fixturenames else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    # The longest come first, so that no process waits at the end.
    items.sort(key=lambda item: ("finished" not in item.fixturenames, item.path.name != "test_kill.py"))
