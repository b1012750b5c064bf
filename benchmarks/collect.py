"""What the accuracy scripts of benchmarks/ share, and the end of those that run stages by a shell script.

    python benchmarks/collect.py ablations --runs runs/ablations/seed0 runs/ablations/seed1 \\
        --rows full=full/cycle3/eval_grpo "no GRPO"=no_grpo/cycle3/eval_grpo --against full

Each row is an evaluation that every run has, by its folder in the run. Writes benchmarks/results/NAME.json:
accuracies by row and seed, overall, by task and by modality, and their differences from the row --against,
paired on the same questions, with 95% intervals over training runs and images together
(measures.two_level_interval); seconds, commit, versions and hardware that the runs wrote down. Then the table
of docs/results.md between <!-- NAME --> and <!-- /NAME -->.
"""

import datetime
import glob
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

from medgr2 import cli, measures, records, runs
from medgr2.errors import RunError

RESULTS = os.path.join(ROOT, "benchmarks", "results")
FIELDS = ("task", "modality")


def read_json(*path):
    path = os.path.join(*path)
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}; give finished runs of the cycle") from None


def read_answers(folders, rows):
    """(questions, {row: 1.0 for each right answer, else 0.0 (n,)}): the test answers of all runs together.

    `rows`: {name: its evaluation's folder in each of `folders`}. `questions` has "run" (its number), "image",
    "task" and "modality" (n,). Raises RunError if two rows differ in theirs.
    """
    import numpy as np

    asked, correct, first = {}, {}, next(iter(rows))
    for row, part in rows.items():
        asked[row], right = [], []
        for run, folder in enumerate(folders):
            path = os.path.join(folder, part, "predictions.jsonl")
            fields = ("id", "image_hash", "task", "correct")
            for record in records.read_records(path, fields, records.ANYWHERE):
                kind = record["task"], record.get("modality", "")
                asked[row].append((run, record["image_hash"], *kind, record["id"]))
                right.append(record["correct"])
        if asked[row] != asked[first]:
            rule = "give runs whose rows share one test file"
            raise RunError(f"{row}: not the test questions of {first}; {rule}")
        correct[row] = np.array(right, float)
    names = "run", "image", "task", "modality"
    return {name: np.array(column) for name, column in zip(names, zip(*asked[first]))}, correct


def measure(values, questions):
    """The mean over runs of each run's mean of `values` (n,), its interval, and the means by run."""
    run = questions["run"]
    by_seed = [float(values[run == number].mean()) for number in range(max(run) + 1)]
    low, high = measures.two_level_interval(values, questions["image"], run, 0)
    return {"mean": sum(by_seed) / len(by_seed), "low": low, "high": high, "by_seed": by_seed}


def measure_by(values, questions, fields=("task",)):
    """What `measure` returns, of all questions and, under "by_FIELD", of each task's (or modality's)."""
    found = measure(values, questions)
    for field in fields:
        by = found[f"by_{field}"] = {}
        for name in sorted(set(questions[field])):
            own = questions[field] == name
            part = {key: column[own] for key, column in questions.items()}
            by[str(name)] = measure(values[own], part)
    return found


def mean_of(values):
    """The mean of those that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def read_stages(folder):
    """The args.json of every stage of a run. Raises RunError if there is none."""
    paths = glob.glob(os.path.join(glob.escape(folder), "**", "args.json"), recursive=True)
    if not paths:
        raise RunError(f"{folder}: no stage has run there; give folders that cycle.sh or a script here wrote")
    return [read_json(path) for path in sorted(paths)]


def count_seconds(folder):
    """From the start of the run's first stage to the end of its last."""
    stages = read_stages(folder)
    first = min(datetime.datetime.fromisoformat(stage["started"]) for stage in stages)
    last = max(datetime.datetime.fromisoformat(stage["ended"]) for stage in stages)
    return (last - first).total_seconds()


def read_environment(folders):
    """Versions, commit and hardware as all stages of all runs wrote them. Raises RunError if they differ."""
    found = []
    for stage in (stage for folder in folders for stage in read_stages(folder)):
        environment = {key: stage[key] for key in ("versions", "git", "hardware")}
        if environment not in found:
            found.append(environment)
    if len(found) != 1:
        raise RunError(
            f"{folders[0]}: {len(found)} commits, machines or sets of versions; one result has one"
        )
    return found[0]


