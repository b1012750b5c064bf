"""Checks generated candidates against the drawn facts. Only the toy clinic has such facts.

    D=runs/toy/cycle1
    python toy/mark.py --scored $D/scored --truth runs/toy/data/unlabelled/truth.jsonl --out $D/marks.json

Writes the fraction of right candidates among all, accepted and random ones and by paradigm, and the AUROC of
the reward model's score, right against wrong.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import clinic

from medgr2 import cli, measures, records
from medgr2.prompts import PARADIGMS, is_match

TASK_OF = {text: task for task, texts in clinic.QUESTIONS.items() for text in texts}


def is_right(candidate, facts):
    """Is the candidate's answer true of its image? It is checked as an answer to the question it asks.

    Its `task` is only what the generator was told to ask for.
    """
    task = TASK_OF.get(candidate["question"], candidate["task"])
    return is_match(candidate["answer"], clinic.truth(facts, task)[0])


def check_candidates(folder, facts):
    """The measures of a folder of scored candidates; `facts` by image id."""
    rows = {}
    for name in ("scored", "accepted", "random"):
        path = os.path.join(folder, f"{name}.jsonl")
        rows[name] = list(records.read_records(path, ("parent", "answer"), records.ANYWHERE))
    scored = rows["scored"]
    right = {r["id"]: is_right(r, facts[r["parent"]]) for r in scored}

    def fraction_right(part):
        return sum(right[r["id"]] for r in part) / len(part) if part else None

    found = {f"right_{name}": fraction_right(part) for name, part in rows.items()}
    found["auroc"] = measures.auroc(
        [r["reward"]["overall"] for r in scored], [right[r["id"]] for r in scored]
    )
    found["candidates"] = len(scored)
    for paradigm in PARADIGMS:
        found[f"right_{paradigm}"] = fraction_right([r for r in scored if r["paradigm"] == paradigm])
    return found


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--scored", required=True, help="output folder of reward.py score")
    p.add_argument("--truth", required=True, help="the clinic's unlabelled/truth.jsonl")
    p.add_argument("--out", required=True, help="JSON file to write")
    return p.parse_args()


def main(args):
    facts = {r["id"]: r["facts"] for r in records.read_records(args.truth, fields=("facts",))}
    found = check_candidates(args.scored, facts)
    with open(args.out + ".tmp", "w") as f:
        json.dump(found, f, indent=1)
    os.replace(args.out + ".tmp", args.out)
    shown = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
    print(f"marks: {', '.join(shown)}")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
