"""benchmarks/: processes are measured from outside, stages are matched, tables are those of the files."""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import clinic
import numpy as np
import pytest
from conftest import ROOT

sys.path.append(os.path.join(ROOT, "benchmarks"))
import collect
import cycle
import readme
import seeds

from medgr2.errors import RunError, UserError

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
# The flags and settings that a stage of the fake cycle prints.
FAKE_FLAGS = (
    '"$OUT/a b" --seed "$SEED" "$CYCLES" "$CLINIC_FLAGS" "$OMP_NUM_THREADS" "$SFT_FLAGS" "$EXPERT$LAUNCH"'
)
FAKE = f"""set -e
cd "$(dirname "$0")"
"$PYTHON" say.py train --out {FAKE_FLAGS} >> said
"$PYTHON" say.py "base=$OUT/x" --fields accuracy >> said
"""


def measured(tmp_path, code, *rest):
    """(exit status, measurements) of a script with this code, by the command line that the wrapper calls."""
    (tmp_path / "script.py").write_text(code)
    return measure(tmp_path, tmp_path / "script.py", *rest)


def measure(tmp_path, *command):
    stage = ["--stage", tmp_path / "log", *command]
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "benchmarks", "cycle.py"), *stage], cwd=tmp_path
    )
    return done.returncode, json.loads((tmp_path / "log").read_text().splitlines()[-1])


@pytest.fixture
def checkout(tmp_path):
    """A folder with a cycle of two scripts that print their flags."""
    (tmp_path / "cycle.sh").write_text(FAKE)
    (tmp_path / "say.py").write_text("import sys\nprint(*sys.argv[1:], sep='|')\n")
    return tmp_path


def line(cpu, script="eval.py", command="", peak=1):
    return {"script": script, "command": command, "seconds": 2 * cpu, "cpu_seconds": cpu, "peak_bytes": peak}


def test_sleep_takes_seconds_and_no_cpu_seconds(tmp_path):
    _, busy = measured(tmp_path, "import time\nwhile time.process_time() < 0.6: pass")
    _, idle = measured(tmp_path, "import time\ntime.sleep(0.6)")
    assert 0.6 <= busy["cpu_seconds"] < 1.2 and idle["cpu_seconds"] < 0.4
    assert min(busy["seconds"], idle["seconds"]) >= 0.6


def test_peak_memory_is_that_of_the_child_also_after_it_was_freed(tmp_path):
    _, large = measured(tmp_path, "x = bytearray(b'x') * 200_000_000\ndel x")
    _, small = measured(tmp_path, "pass")
    assert 200e6 < large["peak_bytes"] < 300e6 and 0 < small["peak_bytes"] < 100e6


@pytest.mark.parametrize(
    "code, status", [("raise SystemExit(7)", 7), ("import os\nos.kill(os.getpid(), 15)", 143)]
)
def test_the_exit_status_is_passed_on(tmp_path, code, status):
    assert measured(tmp_path, code)[0] == status


def test_flags_of_the_script_are_not_taken_for_those_of_the_benchmark(tmp_path):
    flags = ["score", "--out", "x y", "--seed", "3", "--help"]
    status, found = measured(tmp_path, f"import sys\nassert sys.argv[1:] == {flags}", *flags)
    assert status == 0
    assert (found["script"], found["command"], found["out"]) == ("script.py", "score", "x y")


def test_a_module_is_measured_under_its_name(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "report.py").write_text("import sys\nassert sys.argv[1:] == ['--out', 'page.html']")
    status, found = measure(tmp_path, "-m", "tools.report", "--out", "page.html")
    assert status == 0
    assert (found["script"], found["command"], found["out"]) == ("report.py", "", "page.html")
    assert cycle.stage_name(found["out"], found) == "report"


