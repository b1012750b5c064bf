"""What the accuracy scripts of benchmarks/ share, and the end of those that run stages by a shell script.

    python benchmarks/collect.py ablations --runs runs/ablations/seed0 runs/ablations/seed1 \\
        --rows full=full/cycle3/eval_grpo "no GRPO"=sft/cycle3/eval_grpo --against full \\
        --command "bash benchmarks/ablations.sh"

Each row is an evaluation that every run has, by its folder in the run. Writes benchmarks/results/NAME.json:
accuracies by row and seed, overall, by task and by modality, and their differences from the row --against,
paired on the same questions, with 95% intervals over training runs and images together
(measures.two_level_interval); seconds, commit, versions and hardware that the runs wrote down. Then the table
of docs/results.md between <!-- NAME --> and <!-- /NAME -->.

    python benchmarks/collect.py --readme        writes the tables anew, from the committed result files
"""

import datetime
import glob
import os
import sys
from operator import itemgetter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

from medgr2 import cli, measures, records, runs
from medgr2.errors import RunError

RESULTS = os.path.join(ROOT, "benchmarks", "results")
# What marks.json says of a cycle's candidates, and the columns that show it.
MARKS = {"right_scored": "right, of scored", "accepted": "accepted", "right_accepted": "right, of accepted"}
# Columns that a table can have beside each other with a difference in each.
MOST_COLUMNS = 5


def read_json(*path):
    return runs.read_json(os.path.join(*path), "give finished runs of the cycle")


def read_answers(folders, rows, kind_of=None, only=None):
    """(questions, {row: 1.0 for each right answer, else 0.0 (n,)}): the test answers of all runs together.

    `rows`: {name: its evaluation's folder in each of `folders`}. `questions` has "run" (its number), "image",
    "task" and "modality" (n,), and "kind", what `kind_of` says of a record. `only` says which records count.
    Raises RunError if two rows differ in theirs.
    """
    import numpy as np

    asked, correct, first = {}, {}, next(iter(rows))
    for row, part in rows.items():
        asked[row], right = [], []
        for run, folder in enumerate(folders):
            path = os.path.join(folder, part, "predictions.jsonl")
            needed = ("id", "image_hash", "task", "correct")
            found = filter(only, records.read_records(path, needed, records.ANYWHERE))
            for record in sorted(found, key=itemgetter("id")):
                fields = record["task"], record.get("modality", ""), kind_of(record) if kind_of else ""
                asked[row].append((run, record["image_hash"], *fields, record["id"]))
                right.append(record["correct"])
        if asked[row] != asked[first]:
            rule = "give runs whose rows share one test file"
            raise RunError(f"{row}: not the test questions of {first}; {rule}")
        correct[row] = np.array(right, float)
    names = "run", "image", "task", "modality", "kind"
    return {name: np.array(column) for name, column in zip(names, zip(*asked[first]))}, correct


def measure(values, questions):
    """The mean over runs of each run's mean of `values` (n,), its interval, and the means by run.

    A run without such questions is left out.
    """
    run = questions["run"]
    by_seed = [float(values[run == number].mean()) for number in sorted(set(run.tolist()))]
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


def read_marks(folders, rows):
    """{row: [{field of MARKS: of each run, "by_task": {task: the same}}]}, of its variant's cycles."""
    found = {}
    for row, part in rows.items():
        paths = glob.glob(os.path.join(glob.escape(folders[0]), part.split("/")[0], "cycle*", "marks.json"))
        names = sorted(os.path.relpath(path, folders[0]) for path in paths)
        marks = [[read_json(folder, name) for folder in folders] for name in names]
        found[row] = [columns_of(cycle) for cycle in marks]
        for cycle, columns in zip(marks, found[row]):
            tasks = sorted(cycle[0]["by_task"])
            columns["by_task"] = {task: columns_of([run["by_task"][task] for run in cycle]) for task in tasks}
    return found


def columns_of(marks):
    return {field: [run[field] for run in marks] for field in MARKS}


