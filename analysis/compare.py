"""Runs compared on the same items: what each changes against the first, with a paired interval and McNemar's
test.

A run is its folder, or its predictions.jsonl, which eval.py or any other program wrote.

Reads   predictions.jsonl of two or more runs on the same items
Writes  OUT/metrics.json; OUT/changed.jsonl, the items that one run has right and the other wrong;
        OUT/changes.svg and .png

    python -m analysis.compare runs/toy/cycle1/eval_sft runs/toy/cycle1/eval_grpo --out runs/toy/compare
"""

import numpy as np

from analysis import figures
from analysis.run_files import FREE, add_output_arguments, named_runs, read_pair
from medgr2 import cli, records, runs
from medgr2.errors import RunError
from medgr2.measures import by_group, format_groups, interval, mcnemar
from medgr2.prompts import is_match

# Fields of an item that changed.jsonl keeps.
KEPT = ("image", "modality", "task", "question", "options", "answer")


def compare_rows(rows_a, rows_b, seed):
    """Accuracies, their difference, changes and McNemar's p, by group. The same items in the same order."""
    images = np.array([row["image_hash"] for row in rows_a])
    a, b = (
        np.array([is_match(row["prediction"], row["answer"]) for row in rows], float)
        for rows in (rows_a, rows_b)
    )  # (n,)

    def measure(index):
        low, high = interval((b - a)[index], images[index], seed)
        corrected, introduced = int((b > a)[index].sum()), int((a > b)[index].sum())
        return {
            "questions": len(index),
            "images": len(set(images[index])),
            "a": float(a[index].mean()),
            "b": float(b[index].mean()),
            "difference": float((b - a)[index].mean()),
            "low": low,
            "high": high,
            "corrected": corrected,
            "introduced": introduced,
            "p": mcnemar(corrected, introduced),
        }

    return by_group(rows_a, measure)


def changed_items(rows_a, rows_b):
    """Yield the items that one run has right and the other wrong; "a" and "b" are their predictions."""
    for a, b in zip(rows_a, rows_b):
        a_is_right, b_is_right = (is_match(row["prediction"], row["answer"]) for row in (a, b))
        if a_is_right != b_is_right:
            yield {
                "id": a["id"],
                "change": "corrected" if b_is_right else "introduced",
                **{field: a[field] for field in KEPT if field in a},
                "a": a["prediction"],
                "b": b["prediction"],
            }


def format_pair(result):
    """A comparison as one line."""
    line = f"{result['to']} - {result['from']} {result['difference']:+.3f}, p {result['p']:.2g}"
    return f"{line}, errors corrected {result['corrected']}, introduced {result['introduced']}"


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folders or files of predictions")
    add_output_arguments(p)
    return p.parse_args()


def main(args):
    if len(args.runs) < 2:
        raise RunError("give at least two runs")
    (first, base), *others = named_runs(args.runs)
    pairs = [read_pair(base, path) for _, path in others]
    run = runs.start(args, [base, *(path for _, path in others)], free=FREE)
    results = []
    for (rows_a, rows_b), (name, path) in zip(pairs, others):
        names = {"from": first, "to": name}
        result = compare_rows(rows_a, rows_b, args.seed)
        print(f"a: {base}\nb: {path}\n{format_groups(result, args.markdown)}\n")
        results.append(names | result)
        changed = [records.with_relative_image(item, run.folder) for item in changed_items(rows_a, rows_b)]
        run.append("changed.jsonl", [names | item for item in changed])
    figures.changes(run.path("changes"), results)
    run.finish({"pairs": results}, "; ".join(format_pair(result) for result in results))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
