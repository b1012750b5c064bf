"""Seconds, CPU seconds and peak memory of the default cycle by stage.

How they grow with the items, and how they compare with another checkout's.

    python benchmarks/cycle.py --items 1 2 4                 one cycle each, on 1, 2 and 4 times the images
    python benchmarks/cycle.py --against FOLDER --rounds 3   in pairs: this checkout's cycle, then FOLDER's
                                                             (git worktree add FOLDER COMMIT)
    python benchmarks/cycle.py --readme                      writes the table from the committed result file

`cycle.sh` runs as it is. Its PYTHON is a wrapper that measures each process from outside: wall seconds,
user and system CPU seconds (of all threads, also while they spin), peak resident memory. Settings in the
shell are ignored, except for the flags of stages (SFT_FLAGS, ...), which are in `command`. How much of a
stage's work grows with the items, so that a flat row is not taken for a merit:

    all of it    clinic; generate, reward score and mark with the unlabelled images; eval and report with the
                 test images; sft with the records that it learns from, if SFT_FLAGS gives --epochs
    in part      reward train: it computes features of every expert record (--resamples) and tests on those
                 held out, but number and size of the --steps of its heads are fixed
    none of it   grpo, and sft by default: their --steps are fixed (only the checks of their records grow);
                 the seconds in which a process imports and loads

In pairs, stages are matched by output folder. The ratio is that of the sums of their CPU seconds, ours over
theirs, one per round. A stage that only one side has is listed and not in the sums. Writes
benchmarks/results/cycle_DEVICE.json after every run. What else is in it stays, except for rows of items
that were measured in another way (commit, sizes, threads): a table has rows of one kind.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

from medgr2 import cli, runs
from medgr2.errors import RunError

FLAGS = [f"{s}_FLAGS" for s in ("GENERATE", "REWARD", "SCORE", "SFT", "GENERATOR", "GRPO", "EVAL")]
UNSET = "POLICY GENERATOR REWARD_BACKBONE EXPERT REPORTS IMAGES VAL TEST".split()
UNSET += "GENERATE REWARD SFT GRPO EVAL LAUNCH".split()


def parse_args():
    p = cli.Parser(description=__doc__)
    count = cli.number(int, 1)
    p.add_argument("--items", type=count, nargs="+", default=[], help="times the images: one column each")
    p.add_argument("--against", metavar="FOLDER", help="another checkout, to run in turn with this one")
    p.add_argument("--rounds", type=count, default=3, help="pairs of --against")
    p.add_argument("--cycles", type=count, default=1, help="cycles per run")
    sizes = {"nargs": 5, "default": [100, 200, 360, 200, 800], "metavar": "N"}
    p.add_argument("--sizes", type=count, **sizes, help="images at 1 time the items: those of toy/clinic.py")
    p.add_argument("--seed", type=int, default=0, help="of every run")
    p.add_argument("--threads", type=count, default=os.cpu_count(), help="CPU threads of a stage")
    p.add_argument("--out", help="result file (benchmarks/results/cycle_DEVICE.json)")
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    # LOG SCRIPT ARGS...: what the wrapper calls.
    p.add_argument("--stage", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = p.parse_args()
    if not (args.items or args.against or args.readme or args.stage):
        p.error("nothing to measure; give --items or --against")
    if args.against and not os.path.isfile(os.path.join(args.against, "cycle.sh")):
        p.error(f"--against {args.against}: no cycle.sh in it; give the folder of a checkout")
    return args


def measure(log, *command):
    """Run a script, or a module with -m, and add a line about it to `log`. Returns its exit status."""
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, *command], os.environ)
    # Of this child only, and of what it waited for.
    _, status, usage = os.wait4(child, 0)
    is_module = command[0] == "-m"
    script, *rest = command[is_module:]
    line = {
        "script": f"{script.split('.')[-1]}.py" if is_module else os.path.basename(script),
        "command": rest[0] if rest and rest[0].isalpha() else "",
        "out": rest[rest.index("--out") + 1] if "--out" in rest else None,
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    with open(log, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    code = os.waitstatus_to_exitcode(status)
    # Ended by a signal: the status that a shell gives.
    return code if code >= 0 else 128 - code


def cycle_environment(folder, times, args):
    """The environment of a cycle into folder/run, whose processes are measured into folder/log.jsonl."""
    # setup.sh puts the folder of PYTHON first in PATH, so there must be no `python` in it.
    python, log = os.path.join(folder, "measured"), os.path.join(folder, "log.jsonl")
    command = [sys.executable, os.path.abspath(__file__), "--stage", log]
    with open(python, "w", encoding="utf-8") as f:
        f.write(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    os.chmod(python, 0o755)
    settings = {
        "PYTHON": python,
        "OUT": os.path.join(folder, "run"),
        "SEED": str(args.seed),
        "CYCLES": str(args.cycles),
        "OMP_NUM_THREADS": str(args.threads),
        "CLINIC_FLAGS": shlex.join(["--sizes", *(str(n * times) for n in args.sizes)]),
    }
    return os.environ | dict.fromkeys(UNSET, "") | settings


def run_cycle(folder, times, args):
    """Run a checkout's whole cycle → {output, as a path in OUT: what its process took}, in order.

    Raises RunError if it fails.
    """
    with tempfile.TemporaryDirectory() as tmp:
        env, stages = cycle_environment(tmp, times, args), {}
        done = subprocess.run(["bash", "cycle.sh"], cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"{folder}/cycle.sh: exit status {done.returncode}\n{done.stderr[-3000:]}")
        with open(os.path.join(tmp, "log.jsonl"), encoding="utf-8") as f:
            for line in map(json.loads, f):
                out = line.pop("out")
                # The script of the table at the end writes no folder.
                stages[os.path.relpath(out, env["OUT"]) if out else line["script"]] = line
        return stages


def stage_name(out, line):
    """The table's row of a process: what it did, in any cycle; for SFT also on which data."""
    name = os.path.basename(out).removeprefix("sft_")
    if line["script"] == "sft.py":
        return f"sft {'accepted' if name == 'sft' else name}"
    return f"{line['script'][:-3]} {line['command']}".strip()


