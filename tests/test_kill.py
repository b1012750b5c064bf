"""Killed anywhere, any number of times, every stage ends with the records and weights of a run that was left alone.

    python tests/test_kill.py --kills 300 --out benchmarks/results/kills.json      the soak: so many kills, and a table of them

A stage runs in a process of its own, forked from a server that has imported torch; it is killed by SIGKILL at a random
time within what the undisturbed run took, started again by the same command, and so on, then left to finish.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
STAGES = {  # in order: each one's inputs are the outputs of those before it
    "clinic": ("toy/clinic.py", "--sizes 8 6 10 4 10"),
    "reward": ("reward.py", "train --model toy/backbone --data {d}/clinic/expert.jsonl {d}/clinic/reports.jsonl --resamples 1 --steps 100"),
    "candidates": ("generate.py", "--model toy/generator --images {d}/clinic/unlabelled/images.jsonl --batch 2"),
    "scored": ("reward.py", "score --model {d}/reward --data {d}/candidates/candidates.jsonl --keep 0.5 --batch 4 --image-root {d}"),
    "sft": ("sft.py", "--model toy/policy --data {d}/scored/accepted.jsonl --epochs 6 --batch 6 --save-every 2 --image-root {d}"),
    "grpo": ("grpo.py", "--model {d}/sft --reward {d}/reward --data {d}/clinic/expert.jsonl --val {d}/clinic/val.jsonl"
             " --steps 4 --prompts 2 --group 4 --iterations 2 --watch-every 2 --save-every 1"),
    "eval": ("eval.py", "--model {d}/grpo --data {d}/clinic/test.jsonl --batch 4"),
}
VOLATILE = ("seconds", "tokens_per_s")  # what a clock says differs between any two runs


def run_script(script, flags):
    """In a forked process: the script, as if from the command line, silent."""
    os.chdir(ROOT)
    sys.argv = [script, *flags]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    runpy.run_path(script, run_name="__main__")


class Zoo:
    """Where stages are run, in `folder`, and killed."""

    def __init__(self, folder):
        self.folder, self.took = str(folder), {}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "transformers", "accelerate", "vlm", "records", "runs"])

    def run(self, name, out, limit=None, how=signal.SIGKILL):
        """Run a stage into `out`, for at most `limit` seconds; then `how`. Returns its exit status."""
        script, flags = STAGES[name]
        process = self.context.Process(target=run_script, args=(script, [*flags.format(d=self.folder).split(), "--out", out]))
        process.start()
        process.join(limit)
        if process.is_alive():
            os.kill(process.pid, how)
            process.join()
        return process.exitcode

    def reference(self, name):
        started = time.monotonic()
        assert self.run(name, os.path.join(self.folder, name)) == 0, name
        self.took[name] = time.monotonic() - started

    def disturb(self, name, kills, rng, how=signal.SIGKILL):
        """Start the stage and kill it `kills` times, then let it finish; returns the number of kills that met it alive."""
        out, met = os.path.join(self.folder, f"{name}-disturbed-{rng.random()}"), 0
        for _ in range(kills):
            met += self.run(name, out, rng.random() * self.took[name], how) in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
        assert self.run(name, out) == 0, name
        assert contents(out) == contents(os.path.join(self.folder, name)), name
        assert not os.path.exists(out + ".part")
        return met


def contents(folder):
    """{file: hash of its bytes, or of its records without what a clock says} of a finished run."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != "args.json"):
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            data = repr([{k: v for k, v in json.loads(line).items() if not k.endswith(VOLATILE)} for line in data.splitlines()]).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    made = Zoo(tmp_path_factory.mktemp("kill"))
    for name in STAGES:
        made.reference(name)
    return made


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_was_killed_again_and_again_ends_as_if_it_had_not_been(zoo, name):
    zoo.disturb(name, 2, random.Random(f"kill {name}"))


@pytest.mark.parametrize("name", ["candidates", "sft", "grpo"])
def test_a_stage_that_was_asked_to_stop_ends_as_if_it_had_not_been(zoo, name):
    zoo.disturb(name, 1, random.Random(f"term {name}"), signal.SIGTERM)


def test_two_runs_of_a_stage_that_differ_are_told_apart(zoo):
    """The comparison itself can fail: another seed gives other contents."""
    out = os.path.join(zoo.folder, "another seed")
    script, flags = STAGES["candidates"]
    STAGES["another"] = script, flags + " --seed 1"
    try:
        assert zoo.run("another", out) == 0 and contents(out) != contents(os.path.join(zoo.folder, "candidates"))
    finally:
        del STAGES["another"]


def soak(kills, out):
    """Kill stages in turn until there were so many kills; write and print what came of it."""
    import runs
    with tempfile.TemporaryDirectory() as folder:
        zoo, rng, rows = Zoo(folder), random.Random(0), {name: [0, 0] for name in STAGES}
        for name in STAGES:
            zoo.reference(name)
        while sum(met for _, met in rows.values()) < kills:
            for name in STAGES:
                rows[name][1] += zoo.disturb(name, 3, rng)
                rows[name][0] += 1
            print({name: met for name, (_, met) in rows.items()}, flush=True)
    result = {"command": f"python tests/test_kill.py --kills {kills}", "stages": {
        name: {"runs": n, "kills": met, "differing": 0} for name, (n, met) in rows.items()}, **runs.provenance()}
    runs.write_json(out, result)  # `disturb` raises at the first difference: who gets here has seen none
    print(runs.table([(name, n, met, 0) for name, (n, met) in rows.items()], ("stage", "runs", "kills", "differing")))


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--kills", type=int, required=True)
    p.add_argument("--out", required=True)
    a = p.parse_args()
    soak(a.kills, a.out)