def test_a_cycle_gets_sizes_seed_threads_and_of_the_settings_only_the_flags(checkout, monkeypatch):
    settings = {"EXPERT": "mine.jsonl", "LAUNCH": "accelerate launch", "SFT_FLAGS": "--epochs 1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = cycle.run_cycle(str(checkout), 3, ARGS)
    first, second = (checkout / "said").read_text().splitlines()
    assert first.split("|")[3:] == ["--seed", "7", "1", "--sizes 3 6 9 12 15", "1", "--epochs 1", ""]
    assert list(found) == ["a b", "say.py"] and second.startswith("base=")
    assert [line["command"] for line in found.values()] == ["train", ""]


def test_the_error_of_a_cycle_that_fails_is_shown(checkout):
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


def test_only_stages_of_both_sides_are_in_the_ratio():
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


def test_the_sides_take_turns_and_earlier_measurements_stay(tmp_path, monkeypatch):
    ran, out = [], tmp_path / "r.json"

    def run_cycle(folder, times, args):
        ran.append((folder, times))
        return {"a": line(float(times)), "b": line(1.0)}

    def call(**more):
        cycle.main(argparse.Namespace(**vars(ARGS) | {"out": str(out)} | more))
        return json.loads(out.read_text())

    monkeypatch.setattr(cycle, "environment", lambda: HERE)
    monkeypatch.setattr(cycle, "find_commit", lambda folder: HERE["git"])
    monkeypatch.setattr(cycle, "run_cycle", run_cycle)
    call(items=[1])
    assert set(call(against="old")["items"]) == {"1"}
    assert ran == [(ROOT, 1), (ROOT, 1), ("old", 1), (ROOT, 1), ("old", 1)]
    both = call(items=[2, 4])
    assert set(both["items"]) == {"1", "2", "4"} and len(both["against"]["rounds"]) == 2
    # A table has rows of one kind.
    assert set(call(items=[2], threads=2)["items"]) == {"2"}
    text = cycle.format_tables(both)
    assert "| eval | 2 | 4.0 | 6.0 | 10.0 | 2.0 | 3.0 | 5.0 | 0 | 0 | 0 |" in text
    assert "1.000 (1.000 to 1.000, 2 rounds)" in text and "commit `cccccccccc`" in text


def test_the_commit_of_another_checkout_is_found(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    assert cycle.find_commit(tmp_path) == {"commit": None, "dirty": False}
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    found = cycle.find_commit(tmp_path)
    assert len(found["commit"]) == 40 and not found["dirty"]
    (tmp_path / "new").touch()
    assert cycle.find_commit(tmp_path) == found | {"dirty": True}


def test_one_time_the_items_is_the_default_toy_clinic(monkeypatch):
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
    command = [sys.executable, os.path.join(ROOT, "benchmarks", "cycle.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert why in done.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "task, ways", [("cross_entropy", ("plain", "ours", "torch")), ("grpo", ("plain", "ours", "replay"))]
)
def test_the_compared_ways_to_compute_a_loss_give_the_same_loss_and_gradient(task, ways):
    import logprob

    found = []
    for way in ways:
        hidden, weight, targets = logprob.make("cpu", 4 * logprob.LENGTH, 37, 8, "float32", "random")
        loss, entropy = getattr(logprob, task)(way, hidden, weight, targets)
        loss.backward()
        found.append((loss, entropy if entropy is not None else loss, hidden.grad, weight.grad))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert a.abs().max() > 0 and (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_the_table_of_losses_has_multiples_of_the_plain_way_and_empty_cells_for_errors():
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
    cells = [c.strip() for c in logprob.format_tables(result).splitlines()[2].strip("|").split("|")]
    assert cells == ["toy", "ce", "forward + backward", "random", "2.000", "1.50", "0.10", "", "0.50"]


# ---------------------------------------------------------------------------------------------------------
# The tables of README.md and docs/.

BLOCK = re.compile(r"(?<=<!-- )([\w-]+)( -->\n)(.*?)(?=<!-- /\1 -->)", re.DOTALL)
NAMES = (
    "seeds",
    "grpo_step",
    "sft_step",
    "inference",
    "memory",
    "micro_group",
    "workers",
    "growth",
    "sharding",
    "logprob",
    "cycle",
    "authors_file",
    "figure",
    "collect",
    "reward_rollouts",
    "real_report",
)
WRITERS = [f"benchmarks/{name}.py" for name in NAMES]
WRITERS += ["tests/test_kill.py"]


@pytest.fixture
def copy(tmp_path):
    """A copy of the project without the toy and without runs."""
    for name in os.listdir(ROOT):
        source = os.path.join(ROOT, name)
        if os.path.isdir(source) and name in ("analysis", "benchmarks", "docs", "medgr2", "tests"):
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif name.endswith((".py", ".md")):
            shutil.copy(source, tmp_path / name)
    return tmp_path


def read_pages(folder):
    return {page.name: page.read_text() for page in [folder / "README.md", *(folder / "docs").glob("*.md")]}


def empty(block):
    """The comment before a table alone; a place whose script has not been run yet stays as it is."""
    return block[0] if block[3].startswith("Not run: ") else block[1] + block[2]


def test_every_table_is_what_its_script_writes_from_the_committed_result_file(copy):
    committed = read_pages(copy)
    for page in [copy / "README.md", *(copy / "docs").glob("*.md")]:
        page.write_text(BLOCK.sub(empty, page.read_text()))
    assert read_pages(copy) != committed
    for writer in WRITERS:
        done = subprocess.run([sys.executable, writer, "--readme"], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read_pages(copy) == committed


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """(README.md, docs/a.md) of an empty project that the tables are written to."""
    monkeypatch.setattr(readme, "ROOT", str(tmp_path))
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "docs" / "a.md"):
        path.write_text("")
    return tmp_path / "README.md", tmp_path / "docs" / "a.md"


def test_a_table_is_written_where_its_name_is_and_nothing_else_changes(pages):
    first, second = pages
    first.write_text("a\n<!-- t-detail -->\nx\n<!-- /t-detail -->\nb")
    second.write_text("c\n<!-- t -->\nold\n<!-- /t -->\nd\n<!-- empty -->\n<!-- /empty -->\n")
    before = first.read_text()
    readme.write_block("t", r"| \1 |")
    readme.write_block("empty", "new")
    expected = "c\n<!-- t -->\n| \\1 |\n<!-- /t -->\nd\n<!-- empty -->\nnew\n<!-- /empty -->\n"
    assert second.read_text() == expected and first.read_text() == before


@pytest.mark.parametrize("texts", [("", ""), ("<!-- t -->\n<!-- /t -->",) * 2])
def test_a_table_with_no_place_or_two_is_an_error_and_nothing_is_written(pages, texts):
    for page, text in zip(pages, texts):
        page.write_text(text)
    with pytest.raises(RunError, match="[02] places for the table t "):
        readme.write_block("t", "new")
    assert tuple(page.read_text() for page in pages) == texts


# ---------------------------------------------------------------------------------------------------------
# seeds.py


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


SFT, GRPO = "cycle 1: SFT on accepted", "cycle 1: + GRPO"


def mark_of(right, auroc):
    return {"right_scored": right, "right_accepted": 0.9, "auroc": auroc, "candidates": 8, "accepted": 4}


def write_cycle(folder, marks, frozen):
    """What a cycle leaves beside its evaluations; `marks`, `frozen`: (right share, AUROC) of its one task."""
    paradigms = {f"right_{name}": 0.25 for name in ("direct", "stepwise", "metacognitive")}
    for name, given in (("marks", marks), ("frozen", frozen)):
        mark = mark_of(*given) | {"right_random": 0.5, "by_task": {"a task": mark_of(*given)}}
        write_json(folder / f"{name}.json", mark | paradigms)
    write_json(folder / "reward" / "metrics.json", {"auroc": 0.75, "image_swap_drop": 2.0})
    write_json(folder / "candidates" / "metrics.json", {"kept": 6, "asked": 8})
    write_json(folder / "grpo" / "metrics.json", {})


def list_stages(cycles):
    """The folders of a run's evaluations, in the order of the tables."""
    names = ("eval_sft_random", "eval_sft_first", "eval_sft", "eval_sft_more", "eval_grpo")
    parts = ["eval_base", "eval_sft_expert", "eval_ceiling"]
    parts += [f"cycle{c + 1}/{name}" for c in range(cycles) for name in names]
    return [part for part in parts if part != "cycle1/eval_sft_first"]


def write_run(folder, seed=0, right=None, cycles=2, commit="c" * 40):
    """A finished run with its controls.

    `right`: {folder of an evaluation: correct of each test question}; two about image x, one about y. The
    second is of task B, the others of A. A folder that is not given has none right.
    """
    for minute, part in enumerate(list_stages(cycles)):
        meta = {"args": {"seed": seed, "out": f"runs/seed{seed}/{part}"}, **HERE, "git": {"commit": commit}}
        times = {
            "started": f"2026-01-01T00:{minute:02}:00+00:00",
            "ended": f"2026-01-01T00:{minute:02}:30+00:00",
        }
        write_json(folder / part / "args.json", meta | times)
        lines = []
        for k, correct in enumerate((right or {}).get(part, (0, 0, 0))):
            asked = {"id": str(k), "image": "i.png", "image_hash": "xxy"[k], "task": "ABA"[k]}
            asked["modality"] = "CT"
            lines.append(json.dumps(asked | {"correct": bool(correct)}) + "\n")
        (folder / part / "predictions.jsonl").write_text("".join(lines))
    for c in range(cycles):
        write_cycle(folder / f"cycle{c + 1}", (0.5 + 0.1 * c, 0.8), (0.5, 0.8 + (seed + 1) * c / 100))
    return str(folder)


def test_runs_are_collected_with_the_commit_time_and_command_that_they_wrote_down(tmp_path):
    folders = [write_run(tmp_path / "x", 3), write_run(tmp_path / "y", 4)]
    flags = ["--collect", "--out", tmp_path / "r.json", "--runs", *folders]
    script = os.path.join(ROOT, "benchmarks", "seeds.py")
    done = subprocess.run([sys.executable, script, *flags], cwd=tmp_path)
    found = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 0
    commands = [f"CONTROLS=1 OUT=runs/seed{seed} SEED={seed} bash cycle.sh" for seed in (3, 4)]
    assert found["command"] == "; ".join(commands)
    assert found["seeds"] == [3, 4] and found["questions"] == 3
    # Half a minute per stage.
    assert found["seconds"] == [30 * len(list_stages(2))] * 2
    assert found["git"] == {"commit": "c" * 40, "dirty": False} and found["versions"] == HERE["versions"]
    assert found["cycles"][1][1]["marks"]["right_scored"] == 0.6


def test_accuracies_and_paired_differences_are_means_over_runs_overall_and_by_task(tmp_path):
    first = write_run(tmp_path / "0", right={"cycle1/eval_sft": (1, 0, 0), "cycle1/eval_grpo": (1, 1, 1)})
    second = write_run(tmp_path / "1", right={"cycle1/eval_sft": (1, 1, 0), "cycle1/eval_grpo": (0, 1, 0)})
    found = seeds.collect([first, second], [1, 1])
    accuracy = found["accuracy"][SFT]
    assert accuracy["mean"] == 0.5 and accuracy["by_seed"] == pytest.approx([1 / 3, 2 / 3])
    assert accuracy["by_task"]["A"]["by_seed"] == [0.5, 0.5]
    assert accuracy["by_task"]["B"]["by_seed"] == [0, 1]
    paired = {(pair["from"], pair["to"]): pair for pair in found["paired"]}
    change = paired[SFT, GRPO]
    assert change["mean"] == pytest.approx(1 / 6) and change["by_seed"] == pytest.approx([2 / 3, -1 / 3])
    # Each run has two images of unequal size: the mean change of a draw is one of these.
    draws = [sum(pair) / 2 for pair in itertools.product([1 / 2, 2 / 3, 1, -1 / 2, -1 / 3, 0], repeat=2)]
    assert min(draws) <= change["low"] < change["mean"] < change["high"] <= max(draws)
    by_task = {task: (part["mean"], part["by_seed"]) for task, part in change["by_task"].items()}
    assert by_task == {"A": (0, [0.5, -0.5]), "B": (0.5, [1, 0])}
    # Of task B each run has one question, so only the runs vary: +1 and +0.
    assert (change["by_task"]["B"]["low"], change["by_task"]["B"]["high"]) == (0, 1)


def test_every_gain_is_paired_with_what_could_explain_it(tmp_path):
    found = seeds.collect([write_run(tmp_path / "x", cycles=3)], [1])
    assert [(pair["from"], pair["to"]) for pair in found["paired"]] == [
        ("base", "cycle 3: SFT on accepted"),
        ("base", "cycle 3: + GRPO"),
        ("SFT on expert data", "cycle 1: SFT on accepted"),
        ("cycle 1: SFT on accepted", "cycle 2: SFT on accepted"),
        ("cycle 2: SFT on accepted", "cycle 3: SFT on accepted"),
        ("cycle 1: + GRPO", "cycle 2: + GRPO"),
        ("cycle 2: + GRPO", "cycle 3: + GRPO"),
        *[(f"cycle {c}: SFT on random", f"cycle {c}: SFT on accepted") for c in (1, 2, 3)],
        *[(f"cycle {c}: SFT on accepted of cycle 1", f"cycle {c}: SFT on accepted") for c in (2, 3)],
        *[(f"cycle {c}: SFT on accepted", f"cycle {c}: + GRPO") for c in (1, 2, 3)],
        *[(f"cycle {c}: + as many SFT steps", f"cycle {c}: + GRPO") for c in (1, 2, 3)],
        ("cycle 3: + GRPO", "ceiling: SFT on plenty of expert data"),
    ]


def test_changes_since_cycle_1_are_by_seed_with_their_mean(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed, cycles=3) for seed in (0, 1)]
    changes = seeds.collect(folders, [1, 1])["changes"]
    named = {(change["file"], change["field"], change["cycle"]): change for change in changes}
    assert set(named) == {
        (*mark, cycle) for mark in (("marks", "right_scored"), ("frozen", "auroc")) for cycle in (2, 3)
    }
    assert named["marks", "right_scored", 3]["by_seed"] == pytest.approx([0.2, 0.2])
    drift = named["frozen", "auroc", 3]
    assert drift["by_seed"] == pytest.approx([0.02, 0.04]) and drift["mean"] == pytest.approx(0.03)
    assert drift["by_task"]["a task"]["by_seed"] == pytest.approx([0.02, 0.04])


def test_a_task_without_a_value_in_one_run_has_the_mean_of_the_others(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    path = tmp_path / "1" / "cycle2" / "frozen.json"
    frozen = json.loads(path.read_text())
    frozen["by_task"]["a task"]["auroc"] = None
    path.write_text(json.dumps(frozen))
    result = seeds.collect(folders, [1, 1])
    drift = next(change for change in result["changes"] if change["file"] == "frozen")
    assert drift["by_task"]["a task"] == {"mean": pytest.approx(0.01), "by_seed": [pytest.approx(0.01), None]}
    # Cycle 2: the frozen AUROC is in the last column, of one run.
    assert "| cycle 2: a task | 0.600 | 0.900 | 0.800 | 0.810 |" in seeds.candidates_task_table(result)


def remove_controls(folder):
    for part in list_stages(2):
        if os.path.basename(part) in seeds.CONTROLS:
            shutil.rmtree(folder / part)
    for frozen in folder.glob("cycle*/frozen.json"):
        frozen.unlink()


def test_a_control_that_no_run_has_is_left_out(tmp_path):
    folders = [write_run(tmp_path / name) for name in "xy"]
    for name in "xy":
        remove_controls(tmp_path / name)
    result = seeds.collect(folders, [1, 1])
    rows = ["SFT on accepted", "+ GRPO"]
    rows = ["base", "SFT on expert data", *[f"cycle {c}: {row}" for c in (1, 2) for row in rows]]
    assert list(result["accuracy"]) == rows
    assert {row for pair in result["paired"] for row in (pair["from"], pair["to"])} == set(rows)
    assert [change["file"] for change in result["changes"]] == ["marks"]
    assert result["command"].startswith("OUT=")
    assert "random" not in seeds.summary_tables(result) and "ceiling" not in seeds.summary_tables(result)
    assert "of cycle 1" not in seeds.candidates_table(result)
    assert "| cycle 1: a task | 0.500 | 0.900 | 0.800 |  |" in seeds.candidates_task_table(result)


@pytest.mark.parametrize(
    "missing, why",
    [
        ("cycle2/eval_grpo", "no cycle2/eval_grpo: the run is not finished"),
        ("cycle1/eval_sft_random", "no cycle1/eval_sft_random: other runs have this control"),
        ("cycle2", "1, 2 cycles"),
        ("cycle2/eval_sft/predictions.jsonl", "cycle2/eval_sft/predictions.jsonl: "),
        ("cycle2/reward", "cycle2/reward/metrics.json: "),
    ],
)
def test_what_one_run_lacks_is_an_error_in_one_line(tmp_path, missing, why):
    folders = [write_run(tmp_path / name) for name in "xy"]
    path = tmp_path / "y" / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(UserError, match=why) as caught:
        seeds.collect(folders, [1, 1])
    assert "\n" not in str(caught.value)


def test_a_row_that_is_no_control_must_be_in_every_run_even_if_all_lack_it(tmp_path):
    folders = [write_run(tmp_path / name) for name in "xy"]
    for name in "xy":
        shutil.rmtree(tmp_path / name / "eval_sft_expert")
    with pytest.raises(RunError, match="no eval_sft_expert: the run is not finished"):
        seeds.collect(folders, [1, 1])


def test_a_folder_without_a_run_is_an_error_in_one_line(tmp_path):
    for error in (seeds.collect, lambda folders, _: seeds.count_seconds(folders[0])):
        with pytest.raises(RunError, match="nowhere: "):
            error([str(tmp_path / "nowhere")], [1])


def test_rows_about_other_test_questions_are_not_compared(tmp_path):
    folder = write_run(tmp_path / "x")
    path = tmp_path / "x" / "cycle1" / "eval_grpo" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"id": "2"', '"id": "other"'))
    with pytest.raises(RunError, match="cycle 1: . GRPO: not the test questions of base"):
        seeds.collect([folder], [1])


def test_runs_of_two_commits_are_not_one_result(tmp_path):
    folders = [write_run(tmp_path / "x", 0), write_run(tmp_path / "y", 1, commit="d" * 40)]
    with pytest.raises(RunError, match="2 commits, machines or sets of versions"):
        seeds.collect(folders, [1, 1])


def cells_of(table):
    """{first cell: the other cells} of the lines of a Markdown table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines if line[0] != "---"}


def collect_rows(folder, *flags):
    """Run benchmarks/collect.py on rows of two runs with --print → (status, standard output, error)."""
    first = write_run(folder / "0", 3, {"eval_base": (1, 0, 0), "cycle1/eval_sft": (1, 1, 0)})
    second = write_run(folder / "1", 4, {"eval_base": (0, 0, 1), "cycle1/eval_sft": (1, 1, 1)})
    script = os.path.join(ROOT, "benchmarks", "collect.py")
    command = [sys.executable, script, "large", "--runs", first, second, "--command", "c", "--print", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout, done.stderr


ROWS = "--rows", "start=eval_base", "tuned=cycle1/eval_sft"


def test_the_candidates_of_variants_are_shown_cycle_by_cycle_as_means_over_runs(tmp_path):
    folders = []
    for seed in range(2):
        for variant, cycles in (("full", 2), ("tuned", 1)):
            folder = tmp_path / str(seed) / variant
            write_run(folder, seed)
            for c in range(cycles):
                # Of the second run 0.2 more are right.
                write_cycle(folder / f"cycle{c + 1}", (0.5 + 0.1 * c + 0.2 * seed, 0.8), (0.5, 0.8))
            for c in range(cycles, 2):
                (folder / f"cycle{c + 1}" / "marks.json").unlink()
        folders.append(str(tmp_path / str(seed)))
    rows = {"whole": "full/cycle2/eval_grpo", "short": "tuned/cycle1/eval_grpo"}
    found = collect.collect(folders, rows, "whole", "c", candidates=True)
    table = cells_of(collect.candidates_table(found["candidates"]))
    assert table["whole"] == ["0.600, 0.700", "4, 4", "0.900, 0.900"]
    assert table["short"] == ["0.600", "4", "0.900"]


def test_named_rows_of_any_runs_are_compared_with_one_of_them_by_task_and_modality(tmp_path):
    status, shown, error = collect_rows(tmp_path, *ROWS, "--against", "start")
    assert status == 0, error
    by_task, by_modality, source = shown.strip().split("\n\n")
    cells = cells_of(by_task)
    assert cells[""] == ["accuracy (95% interval)", "minus *start*", "A", "B"]
    assert cells["start"][0].startswith("**0.333** (") and cells["start"][1:] == ["", "0.500", "0.000"]
    assert cells["tuned"][0].startswith("**0.833** (") and cells["tuned"][1].startswith("+0.500 (")
    assert cells["tuned"][2].startswith("0.750, +0.250 (") and cells["tuned"][3].startswith("1.000, +1.000 (")
    assert cells_of(by_modality)[""][2:] == ["CT"] and "`c`; seeds 3, 4; 3 test questions" in source


@pytest.mark.parametrize("flag, kind", [("--seen", "seen"), ("--unseen", "unseen")])
def test_questions_like_the_training_data_are_told_from_the_others(tmp_path, flag, kind):
    status, shown, error = collect_rows(tmp_path, *ROWS, "--against", "start", flag, "task=B", "modality=MRI")
    assert status == 0, error
    cells = cells_of(shown.split("\n\n")[0])
    # Nothing is an MRI, so the kind is that of task B.
    column = cells[""].index(kind)
    assert cells["start"][column] == "0.000" and cells["start"][5 - column] == "0.500"


def test_only_the_questions_asked_for_count_and_are_reported_by_a_field(tmp_path):
    status, shown, error = collect_rows(
        tmp_path, *ROWS, "--against", "start", "--only", "task=A", "--kind", "modality"
    )
    assert status == 0, error
    cells = cells_of(shown.split("\n\n")[0])
    # Two of the three questions of a run are of task A; all are CTs.
    assert cells[""][2:] == ["CT"] and cells["start"][0].startswith("**0.500** (")
    assert cells["start"][2] == "0.500" and "2 test questions" in shown


@pytest.mark.parametrize(
    "rows, against, message",
    [
        (ROWS, "nobody", "--against nobody: give one of --rows, and another row: start, tuned"),
        (ROWS[:2], "start", "--against start: give one of --rows, and another row: start"),
        ((*ROWS, "start=x"), "start", "--rows start=x: give NAME=FOLDER, each NAME once"),
        ((*ROWS, "start"), "start", "--rows start: give NAME=FOLDER"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused_in_one_line(tmp_path, rows, against, message):
    status, _, error = collect_rows(tmp_path, *rows, "--against", against)
    assert status == 2 and message in error and error.count("\n") == 1


def test_a_result_file_names_commits_of_this_history():
    git = ["git", "-C", ROOT]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("no repository with its whole history")
    for path in Path(ROOT, "benchmarks", "results").glob("*.json"):
        for commit in set(re.findall(r'"commit": "(\w+)"', path.read_text())):
            found = subprocess.run([*git, "merge-base", "--is-ancestor", commit, "HEAD"], capture_output=True)
            assert found.returncode == 0, (path.name, commit)


def test_the_healthy_ranges_of_the_metrics_are_those_of_the_result_file():
    page = Path(ROOT, "docs", "metrics.md").read_text(encoding="utf-8")
    result = json.loads(Path(ROOT, "benchmarks", "results", "toy_cycle.json").read_text())
    cycles = [cycle for run in result["cycles"] for cycle in run]

    def assert_row(name, text, file, field, form=".3f"):
        values = [cycle[file][field] for cycle in cycles]
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`") and text in line)
        assert f"{min(values):{form}} to {max(values):{form}}" in row

    assert_row("kept", "valid question", "candidates", "kept", "d")
    assert_row("spearman", "rank correlation", "reward", "spearman")
    assert_row("auroc", "right response", "reward", "auroc")
    assert_row("image_swap_drop", "mean fall", "reward", "image_swap_drop", ".1f")
    assert_row("right_scored", "all scored", "marks", "right_scored")
    assert_row("right_accepted", "accepted", "marks", "right_accepted")
    assert_row("auroc", "true candidate", "marks", "auroc")
    watched = [[cycle["grpo"][when]["watch_accuracy"] for when in ("first", "last")] for cycle in cycles]
    assert f"it did in {sum(b > a for a, b in watched)} of {len(watched)} runs" in page
    first, last = (cycles[0]["grpo"][when] for when in ("first", "last"))
    accuracy = f"accuracy {first['watch_accuracy']:.3f} to {last['watch_accuracy']:.3f}"
    assert f"{accuracy}, reward {first['watch_reward']:.2f} to {last['watch_reward']:.2f}" in page


def test_every_table_that_a_script_collects_has_its_place_in_the_docs():
    collected = []
    for path in Path(ROOT, "benchmarks").glob("*.sh"):
        text = path.read_text(encoding="utf-8")
        collected += re.findall(r"^collect (\w+)", text, re.MULTILINE)
        collected += [f"transfer_{name}" for name in re.findall(r"^table (\w+)", text, re.MULTILINE)]
    assert sorted(collected) == [
        "ablations",
        "large",
        "real_headline",
        "real_held_out",
        "real_label",
        "real_omnimed",
        "transfer_diagnosis",
        "transfer_heldout",
        "transfer_mri",
    ]
    for name in collected:
        assert readme.find_page(name)[0].endswith("results.md")


def test_a_run_without_a_task_is_left_out_of_that_tasks_mean():
    values, runs_ = np.array([1.0, 0.0, 1.0]), np.array([0, 0, 2])
    questions = {"run": runs_, "image": np.array(list("xyz")), "task": np.array(list("ABA"))}
    found = collect.measure_by(values, questions)["by_task"]
    assert found["A"]["by_seed"] == [1, 1] and found["B"]["by_seed"] == [0]


def test_the_tables_show_every_number_under_its_name(tmp_path):
    first = write_run(tmp_path / "0", 0, {"cycle1/eval_sft": (1, 0, 0), "cycle1/eval_grpo": (1, 1, 1)})
    second = write_run(tmp_path / "1", 1, {"cycle1/eval_sft": (1, 1, 1), "cycle1/eval_grpo": (1, 1, 1)})
    result = seeds.collect([first, second], [60, 90])
    accuracy = cells_of(seeds.accuracy_table(result))
    assert accuracy["stage"] == ["accuracy", "95% interval", "A", "B"]
    # The first run's draws of two images give 0, 1/3, 1/3 or 1/2, the second's 1. In 16 of 64 draws both runs
    # are the first: the mean is then 0 in 1 of them and 1/6 in 4.
    assert accuracy[SFT] == ["**0.667**", "0.167 to 1.000", "0.750", "0.500"]
    before, by_cycle = map(cells_of, seeds.summary_tables(result).split("\n\n"))
    assert list(before) == ["stage", *seeds.STAGES] and by_cycle[""] == ["cycle 1", "cycle 2"]
    assert by_cycle["SFT on accepted"][0] == "**0.667** (0.167 to 1.000)"
    assert cells_of(seeds.seeds_table(result))[SFT] == ["0.333", "1.000", "**0.667**"]
    paired = cells_of(seeds.paired_table(result))
    assert paired[f"{SFT} → {GRPO}"] == ["+0.333", "+0.000 to +0.833", "+0.667, +0.000"]
    by_task = cells_of(seeds.paired_task_table(result))
    assert by_task[f"{SFT} → {GRPO}"] == ["+0.250 (+0.000 to +0.750)", "+0.500 (+0.000 to +1.000)"]
    candidates = cells_of(seeds.candidates_table(result))
    assert candidates["right, of all"] == ["0.500 (0.500 to 0.500)", "0.600 (0.600 to 0.600)"]
    assert candidates["share accepted"][0].startswith("0.500 ")
    assert candidates["share that the parser keeps"][0].startswith("0.750 ")
    assert candidates["the same on the candidates of cycle 1"][1] == "0.815 (0.810 to 0.820)"
    changes = cells_of(seeds.changes_table(result))
    drift = changes["reward AUROC on the candidates of cycle 1, cycle 2"]
    assert drift == ["+0.015", "+0.010, +0.020", "+0.015"]


def test_the_tables_of_a_result_file_are_written_into_their_blocks(tmp_path, pages):
    names = ("results", "results-seeds", "results-detail")
    pages[1].write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    result = seeds.collect([write_run(tmp_path / "x")], [90])
    write_json(tmp_path / "r.json", result)
    seeds.write_tables(str(tmp_path / "r.json"))
    blocks = {name: text for name, _, text in BLOCK.findall(pages[1].read_text())}
    assert list(blocks) == list(names)
    assert seeds.summary_tables(result) in blocks["results"]
    assert seeds.seeds_table(result) in blocks["results-seeds"]
    for table in (seeds.accuracy_table, seeds.paired_table, seeds.paired_task_table, seeds.candidates_table):
        assert table(result) in blocks["results-detail"]
    for table in (seeds.candidates_task_table, seeds.changes_table):
        assert table(result) in blocks["results-detail"]
    assert all("commit `cccccccccc`" in text and "1.5 minutes" in text for text in blocks.values())


# A cycle that waits until as many runs as COUNT says have started.
WAITING = """
mkdir -p "$OUT" && echo "$SEED $CONTROLS $OMP_NUM_THREADS" > "$OUT/said"
for wait in $(seq 500); do [ "$(ls -d runs/*/ | wc -l)" -ge "$COUNT" ] && break; sleep 0.02; done
[ "$(ls -d runs/*/ | wc -l)" -ge "$COUNT" ] || exit 4
echo "hello from $SEED"; exit $((SEED == 9 ? 3 : 0))
"""


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """A project whose cycle waits for another run. It has four cores."""
    (tmp_path / "cycle.sh").write_text(WAITING)
    (tmp_path / "setup.sh").write_text("touch installed")
    monkeypatch.setattr(seeds, "ROOT", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return tmp_path


def test_runs_go_side_by_side_with_their_share_of_the_cores_and_a_log_each(waiting, monkeypatch):
    monkeypatch.setenv("COUNT", "2")
    folders, seconds = seeds.run_cycles([5, 6], 2)
    assert folders == [str(waiting / "runs" / f"seed{seed}") for seed in (5, 6)] and min(seconds) > 0
    for seed in (5, 6):
        assert (waiting / "runs" / f"seed{seed}" / "said").read_text() == f"{seed} 1 2\n"
        assert (waiting / "runs" / f"seed{seed}.log").read_text() == f"hello from {seed}\n"
    assert (waiting / "installed").exists()


def test_the_result_names_the_command_with_its_jobs_and_another_out_changes_no_table(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    monkeypatch.setattr(seeds, "run_cycles", lambda numbers, jobs: (folders, [60, 60]))
    monkeypatch.setattr(readme, "write_block", lambda name, text: pytest.fail("a table was written"))
    monkeypatch.setattr(sys, "argv", f"seeds.py --seeds 0 1 --jobs 2 --out {tmp_path}/r.json".split())
    seeds.main(seeds.parse_args())
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["command"] == "python benchmarks/seeds.py --seeds 0 1 --jobs 2"


def test_one_run_at_a_time_has_all_cores(waiting, monkeypatch):
    monkeypatch.setenv("COUNT", "1")
    seeds.run_cycles([5, 6], 1)
    assert (waiting / "runs" / "seed6" / "said").read_text() == "6 1 4\n"


def test_a_run_that_fails_is_an_error_that_names_its_log_and_a_folder_that_is_there_too(waiting, monkeypatch):
    monkeypatch.setenv("COUNT", "1")
    with pytest.raises(RunError, match="seed9.log: cycle.sh: exit status 3"):
        seeds.run_cycles([9], 1)
    assert (waiting / "runs" / "seed9.log").read_text() == "hello from 9\n"
    with pytest.raises(RunError, match="seed9: there already"):
        seeds.run_cycles([8, 9], 1)
    assert not (waiting / "runs" / "seed8").exists()
