"""What may happen to any run: Ctrl-C, disks, memory and pipes that fail, names that are not text."""

import argparse
import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT
from PIL import Image
from safetensors.torch import save_file

from medgr2 import cli, loading, records, runs
from medgr2.errors import RunError, explain_system_error


@pytest.fixture(autouse=True)
def handlers():
    """Runs of this process set handlers of signals; put the old ones back."""
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def args_of(folder, **extra):
    return argparse.Namespace(out=str(folder / "out"), seed=3, resume=True, **extra)


def leave(main, args, capsys):
    """Run a script's main, which must end with status 2 → its one line on stderr."""
    with pytest.raises(SystemExit) as left:
        cli.run_main(main, args)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    return line


def start(code, cwd, **options):
    """A Python process that runs this code beside the project, with pipes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env=environment, **pipes)


# Signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, name", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_a_run_after_its_next_commit_in_one_line(number, name, tmp_path, capsys):
    run = runs.start(args_of(tmp_path))
    os.kill(os.getpid(), number)
    assert run.due(1, every=2)
    with pytest.raises(SystemExit) as left:
        run.commit(step=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert left.value.code == 128 + number
    assert line == f"{tmp_path}/out.part: stopped by {name} at step 1; the same command resumes it"
    assert runs.start(args_of(tmp_path)).state["step"] == 1


def commit_and_go_on(folder, stderr, started):
    """In a forked process: a run that is busy after its first commit. stderr goes into a file."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    runs.start(args_of(folder)).commit(step=7)
    started.set()
    while True:
        time.sleep(0.01)


def test_a_second_ctrl_c_leaves_at_once_and_a_second_sigterm_does_not(tmp_path):
    context, stderr = multiprocessing.get_context("fork"), tmp_path / "stderr"
    started = context.Event()
    running = context.Process(target=commit_and_go_on, args=(tmp_path, stderr, started))
    running.start()
    assert started.wait(60)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        time.sleep(0.3)
        assert running.is_alive()
        os.kill(running.pid, number)
    running.join(20)
    (line,) = stderr.read_text().splitlines()
    assert running.exitcode == 130
    assert line.endswith("out.part: stopped at once; the same command resumes from the last commit")
    assert runs.start(args_of(tmp_path)).state["step"] == 7


def test_one_ctrl_c_that_arrives_twice_is_one(tmp_path, monkeypatch):
    """From the terminal, and passed on by a launcher."""
    monkeypatch.setattr(cli, "leave_at_once", pytest.fail)
    run = runs.start(args_of(tmp_path))
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit):
        run.commit(step=1)


def test_ctrl_c_before_a_run_starts_is_one_line_too(tmp_path):
    """While torch is imported, for example."""
    code = "from medgr2 import cli; cli.Parser().parse_args([]); print('parsed', flush=True)\n"
    running = start(code + "import time; time.sleep(60)", tmp_path)
    assert running.stdout.readline() == "parsed\n"
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=20) == ("", "-c: stopped by Ctrl-C\n") and running.returncode == 130


def test_a_bug_keeps_its_traceback(tmp_path):
    running = start("from medgr2 import cli; cli.Parser().parse_args([]); 1 / 0", tmp_path)
    assert "ZeroDivisionError" in running.communicate()[1] and running.returncode == 1


def test_a_job_in_the_background_still_ignores_ctrl_c(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = runs.start(args_of(tmp_path))
    os.kill(os.getpid(), signal.SIGINT)
    assert run.stopping is None


# Disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """No file may grow beyond 100 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_grow_so_large_is_one_line(tmp_path, small_files, capsys):
    weights = torch.zeros(100_000)
    writers = [
        lambda args: runs.start(args).commit(weights=weights),
        lambda args: runs.start(args).append("rows.jsonl", [{"id": "x" * 200_000}]),
        # It makes an error of its own.
        lambda args: save_file({"weights": weights}, tmp_path / "model.safetensors"),
    ]
    for write in writers:
        line = leave(write, args_of(tmp_path), capsys)
        assert "File too large; raise the limit (ulimit -f)" in line and "the same command resumes" in line


def test_a_name_that_is_too_long_is_one_line(tmp_path, capsys):
    line = leave(runs.start, args_of(tmp_path / ("a" * 300)), capsys)
    assert line.endswith(": File name too long; choose a shorter --out")


def test_an_output_folder_that_vanishes_is_one_line(tmp_path, capsys):
    def main(args):
        run = runs.start(args)
        os.rename(run.part, tmp_path / "gone")
        run.append("rows.jsonl", [])

    assert "No such file or directory; mount the disk again" in leave(main, args_of(tmp_path), capsys)


@pytest.mark.parametrize(
    "error, says",
    [
        (
            OSError(errno.EIO, "x"),
            "out: Input/output error; mount the disk again or choose another --out, the",
        ),
        (OSError(errno.ESTALE, "x", "f"), "f: Stale file handle; mount the disk again"),
        (OSError(errno.EMFILE, "x", "f"), "f: Too many open files; raise the limit (ulimit -n)"),
        (OSError(errno.EROFS, "x", "f"), "f: Read-only file system; choose another --out"),
        # As NCCL and torch say it.
        (
            RuntimeError(
                "Error while creating shared memory segment /dev/shm/nccl-X: No space left on device"
            ),
            "/dev/shm is full; give it more room (docker run --shm-size=8g)",
        ),
        (
            RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
            "/dev/shm is full",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has; lower --micro-batch",
        ),
        (MemoryError(), "out of memory; lower --micro-batch"),
    ],
)
def test_what_the_machine_lacks_is_said_with_what_to_do(error, says):
    line = explain_system_error(
        error, {"out": "out", "resume": True, "micro_batch": 8, "group": 4, "batch": None}
    )
    assert says in line and "\n" not in line


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), OSError(errno.EBADF, "x"), OSError("no number"), ConnectionRefusedError(111, "x")],
)
def test_an_error_that_is_not_the_systems_is_not_explained_away(error):
    assert explain_system_error(error, {"out": "out"}) is None
    assert explain_system_error(FileNotFoundError(errno.ENOENT, "x", "elsewhere"), {"out": "out"}) is None


