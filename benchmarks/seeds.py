"""Runs the default cycle over several seeds, collects its results, and writes their tables.

    python benchmarks/seeds.py --seeds 0 1 2    runs CONTROLS=1 OUT=runs/seed$S SEED=$S bash cycle.sh for each
    python benchmarks/seeds.py --jobs 2         two runs at a time, each with half of the cores
    python benchmarks/seeds.py --collect        reads those finished runs again
    python benchmarks/seeds.py --collect --runs runs/toy --out FILE    reads any finished runs
    python benchmarks/seeds.py --readme         writes the tables from the committed result file

Writes benchmarks/results/toy_cycle.json: accuracies by stage, seed and task, and paired differences between
stages, with 95% intervals over training runs and images (measures.two_level_interval); how good candidates
and reward model were, and their changes over the cycles; seconds, command, commit, versions and hardware.
The last three are those that the runs wrote down. Seconds are those of cycle.sh; with --collect they are
those of all stages together. The log of a run is beside its folder.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme
from collect import (
    count_seconds,
    format_interval,
    format_number,
    list_names,
    measure_by,
    provenance,
    read_answers,
    read_environment,
    read_json,
)

from medgr2 import cli, runs
from medgr2.errors import RunError
from medgr2.prompts import PARADIGMS

RESULT = os.path.join(ROOT, "benchmarks", "results", "toy_cycle.json")
# The folder of each row's evaluation, in a run and in each of its cycles.
STAGES = {
    "base": "eval_base",
    "SFT on expert data": "eval_sft_expert",
    "ceiling: SFT on plenty of expert data": "eval_ceiling",
}
CYCLE_STAGES = {
    "SFT on random": "eval_sft_random",
    "SFT on accepted of cycle 1": "eval_sft_first",
    "SFT on accepted": "eval_sft",
    "+ as many SFT steps": "eval_sft_more",
    "+ GRPO": "eval_grpo",
}
# Runs with CONTROLS=1 have these too.
CONTROLS = ("eval_ceiling", "eval_sft_random", "eval_sft_first", "eval_sft_more")
# Measures of toy/mark.py whose change over the cycles is reported. frozen.json is about cycle 1's candidates.
CHANGES = {
    ("marks", "right_scored"): "right, of all candidates",
    ("frozen", "auroc"): "reward AUROC on the candidates of cycle 1",
}


# ---------------------------------------------------------------------------------------------------------
# From the runs to the result file.


def find_rows(folders):
    """({row: its evaluation's folder in each run}, number of cycles), without the controls that no run has.

    Raises RunError if the runs differ in cycles or controls.
    """
    counts = {count_cycles(folder) for folder in folders}
    if len(counts) != 1 or 0 in counts:
        found = ", ".join(map(str, sorted(counts)))
        raise RunError(f"{folders[0]}: {found} cycles; give finished runs of equally many")
    count, rows = counts.pop(), dict(STAGES)
    for c in range(1, count + 1):
        rows |= {f"cycle {c}: {name}": f"cycle{c}/{part}" for name, part in CYCLE_STAGES.items()}
    kept = {}
    for row, part in rows.items():
        missing = [folder for folder in folders if not os.path.isdir(os.path.join(folder, part))]
        is_control = os.path.basename(part) in CONTROLS
        if missing and not (is_control and missing == folders):
            why = "other runs have this control" if is_control else "the run is not finished"
            raise RunError(f"{missing[0]}: no {part}: {why}; give finished runs of equal CONTROLS")
        if not missing:
            kept[row] = part
    return kept, count


def count_cycles(folder):
    count = 0
    while os.path.isdir(os.path.join(folder, f"cycle{count + 1}")):
        count += 1
    return count


def list_pairs(rows, count):
    """(from, to): the rows to compare. A pair with a control that no run has is left out."""

    def of(name, c=count):
        return f"cycle {c}: {name}"

    pairs = [("base", of("SFT on accepted")), ("base", of("+ GRPO"))]
    pairs += [("SFT on expert data", of("SFT on accepted", 1))]
    for name in ("SFT on accepted", "+ GRPO"):
        pairs += [(of(name, c - 1), of(name, c)) for c in range(2, count + 1)]
    for before, after in (
        ("SFT on random", "SFT on accepted"),
        ("SFT on accepted of cycle 1", "SFT on accepted"),
        ("SFT on accepted", "+ GRPO"),
        ("+ as many SFT steps", "+ GRPO"),
    ):
        pairs += [(of(before, c), of(after, c)) for c in range(1, count + 1)]
    pairs += [(of("+ GRPO"), "ceiling: SFT on plenty of expert data")]
    return [pair for pair in pairs if set(pair) <= set(rows)]


def read_cycle(folder):
    found = {
        "reward": read_json(folder, "reward", "metrics.json"),
        "marks": read_json(folder, "marks.json"),
        "candidates": read_json(folder, "candidates", "metrics.json"),
        "grpo": read_json(folder, "grpo", "metrics.json"),
    }
    # A control too: cycle 1's candidates, scored by the reward model of this cycle.
    if os.path.isfile(os.path.join(folder, "frozen.json")):
        found["frozen"] = read_json(folder, "frozen.json")
    return found


def read_mark(cycle, mark, task):
    """A number that toy/mark.py wrote, of a task or (None) of all; None if it has no value."""
    file, field = mark
    found = cycle[file]["by_task"].get(task, {}) if task else cycle[file]
    return found.get(field)


def mean_of(values):
    """The mean of those that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def measure_change(cycles, mark, number, task=None):
    """A mark in cycle `number` minus that in cycle 1: mean over runs, and by run."""
    by_seed = []
    for of_run in cycles:
        first, later = (read_mark(cycle, mark, task) for cycle in (of_run[0], of_run[number - 1]))
        by_seed.append(None if None in (first, later) else later - first)
    return {"mean": mean_of(by_seed), "by_seed": by_seed}


def measure_changes(cycles):
    """The CHANGES since cycle 1, overall and by task; `cycles`: those of each run."""
    found = []
    for mark in CHANGES:
        file, field = mark
        if any(file not in cycle for of_run in cycles for cycle in of_run):
            continue
        for number in range(2, len(cycles[0]) + 1):
            by_task = {task: measure_change(cycles, mark, number, task) for task in list_tasks(cycles)}
            overall = measure_change(cycles, mark, number)
            found.append({"file": file, "field": field, "cycle": number, **overall, "by_task": by_task})
    return found


def list_tasks(cycles):
    return sorted({task for of_run in cycles for cycle in of_run for task in cycle["marks"]["by_task"]})


def collect(folders, seconds, command=None):
    """The result file of finished runs. Without `command` it is that of the cycles themselves."""
    rows, count = find_rows(folders)
    questions, correct = read_answers(folders, rows)
    arguments = [read_json(folder, "eval_base", "args.json")["args"] for folder in folders]
    controls = "CONTROLS=1 " if any(os.path.basename(part) in CONTROLS for part in rows.values()) else ""
    commands = []
    for args in arguments:
        commands.append(f"{controls}OUT={os.path.dirname(args['out'])} SEED={args['seed']} bash cycle.sh")
    paired = []
    for a, b in list_pairs(rows, count):
        paired.append({"from": a, "to": b, **measure_by(correct[b] - correct[a], questions)})
    cycles = []
    for folder in folders:
        cycles.append([read_cycle(os.path.join(folder, f"cycle{c}")) for c in range(1, count + 1)])
    return {
        "command": command or "; ".join(commands),
        "seeds": [args["seed"] for args in arguments],
        "seconds": seconds,
        "questions": int((questions["run"] == 0).sum()),
        "accuracy": {row: measure_by(right, questions) for row, right in correct.items()},
        "paired": paired,
        "cycles": cycles,
        "changes": measure_changes(cycles),
        **read_environment(folders),
    }


# ---------------------------------------------------------------------------------------------------------
# From the result file to the tables.


def format_seeds(found, form):
    return ", ".join(format_number(value, form) or "none" for value in found["by_seed"])


def summary_tables(result):
    """The same means as accuracy_table without tasks: a row per stage, a column per cycle."""
    cells, cycles = {}, [f"cycle {number}" for number in range(1, len(result["cycles"][0]) + 1)]
    for stage, found in result["accuracy"].items():
        cells[stage] = f"**{found['mean']:.3f}** ({format_interval(found, '.3f')})"
    before = [[stage, cells[stage]] for stage in STAGES if stage in cells]
    by_cycle = []
    for stage in CYCLE_STAGES:
        row = [cells.get(f"{cycle}: {stage}", "") for cycle in cycles]
        if any(row):
            by_cycle.append([stage, *row])
    headers = ["stage", "accuracy (95% interval)"]
    return "\n\n".join([readme.format_table(headers, before), readme.format_table(["", *cycles], by_cycle)])


def accuracy_table(result):
    """Means over seeds, overall with the interval and by task."""
    tasks, rows = list_names(result, "task"), []
    for stage, found in result["accuracy"].items():
        by_task = [f"{found['by_task'][task]['mean']:.3f}" for task in tasks]
        rows.append([stage, f"**{found['mean']:.3f}**", format_interval(found, ".3f"), *by_task])
    return readme.format_table(["stage", "accuracy", "95% interval", *tasks], rows)


def paired_table(result):
    rows = []
    for pair in result["paired"]:
        cells = [f"{pair['mean']:+.3f}", format_interval(pair, "+.3f"), format_seeds(pair, "+.3f")]
        rows.append([f"{pair['from']} → {pair['to']}", *cells])
    return readme.format_table(["paired on the same items", "difference", "95% interval", "by seed"], rows)


def paired_task_table(result):
    tasks, rows = list_names(result, "task"), []
    for pair in result["paired"]:
        cells = []
        for found in (pair["by_task"][task] for task in tasks):
            cells.append(f"{found['mean']:+.3f} ({format_interval(found, '+.3f')})")
        rows.append([f"{pair['from']} → {pair['to']}", *cells])
    return readme.format_table(["difference by task (95% interval)", *tasks], rows)


def seeds_table(result):
    rows = []
    for stage, found in result["accuracy"].items():
        rows.append([stage, *(f"{value:.3f}" for value in found["by_seed"]), f"**{found['mean']:.3f}**"])
    return readme.format_table(["stage", *(f"seed {seed}" for seed in result["seeds"]), "mean"], rows)


def describe_cycle(cycle):
    """{row of the table of candidates: number}, of one cycle of one run."""
    marks, reward, candidates = cycle["marks"], cycle["reward"], cycle["candidates"]
    return {
        "share that the parser keeps": candidates["kept"] / candidates["asked"],
        "share accepted": marks["accepted"] / marks["candidates"],
        "right, of all": marks["right_scored"],
        **{f"right, {paradigm}": marks[f"right_{paradigm}"] for paradigm in PARADIGMS},
        "right, of as many at random": marks["right_random"],
        "right, of the accepted": marks["right_accepted"],
        "reward AUROC, right against wrong": marks["auroc"],
        "the same on the candidates of cycle 1": cycle.get("frozen", {}).get("auroc"),
        "held-out expert AUROC": reward["auroc"],
        "image-swap drop (of 16)": reward["image_swap_drop"],
    }


def format_spread(values):
    """`mean (lowest to highest)` of the numbers that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{mean_of(known):.3f}"
    return f"{mean} ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else mean


def candidates_table(result):
    """One column per cycle. Rows without a value are left out."""
    columns = []
    for of_cycle in zip(*result["cycles"]):
        described = [describe_cycle(cycle) for cycle in of_cycle]
        columns.append({row: format_spread([found[row] for found in described]) for row in described[0]})
    headers = ["generated candidates, mean (lowest to highest seed)"]
    headers += [f"cycle {number}" for number in range(1, len(columns) + 1)]
    rows = [[row, *(column[row] for column in columns)] for row in columns[0]]
    return readme.format_table(headers, [row for row in rows if any(row[1:])])


def candidates_task_table(result):
    """One row per cycle and task, means over seeds."""
    marks = [("marks", "right_scored"), ("marks", "right_accepted"), ("marks", "auroc"), ("frozen", "auroc")]
    rows = []
    for number, of_cycle in enumerate(zip(*result["cycles"]), 1):
        for task in list_tasks(result["cycles"]):
            row = [f"cycle {number}: {task}"]
            for mark in marks:
                values = [read_mark(cycle, mark, task) for cycle in of_cycle if mark[0] in cycle]
                row.append(format_number(mean_of(values)))
            rows.append(row)
    headers = ["candidates by task, mean over seeds", "right, of all", "right, of the accepted"]
    headers += ["reward AUROC", "reward AUROC on the candidates of cycle 1"]
    return readme.format_table(headers, rows)


def changes_table(result):
    """Means over seeds of the CHANGES, without intervals."""
    tasks, rows = list_tasks(result["cycles"]), []
    for change in result["changes"]:
        label = f"{CHANGES[change['file'], change['field']]}, cycle {change['cycle']}"
        by_task = [format_number(change["by_task"][task]["mean"], "+.3f") for task in tasks]
        cells = [format_number(change["mean"], "+.3f"), format_seeds(change, "+.3f"), *by_task]
        rows.append([label, *cells])
    return readme.format_table(["change since cycle 1", "mean", "by seed", *tasks], rows)


def write_tables(path):
    """Write the tables of a result file into README.md and docs/."""
    result = read_json(path)
    source = provenance(result, path)
    tables = {
        "results": [summary_tables],
        "results-seeds": [seeds_table],
        "results-detail": [
            accuracy_table,
            paired_table,
            paired_task_table,
            candidates_table,
            candidates_task_table,
            changes_table,
        ],
    }
    for block, functions in tables.items():
        readme.write_block(block, "\n\n".join([*(table(result) for table in functions), source]))


# ---------------------------------------------------------------------------------------------------------
# The runs themselves.


def run_cycle(seed, folder, threads):
    """Run one cycle with its controls into `folder`, its output into `folder`.log → seconds."""
    more = {"OUT": os.path.relpath(folder, ROOT), "SEED": str(seed), "CONTROLS": "1"}
    environment = os.environ | more | {"OMP_NUM_THREADS": str(threads)}
    print(f"seed {seed}: output in {folder}.log", flush=True)
    start = time.time()
    with open(f"{folder}.log", "w") as log:
        done = subprocess.run(["bash", "cycle.sh"], cwd=ROOT, env=environment, stdout=log, stderr=log)
    if done.returncode:
        raise RunError(f"{folder}.log: cycle.sh: exit status {done.returncode}; the end of the log says why")
    return time.time() - start


def run_cycles(seeds, jobs):
    """Run one cycle per seed, `jobs` at a time → (folders, seconds of each).

    Raises RunError if a folder is there, or if a run fails; what has started goes on to its end.
    """
    folders = [os.path.join(ROOT, "runs", f"seed{seed}") for seed in seeds]
    for folder in folders:
        if os.path.exists(folder):
            # Its stages would be skipped, and whatever made them would be taken for this commit's.
            raise RunError(f"{folder}: there already; remove it, or read it with --collect")
    os.makedirs(os.path.join(ROOT, "runs"), exist_ok=True)
    # Now, so that no two runs install at the same time.
    subprocess.run(["bash", "-c", ". ./setup.sh requirements.txt"], cwd=ROOT, check=True)
    threads = max(1, os.cpu_count() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        return folders, list(pool.map(run_cycle, seeds, folders, [threads] * len(seeds)))


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of the cycle each")
    p.add_argument("--jobs", type=cli.number(int, 1), default=1, help="runs at the same time")
    cli.add_switch(p, "--collect", "run nothing; read finished runs again")
    p.add_argument("--runs", nargs="+", help="with --collect: their folders (runs/seed0, ... by --seeds)")
    p.add_argument("--out", default=RESULT, help="result file")
    cli.add_switch(p, "--readme", "only write the tables, from the committed result file")
    args = p.parse_args()
    if args.runs and not args.collect:
        p.error("--runs goes with --collect")
    return args


def main(args):
    if not args.readme:
        if args.collect:
            folders = args.runs or [os.path.join(ROOT, "runs", f"seed{seed}") for seed in args.seeds]
            seconds = [count_seconds(folder) for folder in folders]
        else:
            folders, seconds = run_cycles(args.seeds, args.jobs)
        jobs = f" --jobs {args.jobs}" if args.jobs > 1 else ""
        command = f"python benchmarks/seeds.py --seeds {' '.join(map(str, args.seeds))}{jobs}"
        runs.write_json(args.out, collect(folders, seconds, None if args.runs else command))
    # The tables are those of the committed file.
    if args.readme or os.path.abspath(args.out) == RESULT:
        write_tables(RESULT)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
