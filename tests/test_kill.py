"""However often a stage is killed or stopped, it ends with the records and weights of an undisturbed run.

    python tests/test_kill.py --kills 300                  at least so many; benchmarks/results/kills.json
    python tests/test_kill.py --kills 140 --signal SIGINT  by Ctrl-C; benchmarks/results/interrupts.json
    python tests/test_kill.py --kills 20 --processes 2 3   in several; benchmarks/results/kills_processes.json
    python tests/test_kill.py --readme                     writes the tables of docs/reliability.md from them

A stage runs in a process forked from a server that has imported torch. It is killed, or interrupted as by
Ctrl-C, at a random time within the duration of the undisturbed run, and is started again by the same command.
After some signals it is left to finish.

With --processes each start draws how many processes it has. SIGKILL goes to one of them, or to all and the
launcher; SIGTERM and SIGINT go to the launcher. All come soon after the first commit of the start. The
undisturbed run has one process.
"""

import contextlib
import functools
import hashlib
import json
import math
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
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "tests")]

from helpers import children, torchrun, wait_until_gone

# In order: the inputs of each are outputs of those before it. {d} is their folder.
STAGES = {
    "clinic": ("toy/clinic.py", "--sizes 8 6 10 4 10"),
    "reward": (
        "reward.py",
        "train --model toy/backbone --data {d}/clinic/expert.jsonl {d}/clinic/reports.jsonl"
        " --resamples 1 --steps 100",
    ),
    "joint": (
        "reward.py",
        "train --model toy/backbone --data {d}/clinic/expert.jsonl --freeze nothing --lr 1e-5"
        " --resamples 1 --steps 6 --batch 4 --save-every 1 --workers 1",
    ),
    "candidates": (
        "generate.py",
        "--model toy/generator --images {d}/clinic/unlabelled/images.jsonl --batch 2",
    ),
    "scored": (
        "reward.py",
        "score --model {d}/reward --data {d}/candidates/candidates.jsonl"
        " --keep 0.5 --batch 4 --image-root {d}",
    ),
    "sft": (
        "sft.py",
        "--model toy/policy --data {d}/scored/accepted.jsonl --epochs 6 --batch 6 --save-every 2"
        " --image-root {d} --workers 1",
    ),
    "grpo": (
        "grpo.py",
        "--model {d}/sft --reward {d}/reward --data {d}/clinic/expert.jsonl --val {d}/clinic/val.jsonl"
        " --steps 4 --prompts 2 --group 4 --iterations 2 --watch-every 2 --save-every 1",
    ),
    "eval": ("eval.py", "--model {d}/grpo --data {d}/clinic/test.jsonl --batch 4"),
}
# The stages that several processes share, and the file that grows while each works.
SHARED = {
    "joint": "metrics.jsonl",
    "candidates": "candidates.jsonl",
    "scored": "scored.jsonl",
    "sft": "metrics.jsonl",
    "grpo": "metrics.jsonl",
    "eval": "predictions.jsonl",
}
# Enough commits for several kills; and without --min-spread each process refills its own share of the groups.
ALIKE = {name: " --batch 1" for name in ("candidates", "scored", "eval")}
ALIKE |= {"grpo": " --min-spread -1 --steps 8"}
# How a run of several processes is ended: whom SIGKILL gets; the others are for the launcher.
BLOWS = ("SIGKILL one", "SIGKILL all", "SIGTERM", "SIGINT")
# The names of the result files, without .json, and of the tables in docs/reliability.md.
RESULTS = {"SIGKILL": "kills", "SIGINT": "interrupts"}
PROCESSES_RESULT = "kills_processes"
# The metrics that depend on a clock differ between any two runs.
VOLATILE = ("seconds", "tokens_per_s")


def run_script(script, flags, stderr):
    """In a forked process: the script, as if from the command line, with stderr into the file `stderr`."""
    os.chdir(ROOT)
    sys.argv = [script, *flags]
    try:
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(stderr, "w")
        runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        # As sys.excepthook does it, which the module multiprocessing does not call.
        sys.exit(128 + signal.SIGINT)


