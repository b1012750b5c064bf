"""benchmarks/: processes are measured from outside, stages are matched, tables are those of the files."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys

import clinic
import pytest
from conftest import ROOT

sys.path.append(os.path.join(ROOT, "benchmarks"))
import cycle
import readme
import seeds

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
WRITERS = [f"benchmarks/{name}.py" for name in ("seeds", "grpo_step", "logprob", "cycle", "authors_file")]
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


def test_every_table_is_what_its_script_writes_from_the_committed_result_file(copy):
    committed = read_pages(copy)
    for page in [copy / "README.md", *(copy / "docs").glob("*.md")]:
        page.write_text(BLOCK.sub(r"\1\2", page.read_text()))
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


def write_run(folder, seed, out, correct, commit="c" * 40):
    """A finished run of two cycles: `correct` is that of the one test question at each stage, in order."""
    for minute, (part, right) in enumerate(zip(seeds.STAGES.values(), correct, strict=True)):
        meta = {"args": {"seed": seed, "out": f"{out}/{part}"}, **HERE, "git": {"commit": commit}}
        times = {
            "started": f"2026-01-01T00:{minute:02}:00+00:00",
            "ended": f"2026-01-01T00:{minute:02}:30+00:00",
        }
        write_json(folder / part / "args.json", meta | times)
        write_json(folder / part / "metrics.json", {"accuracy": right, "questions": 1})
        record = {"id": "a", "image": "i.png", "image_hash": "h", "correct": bool(right)}
        write_json(folder / part / "predictions.jsonl", record)
    for part in ("reward/metrics", "marks", "candidates/metrics", "grpo/metrics"):
        for c in (1, 2):
            write_json(folder / f"cycle{c}" / f"{part}.json", {"file": part, "cycle": c})


def test_runs_are_collected_with_the_commit_time_and_command_that_they_wrote_down(tmp_path):
    write_run(tmp_path / "x", 3, "runs/toy", [0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    write_run(tmp_path / "y", 4, "runs/more", [0, 0, 1, 0, 0, 0, 0, 0, 0, 1])
    folders = [str(tmp_path / name) for name in "xy"]
    flags = ["--collect", "--out", tmp_path / "r.json", "--runs", *folders]
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "benchmarks", "seeds.py"), *flags], cwd=tmp_path
    )
    found = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 0
    assert found["command"] == "OUT=runs/toy SEED=3 bash cycle.sh; OUT=runs/more SEED=4 bash cycle.sh"
    assert found["seeds"] == [3, 4] and found["seconds"] == [9 * 60 + 30] * 2
    assert found["git"] == {"commit": "c" * 40} and found["versions"] == HERE["versions"]
    assert found["accuracy"]["base"] == [0, 0] and found["accuracy"]["cycle 1: SFT on random"] == [0, 1]
    assert found["cycles"][1][1]["marks"] == {"file": "marks", "cycle": 2}
    paired = {(p["from"], p["to"]): (p["difference"], p["by_seed"]) for p in found["paired"]}
    assert paired["base", "cycle 2: + GRPO"] == (1, [1, 1])
    assert paired["cycle 1: SFT on random", "cycle 1: SFT on accepted"] == (-0.5, [0, -1])


def test_runs_of_two_commits_are_not_one_result(tmp_path):
    write_run(tmp_path / "x", 0, "runs/x", [0] * 10)
    write_run(tmp_path / "y", 1, "runs/y", [0] * 10, commit="d" * 40)
    with pytest.raises(RunError, match="2 commits, machines or sets of versions"):
        seeds.collect([str(tmp_path / "x"), str(tmp_path / "y")], [1, 1])


def test_the_numbers_of_the_rerun_in_the_readme_are_those_of_its_result_file():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = " ".join(f.read().split())
    again, first = seeds.read_json(seeds.AGAIN)["accuracy"], seeds.read_json(seeds.RESULT)["accuracy"]
    after = text.split("In one more run of the default cycle")[1].split(" - ")[0]
    assert "benchmarks/results/toy_cycle_again.json" in after
    wanted = [again["cycle 1: + GRPO"][0], first["cycle 1: + GRPO"][0]]
    wanted += [again["cycle 1: SFT on accepted + expert"][0]]
    wanted += [again[f"cycle 2: {row}"][0] for row in ("+ GRPO", "SFT on accepted + expert")]
    assert re.findall(r"0\.\d{3}", after) == [f"{accuracy:.3f}" for accuracy in wanted]
    for stage in [stage for stage in seeds.STAGES if "cycle 2" not in stage and "GRPO" not in stage]:
        assert again[stage][0] == first[stage][0]


# ---------------------------------------------------------------------------------------------------------
# recipes/

# The command that each variable's flags go to.
FLAGS_OF = {
    "GENERATE_FLAGS": "generate.py --images i --model m --out o",
    "REWARD_FLAGS": "reward.py train --model m --data d --out o",
    "SCORE_FLAGS": "reward.py score --model m --data d --out o",
    "SFT_FLAGS": "sft.py --model m --data d --out o",
    "GENERATOR_FLAGS": "sft.py --role generator --model m --data d --out o",
    "GRPO_FLAGS": "grpo.py --model m --reward r --data d --out o",
    "EVAL_FLAGS": "eval.py --model m --data d --out o",
}


@pytest.mark.parametrize("recipe", sorted(os.listdir(os.path.join(ROOT, "recipes"))))
def test_a_recipe_prepares_its_data_and_gives_the_cycle_flags_that_the_stages_know(copy, recipe):
    shutil.copytree(os.path.join(ROOT, "recipes"), copy / "recipes")
    shutil.copy(os.path.join(ROOT, "setup.sh"), copy)
    dump = "import json, os, sys; json.dump(dict(os.environ), sys.stdout)"
    (copy / "cycle.sh").write_text(f"\"$PYTHON\" -c '{dump}' > settings.json\n")
    rows, source = [], copy / "source"
    (source / "Images").mkdir(parents=True)
    for i in range(100):
        (source / "Images" / f"{i}.png").write_bytes(str(i).encode())
        row = {
            "question_id": str(i),
            "question": "Which?",
            "gt_answer": "CT",
            "option_A": "CT",
            "option_B": "MRI",
        }
        row |= {
            "question_type": "Modality Recognition",
            "modality_type": "X-Ray",
            "image_path": f"Images/{i}.png",
        }
        rows.append(row)
    write_json(source / "QA_information" / "x.json", rows)
    env = os.environ | {"PYTHON": sys.executable, "OMNIMEDVQA": "source"}
    done = subprocess.run(["bash", f"recipes/{recipe}"], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    settings = json.loads((copy / "settings.json").read_text())
    counts = {
        name: len((copy / settings[name]).read_text().splitlines()) for name in ("EXPERT", "VAL", "TEST")
    }
    assert counts == {"EXPERT": 5, "VAL": 1, "TEST": 20} and settings["IMAGE_ROOT"] == "source"
    assert len((copy / settings["IMAGES"]).read_text().splitlines()) == 74
    for name, command in FLAGS_OF.items():
        # All flags that are not known are named.
        words = [*command.split(), *settings[name].split(), "--no-such-flag"]
        done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True)
        assert "unrecognized arguments: --no-such-flag;" in done.stderr, done.stderr
