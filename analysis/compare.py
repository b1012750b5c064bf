"""Runs on the same items compared: what each one changes against the first, with a paired interval and McNemar's test.

A run is its folder, or its predictions.jsonl; eval.py wrote it, or any other program.

Reads   predictions.jsonl of two or more runs on the same items
Writes  OUT/metrics.json, OUT/changed.jsonl (the items that one run has right and the other wrong), OUT/changes.svg and .png

    python -m analysis.compare runs/toy/cycle1/eval_sft runs/toy/cycle1/eval_grpo --out runs/toy/cycle1/compare
"""

import argparse
import os

import numpy as np

from analysis import figures
from medgr2 import cli, records, runs
from medgr2.errors import RunError
from medgr2.measures import by_group, format_groups, interval, mcnemar
from medgr2.prompts import is_match

# Two predictions on one item agree in these fields.
SAME = ("question", "options", "answer", "image_hash")
# Flags on which no file depends.
FREE = ("markdown",)

# ---------------------------------------------------------------------------------------------------------
# Files.


def read_pair(a, b):
    """The predictions in two files on the same items, in A's order. Raises RunError where the items are not the same."""
    rows_a, rows_b = (
        {
            row["id"]: row
            for row in records.read_records(
                path, (*records.QUESTION, "prediction", "image_hash"), records.ANYWHERE
            )
        }
        for path in (a, b)
    )
    lacking = [
        f"{path} lacks {len(missing)} of {len(other)} ({min(missing)})"
        for path, missing, other in (
            (a, rows_b.keys() - rows_a.keys(), rows_b),
            (b, rows_a.keys() - rows_b.keys(), rows_a),
        )
        if missing
    ]
    if lacking:
        raise RunError(f"not the same items: {', '.join(lacking)}; give two runs on the same --data")
    for name, row in rows_a.items():
        field = next((f for f in SAME if row.get(f) != rows_b[name].get(f)), None)
        if field:
            raise RunError(
                f"item {name} has another `{field}` in {b} than in {a}; give two runs on the same --data"
            )
    return list(rows_a.values()), [rows_b[name] for name in rows_a]


def predictions_file(path):
    """The predictions of a run's folder, or the file itself."""
    return os.path.join(path, "predictions.jsonl") if os.path.isdir(path) else path


def named_paths(values):
    """[(name, predictions file)] of NAME=RUN, or of RUN, which is then named as its folder."""
    found = []
    for value in values:
        name, _, path = value.partition("=")
        # a path may hold a = of its own
        plain = not path or os.sep in name or os.path.exists(value)
        found.append((os.path.basename(value.rstrip("/")), value) if plain else (name, path))
    return [(name, predictions_file(path)) for name, path in found]


# ---------------------------------------------------------------------------------------------------------
# Rows → numbers.


def comparison(rows_a, rows_b, seed):
    """The table of two runs on the same items, in the same order: accuracies, B minus A, what B changed, McNemar's p."""
    images = np.array([row["image_hash"] for row in rows_a])
    a, b = (
        np.array([is_match(row["prediction"], row["answer"]) for row in rows], float)
        for rows in (rows_a, rows_b)
    )  # (n,)

    def measure(i):
        low, high = interval((b - a)[i], images[i], seed)
        corrected, introduced = int((b > a)[i].sum()), int((a > b)[i].sum())
        return {
            "questions": len(i),
            "images": len(set(images[i])),
            "a": float(a[i].mean()),
            "b": float(b[i].mean()),
            "difference": float((b - a)[i].mean()),
            "low": low,
            "high": high,
            "corrected": corrected,
            "introduced": introduced,
            "p": mcnemar(corrected, introduced),
        }

    return by_group(rows_a, measure)


def changed(rows_a, rows_b):
    """The items that one run has right and the other wrong, in the order of the files: {"id", "change", ..., "a", "b": predictions}."""
    for a, b in zip(rows_a, rows_b):
        right = [is_match(row["prediction"], row["answer"]) for row in (a, b)]
        if right[0] != right[1]:
            kept = {
                field: a[field]
                for field in ("image", "modality", "task", "question", "options", "answer")
                if field in a
            }
            yield {
                "id": a["id"],
                "change": "corrected" if right[1] else "introduced",
                **kept,
                "a": a["prediction"],
                "b": b["prediction"],
            }


# ---------------------------------------------------------------------------------------------------------
# The command line.


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="folders of two or more runs, or their predictions.jsonl",
    )
    add_arguments(p)
    return p.parse_args()


def add_arguments(p):
    """The flags that every comparison of runs has."""
    p.add_argument(
        "--markdown", action=argparse.BooleanOptionalAction, default=False, help="print tables in Markdown"
    )
    cli.add_run_arguments(p)


def main(args):
    if len(args.runs) < 2:
        raise RunError("give at least two runs")
    (first, base), *others = named_paths(args.runs)
    pairs = [read_pair(base, path) for _, path in others]
    run, results = runs.start(args, [base, *(path for _, path in others)], free=FREE), []
    for (rows_a, rows_b), (name, path) in zip(pairs, others):
        result = comparison(rows_a, rows_b, args.seed)
        print(f"a: {base}\nb: {path}\n{format_groups(result, args.markdown)}\n")
        results.append({"from": first, "to": name, **result})
        run.append(
            "changed.jsonl",
            [
                {"from": first, "to": name, **records.with_relative_image(change, run.folder)}
                for change in changed(rows_a, rows_b)
            ],
        )
    figures.changes(run.path("changes"), results)
    run.finish(
        {"pairs": results},
        "; ".join(
            f"{r['to']} - {first} {r['difference']:+.3f}, p {r['p']:.2g}, errors corrected {r['corrected']}, introduced {r['introduced']}"
            for r in results
        ),
    )


if __name__ == "__main__":
    cli.run_main(main, parse_args())