def test_memory_that_torch_cannot_get_is_one_line(tmp_path, capsys):
    line = leave(lambda args: torch.empty(1 << 60), args_of(tmp_path, batch=8), capsys)
    assert "can't allocate memory" in line and line.endswith("; lower --batch")


@pytest.mark.parametrize(
    "processes, args, says",
    [
        # What is in use already, or cannot be lower, is not named; --batch is, where nothing cuts it.
        (
            1,
            {"shard": False, "lora": None, "gradient_checkpointing": False, "micro_batch": 8, "batch": 8},
            "add --lora or --gradient-checkpointing, or lower --micro-batch",
        ),
        (
            8,
            {"shard": False, "lora": 8, "micro_batch": 1, "micro_group": None},
            "add --shard, or lower --micro-group",
        ),
        (1, {"batch": 16, "max_new_tokens": 96}, "lower --batch or --max-new-tokens"),
        (1, {}, "lower the size of the input"),
    ],
)
def test_out_of_memory_names_the_flags_that_can_still_help(processes, args, says, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert explain_system_error(MemoryError(), args) == f"out of memory; {says}"


def test_a_model_that_does_not_fit_into_memory_is_not_called_a_broken_one(monkeypatch):
    def load(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loading.transformers.AutoModelForImageTextToText, "from_pretrained", load)
    with pytest.raises(torch.OutOfMemoryError):
        loading.load(str(ROOT / "toy" / "policy"))


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_one_line(lines, tmp_path):
    """Also if all that is printed fits into the buffer and is written at the end only."""
    code = "import sys; from medgr2 import cli; sys.stdin.read(); args = cli.Parser().parse_args([])\n"
    code += f"cli.run_main(lambda args: print('a line\\n' * {lines}), args)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    running = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
    running.stdout.close()
    running.stdin.close()
    assert running.stderr.read().decode() == (
        "-c: stdout: Broken pipe; let something read the output, or write it to a file\n"
    )
    assert running.wait() == 2


# Names that are not text ----------------------------------------------------------------------------------


def test_a_run_whose_paths_are_not_utf_8_is_written_and_resumed(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"Universit\xe9")
    os.mkdir(folder)
    args = argparse.Namespace(out=os.path.join(os.fsdecode(folder), "out"), seed=0, resume=True)
    runs.start(args).commit(step=4)
    assert runs.start(args).state["step"] == 4
    # JSON's escape of the byte that is no UTF-8.
    assert rb"Universit\udce9/out" in open(os.path.join(folder, b"out.part", b"args.json"), "rb").read()


def test_a_record_whose_image_has_a_name_that_is_no_text_is_one_line(tmp_path, capsys):
    row = {"id": "1", "image": os.path.join(tmp_path, os.fsdecode(b"\xe9.png"))}

    def append(args):
        run = runs.start(args)
        run.append("rows.jsonl", [records.with_relative_image(row, run.folder)])
        run.commit(step=1)

    for write in (append, lambda args: records.write_records(tmp_path / "r.jsonl", [row])):
        line = leave(write, args_of(tmp_path), capsys)
        assert "udce9.png" in line and line.endswith(": not UTF-8; rename the file or folder")


def test_in_the_c_locale_paths_and_texts_may_have_accents(tmp_path):
    folder = tmp_path / "Unité"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "é.png")
    (folder / "r.jsonl").write_text(json.dumps({"id": "1", "image": "é.png", "modality": "échographie"}))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in ("check", "split --train 1 --val 0 --test 0 --out out"):
        flags = [*command.split()[:1], folder / "r.jsonl", *command.split()[1:], "--image-root", tmp_path]
        done = subprocess.run(
            [sys.executable, "-m", "medgr2.records", *flags],
            cwd=folder,
            env=os.environ | plain | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stderr == ""
        assert command != "check" or r"\xe9chographie" in done.stdout
    assert '"image": "../é.png"' in (folder / "out" / "train.jsonl").read_text(encoding="utf-8")


def test_help_is_printed_where_greek_letters_are_not():
    command = [sys.executable, "reward.py", "score", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and r"\u03c4" in done.stdout


# Numbers that are not finite ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_gets_into_no_file(value, tmp_path):
    run = runs.start(args_of(tmp_path))
    run.log(step=0, loss=1.0, grad_norm=value)
    with pytest.raises(RunError, match="rows.jsonl: a number of q7 is not finite"):
        run.append("rows.jsonl", [{"id": "q7", "reward": value}])
    with pytest.raises(RunError, match="metrics.json: a number is not finite"):
        run.finish({"auroc": [value]})
    assert not (tmp_path / "out").exists() and not os.path.exists(run.path("metrics.json"))
    assert open(run.path("metrics.jsonl")).read() == '{"step": 0, "loss": 1.0, "grad_norm": null}\n'
