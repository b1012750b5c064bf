"""The whole cycle in a subprocess, on a very small clinic: it ends with its table; again, it does nothing."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, cycle, guarded
from PIL import Image
from test_kill import contents

from medgr2 import records, runs


def test_the_cycle_finishes_and_ends_with_its_table(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr[-2000:]
    table = (out / "table.txt").read_text()
    assert table in done.stdout
    for label in ("base", "SFT on expert data", "cycle 1: SFT on accepted", "cycle 1: + GRPO"):
        assert label in table
    accuracy = json.load(open(out / "eval_base" / "metrics.json"))["accuracy"]
    assert f"{accuracy:.3f}" in next(line for line in table.splitlines() if line.startswith("base"))


def test_every_stage_begins_with_a_line_that_says_what_it_will_do_and_where(finished):
    out, done = finished
    said = {}
    for line in done.stdout.splitlines():
        if found := re.fullmatch(rf"{re.escape(str(out))}/(\S+): (.*), on \S.*", line):
            said.setdefault(found[1], found[2])
    stages = {os.path.relpath(path.parent, out) for path in out.rglob("args.json")}
    assert set(said) == stages and len(stages) > 8
    asked = len((out / "data" / "test.jsonl").read_text().splitlines())
    assert said["eval_base"] == f"{asked} questions to answer"
    assert re.fullmatch(r"\d+ steps of 8 examples out of \d+", said["cycle1/sft"])
    assert said["cycle1/grpo"].startswith("1 steps of 2 questions x 4 responses out of ")
    assert said["cycle1/reward"].startswith("50 steps on the responses to ")
    candidates = len((out / "cycle1" / "scored" / "scored.jsonl").read_text().splitlines())
    assert said["cycle1/scored"] == f"{candidates} candidates to score"
    assert re.fullmatch(r"\d+ candidates about 8 images", said["cycle1/candidates"])


def test_every_record_file_of_the_cycle_is_valid_and_traces_to_its_image(finished):
    out, _ = finished
    images = {r["id"]: r["image"] for r in records.read_records(out / "data" / "unlabelled" / "images.jsonl")}
    scored = list(records.read_records(out / "cycle1" / "scored" / "scored.jsonl", ("reward", "parent"), out))
    assert all(images[r["parent"]] == r["image"] for r in scored)
    kept = [
        len(list(records.read_records(out / "cycle1" / "scored" / f"{name}.jsonl", root=out)))
        for name in ("accepted", "random")
    ]
    assert kept == [round(len(scored) / 2)] * 2
    rollouts = list(records.read_records(out / "cycle1" / "grpo" / "rollouts.jsonl", ("response",), out))
    assert len(rollouts) == 2 * 4 and all(os.path.exists(r["image"]) for r in rollouts)


def test_the_report_holds_every_evaluated_question_every_candidate_and_the_curves_of_every_stage(finished):
    out, done = finished
    page = (out / "report.html").read_text()
    data = json.loads(re.search('<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    asked, scored = (
        [r["id"] for r in records.read_records(out / name, root=out)]
        for name in ("data/test.jsonl", "cycle1/scored/scored.jsonl")
    )
    assert [item["id"] for item in data["items"]] == asked + scored
    assert f"{len(asked + scored)} items" in done.stdout
    evaluations = len(list(out.rglob("eval_*")))
    assert all(len(item["responses"]) == evaluations for item in data["items"][: len(asked)])
    assert all(item["image"] is not None for item in data["items"])
    # GRPO and the reward model logged only one step: no curve.
    assert {curve["title"] for curve in data["curves"]} == {"sft.py"}
    accuracy = json.load(open(out / "eval_base" / "metrics.json"))["accuracy"]
    assert data["tables"][0]["rows"][0][1][0] == f"{accuracy:.3f}"
    # Its rows have the names and the order of the table that the terminal shows.
    names = [re.split("  +", line)[0] for line in (out / "table.txt").read_text().splitlines()[2:-2]]
    assert len(names) == 4 and data["runs"] == names
    assert [row[0][0] for row in data["tables"][0]["rows"]] == names


def test_a_second_call_runs_no_stage_again(finished):
    out, _ = finished

    def times():
        files = [f for f in out.rglob("*") if f.is_file() and f.name not in ("table.txt", "report.html")]
        return {f: f.stat().st_mtime_ns for f in files}

    before = times()
    assert cycle(out).returncode == 0 and before == times()


def test_a_stage_whose_folder_is_gone_is_run_again_and_gives_the_same_records(finished):
    out, _ = finished
    candidates = out / "cycle1" / "candidates"
    before = (candidates / "candidates.jsonl").read_bytes()
    shutil.rmtree(candidates)
    assert cycle(out).returncode == 0 and (candidates / "candidates.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(finished):
    out, _ = finished
    done = cycle(out, GRPO_FLAGS="--steps 2")
    assert done.returncode == 2 and "other settings" in done.stderr and "Traceback" not in done.stderr


def test_expert_data_without_a_test_file_is_refused(tmp_path):
    done = cycle(tmp_path / "run", EXPERT="expert.jsonl", IMAGES="images.jsonl", VAL="val.jsonl")
    assert done.returncode == 2 and "TEST is not" in done.stderr and not (tmp_path / "run").exists()


def test_a_missing_file_is_refused_before_anything_is_run(tmp_path):
    files = dict.fromkeys(("EXPERT", "IMAGES", "TEST"), __file__) | {"VAL": str(tmp_path / "watch.jsonl")}
    done = cycle(tmp_path / "run", IMAGE_ROOT=".", **files)
    assert done.returncode == 2 and "VAL=" in done.stderr and "no such file" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"FILTER": "best"}, "FILTER=best: give accepted or random"),
        ({"FILTER": "random", "CONTROLS": "1"}, "leave one of them out"),
    ],
)
def test_a_filter_that_means_nothing_is_refused_before_a_stage_runs(tmp_path, settings, told):
    done = cycle(tmp_path / "run", **settings)
    assert done.returncode == 2 and told in done.stderr and not list(tmp_path.rglob("args.json"))


# In place of every stage: writes the files that the others read, and its arguments.
STAND_IN = """
import json, os, sys
out = sys.argv[sys.argv.index("--out") + 1]
os.makedirs(out)
json.dump(sys.argv[1:], open(os.path.join(out, "argv.json"), "w"))
question = {"id": "q", "question": "q?", "options": ["a", "b"], "answer": "a", "image": "a.png"}
question |= {"reward": {"overall": 1.0}, "prediction": "a", "correct": True}
answers = ["predictions"] if os.path.basename(out).startswith("eval_") else []
scores = ["scored", "accepted", "random"] if os.path.basename(out).endswith("scored") else []
for name in ("candidates", "rollouts", "metrics", *answers, *scores):
    with open(os.path.join(out, name + ".jsonl"), "w") as f:
        f.write(json.dumps(question) + "\\n")