def read_stages(folder):
    """The args.json of every stage of a run. Raises RunError if there is none."""
    found = glob.glob(os.path.join(glob.escape(folder), "**", "args.json"), recursive=True)
    # A stage that two variants share is one.
    paths = {os.path.realpath(path) for path in found}
    if not paths:
        raise RunError(f"{folder}: no stage has run there; give folders that cycle.sh or a script here wrote")
    return [read_json(path) for path in sorted(paths)]


def count_seconds(folder):
    """Of all stages of the run together, without what was between them."""
    total = 0.0
    for stage in read_stages(folder):
        started, ended = (datetime.datetime.fromisoformat(stage[key]) for key in ("started", "ended"))
        total += (ended - started).total_seconds()
    return total


def read_environment(folders):
    """Versions, commit and hardware as all stages of all runs wrote them. Raises RunError if they differ.

    The checkout is dirty if it was for any: results that were written in the meantime make it so.
    """
    stages, found = [stage for folder in folders for stage in read_stages(folder)], []
    dirty = any(stage["git"].get("dirty") for stage in stages)
    for stage in stages:
        environment = {key: stage[key] for key in ("versions", "hardware")}
        environment["git"] = stage["git"] | {"dirty": dirty}
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


def list_names(result, field):
    """The tasks (or modalities) of a result's accuracies."""
    return list(next(iter(result["accuracy"].values()))[f"by_{field}"])


def provenance(result, path):
    hardware, versions = result["hardware"], result["versions"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpus']} CPU cores ({hardware['machine']})"
    minutes = ", ".join(f"{seconds / 60:.1f}" for seconds in result["seconds"])
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"Command `{result['command']}`; seeds {seeds}; {result['questions']} test questions per seed; "
        f"commit `{(result['git']['commit'] or '?')[:10]}`; {machine}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {minutes} minutes per seed. "
        f"Result file: `{os.path.relpath(path, ROOT)}`."
    )


def rows_table(result, field):
    """One line per row: accuracy, overall and by `field`, and its difference from the row "against".

    With more columns than MOST_COLUMNS the differences by `field` are in the result file only.
    """
    names, lines = list_names(result, field), []
    pairs = {pair["to"]: pair for pair in result["paired"]}
    for row, found in result["accuracy"].items():
        pair = pairs.get(row)
        line = [row, f"**{found['mean']:.3f}** ({format_interval(found, '.3f')})", format_difference(pair)]
        for name in names:
            difference = format_difference(pair and pair[f"by_{field}"][name])
            mean = f"{found[f'by_{field}'][name]['mean']:.3f}"
            line.append(f"{mean}, {difference}" if pair and len(names) <= MOST_COLUMNS else mean)
        lines.append(line)
    return readme.format_table(["", "accuracy (95% interval)", f"minus *{result['against']}*", *names], lines)


def format_difference(pair):
    return f"{pair['mean']:+.3f} ({format_interval(pair, '+.3f')})" if pair else ""


def candidates_table(marks):
    """One line per row: what read_marks found, means over the runs, cycle by cycle."""
    lines = []
    for row, cycles in marks.items():
        cells = [row]
        for field in MARKS:
            means = [sum(cycle[field]) / len(cycle[field]) for cycle in cycles]
            cells.append(", ".join(f"{mean:.0f}" if field == "accepted" else f"{mean:.3f}" for mean in means))
        lines.append(cells)
    return readme.format_table(["candidates, cycle by cycle", *MARKS.values()], lines)


# ---------------------------------------------------------------------------------------------------------


