"""Around the filter of reward.py: places per cell, ties, pass rates, and what is printed of its result."""

import numpy as np

from medgr2 import cli, records
from medgr2.errors import require
from medgr2.prompts import is_match


def allocate(sizes, total):
    """Divide `total` places over cells in proportion to their sizes; the largest remainders round up."""
    exact = [total * size / max(1, sum(sizes)) for size in sizes]
    places = [int(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: places[i] - exact[i])
    for i in by_remainder[: total - sum(places)]:
        places[i] += 1
    return places


def count_tied(ranked, n):
    """How many of the ranked values equal both the n-th and the next, so that a random draw decides."""
    is_parted = 0 < n < len(ranked) and ranked[n - 1] == ranked[n]
    return ranked.count(ranked[n]) if is_parted else 0


def with_pass_rates(rows, path):
    """The candidates with `pass_rate`: the share of the policy's samples that give the candidate's answer."""
    answered = {r["id"]: r for r in records.read_records(path, ("answer", "samples"), records.ANYWHERE)}
    found = []
    for row in rows:
        require(row["id"] in answered, f"{path}: no answers to {row['id']}: run eval.py on the candidates")
        samples = answered[row["id"]]["samples"]
        right = sum(is_match(sample, row["answer"]) for sample in samples)
        found.append(row | {"pass_rate": right / len(samples)})
    return found


def print_selection(rows, accepted, lowest, highest):
    """How many were accepted by task and modality, and a histogram of R, which is between these limits."""
    for field in ("task", "modality"):
        scored = [row.get(field, "") for row in rows]
        kept = [scored[i] for i in accepted]
        table = [(name, scored.count(name), kept.count(name)) for name in sorted(set(scored))]
        print(cli.format_table(table, (field, "scored", "accepted")))
    counts, edges = np.histogram([row["reward"]["overall"] for row in rows], bins=8, range=(lowest, highest))
    for low, high, count in zip(edges, edges[1:], counts):
        print(f"{low:5.0f} to {high:3.0f} {'█' * round(50 * count / max(counts))} {count}")


def explain_rejection(R, threshold):
    """Why the filter accepts none of the candidates with these R, and what to do."""
    if threshold is None:
        return "--keep rounds to 0; raise it, with another --out"
    least, greatest = min(R), max(R)
    return f"R is from {least} to {greatest}, below --threshold {threshold:g}; lower it, with another --out"