def merge(stages):
    """{output: measurements} → {row: (processes, seconds, CPU seconds, peak bytes)}; the total is last."""
    found = {}
    named = [(stage_name(out, line), line) for out, line in stages.items()]
    for name, line in named + [("total", line) for line in stages.values()]:
        n, seconds, cpu, peak = found.get(name, (0, 0, 0, 0))
        seconds, cpu = seconds + line["seconds"], cpu + line["cpu_seconds"]
        found[name] = n + 1, seconds, cpu, max(peak, line["peak_bytes"])
    return found


def compare(rounds):
    """Pairs of {output: CPU seconds} → the stages of both sides and of one only, the ratios of the sums."""
    ours, theirs = rounds[0]["ours"], rounds[0]["theirs"]
    both = [out for out in ours if out in theirs]
    ratios = []
    for turn in rounds:
        ratios.append(sum(turn["ours"][out] for out in both) / sum(turn["theirs"][out] for out in both))
    return {
        "rounds": rounds,
        "matched": both,
        "only_ours": [out for out in ours if out not in both],
        "only_theirs": [out for out in theirs if out not in both],
        "ratios": ratios,
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def kind(row):
    """What the rows of one table have in common."""
    return [row["git"]["commit"], *(row[key] for key in ("flags", "threads", "sizes", "cycles", "seed"))]


def provenance(row):
    hardware, versions = row["hardware"], row["versions"]
    return (
        f"Command `{row['command']}`; commit `{(row['git']['commit'] or '?')[:10]}`; "
        f"{', '.join([*hardware['gpus'], ''])}OMP_NUM_THREADS={row['threads']}, {hardware['cpus']} CPU cores "
        f"({hardware['machine']}), torch {versions['torch']}, transformers {versions['transformers']}."
    )


def items_table(items):
    """Markdown: one row per stage, each measurement in as many columns as there are numbers of items."""
    times = sorted(items, key=int)
    merged, rows = [merge(items[t]["stages"]) for t in times], []
    headers = [f"{what} {t}x" for what in ("seconds", "CPU s", "peak MB") for t in times]
    for name, (processes, *_) in merged[0].items():
        seconds = [f"{found[name][1]:.1f}" for found in merged]
        cpu = [f"{found[name][2]:.1f}" for found in merged]
        peak = [f"{found[name][3] / 1e6:.0f}" for found in merged]
        rows.append([name, processes, *seconds, *cpu, *peak])
    table = readme.format_table(["stage", "processes", *headers], rows)
    first = items[times[0]]
    sizes = f"Images in expert, reports, unlabelled, val, test at 1x: {first['sizes']}."
    return f"{table}\n\n{sizes} {provenance(first)}"


def pair_table(result):
    """CPU seconds by matched stage, medians over rounds, and their sum."""
    rows = []
    for name, outs in [*((out, [out]) for out in result["matched"]), ("sum", result["matched"])]:
        ours, theirs = (
            statistics.median(sum(turn[side][out] for out in outs) for turn in result["rounds"])
            for side in ("ours", "theirs")
        )
        rows.append((name, ours, theirs, ours / theirs))
    return cli.format_table(rows, ("stage, CPU seconds", "ours", "theirs", "ours/theirs"))


def pair_line(result):
    ratio, unmatched = result["ratio"], ""
    for side in ("ours", "theirs"):
        if result[f"only_{side}"]:
            unmatched += f"; only in {side}, not in the sums: {', '.join(result[f'only_{side}'])}"
    return (
        f"Against commit `{(result['theirs']['commit'] or '?')[:10]}`, in pairs: CPU seconds of the "
        f"{len(result['matched'])} stages of both, ours over theirs, {ratio['median']:.3f} "
        f"({ratio['low']:.3f} to {ratio['high']:.3f}, {len(result['ratios'])} rounds){unmatched}. "
        f"{provenance(result)}"
    )


def format_tables(result):
    """The table of items and a line on the pairs, as far as they have been measured."""
    parts = [items_table(result["items"])] if result.get("items") else []
    parts += [pair_line(result["against"])] if result.get("against") else []
    return "\n\n".join(parts)


def environment():
    """runs.environment of a process that has torch, and so knows the GPUs."""
    code = "import json, sys; sys.path[0] = sys.argv[1]; import torch; from medgr2 import runs; "
    code += "print(json.dumps(runs.environment()))"
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{done.stderr.strip().splitlines()[-1]}; run it with a python that has torch")
    return json.loads(done.stdout)


def find_commit(folder):
    """Commit of another checkout, of any age, and whether files in it have changed."""

    def git(*command):
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def main(args):
    if args.stage:
        sys.exit(measure(*args.stage))
    here = {} if args.readme else environment()
    device = "cuda" if here and here["hardware"]["gpus"] else "cpu"
    out = args.out or os.path.join(ROOT, "benchmarks", "results", f"cycle_{device}.json")
    result = {"items": {}}
    if args.readme and not os.path.exists(out):
        raise RunError(f"{out}: no such file; measure first")
    if os.path.exists(out):
        with open(out, encoding="utf-8") as f:
            result = json.load(f)
    if args.readme:
        return readme.write_block("cycle", format_tables(result))
    flags = [f"{k}={shlex.quote(os.environ[k])}" for k in FLAGS if os.environ.get(k)]
    given = ["FOLDER" if word == args.against else shlex.quote(word) for word in sys.argv[1:]]
    about = {
        "command": " ".join([*flags, "python benchmarks/cycle.py", *given]),
        "flags": flags,
        **{key: getattr(args, key) for key in ("threads", "sizes", "cycles", "seed")},
        **here,
    }
    for times in args.items:
        alike = {t: row for t, row in result["items"].items() if kind(row) == kind(about)}
        result["items"] = alike | {str(times): about | {"stages": run_cycle(ROOT, times, args)}}
        runs.write_json(out, result)
        print(items_table(result["items"]), flush=True)
    if not args.against:
        return
    theirs, rounds = find_commit(args.against), []
    for k in range(args.rounds):
        turn = {}
        for side, folder in (("ours", ROOT), ("theirs", args.against)):
            stages = run_cycle(folder, 1, args)
            turn[side] = {name: line["cpu_seconds"] for name, line in stages.items()}
        rounds.append(turn)
        result["against"] = about | {"theirs": theirs} | compare(rounds)
        runs.write_json(out, result)
        print(f"round {k}\n{pair_table(result['against'])}\n{pair_line(result['against'])}", flush=True)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