def collect(folders, rows, against, command, kind_of=None, only=None, candidates=False):
    """The result file of the runs in `folders`."""
    fields = ("task", "modality") if kind_of is None else ("kind", "task", "modality")
    questions, correct = read_answers(folders, rows, kind_of, only)
    paired = []
    for row, right in correct.items():
        if row != against:
            found = measure_by(right - correct[against], questions, fields)
            paired.append({"from": against, "to": row, **found})
    first = next(iter(rows.values()))
    return {
        "command": command,
        "seeds": [read_json(folder, first, "args.json")["args"]["seed"] for folder in folders],
        "seconds": [count_seconds(folder) for folder in folders],
        "questions": int((questions["run"] == 0).sum()),
        "fields": fields,
        "against": against,
        "accuracy": {row: measure_by(right, questions, fields) for row, right in correct.items()},
        "paired": paired,
        **({"candidates": read_marks(folders, rows)} if candidates else {}),
        **read_environment(folders),
    }


def format_tables(result, path):
    """The tables of a result and where it comes from, in Markdown."""
    tables = [rows_table(result, field) for field in result["fields"]]
    tables += [candidates_table(result["candidates"])] if "candidates" in result else []
    return "\n\n".join([*tables, provenance(result, path)])


def write_committed_tables():
    """The tables of all result files that `collect` wrote."""
    for path in glob.glob(os.path.join(RESULTS, "*.json")):
        result = read_json(path)
        if {"against", "fields"} <= result.keys():
            readme.write_block(os.path.basename(path).removesuffix(".json"), format_tables(result, path))


def parse_rows(texts, against):
    """{name: folder} of NAME=FOLDER each. Raises RunError for another form, a name twice, or a single row."""
    rows = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and folder) or name in rows:
            raise RunError(f"--rows {text}: give NAME=FOLDER, each NAME once")
        rows[name] = folder
    if against not in rows or len(rows) == 1:
        raise RunError(f"--against {against}: give one of --rows, and another row: {', '.join(rows)}")
    return rows


def has_any(texts):
    """holds(record): does it have any of these FIELD=VALUE?"""
    conditions = [text.partition("=")[::2] for text in texts]

    def holds(record):
        return any(str(record.get(field)) == value for field, value in conditions)

    return holds


def find_kind_of(args):
    """kind_of(record) as the flags say, or None."""
    if args.kind:
        return itemgetter(args.kind)
    if not args.seen and not args.unseen:
        return None
    names = ("unseen", "seen") if args.seen else ("seen", "unseen")
    among = has_any(args.seen or args.unseen)

    def kind_of(record):
        return names[among(record)]

    return kind_of


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("name", help="of the result file and of the table")
    p.add_argument("--runs", required=True, nargs="+", help="a folder per seed")
    p.add_argument("--rows", required=True, nargs="+", metavar="NAME=FOLDER", help="evaluations in each run")
    p.add_argument("--against", required=True, metavar="NAME", help="row that the others are compared with")
    kinds = p.add_mutually_exclusive_group()
    condition = {"nargs": "+", "metavar": "FIELD=VALUE"}
    kinds.add_argument("--seen", **condition, help="test questions of this kind were trained on; others not")
    kinds.add_argument("--unseen", **condition, help="test questions of this kind were not; others were")
    kinds.add_argument("--kind", metavar="FIELD", help="field of the test questions to report by, too")
    p.add_argument("--only", **condition, help="test questions that count")
    p.add_argument("--command", required=True, help="what made the runs, for the table")
    cli.add_switch(p, "--candidates", "also a table of the toy's candidates by cycle: right, accepted")
    cli.add_switch(p, "--print", "print the table and write nothing")
    return p.parse_args()


def main(args):
    rows = parse_rows(args.rows, args.against)
    # Before the work, so that a missing place for the table is known first.
    readme.find_page(args.name)
    path = os.path.join(RESULTS, f"{args.name}.json")
    only = has_any(args.only) if args.only else None
    how = find_kind_of(args), only, args.candidates
    result = collect(args.runs, rows, args.against, args.command, *how)
    tables = format_tables(result, path)
    if args.print:
        return print(tables)
    runs.write_json(path, result)
    readme.write_block(args.name, tables)


if __name__ == "__main__":
    if sys.argv[1:] == ["--readme"]:
        write_committed_tables()
    else:
        cli.run_main(main, parse_args())
