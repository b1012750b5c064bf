"""What several test files share: paths, small records and images, and a server of chat completions."""

import io
import json
import os
import pathlib
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler

import pytest
from hypothesis import settings

from medgr2 import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} is missing")
few = settings(max_examples=100, deadline=None)
OPTIONS = ["X-ray", "MRI", "CT"]
KEY = "sk-very-secret-123"


# Runs one script after another and leaves a file per process. Scripts are apart by "then".
RANKS = """import os, runpy, sys
open(os.path.join(sys.argv[1], "rank" + os.environ.get("RANK", "-")), "w").close()
sys.path.insert(0, os.getcwd())
for command in " ".join(sys.argv[2:]).split(" then "):
    sys.argv = command.split()
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_here(module, *words):
    """Run a module as its command line does, but in this process → a subprocess.CompletedProcess."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    words = [os.path.basename(module.__file__), *map(str, words)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        try:
            cli.run_main(module.main, module.parse_args())
        except SystemExit as leaving:
            status = leaving.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def run_in_one_and_two(folder, *stages):
    """Run stages' command lines in one process into folder/one, and in two over gloo into folder/two.

    Of several stages each names its folder: `--out OUT/scored`; OUT is one or two.
    """
    (folder / "ranks.py").write_text(RANKS)
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for start, out in (([sys.executable], "one"), (launch, "two")):
        words = " then ".join(stages).replace("OUT", f"{folder}/{out}").split()
        more = [] if "--out" in words else ["--out", f"{folder}/{out}"]
        flags = [*start, f"{folder}/ranks.py", str(folder), *words, *more]
        done = subprocess.run(flags, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.glob("rank?")) == ["rank-", "rank0", "rank1"]


def torchrun(processes, *command, stderr):
    """Start a script in so many processes over gloo → the launcher's Popen."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = {"stdout": subprocess.DEVNULL, "stderr": stderr}
    return subprocess.Popen(
        [*launcher, str(processes), *map(str, command)], cwd=ROOT, env=environment, **output
    )


def children(pid):
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def wait_until_gone(pids, seconds):
    """Assert that none of these processes runs any more after so many seconds."""
    deadline, pids = time.monotonic() + seconds, list(pids)
    # What a process that has ended leaves until its parent asks for it has no /proc/PID/exe.
    while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}/exe")]:
        assert time.monotonic() < deadline, f"{left} of {pids} are left after {seconds} s"
        time.sleep(0.02)


def put_image(path, colour=(10, 20, 30), size=(4, 3), **options):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return str(path)


def put_json(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return str(path)


def question(image="/data/a.png", **fields):
    return {
        "id": "q1",
        "image": image,
        "question": "Which modality?",
        "options": list(OPTIONS),
        "answer": "CT",
        "rationale": "Bone is bright.",
        "source": "expert",
    } | fields


def omni(**change):
    row = {
        "dataset": "Chest",
        "question_id": "Chest_0",
        "question_type": "Modality Recognition",
        "question": "Which?",
        "gt_answer": "CT.",
        "image_path": "Images/a.png",
        "option_A": "MRI",
        "option_B": "CT.",
        "modality_type": "CT(Computed Tomography)",
    } | change
    return {key: value for key, value in row.items() if value is not ...}


class ChatHandler(BaseHTTPRequestHandler):
    """Answers each request with what `server.script(body)` returns; see the fixture `serve`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            first, second = self.server.script(body)
        finally:
            with self.server.lock:
                self.server.busy -= 1
        # Hang up.
        if first is None:
            return self.connection.close()
        status, content = (
            (200, completion(body, first, second)) if isinstance(first, str) else (first, second)
        )
        is_raw = isinstance(content, bytes)
        payload = content if is_raw else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if is_raw else "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


def completion(body, text, finish_reason):
    """The response of a chat completion."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }
