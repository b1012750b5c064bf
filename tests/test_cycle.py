"""The whole cycle, by subprocess, on a very small clinic: it finishes, it ends with its table, and again does nothing."""

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
from test_kill import contents

from medgr2 import records, runs


def test_the_cycle_finishes_and_ends_with_its_table(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr[-2000:]
    table = (out / "table.txt").read_text()
    assert table in done.stdout
    for label in (
        "base",
        "SFT on expert data",
        "cycle 1: SFT on random",
        "cycle 1: SFT on accepted",
        "cycle 1: SFT on accepted + expert",
        "cycle 1: + GRPO",
    ):
        assert label in table
    accuracy = json.load(open(out / "eval_base" / "metrics.json"))["accuracy"]
    assert f"{accuracy:.3f}" in next(line for line in table.splitlines() if line.startswith("base"))


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


def test_the_report_holds_every_evaluated_question_every_candidate_and_every_stages_curves(finished):
    out, done = finished
    data = json.loads(
        re.search('<script id="data"[^>]*>(.*?)</script>', (out / "report.html").read_text(), re.DOTALL)[1]
    )
    asked, scored = (
        [r["id"] for r in records.read_records(out / name, root=out)]
        for name in ("data/test.jsonl", "cycle1/scored/scored.jsonl")
    )
    assert [
        item["id"] for item in data["items"]
    ] == asked + scored and f"{len(asked + scored)} items" in done.stdout
    assert {len(item["responses"]) for item in data["items"][: len(asked)]} == {
        len(list(out.rglob("eval_*")))
    } and all(i["image"] is not None for i in data["items"])
    # GRPO and reward model logged one step each: no curve
    assert {curve["title"] for curve in data["curves"]} == {"sft.py"}
    assert (
        data["tables"][0]["rows"][0][1][0]
        == f"{json.load(open(out / 'eval_base' / 'metrics.json'))['accuracy']:.3f}"
    )


def test_the_second_call_does_nothing_again(finished):
    def times():
        return {
            f: f.stat().st_mtime_ns
            for f in out.rglob("*")
            if f.is_file() and f.name not in ("table.txt", "report.html")
        }

    out, _ = finished
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


def test_a_file_that_is_not_there_is_refused_before_anything_is_run(tmp_path):
    there = __file__
    done = cycle(
        tmp_path / "run",
        EXPERT=there,
        IMAGES=there,
        TEST=there,
        IMAGE_ROOT=".",
        VAL=str(tmp_path / "watch.jsonl"),
    )
    assert (
        done.returncode == 2
        and "VAL=" in done.stderr
        and "no such file" in done.stderr
        and not (tmp_path / "run").exists()
    )


def test_a_bad_input_stops_the_cycle_with_one_line_and_status_2(tmp_path):
    broken = tmp_path / "expert.jsonl"
    broken.write_text('{"id": "a"\n')
    done = cycle(
        tmp_path / "run",
        EXPERT=str(broken),
        TEST=str(broken),
        VAL=str(broken),
        IMAGES=str(broken),
        IMAGE_ROOT=str(tmp_path),
    )
    assert done.returncode == 2 and f"{broken}:1" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------
# Nothing is lost.


def files_in(out):
    """How many files a cycle has written so far, those of its data aside: a clock that no other load on the machine disturbs."""
    return sum(len(files) for folder, _, files in os.walk(out) if not folder.startswith(str(out / "data")))


def test_a_cycle_that_was_killed_and_stopped_ends_as_if_it_had_not_been(finished, tmp_path):
    """Its last stages: that saves minutes, and tests/test_kill.py kills those before."""
    out, _ = finished
    again, rng = tmp_path / out.name, random.Random("kill the cycle")
    shutil.copytree(out, again)
    for path in [
        again / "settings",
        again / "table.txt",
        again / "report.html",
        *again.glob("cycle1/*sft_both"),
        *again.glob("cycle1/*grpo"),
    ]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in again.rglob("args.json"):
        path.write_text(path.read_text().replace(str(out), str(again)))
    there = files_in(again)
    moments = sorted(there + rng.random() * 0.9 * (files_in(out) - there) for _ in range(4))
    for moment, how in zip(moments, (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        running = subprocess.Popen(
            ["bash", "cycle.sh"],
            cwd=ROOT,
            env=os.environ | SMALL | {"OUT": str(again)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while files_in(again) < moment and running.poll() is None:
            time.sleep(0.02)
        time.sleep(2 * rng.random())
        assert running.poll() is None
        if how == signal.SIGKILL:
            os.killpg(running.pid, how)
            running.wait()
        else:
            # to the shell alone, as `kill` does
            running.terminate()
            assert running.wait() == 128 + how
            # it left no stage behind
            with pytest.raises(ProcessLookupError):
                os.killpg(running.pid, 0)
    last = cycle(again)
    assert last.returncode == 0, last.stderr[-2000:]
    assert contents(again) == contents(out)


def test_a_cycle_that_meets_the_stage_of_a_killed_one_says_who_is_writing(tmp_path):
    lock = runs.take_lock(str(tmp_path / "run" / "eval_base.part"))
    done = cycle(tmp_path / "run")
    lock.close()
    assert (
        done.returncode == 2
        and f"process {os.getpid()} on " in done.stderr
        and "wait for it" in done.stderr
        and "Traceback" not in done.stderr
    )


# ---------------------------------------------------------------------------------------------------------
# Nothing gets out: with local paths alone, no network is needed or asked.


def test_the_cycle_asks_for_no_network(finished):
    out, _ = finished
    lines = (out.parent / "network.log").read_text().splitlines()
    scripts = {f"{name}.py" for name in ("clinic", "mark", "generate", "reward", "sft", "grpo", "eval")}
    assert {os.path.basename(line.split()[-1]) for line in lines if line.startswith("guards ")} >= scripts | {
        "analysis.summarize",
        "analysis.report",
    }
    assert [line for line in lines if not line.startswith("guards ")] == []


def test_the_guard_stops_and_tells_of_a_model_from_the_hub(tmp_path):
    # the library would wait between its tries
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
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces here (unshare --net)")
    out, _ = finished
    images = out / "data" / "unlabelled" / "images.jsonl"
    subprocess.run(
        [
            *alone,
            sys.executable,
            "generate.py",
            "--model",
            "toy/generator",
            "--images",
            images,
            "--out",
            tmp_path / "out",
        ],
        cwd=ROOT,
        check=True,
    )
    there, here = (
        list(records.read_records(folder / "candidates.jsonl", root=out))
        for folder in (out / "cycle1" / "candidates", tmp_path / "out")
    )
    assert there == here