# ---------------------------------------------------------------------------------------------------------
# Tables.


def format_number(value, form=".3f"):
    """An empty cell for None."""
    return "" if value is None else format(value, form)


def format_interval(found, form):
    return f"{found['low']:{form}} to {found['high']:{form}}" if found["low"] is not None else ""


def format_seeds(found, form):
    return ", ".join(format_number(value, form) or "none" for value in found["by_seed"])


def list_names(result, field):
    """The tasks (or modalities) of a result's accuracies."""
    return list(next(iter(result["accuracy"].values()))[f"by_{field}"])


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


def provenance(result, path):
    hardware, versions = result["hardware"], result["versions"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpus']} CPU cores ({hardware['machine']})"
    minutes = ", ".join(f"{seconds / 60:.1f}" for seconds in result["seconds"])
    return (
        f"Command `{result['command']}`; {result['questions']} test questions per seed; "
        f"commit `{(result['git']['commit'] or '?')[:10]}`; {machine}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {minutes} minutes per seed. "
        f"Result file: `{os.path.relpath(path, ROOT)}`."
    )


def rows_table(result, against, field):
    """A row per row: accuracy, its difference from the row `against`, and the accuracy by `field`."""
    names, lines = list_names(result, field), []
    differences = {pair["to"]: pair for pair in result["paired"]}
    for row, found in result["accuracy"].items():
        pair = differences.get(row)
        difference = f"{pair['mean']:+.3f} ({format_interval(pair, '+.3f')})" if pair else ""
        by = [f"{found[f'by_{field}'][name]['mean']:.3f}" for name in names]
        lines.append([row, f"**{found['mean']:.3f}** ({format_interval(found, '.3f')})", difference, *by])
    return readme.format_table(["", "accuracy (95% interval)", f"minus *{against}*", *names], lines)


# ---------------------------------------------------------------------------------------------------------


def collect(folders, rows, against, command):
    """The result file of the runs in `folders`."""
    questions, correct = read_answers(folders, rows)
    paired = []
    for row, right in correct.items():
        if row != against:
            found = measure_by(right - correct[against], questions, FIELDS)
            paired.append({"from": against, "to": row, **found})
    first = next(iter(rows.values()))
    return {
        "command": command,
        "seeds": [read_json(folder, first, "args.json")["args"]["seed"] for folder in folders],
        "seconds": [count_seconds(folder) for folder in folders],
        "questions": int((questions["run"] == 0).sum()),
        "accuracy": {row: measure_by(right, questions, FIELDS) for row, right in correct.items()},
        "paired": paired,
        **read_environment(folders),
    }


def format_tables(result, path):
    """The tables of a result and where it comes from, in Markdown."""
    tables = [rows_table(result, result["paired"][0]["from"], field) for field in FIELDS]
    return "\n\n".join([*tables, provenance(result, path)])


def parse_row(text):
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise RunError(f"--rows {text}: give NAME=FOLDER")
    return name, folder


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("name", help="of the result file and of the table")
    p.add_argument("--runs", required=True, nargs="+", help="a folder per seed")
    p.add_argument("--rows", required=True, nargs="+", metavar="NAME=FOLDER", help="evaluations in each run")
    p.add_argument(
        "--against", required=True, metavar="NAME", help="the row that the others are compared with"
    )
    p.add_argument("--command", help="what made the runs, for the table (the script of that NAME)")
    cli.add_switch(p, "--print", "print the table and write nothing")
    return p.parse_args()


def main(args):
    rows = dict(parse_row(text) for text in args.rows)
    if args.against not in rows:
        raise RunError(f"--against {args.against}: not among --rows: {', '.join(rows)}")
    path = os.path.join(RESULTS, f"{args.name}.json")
    command = args.command or f"bash benchmarks/{args.name}.sh"
    result = collect(args.runs, rows, args.against, command)
    if args.print:
        return print(format_tables(result, path))
    runs.write_json(path, result)
    readme.write_block(args.name, format_tables(result, path))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
