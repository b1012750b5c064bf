"""Several runs on the same items: two compared, many as a matrix of transfer or as a curve over the amount of data.

A run is its folder, or its predictions.jsonl; eval.py wrote it, or anybody.
"""
import os

import numpy as np

import records
import runs
from measures import by_group, interval, mcnemar

SAME = ("question", "options", "answer", "image_hash")  # two predictions on one item agree in these

# ---------------------------------------------------------------------------------------------------------
# Files.

def read_pair(a, b, flag="--compare"):
    """The predictions in two files on the same items, in A's order. Raises RunError where the items are not the same."""
    rows_a, rows_b = ({row["id"]: row for row in records.read(
        path, (*records.QUESTION, "prediction", "image_hash"), records.ANYWHERE)} for path in (a, b))
    lacking = [f"{path} lacks {len(missing)} of {len(other)} ({min(missing)})" for path, missing, other in
               ((a, rows_b.keys() - rows_a.keys(), rows_b), (b, rows_a.keys() - rows_b.keys(), rows_a)) if missing]
    if lacking:
        raise runs.RunError(f"{flag}: not the same items: {', '.join(lacking)}; give two runs on the same --data")
    for name, row in rows_a.items():
        field = next((f for f in SAME if row.get(f) != rows_b[name].get(f)), None)
        if field:
            raise runs.RunError(f"{flag}: item {name} has another `{field}` in {b} than in {a}; "
                                "give two runs on the same --data")
    return list(rows_a.values()), [rows_b[name] for name in rows_a]


def predictions_file(path):
    """The predictions of a run's folder, or the file itself."""
    return os.path.join(path, "predictions.jsonl") if os.path.isdir(path) else path


def named_paths(values):
    """[(name, predictions file)] of NAME=RUN, or of RUN, which is then named as its folder."""
    found = []
    for value in values:
        name, _, path = value.partition("=")
        plain = not path or os.sep in name or os.path.exists(value)  # a path may hold a = of its own
        found.append((os.path.basename(value.rstrip("/")), value) if plain else (name, path))
    return [(name, predictions_file(path)) for name, path in found]


# ---------------------------------------------------------------------------------------------------------
# Rows → numbers.

def comparison(rows_a, rows_b, seed):
    """The table of two runs on the same items, in the same order: accuracies, B minus A, what B changed, McNemar's p."""
    images = np.array([row["image_hash"] for row in rows_a])
    a, b = (np.array([records.is_match(row["prediction"], row["answer"]) for row in rows], float) for rows in (rows_a, rows_b))  # (n,)

    def measure(i):
        low, high = interval((b - a)[i], images[i], seed)
        corrected, introduced = int((b > a)[i].sum()), int((a > b)[i].sum())
        return {"questions": len(i), "images": len(set(images[i])), "a": float(a[i].mean()), "b": float(b[i].mean()),
                "difference": float((b - a)[i].mean()), "low": low, "high": high,
                "corrected": corrected, "introduced": introduced, "p": mcnemar(corrected, introduced)}

    return by_group(rows_a, measure)


def changed(rows_a, rows_b):
    """The items that one run has right and the other wrong, in the order of the files: {"id", "change", ..., "a", "b": predictions}."""
    for a, b in zip(rows_a, rows_b):
        right = [records.is_match(row["prediction"], row["answer"]) for row in (a, b)]
        if right[0] != right[1]:
            kept = {field: a[field] for field in ("image", "modality", "task", "question", "options", "answer") if field in a}
            yield {"id": a["id"], "change": "corrected" if right[1] else "introduced", **kept, "a": a["prediction"], "b": b["prediction"]}


def matrix(named, by):
    """Accuracy of each run (rows) on each modality or task (columns): {"rows", "columns", "questions", "accuracy", "relative", ...}.

    `relative` divides a column by the accuracy of the run that is named as it: what is left of training on the thing itself.
    `named`: {run: its predictions}, all on the same items.
    """
    groups = [row.get(by, "(none)") for row in next(iter(named.values()))]
    columns = sorted(set(groups))
    right = {name: [records.is_match(r["prediction"], r["answer"]) for r in rows] for name, rows in named.items()}
    accuracy = {name: [float(np.mean([r for r, g in zip(marks, groups) if g == c])) for c in columns] for name, marks in right.items()}
    own = [accuracy[c][i] if c in accuracy else None for i, c in enumerate(columns)]
    pairs = [(name == c, value) for name in named if name in columns for c, value in zip(columns, accuracy[name])]
    return {"by": by, "rows": list(named), "columns": columns, "questions": [groups.count(c) for c in columns],
            "accuracy": list(accuracy.values()), "relative": [[v / o if o else None for v, o in zip(row, own)] for row in accuracy.values()],
            **{f"{label}_diagonal": float(np.mean(v)) if (v := [x for d, x in pairs if d == on]) else None
               for label, on in (("on", True), ("off", False))}}


def curve(points):
    """{method: [{"k", "mean", "low", "high", "seeds"}]}, k rising, of [(method, k, accuracy)]; low and high: worst and best seed."""
    curves = {method: [] for method, _, _ in points}
    for method, k in sorted({(method, k) for method, k, _ in points}, key=lambda p: p[1]):
        seeds = [accuracy for m, n, accuracy in points if (m, n) == (method, k)]
        curves[method].append({"k": k, "mean": float(np.mean(seeds)), "low": min(seeds), "high": max(seeds), "seeds": seeds})
    return curves
