"""benchmarks/cycle.py: what a process took is measured from outside, stages are matched, and the tables say what the file holds."""

import argparse
import json
import os
import subprocess
import sys

import clinic
import pytest
from conftest import ROOT

sys.path.append(os.path.join(ROOT, "benchmarks"))
import cycle

from medgr2.errors import RunError

ARGS = argparse.Namespace(
    items=[],
    against=None,
    rounds=2,
    cycles=1,
    sizes=[1, 2, 3, 4, 5],
    seed=7,
    threads=1,
    out=None,
    readme=False,
    stage=None,
)
HERE = {
    "git": {"commit": "c" * 40, "dirty": False},
    "versions": {"torch": "2", "transformers": "5"},
    "hardware": {"machine": "x", "cpus": 2, "gpus": []},
}
FAKE = """set -e
cd "$(dirname "$0")"
"$PYTHON" say.py train --out "$OUT/a b" --seed "$SEED" "$CYCLES" "$CLINIC_FLAGS" "$OMP_NUM_THREADS" "$SFT_FLAGS" "$EXPERT$LAUNCH" >> said
"$PYTHON" say.py "base=$OUT/x" --fields accuracy >> said
"""


def measured(tmp_path, code, *rest):
    """(exit status, what was measured) of a script with this code, through the command line that the wrapper calls."""
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, "benchmarks", "cycle.py"),
            "--stage",
            str(tmp_path / "log"),
            str(tmp_path / "script.py"),
            *rest,
        ]
    )
    return done.returncode, json.loads((tmp_path / "log").read_text().splitlines()[-1])


@pytest.fixture
def checkout(tmp_path):
    """A folder whose cycle runs two scripts that say what they were given."""
    (tmp_path / "cycle.sh").write_text(FAKE)
    (tmp_path / "say.py").write_text("import sys\nprint(*sys.argv[1:], sep='|')\n")
    return tmp_path


def line(cpu, script="eval.py", command="", peak=1):
    return {"script": script, "command": command, "seconds": 2 * cpu, "cpu_seconds": cpu, "peak_bytes": peak}


def test_cpu_seconds_are_those_of_work_and_seconds_also_those_of_sleep(tmp_path):
    _, busy = measured(tmp_path, "import time\nwhile time.process_time() < 0.6: pass")
    _, idle = measured(tmp_path, "import time\ntime.sleep(0.6)")
    assert (
        0.6 <= busy["cpu_seconds"] < 1.2
        and idle["cpu_seconds"] < 0.4
        and min(busy["seconds"], idle["seconds"]) >= 0.6
    )


def test_peak_memory_is_the_childs_own_even_after_it_was_given_back(tmp_path):
    _, large = measured(tmp_path, "x = bytearray(b'x') * 200_000_000\ndel x")
    _, small = measured(tmp_path, "pass")
    assert 200e6 < large["peak_bytes"] < 300e6 and 0 < small["peak_bytes"] < 100e6


@pytest.mark.parametrize(
    "code, status", [("raise SystemExit(7)", 7), ("import os\nos.kill(os.getpid(), 15)", 143)]
)
def test_the_exit_status_is_handed_on(tmp_path, code, status):
    assert measured(tmp_path, code)[0] == status


def test_flags_of_the_script_are_not_taken_for_the_benchmarks_own(tmp_path):
    status, found = measured(
        tmp_path,
        "import sys\nassert sys.argv[1:] == ['score', '--out', 'x y', '--seed', '3', '--help']",
        "score",
        "--out",
        "x y",
        "--seed",
        "3",
        "--help",
    )
    assert (
        status == 0
        and found["script"] == "script.py"
        and found["command"] == "score"
        and found["out"] == "x y"
    )


def test_a_checkouts_cycle_is_given_sizes_seed_and_threads_and_no_settings_but_flags(checkout, monkeypatch):
    for name, value in {
        "EXPERT": "mine.jsonl",
        "LAUNCH": "accelerate launch",
        "SFT_FLAGS": "--epochs 1",
    }.items():
        monkeypatch.setenv(name, value)
    found = cycle.run_cycle(str(checkout), 3, ARGS)
    first, second = (checkout / "said").read_text().splitlines()
    assert first.split("|")[3:] == ["--seed", "7", "1", "--sizes 3 6 9 12 15", "1", "--epochs 1", ""]
    assert (
        list(found) == ["a b", "say.py"]
        and [v["command"] for v in found.values()] == ["train", ""]
        and second.startswith("base=")
    )


def test_a_cycle_that_fails_is_named_with_what_it_said(checkout):
    (checkout / "say.py").write_text("import sys\nsys.exit('no such luck')")
    with pytest.raises(RunError, match="cycle.sh: exit status 1\nno such luck"):
        cycle.run_cycle(str(checkout), 1, ARGS)