def strike(launcher, blow, rng):
    """End a run of several processes → its status. None may be left after 10 seconds, 30 if it commits."""
    workers = children(launcher.pid)
    name, _, victims = blow.partition(" ")
    victims = {
        "one": rng.sample(workers, min(1, len(workers))),
        "all": [launcher.pid, *workers],
        "": [launcher.pid],
    }[victims]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[name])
    wait_until_gone(workers, 10 if name == "SIGKILL" else 30)
    return launcher.wait(60)


def size(path):
    """In bytes; 0 if there is no such file (a run that is done has moved it)."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


class Runner:
    """Runs stages in `folder` and kills them."""

    def __init__(self, folder, more=()):
        """more: {stage: flags that it gets besides}."""
        self.folder, self.seconds, self.stderr = str(folder), {}, os.path.join(folder, "stderr")
        self.more = dict(more)
        self.context = multiprocessing.get_context("forkserver")
        # All that the stages import, and the toy's architecture.
        toy = [f"transformers.models.{name}.modeling_{name}" for name in ("llava", "siglip", "qwen2")]
        modules = ["generate", "reward", "sft", "grpo", "eval", *toy]
        self.context.set_forkserver_preload(modules)
        # Starts the server here, so that its start does not count as time of a stage.
        first = self.context.Process(target=int)
        first.start()
        first.join()

    def command(self, name, out):
        script, flags = STAGES[name]
        return script, [*(flags + self.more.get(name, "")).format(d=self.folder).split(), "--out", str(out)]

    def run(self, name, out, limit=None, how=signal.SIGKILL):
        """Run a stage into `out`; `limit` seconds after its script starts send it the signal `how`.

        Returns its exit status. Sets `took`, the seconds since the script started.
        """
        Path(self.stderr).unlink(missing_ok=True)
        process = self.context.Process(target=run_script, args=(*self.command(name, out), self.stderr))
        process.start()
        # run_script opens the file first. What the process does before that is not the stage.
        while process.is_alive() and not os.path.exists(self.stderr):
            time.sleep(0.002)
        started = time.monotonic()
        process.join(limit)
        if process.is_alive():
            # It may end just now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, how)
            process.join()
        self.took = time.monotonic() - started
        return process.exitcode

    def reference(self, name):
        """Run a stage undisturbed."""
        assert self.run(name, os.path.join(self.folder, name)) == 0, name
        self.seconds[name] = self.took

    def disturb(self, name, kills, rng, how=signal.SIGKILL):
        """Start the stage and kill it `kills` times by the signal `how`, then let it finish.

        Returns (how many kills found it alive, what differs from the undisturbed run, how many records of the
        undisturbed run are missing).
        """
        out, hits = os.path.join(self.folder, f"{name}-disturbed-{rng.random()}"), 0
        killed = (-how, 128 + how)
        for _ in range(kills):
            hits += self.run(name, out, rng.random() * self.seconds[name], how) in killed
        status, undisturbed = self.run(name, out), os.path.join(self.folder, name)
        there, here = contents(undisturbed), contents(out)
        differing = [file for file in sorted({*there, *here}) if there.get(file) != here.get(file)]
        if status:
            differing.append(f"exit status {status}")
        if os.path.exists(out + ".part"):
            differing.append("unfinished")
        return hits, differing, len(record_ids(undisturbed) - record_ids(out))

    def run_several(self, name, out, processes, blow=None, delay=0.0, rng=random):
        """The same in several processes; the blow falls `delay` seconds after the first new commit.

        Returns the launcher's status.
        """
        script, flags = self.command(name, out)
        growing = Path(out + ".part", SHARED[name])
        before = size(growing)
        with open(self.stderr, "w") as stderr:
            launcher = torchrun(processes, script, *flags, stderr=stderr)
        while launcher.poll() is None:
            # A resumed run first drops what was not committed.
            before = min(before, size(growing))
            if blow and size(growing) > before:
                time.sleep(delay)
                return strike(launcher, blow, rng)
            time.sleep(0.02)
        return launcher.returncode

    def disturb_several(self, name, numbers, rng):
        """Start the stage, end it in each way and let it finish; each start draws its number of processes.

        Returns ({blow: how many found it alive}, records lost and doubled, what differs from the undisturbed
        run, which has one process).
        """
        out, hits = os.path.join(self.folder, f"{name}-several-{rng.random()}"), {}
        for blow in rng.sample(BLOWS, len(BLOWS)):
            delay = rng.random() * 0.3
            hits[blow] = int(self.run_several(name, out, rng.choice(numbers), blow, delay, rng) != 0)
        status = self.run_several(name, out, rng.choice(numbers))
        assert status == 0, Path(self.stderr).read_text()
        undisturbed = os.path.join(self.folder, name)
        there, here = count_records(undisturbed), count_records(out)
        lost, doubled = (there - here).total(), (here - there).total()
        return {blow: hits[blow] for blow in BLOWS}, lost, doubled, differences(undisturbed, out)


def differences(undisturbed, folder):
    """Names of the files in which runs of one and of several processes differ.

    Bytes of records must be equal. Weights, and the numbers that come of them, may differ by rounding.
    """
    names = {str(p.relative_to(f)) for f in (undisturbed, folder) for p in Path(f).rglob("*.*")}
    pairs = {name: (Path(undisturbed, name), Path(folder, name)) for name in names - {"args.json"}}
    return sorted(name for name, (there, here) in pairs.items() if not is_equal(there, here))


def is_equal(there, here):
    if not (there.exists() and here.exists()):
        return False
    if there.suffix == ".safetensors":
        from safetensors.torch import load_file

        a, b = load_file(there), load_file(here)
        return a.keys() == b.keys() and all((a[k] - b[k]).norm() <= 1e-3 * a[k].norm() for k in a)
    if there.name in ("metrics.json", "metrics.jsonl", "rollouts.jsonl"):
        return is_close(read_rows(there), read_rows(here))
    # The model card has the losses.
    return there.name == "README.md" or there.read_bytes() == here.read_bytes()


def read_rows(path):
    """The rows of a JSON file. Of rollouts, whose order and ids depend on the processes, in one order."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    rows = [{k: v for k, v in json.loads(line).items() if not k.endswith(VOLATILE)} for line in lines]
    if path.name == "rollouts.jsonl":
        rows = [{k: v for k, v in row.items() if k != "id"} for row in rows]
        rows.sort(key=lambda row: (row["step"], row["record"], row["response"]))
    return rows


