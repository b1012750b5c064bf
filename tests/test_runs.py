"""runs.py: a run's folder is final once it exists, resumes from the last commit, and holds only one run.

cli.py: numbers have bounds, a mistake is one line, tables line up.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analysis import summarize
from medgr2 import cli, runs
from medgr2.errors import RunError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "kind, least, most, text, value",
    [
        (int, 1, None, "1", 1),
        (int, 1, None, "0", None),
        (int, 1, None, "1.5", None),
        (float, 0, 1, "1", 1.0),
        (float, 0, 1, "1.01", None),
        (float, 0, None, "nan", None),
        (float, 0, None, "inf", None),
        (float, -6, 10, "-6", -6.0),
        (float, -6, 10, "-inf", None),
    ],
)
def test_a_number_out_of_bounds_or_not_finite_is_refused(kind, least, most, text, value):
    parse = cli.number(kind, least, most)
    if value is None:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            parse(text)
    else:
        assert parse(text) == value and type(parse(text)) is kind


@pytest.fixture(autouse=True)
def handler():
    """Runs of this process set a handler for SIGTERM; put the old one back."""
    old = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, old)


def args_of(tmp_path, **extra):
    return argparse.Namespace(out=str(tmp_path / "out"), seed=3, resume=True, **extra)


def lines(path):
    return [json.loads(line) for line in open(path)]


def test_a_finished_run_is_renamed_and_the_same_command_again_exits_with_status_0(tmp_path):
    run = runs.start(args_of(tmp_path, lr=1.0))
    run.log(step=0, loss=0.123456789)
    run.finish({"loss": 1})
    assert lines(tmp_path / "out" / "metrics.jsonl") == [{"step": 0, "loss": 0.123457}]
    assert json.load(open(tmp_path / "out" / "metrics.json")) == {"loss": 1}
    assert not (tmp_path / "out.part").exists()
    assert sorted(os.listdir(tmp_path / "out")) == ["args.json", "metrics.json", "metrics.jsonl"]
    with pytest.raises(SystemExit) as left:
        runs.start(args_of(tmp_path, lr=1.0))
    assert left.value.code == 0


def test_another_command_on_the_same_folder_is_refused_and_names_the_flag(tmp_path):
    runs.start(args_of(tmp_path, lr=1.0)).finish({})
    with pytest.raises(RunError, match="--lr 1.0 there, 2.0 here"):
        runs.start(args_of(tmp_path, lr=2.0))


def test_an_unfinished_run_of_another_command_is_refused(tmp_path):
    runs.start(args_of(tmp_path, lr=1.0)).commit(step=1)
    with pytest.raises(RunError, match="another run"):
        runs.start(args_of(tmp_path, lr=2.0))


def test_an_unfinished_run_without_a_commit_is_replaced(tmp_path):
    # For example one with a wrong --model that failed at once.
    runs.start(args_of(tmp_path, lr=1.0)).append("rows.jsonl", [{"a": 1}])
    run = runs.start(args_of(tmp_path, lr=2.0))
    assert run.state == {} and not (tmp_path / "out.part" / "rows.jsonl").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    os.makedirs(tmp_path / "out")
    with pytest.raises(RunError, match="something other than a run"):
        runs.start(args_of(tmp_path))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"script": "x.py"}', '{"script": "x.py", "args": [], "inputs": {}}']
)
def test_a_folder_whose_args_json_is_not_that_of_a_run_is_refused(tmp_path, text):
    os.makedirs(tmp_path / "out")
    (tmp_path / "out" / "args.json").write_text(text)
    with pytest.raises(RunError, match="something other than a run"):
        runs.start(args_of(tmp_path))


def test_an_argument_on_which_no_output_depends_may_change_before_a_resume(tmp_path):
    runs.start(args_of(tmp_path, timeout=1), free=("timeout",)).commit(step=7)
    assert runs.start(args_of(tmp_path, timeout=60), free=("timeout",)).state["step"] == 7
    with pytest.raises(RunError, match="--timeout 1 there, 9 here"):
        runs.start(args_of(tmp_path, timeout=9))


def test_an_out_that_cannot_be_written_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = argparse.Namespace(out=str(tmp_path / "file" / "out"), seed=0, resume=True)
    with pytest.raises(SystemExit) as left:
        cli.run_main(lambda args: runs.start(args), args)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line and "Not a directory" in line


def test_a_full_disk_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    def fill(args):
        with open("/dev/full", "w") as f:
            f.write("x" * 10000)

    with pytest.raises(SystemExit) as left:
        cli.run_main(fill, argparse.Namespace(out="o"))
    assert left.value.code == 2 and "No space left on device" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        cli.run_main(lambda args: open("/none"), argparse.Namespace(out="o"))


def test_the_error_that_safetensors_raises_on_a_full_disk_is_one_line_too(capsys):
    from safetensors import SafetensorError

    # Its message; tests/test_kill.py fills a real disk.
    def fill(args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(SystemExit) as left:
        cli.run_main(fill, argparse.Namespace(out="o"))
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "o: No space left on device; make room" in line


@pytest.mark.parametrize(
    "free, error, says",
    [
        (1000, RunError, r"a commit needs 1\.\d+ MiB and 0\.001 MiB are free"),
        # There is room, so it must be a quota.
        (1 << 40, OSError, "No space left on device"),
    ],
)
def test_a_commit_that_does_not_fit_says_so_and_the_last_one_is_kept(
    tmp_path, monkeypatch, free, error, says
):
    run = runs.start(args_of(tmp_path))
    run.commit(step=1)
    os.symlink("/dev/full", run.path("state/new"))
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda _: argparse.Namespace(free=free))
    with pytest.raises(error, match=says):
        run.commit(step=2, weights=torch.zeros(1 << 18))
    assert runs.start(args_of(tmp_path)).state["step"] == 1


def test_a_second_process_on_one_folder_is_told_which_process_holds_it(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from medgr2 import runs; import time\n"
        f"lock = runs.take_lock({str(tmp_path / 'out.part')!r}); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match=f"process {holder.pid} on "):
        runs.start(args_of(tmp_path))
    holder.kill()
    holder.wait()
    # The lock ended with the process that held it.
    runs.start(args_of(tmp_path)).finish({})


def test_a_damaged_newest_commit_is_set_aside_and_the_one_before_is_used(tmp_path, capsys):
    run = runs.start(args_of(tmp_path))
    for step in (1, 2, 3):
        run.append("rows.jsonl", [{"step": step}])
        run.commit(step=step)
    states = sorted((tmp_path / "out.part" / "state").iterdir())
    assert len(states) == 2
    damaged = bytearray(states[-1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    states[-1].write_bytes(damaged)
    again = runs.start(args_of(tmp_path))
    assert again.state["step"] == 2
    assert lines(tmp_path / "out.part" / "rows.jsonl") == [{"step": 1}, {"step": 2}]
    assert "damaged, set aside" in capsys.readouterr().out


def test_sigterm_ends_a_run_after_its_next_commit_with_the_state_saved(tmp_path):
    run = runs.start(args_of(tmp_path))
    assert [run.due(step, every=2) for step in (1, 2)] == [False, True]
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.due(1, every=2)
    with pytest.raises(SystemExit) as left:
        run.commit(step=1)
    assert left.value.code == 143
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert runs.start(args_of(tmp_path)).state["step"] == 1


def test_sigterm_ends_a_loop_that_commits_nothing_after_its_step(tmp_path):
    run, done = runs.start(args_of(tmp_path)), []
    with pytest.raises(SystemExit):
        for step in run.progress(range(5), "steps"):
            done.append(step)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    assert done == [0, 1]


def test_files_of_one_label_share_a_row_of_the_table(tmp_path):
    for name, values in (("a+b.json", {"accuracy": 0.5}), ("c.json", {"auroc": 0.25})):
        (tmp_path / name).write_text(json.dumps(values))
    shown = summarize.summarize(
        [f"x={tmp_path}/a+b.json", f"y={tmp_path}/a+b.json", f"x={tmp_path}/c.json"], ["accuracy", "auroc"]
    )
    assert [line.split() for line in shown.splitlines()[2:]] == [["x", "0.500", "0.250"], ["y", "0.500"]]


def test_an_input_that_changed_is_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    runs.start(args_of(tmp_path), [str(data)]).commit(step=1)
    data.write_text("two")
    with pytest.raises(RunError, match="has changed"):
        runs.start(args_of(tmp_path), [str(data)])


def test_what_was_written_after_the_last_commit_is_dropped_and_the_state_is_restored(tmp_path, capsys):
    run = runs.start(args_of(tmp_path))
    run.append("rows.jsonl", [{"a": 1}])
    run.commit(step=1, weights={"w": torch.arange(3.0)})
    run.append("rows.jsonl", [{"a": 2}])
    run.append("late.jsonl", [{"b": 1}])
    # A crash in the middle of a line, with nothing more committed.
    for file in run.files.values():
        file.write('{"half')
        file.close()
    again = runs.start(args_of(tmp_path))
    assert again.state["step"] == 1 and torch.equal(again.state["weights"]["w"], torch.arange(3.0))
    assert "dropped" in capsys.readouterr().out
    again.append("rows.jsonl", [{"a": 3}])
    again.finish({})
    assert lines(tmp_path / "out" / "rows.jsonl") == [{"a": 1}, {"a": 3}]
    assert (tmp_path / "out" / "late.jsonl").read_text() == ""


def test_a_file_not_written_since_the_commit_keeps_its_rows_through_two_resumes(tmp_path):
    run = runs.start(args_of(tmp_path))
    run.append("first.jsonl", [{"a": 1}])
    run.commit(step=1)
    run = runs.start(args_of(tmp_path))
    run.append("second.jsonl", [{"b": 1}])
    # This process never opened first.jsonl.
    run.commit(step=2)
    runs.start(args_of(tmp_path)).finish({})
    assert lines(tmp_path / "out" / "first.jsonl") == [{"a": 1}]
    assert lines(tmp_path / "out" / "second.jsonl") == [{"b": 1}]


def test_no_resume_starts_over(tmp_path):
    run = runs.start(args_of(tmp_path))
    run.append("rows.jsonl", [{"a": 1}])
    run.commit(step=1)
    args = args_of(tmp_path)
    args.resume = False
    assert runs.start(args).state == {} and not (tmp_path / "out.part" / "rows.jsonl").exists()


def test_args_json_holds_arguments_versions_and_hashes_of_inputs(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("abc")
    runs.start(args_of(tmp_path, lr=1.0), [str(data), "a/hub-name"]).finish({})
    meta = json.load(open(tmp_path / "out" / "args.json"))
    assert meta["args"]["lr"] == 1.0 and meta["versions"]["torch"] and meta["ended"] >= meta["started"]
    # SHA-256 of "abc", from FIPS 180-2.
    assert meta["inputs"][str(data)] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert meta["inputs"]["a/hub-name"] is None


def test_nan_is_never_written(tmp_path):
    run = runs.start(args_of(tmp_path))
    with pytest.raises(ValueError):
        run.append("rows.jsonl", [{"reward": float("nan")}])


def test_a_seed_depends_only_on_its_parts_and_on_each_of_them():
    assert runs.seed_of(0, "a", 1) == runs.seed_of(0, "a", 1)
    assert len({runs.seed_of(0, name, k) for name in "ab" for k in range(1000)}) == 2000
    assert all(0 <= runs.seed_of(k) < 2**63 for k in range(100))


def test_a_table_lines_up_and_numbers_align_right():
    text = cli.format_table([("a", 1.5, 10), ("bbb", None, 7)], ("name", "x", "n")).splitlines()
    assert text == ["name      x   n", "----  -----  --", "a     1.500  10", "bbb           7"]


def test_the_image_root_may_change_before_a_resume_and_another_argument_may_not(tmp_path):
    args = args_of(tmp_path)
    args.image_root = "here"
    runs.start(args).commit(step=3)
    args.image_root = "there"
    assert runs.start(args).state["step"] == 3
    args.seed += 1
    with pytest.raises(RunError, match="--seed"):
        runs.start(args)
