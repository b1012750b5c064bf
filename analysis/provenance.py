"""Where a sample and a number come from: what args.json says of every run in a cycle's folder, followed and checked.

    trace    one generated sample: its image and parent, who generated it, what it was scored by, whether it was accepted,
             and which runs learned from a file that holds it, directly or by a model that did
    verify   the SHA-256 of every input of every run, computed again: what has changed or is gone since it was read

Reads   a folder with runs in it, such as the OUT of cycle.sh; a folder that was moved or copied as a whole is followed there

    python -m analysis.provenance trace unlabelled00000-c1-stepwise-0 --in runs/toy
    python -m analysis.provenance verify runs/toy
"""

import functools
import json
import os
import sys

from medgr2 import cli, records, runs
from medgr2.errors import RunError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# files of samples, beside those that hold all
FATES = ("accepted", "random", "rejected")


def parse_args():
    p = cli.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("trace", help="follow a sample back to its image and on to the runs that used it")
    t.add_argument("id", help="id of a generated record")
    t.add_argument(
        "--in",
        dest="run",
        required=True,
        metavar="RUN",
        help="folder with the runs, such as the OUT of cycle.sh",
    )
    v = commands.add_parser(
        "verify", help="recompute the hashes of all inputs; status 1 where one has changed"
    )
    v.add_argument("run", help="folder with the runs, such as the OUT of cycle.sh")
    return p.parse_args()


def find_runs(top):
    """{folder: its args.json} of all finished runs below `top`, in the order in which they began. Raises RunError."""
    found = {}
    for folder, _, files in os.walk(top):
        if "args.json" not in files or folder.endswith(".part"):
            continue
        path = os.path.join(folder, "args.json")
        try:
            with open(path, encoding="utf-8") as f:
                meta = json.load(f)
            meta["script"], meta["started"], meta["args"]["out"], meta["inputs"].items()
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise RunError(f"{path}: not what a run writes; remove it, or give another folder") from None
        found[folder] = meta
    if not found:
        raise RunError(f"{top}: no runs in it (no args.json); give the OUT of cycle.sh")
    return dict(sorted(found.items(), key=lambda item: (item[1]["started"], item[0])))


def where(path, folder, meta):
    """Where an input of the run in `folder` is now, or None: as seen from its output folder, from here, or from the scripts."""
    # holds when all was moved together
    beside = os.path.relpath(os.path.abspath(path), os.path.abspath(meta["args"]["out"]))
    places = (os.path.join(folder, beside), path, os.path.join(ROOT, path))
    return next((os.path.realpath(place) for place in places if os.path.exists(place)), None)


# ---------------------------------------------------------------------------------------------------------
# trace


def holding(found, sample):
    """[(folder, file, record)]: every record file of a run that holds the sample's id, candidates before scored."""
    hits = []
    for folder in found:
        for name in ("candidates", "scored", *FATES):
            path = os.path.join(folder, f"{name}.jsonl")
            if os.path.isfile(path) and os.path.getsize(path):
                hits += [
                    (folder, path, r)
                    for r in records.read_records(path, root=records.ANYWHERE)
                    if r["id"] == sample
                ]
    return hits


def users(found, sources):
    """[(folder, source)]: the runs that read one of `sources` (files or folders)."""
    real = {os.path.realpath(source) for source in sources}
    return [
        (folder, place)
        for folder, meta in found.items()
        for place in (where(p, folder, meta) for p in meta["inputs"])
        if place in real
    ]


def descendants(found, folders):
    """The runs that read the output of `folders`, or of one that did, in their order."""
    new, reached = list(folders), []
    while new:
        new = [f for f, _ in users(found, new) if f not in reached and f not in folders]
        reached += dict.fromkeys(new)
    return [folder for folder in found if folder in reached]


def rollouts(folder, sample):
    """How many responses to the sample a GRPO run learned from; None where it keeps no rollouts."""
    path = os.path.join(folder, "rollouts.jsonl")
    return (
        sum(r.get("record") == sample for r in records.read_records(path, root=records.ANYWHERE))
        if os.path.isfile(path)
        else None
    )


def is_scoring(folder):
    return os.path.exists(os.path.join(folder, "scored.jsonl"))


def chapter(folder, path, record, meta, top):
    """What one of a run's files says of the sample: (what, text)."""
    name, short = os.path.basename(path).removesuffix(".jsonl"), os.path.relpath(path, top)
    model = meta["args"].get("model") or meta["args"].get("endpoint_model")
    if name == "scored":
        return "scored", f"{record['reward']['overall']} by {model}; {short}"
    if name == "candidates":
        how = ", ".join(
            f"{field} {record[field]}" for field in ("paradigm", "seed", "cycle") if field in record
        )
        return "generated", f"by {record.get('generator', model)}, {how}; {short}"
    return name, short + (f" ({record['reason']})" if "reason" in record else "")


def trace(sample, top):
    """The lines that tell a sample's story: [(what, text)]. Raises RunError where no run holds it."""
    found = find_runs(top)
    hits = holding(found, sample)
    if not hits:
        raise RunError(f"{sample}: in no run of {top}; give the id of a record in a candidates.jsonl there")
    record = hits[0][2]
    story = [("sample", sample), ("image", f"{record.get('image')} (record {record.get('parent')})")]
    story += [chapter(folder, path, r, found[folder], top) for folder, path, r in hits]
    if "scored" in dict(story) and "accepted" not in dict(story):
        story.append(("accepted", "no"))
    name = lambda folder: f"{os.path.relpath(folder, top)} ({found[folder]['script']})"  # noqa: E731
    readers = [(f, place) for f, place in users(found, [path for _, path, _ in hits]) if not is_scoring(f)]
    for folder, place in readers:
        count = rollouts(folder, sample)
        practised = "" if count is None else f", {count} rollouts on it"
        story.append(
            ("read by", f"{name(folder)}, from {os.path.relpath(place, os.path.realpath(top))}{practised}")
        )
    return story + [("then by", name(f)) for f in descendants(found, [f for f, _ in readers])]


# ---------------------------------------------------------------------------------------------------------
# verify


def verify(top):
    """(changes, counts): [(run, input, what)] that do not hold any more, and how many inputs were looked at, by outcome."""
    digest, changes = functools.lru_cache(None)(runs.sha256), []
    counts = {"same": 0, "changed": 0, "gone": 0, "never on this disk": 0}
    for folder, meta in find_runs(top).items():
        for path, then in meta["inputs"].items():
            place = where(path, folder, meta)
            outcome = (
                "never on this disk"
                if then is None
                else "gone"
                if place is None
                else "same"
                if digest(place) == then
                else "changed"
            )
            counts[outcome] += 1
            if outcome in ("changed", "gone"):
                now = f": {then[:12]} then, {digest(place)[:12]} now" if place else ""
                changes.append((os.path.relpath(folder, top), path, outcome + now))
    return changes, counts


def main(args):
    if args.command == "trace":
        story = trace(args.id, args.run)
        print("\n".join(f"{what:<10} {text}" for what, text in story))
        return
    changes, counts = verify(args.run)
    if changes:
        print(cli.format_table(changes, ("run", "input", "since then")))
    print(f"{args.run}: inputs " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n))
    sys.exit(1 if changes else 0)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