def count_records(folder):
    """Counter of (file, id) of every record in a folder; of rollouts all else that tells them apart."""
    found = Counter()
    for path in Path(folder).glob("*.jsonl"):
        if path.name == "rollouts.jsonl":
            found.update((row["step"], row["record"], row["response"]) for row in read_rows(path))
        elif path.name != "metrics.jsonl":
            found.update((path.name, row["id"]) for row in read_rows(path))
    return found


def is_close(a, b):
    """Are two JSON values equal up to rounding in their floats?"""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_close(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(is_close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=0.01, abs_tol=1e-3)
    return a == b


def contents(folder):
    """{file: hash} of all files in a folder, without the folder's own path and what depends on a clock."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        data = path.read_bytes().replace(str(folder).encode(), b"")
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            timeless = [{k: v for k, v in row.items() if not k.endswith(VOLATILE)} for row in rows]
            data = repr(timeless).encode()
        if path.name == "args.json":
            # Not the hashes of the inputs: that of a model's folder includes its args.json and so a clock.
            metadata = json.loads(data)
            data = repr((metadata["script"], metadata["args"], list(metadata["inputs"]))).encode()
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
def runner(tmp_path_factory):
    made = Runner(tmp_path_factory.mktemp("kill"))
    for name in STAGES:
        made.reference(name)
    return made


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_was_killed_twice_ends_like_an_undisturbed_one(runner, name):
    assert runner.disturb(name, 2, random.Random(f"kill {name}"))[1:] == ([], 0)


@pytest.mark.parametrize(
    "name, how",
    [
        ("candidates", signal.SIGTERM),
        ("grpo", signal.SIGTERM),
        ("sft", signal.SIGINT),
        ("scored", signal.SIGINT),
        ("eval", signal.SIGINT),
    ],
)
def test_a_stage_that_got_sigterm_or_ctrl_c_ends_like_an_undisturbed_one(runner, name, how):
    assert runner.disturb(name, 1, random.Random(f"term {name}"), how)[1:] == ([], 0)


def test_two_processes_that_got_sigterm_commit_and_one_resumes(runner, tmp_path):
    out = str(tmp_path / "out")
    assert runner.run_several("sft", out, 2, "SIGTERM") == 1
    # Their own line is below the launcher's.
    for _ in range(100):
        last = Path(runner.stderr).read_text().splitlines()[-1]
        time.sleep(0.05 * (not last.startswith(out)))
    assert re.fullmatch(rf"{out}.part: stopped by SIGTERM at step \d+; the same command resumes it", last)
    assert len(list(Path(out + ".part", "state").iterdir())) in (1, 2)
    assert runner.run("sft", out) == 0
    assert differences(os.path.join(runner.folder, "sft"), out) == []


@pytest.fixture
def disk(tmp_path):
    """A function that makes a disk of so many KiB, or changes its size, and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def of_size(kib):
        options = f"size={kib}k" + (",remount" if os.path.ismount(folder) else "")
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
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
def test_a_stage_whose_disk_is_full_says_so_in_one_line_and_resumes_once_there_is_room(
    runner, disk, kib, commits, says
):
    out = disk(kib) / "out"
    assert runner.run("sft", out) == 2
    assert re.fullmatch(rf"sft.py: \S+/{says}.*\n", Path(runner.stderr).read_text())
    # Only complete ones.
    assert len(list(out.parent.glob("out.part/state/*"))) == commits
    disk(200_000)
    assert runner.run("sft", out) == 0 and contents(out) == contents(os.path.join(runner.folder, "sft"))


def test_a_model_that_does_not_fit_says_how_much_it_needs_and_leaves_nothing(disk):
    from medgr2 import loading
    from medgr2.errors import ModelError

    folder = disk(1000)
    with pytest.raises(ModelError, match=r"the model needs \d\.\d+ MiB and 0\.9\d+ MiB are free; make room"):
        loading.save(loading.load(str(ROOT / "toy" / "policy")), folder / "model")
    assert not list(folder.rglob("*.*"))


def test_a_file_that_differs_and_a_record_that_is_lost_are_counted(runner, monkeypatch):
    """The comparison itself can fail: here with a run that holds one more record."""
    shutil.copytree(os.path.join(runner.folder, "candidates"), os.path.join(runner.folder, "more"))
    with open(os.path.join(runner.folder, "more", "candidates.jsonl"), "a") as file:
        file.write('{"id": "one more"}\n')
    monkeypatch.setitem(STAGES, "more", STAGES["candidates"])
    # args.json differs because its --out does.
    assert runner.disturb("more", 0, random.Random(0)) == (0, ["args.json", "candidates.jsonl"], 1)


def test_a_record_a_number_and_a_weight_that_differ_are_found(tmp_path):
    from safetensors.torch import save_file

    for folder, record, loss, weight in (
        ("a", "x", 1.0, 1.0),
        ("b", "x", 1.001, 1.0001),
        ("c", "y", 1.1, 1.1),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "predictions.jsonl").write_text(json.dumps({"id": record}))
        (tmp_path / folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}))
        save_file({"w": torch.full((9,), weight)}, tmp_path / folder / "model.safetensors")
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert differences(tmp_path / "a", tmp_path / "c") == [
        "metrics.jsonl",
        "model.safetensors",
        "predictions.jsonl",
    ]
    assert (count_records(tmp_path / "a") - count_records(tmp_path / "c")).total() == 1


