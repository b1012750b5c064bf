"""Several processes end together and in one line, and hash their inputs once."""

import subprocess
import time

from helpers import children, torchrun, wait_until_gone

# A stage with a reduction per step. In step 3 process 1, or with --all each, does what --fail says.
STAGE = """
import os, signal
import torch
from accelerate import Accelerator
from medgr2 import cli, runs
from medgr2.errors import RunError

def hash_once(path):
    open(f"{path}.hashed-by-{os.environ['RANK']}", "x").close()
    return "a hash"

def fail(what):
    if what == "mistake":
        raise RunError("a.png: broken: replace it")
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if what == "bug":
        1 / 0
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[what])

def main(args):
    accelerator = Accelerator()
    runs.sha256 = hash_once
    run = runs.start(args, [args.data], accelerator.is_main_process)
    assert run.metadata["inputs"] == {args.data: "a hash"}
    for step in run.progress(range(1_000_000), "steps"):
        if step == 3 and (accelerator.process_index == 1 or args.all):
            fail(args.fail)
        accelerator.reduce(torch.ones(1))
        if run.due(step + 1, 1_000_000):
            run.commit(step=step + 1)

if __name__ == "__main__":
    parser = cli.Parser()
    parser.add_argument("--fail")
    parser.add_argument("--data")
    cli.add_switch(parser, "--all", "")
    cli.add_run_arguments(parser)
    cli.run_main(main, parser.parse_args())
"""


def run_stage(folder, *flags):
    """Run STAGE in two processes → (the lines on stderr, the seconds from the first of them to the end).

    Asserts that both processes end within 10 seconds of it.
    """
    (folder / "stage.py").write_text(STAGE)
    said = folder / "stderr"
    flags = [*flags, "--out", folder / "out", "--data", folder / "data"]
    with open(said, "w") as stderr:
        launcher = torchrun(2, folder / "stage.py", *flags, stderr=stderr)
    workers = []
    while launcher.poll() is None and not said.stat().st_size:
        workers = children(launcher.pid)
        time.sleep(0.02)
    started = time.monotonic()
    wait_until_gone(workers, 10)
    seconds = time.monotonic() - started
    assert len(workers) == 2 and launcher.wait(60) == 1
    # The last line is written once the launcher has ended.
    time.sleep(1)
    return said.read_text().splitlines(), seconds


def statuses(lines):
    """The exit statuses of the processes, from the launcher's summary."""
    return sorted(int(line.split()[2]) for line in lines if line.startswith("  exitcode"))


def test_a_mistake_that_one_process_finds_ends_both_and_is_the_first_and_the_last_line(tmp_path):
    lines, _ = run_stage(tmp_path, "--fail", "mistake")
    says = "stage.py: a.png: broken: replace it"
    assert lines[0] == lines[-1] == says and lines.count(says) == 2
    # The only traceback is the launcher's.
    assert sum(line.startswith("Traceback") for line in lines) == 1 and "ChildFailedError" in str(lines)
    assert 2 in statuses(lines)
    # Besides, one process has hashed the input and told the other.
    assert [path.name for path in tmp_path.glob("data.*")] == ["data.hashed-by-0"]


def test_a_caller_that_reads_to_the_end_of_the_output_before_it_waits_gets_the_last_line(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    flags = ("--fail", "mistake", "--out", tmp_path / "out", "--data", tmp_path / "data")
    launcher = torchrun(2, tmp_path / "stage.py", *flags, stderr=subprocess.PIPE)
    _, said = launcher.communicate(timeout=60)
    assert said.decode().splitlines()[-1] == "stage.py: a.png: broken: replace it"