json.dump({"accuracy": 1.0}, open(os.path.join(out, "metrics.json"), "w"))
"""


def test_a_later_cycle_goes_on_from_the_one_before_and_each_control_from_its_own_policy(tmp_path):
    out, script = tmp_path / "run", tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "e.jsonl").write_text('{"id": "e", "question": "q?", "answer": "a", "image": "a.png"}\n')
    expert = str(tmp_path / "e.jsonl")
    files = dict.fromkeys(("EXPERT", "TEST", "VAL", "IMAGES", "PLENTY"), expert)
    stages = dict.fromkeys(("GENERATE", "REWARD", "SFT", "GRPO", "EVAL"), str(script))
    done = cycle(out, IMAGE_ROOT=str(tmp_path), CYCLES="3", CONTROLS="1", **files, **stages)
    assert done.returncode == 0, done.stderr
    for row in ("ceiling: SFT on plenty of expert data", "SFT on random", "+ as many SFT steps"):
        assert row in done.stdout

    def read(stage, *flags):
        """The values of these flags in the stage's arguments, in order."""
        argv, found, flag = json.loads((out / stage / "argv.json").read_text()), [], None
        for arg in argv:
            flag = arg if arg.startswith("--") else flag
            if flag in flags and arg != flag:
                found.append(arg.removeprefix(f"{out}/"))
        return found

    accepted, drawn = (
        [f"cycle{c}/scored/{kind}.jsonl" for c in (1, 2, 3)] for kind in ("accepted", "random")
    )
    before = {1: "toy/policy", 2: "cycle1/grpo", 3: "cycle2/grpo"}
    generators = {1: "toy/generator", 2: "cycle1/generator", 3: "cycle2/generator"}
    for c in (1, 2, 3):
        d, data = f"cycle{c}", [*accepted[:c], expert]
        assert read(f"{d}/sft", "--model", "--data") == [before[c], *data]
        assert read(f"{d}/grpo", "--model", "--reward", "--data") == [f"{d}/sft", f"{d}/reward", *data]
        assert read(f"{d}/grpo", "--unlabelled") == [f"cycle{k}/scored/scored.jsonl" for k in range(1, c + 1)]
        assert read(f"{d}/sft_more", "--model", "--data") == [f"{d}/sft", *data]
        assert read(f"{d}/candidates", "--model", "--part") == [generators[c], f"{c}/3"]
        rollouts = [f"cycle{k}/grpo/rollouts.jsonl" for k in range(1, c)]
        assert read(f"{d}/reward", "--data", "--rollouts") == [expert, *rollouts]
        start = f"cycle{c - 1}/sft_random" if c > 1 else "toy/policy"
        assert read(f"{d}/sft_random", "--model", "--data") == [start, *drawn[:c], expert]
    for c in (2, 3):
        start = "cycle1/sft" if c == 2 else "cycle2/sft_first"
        assert read(f"cycle{c}/sft_first", "--model", "--data") == [start, accepted[0], expert]
        frozen = [f"cycle{c}/reward", "cycle1/candidates/candidates.jsonl"]
        assert read(f"cycle{c}/frozen_scored", "--model", "--data") == frozen
    assert read("cycle2/generator", "--model", "--data") == ["cycle1/generator", accepted[1]]
    assert not (out / "cycle3" / "generator").exists()


def test_a_bad_input_stops_the_cycle_with_one_line_and_status_2(tmp_path):
    broken = tmp_path / "expert.jsonl"
    broken.write_text('{"id": "a"\n')
    files = dict.fromkeys(("EXPERT", "TEST", "VAL", "IMAGES"), str(broken))
    done = cycle(tmp_path / "run", IMAGE_ROOT=str(tmp_path), **files)
    assert done.returncode == 2 and f"{broken}:1" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------
# Kills.


def files_in(out):
    """How many files a cycle has written, without its data: a clock independent of the machine's load."""
    return sum(len(files) for folder, _, files in os.walk(out) if not folder.startswith(str(out / "data")))


def start_cycle(out):
    """Start a cycle in a process group of its own, without output."""
    return subprocess.Popen(
        ["bash", "cycle.sh"],
        cwd=ROOT,
        env=os.environ | SMALL | {"OUT": str(out)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_cycle_that_was_killed_and_stopped_gives_the_files_of_an_undisturbed_one(finished, tmp_path):
    """Only its last stages, which saves minutes; tests/test_kill.py kills the others."""
    out, _ = finished
    again, rng = tmp_path / out.name, random.Random("kill the cycle")
    shutil.copytree(out, again)
    for name in ("settings", "table.txt", "report.html"):
        (again / name).unlink()
    for path in [*again.glob("cycle1/*sft"), *again.glob("cycle1/*grpo")]:
        shutil.rmtree(path)
    for path in [*again.rglob("args.json"), *again.rglob("README.md")]:
        path.write_text(path.read_text().replace(str(out), str(again)))
    there = files_in(again)
    moments = sorted(there + rng.random() * 0.9 * (files_in(out) - there) for _ in range(4))
    for moment, how in zip(moments, (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        running = start_cycle(again)
        while files_in(again) < moment and running.poll() is None:
            time.sleep(0.02)
        time.sleep(2 * rng.random())
        assert running.poll() is None
        if how == signal.SIGKILL:
            os.killpg(running.pid, how)
            running.wait()
        else:
            # Only to the shell, as `kill` does.
            running.terminate()
            assert running.wait() == 128 + how
            # It left no stage running.
            with pytest.raises(ProcessLookupError):
                os.killpg(running.pid, 0)
    last = cycle(again)
    assert last.returncode == 0, last.stderr[-2000:]
    assert contents(again) == contents(out)


# In place of a stage: writes its process id, and takes long to end after SIGTERM.
SLOW_STAGE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(float(sys.argv[-1])), sys.exit(143)))
with open("PIDS", "w") as file:
    file.write(str(os.getpid()))
time.sleep(999)
"""


@pytest.mark.parametrize("stage_seconds, signals", [(0, 1), (999, 2)])
def test_ctrl_c_waits_for_the_stage_to_commit_and_a_second_one_does_not(tmp_path, stage_seconds, signals):
    pid, script = tmp_path / "pid", tmp_path / "stage.py"
    script.write_text(SLOW_STAGE.replace("PIDS", str(pid)))
    files = dict.fromkeys(("EXPERT", "TEST", "VAL", "IMAGES"), __file__) | {"IMAGE_ROOT": str(tmp_path)}
    env = os.environ | SMALL | files | {"OUT": str(tmp_path / "run"), "EVAL": str(script)}
    env |= {"EVAL_FLAGS": "", "SEED": str(stage_seconds)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(["bash", "cycle.sh"], cwd=ROOT, env=env, start_new_session=True, **pipes)
    while not (pid.exists() and pid.read_text()):
        assert running.poll() is None
        time.sleep(0.02)
    for _ in range(signals):
        # To the whole group, as a terminal does.
        os.killpg(running.pid, signal.SIGINT)
        time.sleep(0.3)
    # It ends once no process holds the pipe, so the stage has ended too.
    _, error = running.communicate(timeout=50)
    assert running.returncode == 130
    assert error == ("cycle.sh: stopped; the same command resumes it\n" if signals == 1 else "")


def test_a_cycle_that_finds_a_stage_of_another_one_running_says_which_process_is_writing(tmp_path):
    lock = runs.take_lock(str(tmp_path / "run" / "eval_base.part"))
    done = cycle(tmp_path / "run")
    lock.close()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"process {os.getpid()} on " in done.stderr and "wait for it" in done.stderr


# ---------------------------------------------------------------------------------------------------------
# With only local paths no network is needed or asked.


def test_the_cycle_asks_for_no_network(finished):
    out, _ = finished
    lines = (out.parent / "network.log").read_text().splitlines()
    guarded_scripts = {os.path.basename(line.split()[-1]) for line in lines if line.startswith("guards ")}
    scripts = {f"{name}.py" for name in ("clinic", "mark", "generate", "reward", "sft", "grpo", "eval")}
    assert guarded_scripts >= scripts | {"analysis.summarize", "analysis.report"}
    assert [line for line in lines if not line.startswith("guards ")] == []


def test_the_guard_refuses_and_logs_a_model_from_the_hub(tmp_path):
    # Without the sleep, because the library waits between its attempts.
    load = "import time; from medgr2 import loading; time.sleep = lambda _: None; loading.load('owner/model')"
    done = subprocess.run(
        [sys.executable, "-c", load],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | guarded(tmp_path / "log") | {"HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 1 and "ModelError" in done.stderr
    assert any(line.startswith("socket.") for line in (tmp_path / "log").read_text().splitlines())


def test_a_stage_runs_without_any_network_interface_and_writes_the_same_records(finished, tmp_path):
    unshare = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces here (unshare --net)")
    out, _ = finished
    images = out / "data" / "unlabelled" / "images.jsonl"
    flags = ["--model", "toy/generator", "--images", images, "--per-image", "2", "--out", tmp_path / "out"]
    subprocess.run([*unshare, sys.executable, "generate.py", *flags], cwd=ROOT, check=True)
    folders = (out / "cycle1" / "candidates", tmp_path / "out")
    there, here = (list(records.read_records(folder / "candidates.jsonl", root=out)) for folder in folders)
    assert there == here
