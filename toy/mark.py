"""Checks generated candidates against the drawn facts. Only the toy clinic has such facts.

    D=runs/toy/cycle1
    python toy/mark.py --scored $D/scored --truth runs/toy/data/unlabelled/truth.jsonl --out $D/marks.json

Reads any output folder of `reward.py score`. Writes the fraction of right candidates among all, accepted and
random ones and by paradigm, and the AUROC of the reward model's score, right against wrong; the same by task.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import clinic

from medgr2 import cli, measures, records, runs
from medgr2.prompts import PARADIGMS, is_match

TASK_OF = {text: task for task, texts in clinic.QUESTIONS.items() for text in texts}


def is_right(candidate, facts):
    """Is the candidate's answer true of its image? It is checked as an answer to the question it asks.

    Its `task` is only what the generator was told to ask for.
    """
    task = TASK_OF.get(candidate["question"], candidate["task"])
    return is_match(candidate["answer"], clinic.truth(facts, task)[0])


def fraction_right(rows, right):
    return sum(right[r["id"]] for r in rows) / len(rows) if rows else None


def measure(scored, accepted, right):
    """The measures of candidates, of which some were accepted; `right` by id. None for what has no value."""
    return {
        "right_scored": fraction_right(scored, right),
        "right_accepted": fraction_right(accepted, right),
        "auroc": measures.auroc([r["reward"]["overall"] for r in scored], [right[r["id"]] for r in scored]),
        "candidates": len(scored),
        "accepted": len(accepted),
    }


def check_candidates(folder, facts):
    """The measures of a folder of scored candidates; `facts` by image id.

    `by_task` groups by the record's `task`, as the filter does.
    """
    rows = {}
    for name in ("scored", "accepted", "random"):
        path = os.path.join(folder, f"{name}.jsonl")
        rows[name] = list(records.read_records(path, ("parent", "answer", "task"), records.ANYWHERE))
    scored = rows["scored"]
    right = {r["id"]: is_right(r, facts[r["parent"]]) for r in scored}

    found = measure(scored, rows["accepted"], right) | {"right_random": fraction_right(rows["random"], right)}
    for paradigm in PARADIGMS:
        of_paradigm = [r for r in scored if r["paradigm"] == paradigm]
        found[f"right_{paradigm}"] = fraction_right(of_paradigm, right)
    found["by_task"] = {}
    for task in sorted({r["task"] for r in scored}):
        own = [[r for r in rows[name] if r["task"] == task] for name in ("scored", "accepted")]
        found["by_task"][task] = measure(*own, right)
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
    runs.write_json(args.out, found)
    overall = {name: value for name, value in found.items() if name != "by_task"}
    shown = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in overall.items()]
    print(f"marks: {', '.join(shown)}")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
