"""Marks generated candidates against the drawn facts: what no real run can do, and what the toy clinic is for.

    python toy/mark.py --scored runs/toy/cycle1/scored --truth runs/toy/data/unlabelled/truth.jsonl --out runs/toy/cycle1/marks.json

Writes the share of right candidates among all, accepted and random ones and by paradigm, and the AUROC of the reward
model's score for right against wrong.
"""

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import clinic

from medgr2 import measures, records
from medgr2.errors import RecordError
from medgr2.prompts import PARADIGMS, is_match

TASK_OF = {text: task for task, texts in clinic.QUESTIONS.items() for text in texts}


def is_right(candidate, facts):
    """Is the candidate's answer the truth about its image? By the question that it asks, whatever it was asked for."""
    task = TASK_OF.get(candidate["question"], candidate["task"])
    return is_match(candidate["answer"], clinic.truth(facts, task)[0])


def mark(scored, facts):
    """Marks of one folder of scored candidates; `facts` by image id."""
    rows = {
        name: list(
            records.read_records(
                os.path.join(scored, f"{name}.jsonl"), ("parent", "answer"), records.ANYWHERE
            )
        )
        for name in ("scored", "accepted", "random")
    }
    right = {r["id"]: is_right(r, facts[r["parent"]]) for r in rows["scored"]}
    share = lambda part: sum(right[r["id"]] for r in part) / len(part) if part else None  # noqa: E731
    found = {f"right_{name}": share(part) for name, part in rows.items()}
    found["auroc"] = measures.auroc(
        [r["reward"]["overall"] for r in rows["scored"]], [right[r["id"]] for r in rows["scored"]]
    )
    found["candidates"] = len(rows["scored"])
    for paradigm in PARADIGMS:
        found[f"right_{paradigm}"] = share([r for r in rows["scored"] if r["paradigm"] == paradigm])
    return found


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--scored", required=True, help="output folder of reward.py score")
    p.add_argument("--truth", required=True, help="the clinic's unlabelled/truth.jsonl")
    p.add_argument("--out", required=True, help="JSON file to write")
    return p.parse_args()


def main(args):
    facts = {r["id"]: r["facts"] for r in records.read_records(args.truth, fields=("facts",))}
    found = mark(args.scored, facts)
    with open(args.out + ".tmp", "w") as f:
        json.dump(found, f, indent=1)
    os.replace(args.out + ".tmp", args.out)
    print(
        "marks: "
        + ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except RecordError as e:
        sys.exit(f"mark.py: {e}")