def soak(kills, stages, disturb, runner, command, out):
    """Disturb each stage until all together were hit at least `kills` times; write the result to `out`.

    disturb(runner, name, rng) → (hits, {column: count}, what differs). Returns the disturbed runs that differ
    from the undisturbed one or lost a record.
    """
    from medgr2 import runs

    counts, hits, found = {name: Counter() for name in stages}, Counter(), []
    for name in STAGES:
        runner.reference(name)
    # As many in each stage.
    while unfinished := [name for name in stages if hits[name] * len(stages) < kills]:
        for name in unfinished:
            # The seed of the moments of its kills.
            schedule = f"{name} {counts[name]['runs']}"
            hit, columns, differing = disturb(runner, name, random.Random(schedule))
            hits[name] += hit
            for column, more in {"runs": 1, **columns, "differing runs": int(bool(differing))}.items():
                counts[name][column] += more
            if differing or columns["lost records"]:
                found.append({"schedule": schedule, "differing": differing, **columns})
            print(name, dict(counts[name]), *found, flush=True)
            result = {"command": command, "differences": found, "stages": counts, **runs.environment()}
            runs.write_json(out, result)
    return found


def soak_one(runner, name, rng, how):
    """For `soak`: a run of one process, three times ended by the signal `how`."""
    hits, differing, lost = runner.disturb(name, 3, rng, how)
    return hits, {"kills": hits, "lost records": lost}, differing


