"""prefetch.py and --workers: who prepares the batches; the files of a stage do not depend on it."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import clinic
import pytest
import torch
from helpers import ROOT, run_here, wait_until_gone

import eval as evaluation
import generate
import grpo
import reward
import sft
from medgr2 import images, loading
from medgr2.errors import RecordError
from medgr2.prefetch import prefetch


def square(i):
    return i * i


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_prepared_comes_in_order_and_an_endless_sequence_is_allowed(workers):
    assert list(prefetch(range(3, 12), square, workers)) == [i * i for i in range(3, 12)]
    assert list(prefetch([], square, workers)) == []
    endless = prefetch(itertools.count(5), square, workers)
    assert [next(endless) for _ in range(4)] == [25, 36, 49, 64]
    endless.close()


def test_a_thread_prepares_the_next_one_while_the_caller_uses_this_one():
    made, working = [threading.Event() for _ in range(4)], []

    def prepare(i):
        working.append(threading.current_thread())
        made[i].set()
        return i

    coming = prefetch(range(4), prepare)
    for i in range(3):
        assert next(coming) == i
        assert made[i + 1].wait(10), "made while the caller uses the one before"
        assert not any(event.is_set() for event in made[i + 2 :]), "only one is made ahead"
    assert len(set(working)) == 1 and threading.current_thread() not in working


def pid_and_threads(i):
    time.sleep(0.05)
    return os.getpid(), torch.get_num_threads()


def test_as_many_processes_as_workers_prepare_and_each_computes_with_one_thread():
    found = list(prefetch(range(12), pid_and_threads, 3))
    assert len({pid for pid, _ in found}) == 3 and os.getpid() not in dict(found)
    assert {threads for _, threads in found} == {1}
    wait_until_gone([pid for pid, _ in found], 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_mistake_is_raised_in_its_turn_with_its_one_line_message(workers):
    def prepare(i):
        if i == 2:
            raise RecordError("x.jsonl: record 2 has no image")
        return i

    coming = prefetch(range(5), prepare, workers)
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(RecordError, match=r"^x.jsonl: record 2 has no image$"):
        next(coming)


def test_a_bug_in_a_worker_arrives_with_its_traceback():
    def prepare(i):
        return [1, 2][i]

    coming = prefetch(range(5), prepare, 2)
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(IndexError) as caught:
        next(coming)
    assert str(caught.value) == "list index out of range" and "return [1, 2][i]" in caught.value.__notes__[0]


def test_an_item_that_cannot_be_passed_is_an_error_in_its_turn():
    coming = prefetch(range(3), lambda i: i if i < 2 else threading.Lock(), 1)
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(TypeError, match="cannot pickle"):
        next(coming)


# In a process of its own: `happen` after the first two batches, with workers that have prepared more.
SCRIPT = """
import argparse, multiprocessing, os, signal, sys, time
sys.path.insert(0, {root!r})
from medgr2 import cli
from medgr2.prefetch import prefetch

def kill_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    # Busy, as in a forward pass.
    for _ in range(300):
        time.sleep(0.1)

def kill_this():
    os.kill(os.getpid(), signal.SIGKILL)

def main(args):
    coming = prefetch(range(1000), lambda i: b"x" * 1_000_000, 2)
    next(coming), next(coming)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {happen}

cli.run_main(main, argparse.Namespace())
"""


@pytest.mark.parametrize(
    "happen, status, last",
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        (
            "kill_worker()",
            2,
            r".*DataLoader worker \(pid \d+\) is killed by signal: Killed: lower --workers, or .*",
        ),
        ("kill_this()", -signal.SIGKILL, ""),
    ],
)
def test_a_run_that_fails_or_is_killed_ends_and_so_do_its_workers(tmp_path, happen, status, last):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), happen=happen))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert re.fullmatch(last, (done.stderr.splitlines() or [""])[-1]), done.stderr
    wait_until_gone(map(int, done.stdout.split()), 10)


def test_a_signal_to_all_processes_of_a_run_leaves_its_workers_alone():
    coming = prefetch(range(40), pid_and_threads, 2)
    pids = {next(coming)[0] for _ in range(4)}
    for pid, number in itertools.product(pids, (signal.SIGINT, signal.SIGTERM)):
        os.kill(pid, number)
    assert {pid for pid, _ in coming} == pids


# The stages ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("workers")
    clinic.write_clinic(str(out / "data"), (4, 2, 3, 3, 3), seed=3)
    torch.manual_seed(0)
    (out / "rm").mkdir()
    backbone = loading.load(str(ROOT / "toy" / "backbone"))
    reward.RewardModel(backbone, reward.Heads(30, 8), True).save(str(out / "rm"))
    return out


STAGES = {
    "generate": (generate, "--model {toy}/generator --images {data}/unlabelled/images.jsonl --batch 2"),
    "train": (reward, "train --model {toy}/backbone --data {data}/expert.jsonl --steps 3 --batch 4"),
    "joint": (
        reward,
        "train --model {toy}/backbone --data {data}/expert.jsonl --steps 3 --batch 4 --freeze nothing "
        "--lr 1e-5",
    ),
    "score": (reward, "score --model {rm} --data {data}/expert.jsonl --keep 0.5 --batch 2"),
    "sft": (
        sft,
        "--model {toy}/policy --data {data}/expert.jsonl --val {data}/val.jsonl --steps 4 --batch 3",
    ),
    "grpo": (
        grpo,
        "--model {toy}/policy --reward {rm} --data {data}/expert.jsonl --val {data}/val.jsonl --steps 2 "
        "--prompts 3 --group 4 --rollout-batch 2 --watch-every 1 --min-spread -1 --patience 0",
    ),
    "eval": (
        evaluation,
        "--model {toy}/policy --data {data}/test.jsonl --batch 4 --scores --blind --samples 2",
    ),
}
# What differs between two runs: when, how long, and the flag itself.
TIMES = {"seconds", "sample_seconds", "learn_seconds", "sample_tokens_per_s", "learn_tokens_per_s"}


def content(path):
    """The bytes of a file of a run, without what differs between two runs."""
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: x for name, x in row.items() if name not in TIMES} for row in rows]
    return path.read_bytes()


@pytest.mark.parametrize("name", STAGES)
def test_workers_prepare_all_images_of_a_stage_and_change_no_byte_of_what_it_writes(
    name, folder, monkeypatch
):
    module, flags = STAGES[name]
    flags = flags.format(toy=ROOT / "toy", data=folder / "data", rm=folder / "rm").split()
    log, to_rgb = folder / f"{name}.pids", images.to_rgb

    def to_rgb_and_tell(image):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return to_rgb(image)

    def run(workers):
        out = folder / f"{name}{workers}"
        done = run_here(module, *flags, "--out", out, "--workers", workers)
        assert done.returncode == 0, done.stderr
        files = [path for path in out.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(out)): content(path)
            for path in files
            if path.name not in ("args.json", "README.md")
        }

    alone = run(0)
    monkeypatch.setattr(images, "to_rgb", to_rgb_and_tell)
    assert run(2) == alone and "metrics.json" in alone
    pids = log.read_text().split()
    # So this process opens no image.
    assert pids and str(os.getpid()) not in pids
