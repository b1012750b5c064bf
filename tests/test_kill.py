"""Killed anywhere, any number of times, every stage ends with the records and weights of a run that was left alone.

    python tests/test_kill.py --kills 300      the soak: so many kills, counted in benchmarks/results/kills.json
    python tests/test_kill.py --readme         writes the README's table of them anew

A stage runs in a process of its own, forked from a server that has imported torch; it is killed by SIGKILL at a random
time within what the undisturbed run took, started again by the same command, and so on, then left to finish.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
# in order: each one's inputs are the outputs of those before it
STAGES = {
    "clinic": ("toy/clinic.py", "--sizes 8 6 10 4 10"),
    "reward": (
        "reward.py",
        "train --model toy/backbone --data {d}/clinic/expert.jsonl {d}/clinic/reports.jsonl --resamples 1 --steps 100",
    ),
    "candidates": (
        "generate.py",
        "--model toy/generator --images {d}/clinic/unlabelled/images.jsonl --batch 2",
    ),
    "scored": (
        "reward.py",
        "score --model {d}/reward --data {d}/candidates/candidates.jsonl --keep 0.5 --batch 4 --image-root {d}",
    ),
    "sft": (
        "sft.py",
        "--model toy/policy --data {d}/scored/accepted.jsonl --epochs 6 --batch 6 --save-every 2 --image-root {d}",
    ),
    "grpo": (
        "grpo.py",
        "--model {d}/sft --reward {d}/reward --data {d}/clinic/expert.jsonl --val {d}/clinic/val.jsonl"
        " --steps 4 --prompts 2 --group 4 --iterations 2 --watch-every 2 --save-every 1",
    ),
    "eval": ("eval.py", "--model {d}/grpo --data {d}/clinic/test.jsonl --batch 4"),
}
# what a clock says differs between any two runs
VOLATILE = ("seconds", "tokens_per_s")


def run_script(script, flags, said):
    """In a forked process: the script, as if from the command line; what it says on stderr goes into the file `said`."""
    os.chdir(ROOT)
    sys.argv = [script, *flags]
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(said, "w")
    runpy.run_path(script, run_name="__main__")


class Zoo:
    """Where stages are run, in `folder`, and killed."""

    def __init__(self, folder):
        self.folder, self.took, self.said = str(folder), {}, os.path.join(folder, "said")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["torch", "transformers", "accelerate", "medgr2.vlm", "medgr2.records", "medgr2.runs"]
        )
        # starts the server, for which no stage's time should stand
        first = self.context.Process(target=int)
        first.start()
        first.join()

    def run(self, name, out, limit=None, how=signal.SIGKILL):
        """Run a stage into `out`, for at most `limit` seconds; then `how`. Returns its exit status."""
        script, flags = STAGES[name]
        flags = [*flags.format(d=self.folder).split(), "--out", str(out)]
        process = self.context.Process(target=run_script, args=(script, flags, self.said))
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
        """Start the stage and kill it `kills` times, then let it finish.

        Returns (kills that met it alive, what differs from the undisturbed run, records of that run that it lacks).
        """
        out, met = os.path.join(self.folder, f"{name}-disturbed-{rng.random()}"), 0
        for _ in range(kills):
            met += self.run(name, out, rng.random() * self.took[name], how) in (
                -signal.SIGKILL,
                128 + signal.SIGTERM,
                -signal.SIGTERM,
            )
        status, undisturbed = self.run(name, out), os.path.join(self.folder, name)
        there, here = contents(undisturbed), contents(out)
        differing = [file for file in sorted({*there, *here}) if there.get(file) != here.get(file)]
        differing += [f"exit status {status}"] * (status != 0) + ["unfinished"] * os.path.exists(
            out + ".part"
        )
        return met, differing, len(record_ids(undisturbed) - record_ids(out))


def contents(folder):
    """{file: hash of its bytes, or of what no clock says of it, the folder's own path apart} of all that is in a folder."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        data = path.read_bytes().replace(str(folder).encode(), b"")
        if path.name == "metrics.jsonl":
            data = repr(
                [
                    {k: v for k, v in json.loads(line).items() if not k.endswith(VOLATILE)}
                    for line in data.splitlines()
                ]
            ).encode()
        if path.name == "args.json":
            # the hashes of its inputs hold the args.json of a model's folder, and so a clock
            told = json.loads(data)
            data = repr((told["script"], told["args"], list(told["inputs"]))).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def record_ids(folder):
    """(file, id) of every record in a folder."""
    return {
        (str(path.relative_to(folder)), json.loads(line)["id"])
        for path in Path(folder).rglob("*.jsonl")
        if path.name != "metrics.jsonl"
        for line in path.read_bytes().splitlines()
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    made = Zoo(tmp_path_factory.mktemp("kill"))
    for name in STAGES:
        made.reference(name)
    return made


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_was_killed_again_and_again_ends_as_if_it_had_not_been(zoo, name):
    assert zoo.disturb(name, 2, random.Random(f"kill {name}"))[1:] == ([], 0)


@pytest.mark.parametrize("name", ["candidates", "sft", "grpo"])
def test_a_stage_that_was_asked_to_stop_ends_as_if_it_had_not_been(zoo, name):
    assert zoo.disturb(name, 1, random.Random(f"term {name}"), signal.SIGTERM)[1:] == ([], 0)


@pytest.fixture
def disk(tmp_path):
    """A function that makes a disk of so many KiB, or gives it another size, and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def of_size(kib):
        options = f"size={kib}k" + ",remount" * os.path.ismount(folder)
        if (
            not shutil.which("mount")
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
            ).returncode
        ):
            pytest.skip("no small disk can be mounted here (it takes root)")
        return folder

    yield of_size
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "kib, commits, says",
    [
        (4, 0, r"out: No space left on device; make room"),
        (20_000, 2, r"out.part: a commit needs 8\.\d+ MiB and [123]\.\d+ MiB are free; make room"),
    ],
)
def test_a_stage_whose_disk_is_full_says_so_in_a_line_and_goes_on_once_there_is_room(
    zoo, disk, kib, commits, says
):
    out = disk(kib) / "out"
    assert zoo.run("sft", out) == 2
    assert re.fullmatch(rf"sft.py: \S+/{says}.*\n", Path(zoo.said).read_text())
    # good ones alone
    assert len(list(out.parent.glob("out.part/state/*"))) == commits
    disk(200_000)
    assert zoo.run("sft", out) == 0 and contents(out) == contents(os.path.join(zoo.folder, "sft"))


def test_a_model_that_does_not_fit_says_how_much_it_needs_and_leaves_nothing(disk):
    from medgr2 import loading
    from medgr2.errors import ModelError

    folder = disk(1000)
    with pytest.raises(ModelError, match=r"the model needs \d\.\d+ MiB and 0\.9\d+ MiB are free; make room"):
        loading.save(loading.load(str(ROOT / "toy" / "policy")), folder / "model")
    assert not list(folder.rglob("*.*"))


def test_a_file_that_differs_and_a_record_that_is_lost_are_counted(zoo, monkeypatch):
    """The comparison itself can fail: against a run that holds one record more."""
    shutil.copytree(os.path.join(zoo.folder, "candidates"), os.path.join(zoo.folder, "more"))
    with open(os.path.join(zoo.folder, "more", "candidates.jsonl"), "a") as file:
        file.write('{"id": "one more"}\n')
    monkeypatch.setitem(STAGES, "more", STAGES["candidates"])
    # args.json: its --out is another
    assert zoo.disturb("more", 0, random.Random(0)) == (0, ["args.json", "candidates.jsonl"], 1)


def soak(kills, out):
    """Kill stages in turn until there were so many kills; write and print what came of it. Returns the runs that differ, or lost a record."""
    from medgr2 import runs

    # runs, kills, lost records, differing runs
    rows, differences = {name: [0, 0, 0, 0] for name in STAGES}, []
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(folder)
        for name in STAGES:
            zoo.reference(name)
        while sum(row[1] for row in rows.values()) < kills:
            for name, row in rows.items():
                # the seed of the moments of its kills
                schedule = f"{name} {row[0]}"
                met, differing, lost = zoo.disturb(name, 3, random.Random(schedule))
                rows[name] = [row[0] + 1, row[1] + met, row[2] + lost, row[3] + bool(differing)]
                differences += [{"schedule": schedule, "differing": differing, "lost": lost}] * bool(
                    differing or lost
                )
            print({name: row[1] for name, row in rows.items()}, *differences, flush=True)
    fields = ("runs", "kills", "lost records", "differing runs")
    runs.write_json(
        out,
        {
            "command": f"python tests/test_kill.py --kills {kills}",
            "differences": differences,
            "stages": {name: dict(zip(fields, row)) for name, row in rows.items()},
            **runs.environment(),
        },
    )
    return differences


def table(path):
    """The soak's result as Markdown, all stages last."""
    from medgr2 import cli

    result = json.loads(Path(path).read_text())
    rows = [[name, *row.values()] for name, row in result["stages"].items()]
    rows.append(["all", *map(sum, list(zip(*rows))[1:])])
    return (
        cli.format_table(rows, ["stage", *next(iter(result["stages"].values()))], markdown=True)
        + f"\n\nCommand `{result['command']}`; commit `{(result['git']['commit'] or '?')[:10]}`; {result['hardware']['cpus']} CPU cores."
    )


if __name__ == "__main__":
    sys.path.append(str(ROOT / "benchmarks"))
    import readme

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--kills", type=int, help="go on until there were so many")
    p.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "kills.json"), help="result file")
    p.add_argument("--readme", action="store_true", help="write the README's table from the result file")
    a = p.parse_args()
    found = soak(a.kills, a.out) if a.kills else []
    print(table(a.out))
    if a.readme:
        readme.write_block("kills", table(a.out))
    sys.exit(bool(found))