def soak_several(runner, name, rng, numbers):
    """For `soak`: a run of several processes, ended in each way."""
    hits, lost, doubled, differing = runner.disturb_several(name, numbers, rng)
    return sum(hits.values()), {**hits, "lost records": lost, "doubled records": doubled}, differing


def kills_table(path):
    """The result of `soak` as Markdown; the last row is the sum of the stages."""
    from medgr2 import cli

    result = json.loads(Path(path).read_text())
    counts = list(result["stages"].values())
    rows = [[name, *count.values()] for name, count in result["stages"].items()]
    rows.append(["all", *(sum(count[field] for count in counts) for field in counts[0])])
    commit, cpus = (result["git"]["commit"] or "?")[:10], result["hardware"]["cpus"]
    note = f"Command `{result['command']}`; commit `{commit}`; {cpus} CPU cores."
    return cli.format_table(rows, ["stage", *counts[0]], markdown=True) + "\n\n" + note


def parse_args():
    from medgr2 import cli

    p = cli.Parser(description=__doc__)
    p.add_argument("--kills", type=int, help="continue until there are so many")
    p.add_argument("--signal", choices=RESULTS, default="SIGKILL", help="what kills it")
    numbers = "kill runs of several processes; each start draws one of these numbers"
    p.add_argument("--processes", type=int, nargs="+", help=numbers)
    cli.add_switch(p, "--readme", "write the tables of docs/reliability.md from the result files")
    return p.parse_args()


def main(args):
    # A job in the background ignores Ctrl-C, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    names = [*RESULTS.values(), PROCESSES_RESULT]
    files = {block: ROOT / "benchmarks" / "results" / f"{block}.json" for block in names}
    found = []
    if args.kills:
        command = f"python tests/test_kill.py --kills {args.kills} "
        if args.processes:
            stages, out = SHARED, files[PROCESSES_RESULT]
            disturb = functools.partial(soak_several, numbers=args.processes)
            command += f"--processes {' '.join(map(str, args.processes))}"
        else:
            stages, out = STAGES, files[RESULTS[args.signal]]
            disturb = functools.partial(soak_one, how=signal.Signals[args.signal])
            command += f"--signal {args.signal}"
        with tempfile.TemporaryDirectory() as folder:
            runner = Runner(folder, ALIKE if args.processes else {})
            found = soak(args.kills, stages, disturb, runner, command, str(out))
        print(kills_table(out))
    if args.readme:
        sys.path.append(str(ROOT / "benchmarks"))
        import readme

        for block, path in files.items():
            if path.exists():
                readme.write_block(block, kills_table(path))
    sys.exit(bool(found))


if __name__ == "__main__":
    main(parse_args())