def test_processes_of_one_role_are_summed_and_the_largest_peak_is_kept():
    stages = {
        "sft_expert": line(1, "sft.py"),
        "cycle1/sft": line(2, "sft.py"),
        "cycle1/generator": line(3, "sft.py"),
        "eval_base": line(4, peak=5),
        "cycle1/eval_sft": line(5, peak=9),
        "cycle1/eval_grpo": line(6, peak=7),
        "cycle1/reward": line(7, "reward.py", "train"),
    }
    assert cycle.merge(stages) == {
        "sft expert": (1, 2, 1, 1),
        "sft accepted": (1, 4, 2, 1),
        "sft generator": (1, 6, 3, 1),
        "eval": (3, 30, 15, 9),
        "reward train": (1, 14, 7, 1),
        "total": (7, 56, 28, 9),
    }


def test_only_what_both_sides_ran_is_in_the_ratio():
    found = cycle.compare(
        [
            {"ours": {"a": 1.0, "mine": 100.0, "b": 2.0}, "theirs": {"old": 50.0, "b": 3.0, "a": 1.0}},
            {"ours": {"a": 2.0, "mine": 1.0, "b": 2.0}, "theirs": {"old": 5.0, "b": 1.0, "a": 1.0}},
            {"ours": {"a": 1.0, "mine": 1.0, "b": 2.0}, "theirs": {"old": 5.0, "b": 2.0, "a": 1.0}},
        ]
    )
    assert (
        found["matched"] == ["a", "b"] and found["only_ours"] == ["mine"] and found["only_theirs"] == ["old"]
    )
    assert found["ratios"] == [0.75, 2.0, 1.0] and found["ratio"] == {"median": 1.0, "low": 0.75, "high": 2.0}


def test_the_sides_take_turns_and_what_other_calls_measured_stays(tmp_path, monkeypatch):
    ran, out = [], tmp_path / "r.json"
    monkeypatch.setattr(cycle, "machine", lambda folder: HERE)
    monkeypatch.setattr(
        cycle,
        "run_cycle",
        lambda folder, times, args: ran.append((folder, times)) or {"a": line(float(times)), "b": line(1.0)},
    )
    call = lambda **more: (
        cycle.main(argparse.Namespace(**vars(ARGS) | {"out": str(out)} | more)) or json.loads(out.read_text())
    )  # noqa: E731
    call(items=[1])
    assert set(call(against="old")["items"]) == {"1"} and ran == [
        (ROOT, 1),
        (ROOT, 1),
        ("old", 1),
        (ROOT, 1),
        ("old", 1),
    ]
    both = call(items=[2, 4])
    assert set(both["items"]) == {"1", "2", "4"} and len(both["against"]["rounds"]) == 2
    # one table is of one kind
    assert set(call(items=[2], threads=2)["items"]) == {"2"}
    text = cycle.readme_text(both)
    assert (
        "| eval | 2 | 4.0 | 6.0 | 10.0 | 2.0 | 3.0 | 5.0 | 0 | 0 | 0 |" in text
        and "1.000 (1.000 to 1.000, 2 rounds)" in text
        and "cccccccccc" in text
    )


def test_one_time_the_items_is_the_toy_clinic_as_it_comes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cycle.py", "--items", "1"])
    sizes = cycle.parse_args().sizes
    monkeypatch.setattr(sys, "argv", ["clinic.py", "--out", "x"])
    assert sizes == list(clinic.parse_args().sizes)


@pytest.mark.parametrize(
    "flags, why",
    [
        ([], "nothing to measure"),
        (["--against", "nowhere"], "no cycle.sh in it"),
        (["--readme", "--out", "nowhere"], "no such file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_run(tmp_path, flags, why):
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "benchmarks", "cycle.py"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and why in done.stderr
        and not os.listdir(tmp_path)
    ), done.stderr


def test_the_table_of_losses_has_multiples_of_the_plain_way_and_leaves_out_what_was_not_measured():
    import logprob

    row = {"task": "ce", "size": "toy", "inputs": "random", "mode": "both"}
    rows = [
        row | {"way": "plain", "seconds": 2.0, "megabytes": 100.0},
        row | {"way": "ours", "seconds": 3.0, "megabytes": 10.0},
        row | {"way": "torch", "error": "no such function"},
        row | {"way": "gemms", "seconds": 1.0, "megabytes": 1.0},
    ]
    result = {
        "rows": rows,
        "sizes": {"toy": {"N": 1, "V": 2, "D": 3, "dtype": "float32"}},
        "command": "c",
        "git": {"commit": "abc"},
        "hardware": {"gpus": [], "cpus": 2, "machine": "m"},
        "versions": {"torch": "t"},
    }
    cells = [c.strip() for c in logprob.readme_table(result).splitlines()[2].strip("|").split("|")]
    assert cells == ["toy", "ce", "forward + backward", "random", "2.000", "1.50", "0.10", "", "0.50"]
