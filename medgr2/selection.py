"""Around the filter of reward.py: places per cell, ties, pass rates, and what is printed of its result."""

from operator import itemgetter

import numpy as np

from medgr2 import cli, records
from medgr2.errors import require
from medgr2.images import find_unreadable
from medgr2.prompts import is_match, prompt_of, reference_response


def read_candidates(args):
    """(candidates, those with an unreadable image, set aside with their reason)."""
    skip = args.on_error == "skip"
    rows = records.read_kept(args.data, records.QUESTION, args.image_root, skip and args.max_rejected)
    unreadable = find_unreadable(rows, args.max_rejected) if skip else {}
    readable = [row for row in rows if row["image"] not in unreadable]
    require(readable, f"{args.data}: no image is readable; correct `image`, see --image-root")
    rejected = [row for row in rows if row["image"] in unreadable]
    reason = {"reason": "unreadable image"}
    return readable, [row | reason | {"text": unreadable[row["image"]]} for row in rejected]


def split_too_long(backbone, rows, on_error):
    """(candidates that fit into the backbone's context, others with their reason).

    Raises RecordError unless those may be skipped, and if no candidate fits.
    """
    from medgr2 import context, encoding

    def count_reply(row):
        return encoding.encode_continuations(backbone, [reference_response(row)])[0].shape[1]

    too_long = context.find_too_long(backbone, rows, itemgetter("image"), prompt_of, count_reply)
    advice = f"{len(too_long)} of {len(rows)} candidates; or set them aside with --on-error skip"
    is_allowed = on_error == "skip" and len(too_long) < len(rows)
    require(is_allowed or not too_long, f"{next(iter(too_long.values()), '')} ({advice})")
    reason = {"reason": "longer than the model's context"}
    rejected = [rows[i] | reason | {"text": why} for i, why in too_long.items()]
    return [row for i, row in enumerate(rows) if i not in too_long], rejected


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
