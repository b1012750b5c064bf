"""Where a sample and a number come from: the args.json of every run in a cycle's folder, followed and
checked.

    trace    one generated sample: its image and parent, the generator, the score, whether it was accepted,
             and the runs that learned from a file that holds it, directly or through a model that did
    verify   the SHA-256 of every input of every run, computed again: what has changed or is gone since then

Reads   a folder with runs in it, such as the OUT of cycle.sh; if it was moved or copied as a whole, inputs
        are found in the new place

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
# The files of samples in a run's folder, in the order in which a sample passes through them.
SAMPLE_FILES = ("candidates", "scored", "accepted", "random", "rejected")


def parse_args():
    p = cli.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("trace", help="follow a sample back to its image and on to the runs that used it")
    c.add_argument("id", help="id of a generated record")
    c.add_argument("--in", dest="run", required=True, help="folder of the runs, as the OUT of cycle.sh")
    c = commands.add_parser("verify", help="recompute the hashes of all inputs; status 1 if one has changed")
    c.add_argument("run", help="folder of the runs, as the OUT of cycle.sh")
    return p.parse_args()


def find_runs(top):
    """{folder: its args.json} of all finished runs below `top`, by start time. Raises RunError for none."""
    found = {}
    for folder, _, files in os.walk(top):
        if "args.json" in files and not folder.endswith(".part"):
            found[folder] = read_meta(os.path.join(folder, "args.json"))
    if not found:
        raise RunError(f"{top}: no runs in it (no args.json); give the OUT of cycle.sh")
    return dict(sorted(found.items(), key=lambda item: (item[1]["started"], item[0])))


def read_meta(path):
    """The args.json of a run. Raises RunError if it lacks what is needed here."""
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        meta["script"], meta["started"], meta["args"]["out"], meta["inputs"].items()
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise RunError(f"{path}: not what a run writes; remove it, or give another folder") from None
    return meta


def locate(path, folder, meta):
    """Where an input of the run in `folder` is now, or None."""
    # As seen from the run's output, which holds if all was moved together; from here; from the scripts.
    from_output = os.path.relpath(os.path.abspath(path), os.path.abspath(meta["args"]["out"]))
    places = (os.path.join(folder, from_output), path, os.path.join(ROOT, path))
    return next((os.path.realpath(place) for place in places if os.path.exists(place)), None)


# ---------------------------------------------------------------------------------------------------------
# trace


def find_records(found, sample):
    """[(folder, file, record)]: the records with this id in the sample files of all runs."""
    hits = []
    for folder in found:
        for name in SAMPLE_FILES:
            path = os.path.join(folder, f"{name}.jsonl")
            if os.path.isfile(path) and os.path.getsize(path):
                for record in records.read_records(path, root=records.ANYWHERE):
                    if record["id"] == sample:
                        hits.append((folder, path, record))
    return hits


def find_readers(found, sources):
    """[(folder, source)]: the runs that read one of `sources` (files or folders)."""
    wanted = {os.path.realpath(source) for source in sources}
    readers = []
    for folder, meta in found.items():
        for path in meta["inputs"]:
            place = locate(path, folder, meta)
            if place in wanted:
                readers.append((folder, place))
    return readers


def find_descendants(found, folders):
    """The runs that read the output of `folders`, or of a run that did, by start time."""
    new, reached = list(folders), []
    while new:
        new = [f for f, _ in find_readers(found, new) if f not in reached and f not in folders]
        reached += dict.fromkeys(new)
    return [folder for folder in found if folder in reached]


def count_rollouts(folder, sample):
    """How many responses to the sample a GRPO run learned from; None if the run keeps no rollouts."""
    path = os.path.join(folder, "rollouts.jsonl")
    if not os.path.isfile(path):
        return None
    return sum(row.get("record") == sample for row in records.read_records(path, root=records.ANYWHERE))


def describe_hit(folder, path, record, meta, top):
    """(what, text): what one file of a run says of the sample."""
    name, short = os.path.basename(path).removesuffix(".jsonl"), os.path.relpath(path, top)
    model = meta["args"].get("model") or meta["args"].get("endpoint_model")
    if name == "scored":
        return "scored", f"{record['reward']['overall']} by {model}; {short}"
    if name == "candidates":
        details = [f"{field} {record[field]}" for field in ("paradigm", "seed", "cycle") if field in record]
        return "generated", f"by {record.get('generator', model)}, {', '.join(details)}; {short}"
    return name, short + (f" ({record['reason']})" if "reason" in record else "")


def trace(sample, top):
    """[(what, text)]: lines on a sample's origin and use. Raises RunError if no run has it."""
    found = find_runs(top)
    hits = find_records(found, sample)
    if not hits:
        raise RunError(f"{sample}: in no run of {top}; give the id of a record in a candidates.jsonl there")

    def run_name(folder):
        return f"{os.path.relpath(folder, top)} ({found[folder]['script']})"

    record = hits[0][2]
    lines = [("sample", sample), ("image", f"{record.get('image')} (record {record.get('parent')})")]
    lines += [describe_hit(folder, path, hit, found[folder], top) for folder, path, hit in hits]
    if "scored" in dict(lines) and "accepted" not in dict(lines):
        lines.append(("accepted", "no"))
    learners = {}
    for folder, place in find_readers(found, [path for _, path, _ in hits]):
        # Scoring reads the sample but does not learn from it. GRPO may read it from two files.
        if not os.path.exists(os.path.join(folder, "scored.jsonl")):
            learners.setdefault(folder, place)
    for folder, place in learners.items():
        text = f"{run_name(folder)}, from {os.path.relpath(place, os.path.realpath(top))}"
        rollouts = count_rollouts(folder, sample)
        lines.append(("read by", text if rollouts is None else f"{text}, {rollouts} rollouts on it"))
    for folder in find_descendants(found, list(learners)):
        lines.append(("then by", run_name(folder)))
    return lines


# ---------------------------------------------------------------------------------------------------------
# verify


def verify(top):
    """([(run, input, what happened)] of the inputs that no longer hold, {outcome: number of inputs})."""
    digest = functools.lru_cache(None)(runs.sha256)
    changes, counts = [], {"same": 0, "changed": 0, "gone": 0, "never on this disk": 0}
    for folder, meta in find_runs(top).items():
        for path, then in meta["inputs"].items():
            place = locate(path, folder, meta)
            # Where no file was read, as for a model of the hub, there is no hash.
            if then is None:
                outcome = "never on this disk"
            elif place is None:
                outcome = "gone"
            else:
                outcome = "same" if digest(place) == then else "changed"
            counts[outcome] += 1
            if outcome in ("changed", "gone"):
                hashes = f": {then[:12]} then, {digest(place)[:12]} now" if place else ""
                changes.append((os.path.relpath(folder, top), path, outcome + hashes))
    return changes, counts


def main(args):
    if args.command == "trace":
        print("\n".join(f"{what:<10} {text}" for what, text in trace(args.id, args.run)))
        return
    changes, counts = verify(args.run)
    if changes:
        print(cli.format_table(changes, ("run", "input", "since then")))
    print(f"{args.run}: inputs " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n))
    sys.exit(1 if changes else 0)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
