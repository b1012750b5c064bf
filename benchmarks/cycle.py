"""Seconds, CPU seconds and peak memory of the default cycle by stage; how they grow with the items; and against another checkout's.

    python benchmarks/cycle.py --items 1 2 4                 one cycle each, on a clinic of 1, 2 and 4 times the images
    python benchmarks/cycle.py --against FOLDER --rounds 3   in pairs: this checkout's cycle, then FOLDER's (git worktree add FOLDER COMMIT)
    python benchmarks/cycle.py --readme                      writes the README's table anew, from the committed result file

`cycle.sh` runs as it is; its PYTHON is a wrapper that measures each process from outside: wall seconds, user and system CPU seconds (of
all threads, also where they spin while they wait), peak resident memory. Settings in the shell are not heeded, but for the flags of
stages (SFT_FLAGS, ...), which stand in `command`. What of a stage's work grows with the items, so that no flat row is taken for a virtue:

    all of it    clinic; generate, reward score and mark with the unlabelled images; eval and report with the test images; sft with the
                 records it learns from (its epochs are fixed, not its steps)
    in part      reward train: it reads features of every expert record (--resamples) and tests on those held out, but the --steps of
                 its heads are fixed, in number and size
    none of it   grpo: --steps of --prompts questions, a watch of --watch-items (only its look for test images among its records grows);
                 and what every process begins with, a few seconds of importing and loading

In pairs, stages are matched by output folder. The ratio is of the sums of their CPU seconds, ours over theirs, one a round; a stage that
one side alone has is listed and not in the sums. Writes benchmarks/results/cycle_DEVICE.json after every run; what else is in it stays, but
for rows of items that were measured otherwise (commit, sizes, threads): a table is of one kind.
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
UNSET = "POLICY GENERATOR REWARD_BACKBONE EXPERT REPORTS IMAGES VAL TEST GENERATE REWARD SFT GRPO EVAL LAUNCH".split()


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument(
        "--items",
        type=cli.number(int, 1),
        nargs="+",
        default=[],
        help="times the clinic's images: a row of the table each",
    )
    p.add_argument("--against", metavar="FOLDER", help="another checkout, to run in turn with this one")
    p.add_argument("--rounds", type=cli.number(int, 1), default=3, help="pairs of --against")
    p.add_argument("--cycles", type=cli.number(int, 1), default=1, help="cycles of a run")
    p.add_argument(
        "--sizes",
        type=cli.number(int, 1),
        nargs=5,
        default=[100, 200, 400, 200, 800],
        metavar="N",
        help="images at 1 time the items: toy/clinic.py's own",
    )
    p.add_argument("--seed", type=int, default=0, help="of every run")
    p.add_argument(
        "--threads", type=cli.number(int, 1), default=os.cpu_count(), help="CPU threads of a stage"
    )
    p.add_argument("--out", help="result file (benchmarks/results/cycle_DEVICE.json)")
    p.add_argument(
        "--readme",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="only write the README's table, from the result file",
    )
    # LOG SCRIPT ARGS...: what the wrapper calls
    p.add_argument("--stage", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = p.parse_args()
    if not (args.items or args.against or args.readme or args.stage):
        p.error("nothing to measure; give --items or --against")
    if args.against and not os.path.isfile(os.path.join(args.against, "cycle.sh")):
        p.error(f"--against {args.against}: no cycle.sh in it; give the folder of a checkout")
    return args


def measure(log, script, *rest):
    """Run a script in a process of its own and add a line about it to `log`; returns its exit status."""
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, script, *rest], os.environ)
    # this child alone, and what it waited for
    _, status, usage = os.wait4(child, 0)
    line = {
        "script": os.path.basename(script),
        "command": rest[0] if rest and rest[0].isalpha() else "",
        "out": rest[rest.index("--out") + 1] if "--out" in rest else None,
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    with open(log, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    code = os.waitstatus_to_exitcode(status)
    # by a signal: as a shell says it
    return code if code >= 0 else 128 - code


def run_cycle(folder, times, args):
    """A checkout's whole cycle, afresh → {output, as a path in OUT: what its process took}, in order. Raises RunError if it fails."""
    with tempfile.TemporaryDirectory() as tmp:
        log, out = os.path.join(tmp, "log.jsonl"), os.path.join(tmp, "run")
        # setup.sh puts its folder first in PATH: there must be no `python` in it
        python = os.path.join(tmp, "measured")
        with open(python, "w", encoding="utf-8") as f:
            f.write(
                f'#!/bin/sh\nexec {shlex.join([sys.executable, os.path.abspath(__file__), "--stage", log])} "$@"\n'
            )
        os.chmod(python, 0o755)
        env = (
            os.environ
            | dict.fromkeys(UNSET, "")
            | {
                "PYTHON": python,
                "OUT": out,
                "SEED": str(args.seed),
                "CYCLES": str(args.cycles),
                "OMP_NUM_THREADS": str(args.threads),
                "CLINIC_FLAGS": shlex.join(["--sizes", *(str(n * times) for n in args.sizes)]),
            }
        )
        done = subprocess.run(["bash", "cycle.sh"], cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"{folder}/cycle.sh: exit status {done.returncode}\n{done.stderr[-3000:]}")
        with open(log, encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
    for line in lines:
        where = line.pop("out")
        # the table's script writes no folder
        line["of"] = os.path.relpath(where, out) if where else line["script"]
    return {line.pop("of"): line for line in lines}


def role(out, line):
    """The table's row of a process: what it did, whatever the cycle; for SFT also on which data."""
    name = os.path.basename(out).removeprefix("sft_")
    return (
        f"sft {'accepted' if name == 'sft' else name}"
        if line["script"] == "sft.py"
        else f"{line['script'][:-3]} {line['command']}".strip()
    )


def merge(stages):
    """{output: measurements} → {row of the table: processes, seconds, CPU seconds, peak bytes}, the last row the total."""
    found = {}
    for name, line in [(role(*s), s[1]) for s in stages.items()] + [
        ("total", line) for line in stages.values()
    ]:
        n, seconds, cpu, peak = found.get(name, (0, 0, 0, 0))
        found[name] = (
            n + 1,
            seconds + line["seconds"],
            cpu + line["cpu_seconds"],
            max(peak, line["peak_bytes"]),
        )
    return found


def compare(rounds):
    """Pairs of {output: CPU seconds} → the stages of both and of one side alone, the ratio of the sums over the former."""
    ours, theirs = rounds[0]["ours"], rounds[0]["theirs"]
    both = [o for o in ours if o in theirs]
    ratios = [sum(r["ours"][o] for o in both) / sum(r["theirs"][o] for o in both) for r in rounds]
    return {
        "rounds": rounds,
        "matched": both,
        "only_ours": [o for o in ours if o not in both],
        "only_theirs": [o for o in theirs if o not in both],
        "ratios": ratios,
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def kind(row):
    """What rows of one table have in common."""
    return [row["git"]["commit"], *(row[k] for k in ("flags", "threads", "sizes", "cycles", "seed"))]


def source(row):
    h, v = row["hardware"], row["versions"]
    return (
        f"Command `{row['command']}`; commit `{(row['git']['commit'] or '?')[:10]}`; {', '.join([*h['gpus'], ''])}OMP_NUM_THREADS={row['threads']}, "
        f"{h['cpus']} CPU cores ({h['machine']}), torch {v['torch']}, transformers {v['transformers']}."
    )


def items_table(items):
    """Markdown: a row a stage, each measurement in as many columns as there are numbers of items."""
    times = sorted(items, key=int)
    rows = [merge(items[t]["stages"]) for t in times]
    heads = [f"{what} {t}x" for what in ("seconds", "CPU s", "peak MB") for t in times]
    lines = ["| stage | processes | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + len(heads))]
    for name, first in rows[0].items():
        cells = [
            form(row[name][k])
            for k, form in ((1, "{:.1f}".format), (2, "{:.1f}".format), (3, lambda b: f"{b / 1e6:.0f}"))
            for row in rows
        ]
        lines.append(f"| {name} | {first[0]} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"Images in expert, reports, unlabelled, val, test at 1x: {items[times[0]]['sizes']}. {source(items[times[0]])}",
        ]
    )


def pair_table(a):
    """CPU seconds by matched stage, medians over rounds, and the sum."""
    middle = lambda side, outs: statistics.median([sum(r[side][o] for o in outs) for r in a["rounds"]])  # noqa: E731
    rows = [
        (name, middle("ours", outs), middle("theirs", outs))
        for name, outs in [*((o, [o]) for o in a["matched"]), ("sum", a["matched"])]
    ]
    return cli.format_table(
        [(*r, r[1] / r[2]) for r in rows], ("stage, CPU seconds", "ours", "theirs", "ours/theirs")
    )


def pair_line(a):
    r = a["ratio"]
    alone = [
        f"; in {whose} alone, not in the sums: {', '.join(a[f'only_{whose}'])}"
        for whose in ("ours", "theirs")
        if a[f"only_{whose}"]
    ]
    return (
        f"Against commit `{(a['theirs']['commit'] or '?')[:10]}`, in pairs: CPU seconds of the {len(a['matched'])} stages of both, "
        f"ours over theirs, {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f}, {len(a['ratios'])} rounds){''.join(alone)}. {source(a)}"
    )


def readme_text(result):
    """The README's block: the table of items and a line on the pairs, each where it has been measured."""
    return "\n\n".join(
        show(result[part])
        for part, show in (("items", items_table), ("against", pair_line))
        if result.get(part)
    )


def machine(folder):
    """runs.environment of a checkout, asked of a process that has torch, so that it knows the GPUs."""
    code = "import json, sys; sys.path[0] = sys.argv[1]; import torch, runs; print(json.dumps(runs.environment()))"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    if done.returncode:
        raise RunError(
            f"{folder}: {done.stderr.strip().splitlines()[-1]}; give the folder of a checkout, and a python that has torch"
        )
    return json.loads(done.stdout)


def main(args):
    if args.stage:
        sys.exit(measure(*args.stage))
    here = {} if args.readme else machine(ROOT)
    out = args.out or os.path.join(
        ROOT, "benchmarks", "results", f"cycle_{'cuda' if here and here['hardware']['gpus'] else 'cpu'}.json"
    )
    result = {"items": {}}
    if args.readme and not os.path.exists(out):
        raise RunError(f"{out}: no such file; measure first")
    if os.path.exists(out):
        with open(out, encoding="utf-8") as f:
            result = json.load(f)
    if args.readme:
        return readme.write_block("cycle", readme_text(result))
    flags = [f"{k}={shlex.quote(os.environ[k])}" for k in FLAGS if os.environ.get(k)]
    command = " ".join(
        [
            *flags,
            "python benchmarks/cycle.py",
            *("FOLDER" if a == args.against else shlex.quote(a) for a in sys.argv[1:]),
        ]
    )
    about = {
        "command": command,
        "flags": flags,
        **{k: getattr(args, k) for k in ("threads", "sizes", "cycles", "seed")},
        **here,
    }
    for times in args.items:
        alike = {t: row for t, row in result["items"].items() if kind(row) == kind(about)}
        result["items"] = alike | {str(times): about | {"stages": run_cycle(ROOT, times, args)}}
        runs.write_json(out, result)
        print(items_table(result["items"]), flush=True)
    if not args.against:
        return
    theirs, rounds = machine(args.against)["git"], []
    for k in range(args.rounds):
        pair = {
            side: run_cycle(folder, 1, args) for side, folder in (("ours", ROOT), ("theirs", args.against))
        }
        rounds.append(
            {side: {o: line["cpu_seconds"] for o, line in stages.items()} for side, stages in pair.items()}
        )
        result["against"] = about | {"theirs": theirs} | compare(rounds)
        runs.write_json(out, result)
        print(f"round {k}\n{pair_table(result['against'])}\n{pair_line(result['against'])}", flush=True)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
