"""Several runs on the same items: two compared, many as a matrix of transfer or as a curve over the amount of data.

A run is its folder, or its predictions.jsonl; eval.py wrote it, or anybody.
"""
import os
from collections import Counter

import numpy as np

import records
import runs
from measures import by_group, interval, mcnemar

SAME = ("question", "options", "answer", "image_hash")  # two predictions on one item agree in these

# ---------------------------------------------------------------------------------------------------------
# Files.

def read_pair(a, b, flag="--compare"):
    """The predictions in two files on the same items, in A's order. Raises RunError where the items are not the same."""
    rows_a, rows_b = ({row["id"]: row for row in records.read(path, (*records.QUESTION, "prediction", "image_hash"))}
                      for path in (a, b))
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


def named_paths(flag, values):
    """[(name, predictions file)] of NAME=RUN or RUN, whose folder's name then is the name. Raises RunError where one is there twice."""
    pairs = [value.rpartition("=")[::2] if "=" in value else (os.path.basename(value.rstrip("/")), value) for value in values]
    twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
    if twice and flag != "--efficiency":
        raise runs.RunError(f"{flag}: two runs are called {twice[0]}; name them, NAME=RUN")
    return [(name, predictions_file(path)) for name, path in pairs]


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


def matrix(named, by):
    """Accuracy of each run (rows) on each modality or task (columns): {"rows", "columns", "questions", "accuracy", "relative", ...}.

    `relative` divides a column by the accuracy of the run that is named as it: what is left of training on the thing itself.
    `named`: {run: its predictions}, all on the same items.
    """
    groups = [row.get(by, "(none)") for row in next(iter(named.values()))]
    columns = sorted(set(groups))
    accuracy = {name: [float(np.mean([records.is_match(r["prediction"], r["answer"]) for r, g in zip(rows, groups) if g == c])) for c in columns] for name, rows in named.items()}
    own = [accuracy[c][i] if c in accuracy else None for i, c in enumerate(columns)]
    pairs = [(name == c, value) for name in named if name in columns for c, value in zip(columns, accuracy[name])]
    return {"by": by, "rows": list(named), "columns": columns, "questions": [groups.count(c) for c in columns],
            "accuracy": list(accuracy.values()), "relative": [[v / o if o else None for v, o in zip(row, own)] for row in accuracy.values()],
            **{f"{label}_diagonal": float(np.mean(v)) if (v := [x for d, x in pairs if d == on]) else None
               for label, on in (("on", True), ("off", False))}}


def curve(points):
    """{method: [{"k", "mean", "low", "high", "seeds"}]} by k, of [(method, k, accuracy)]; the band is from worst to best seed."""
    curves = {}
    for method, k in sorted({(method, k) for method, k, _ in points}, key=lambda p: p[1]):
        seeds = [accuracy for m, n, accuracy in points if (m, n) == (method, k)]
        curves.setdefault(method, []).append({"k": k, "mean": float(np.mean(seeds)), "low": min(seeds), "high": max(seeds), "seeds": seeds})
    return curves
