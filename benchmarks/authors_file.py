"""One file of predictions by every scorer: the file that the authors of MedGR2 published, and the README's table of it.

    python benchmarks/authors_file.py checkpoint_30.jsonl    from github.com/HelmarZhi/MedGR-Square; it is not part of this project
    python benchmarks/authors_file.py --readme               writes the README's table anew from the committed result file

Writes benchmarks/results/scorers_checkpoint_30.json: every scorer's figures in all, by data set, and by modality where the data
set has one alone; the interval, and the baselines that never look.
"""

import argparse
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

import eval as evaluation
from medgr2 import cli, runs, scorers
from medgr2.errors import RunError

RESULT = os.path.join(ROOT, "benchmarks", "results", "scorers_checkpoint_30.json")
FIELDS = {"id": "question_id", "prediction": "model_answer", "answer": "gt_answer", "image": "image_path"}


def collect(path):
    rows, unsure = scorers.read_predictions(path, FIELDS)
    found = scorers.score_by_group(rows)
    overall = {k: v for k, v in evaluation.compute_metrics(rows, 0).items() if not isinstance(v, dict)}
    return {
        "command": f"python benchmarks/authors_file.py {os.path.basename(path)}",
        "sha256": runs.sha256(path),
        "unsure_options": unsure,
        "scorers": found,
        "letter_or_text": overall,
        **runs.environment(),
    }


def readme_table(result):
    """The README's block: every scorer in all, then by modality."""
    closed, by = result["scorers"]["closed"], result["scorers"]["modality"]
    lines = [
        "| scorer | right, of all | could not read | right, of those read | as published | left out there |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {s['accuracy']:.4f} | {s['unread']} | {s['of_read']:.4f} | {s['published']:.4f} | {s['left_out']} |"
        for name, s in closed.items()
        if name != "questions"
    ]
    columns = [name for name in closed if name != "questions"]
    lines += ["", f"| modality | questions | {' | '.join(columns)} |", "|---|---:|" + "---:|" * len(columns)]
    lines += [
        f"| {'not known' if name == '(none)' else name} | {group['closed']['questions']} | "
        + " | ".join(f"{group['closed'][c]['accuracy']:.3f}" for c in columns)
        + " |"
        for name, group in sorted(by.items(), key=lambda item: (item[0] == "(none)", item[0]))
    ]
    o = result["letter_or_text"]
    lines += [
        "",
        f"{closed['questions']} questions on {o['images']} images. By *letter or text* {o['accuracy']:.3f}, 95% interval over images {o['low']:.3f} to "
        f"{o['high']:.3f}; always the most frequent position: {o['position']:.3f}. Command `{result['command']}`; result file: "
        "`benchmarks/results/scorers_checkpoint_30.json`.",
    ]
    return "\n".join(lines)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("file", nargs="?", help="the authors' checkpoint_30.jsonl")
    p.add_argument(
        "--readme",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="only write the README's table, from the result file",
    )
    return p.parse_args()


def main(args):
    if bool(args.file) == args.readme:
        raise RunError("give the file, or --readme")
    if args.file:
        runs.write_json(RESULT, collect(args.file))
    with open(RESULT, encoding="utf-8") as f:
        result = json.load(f)
    readme.write_block("scorers", readme_table(result))
    print(readme_table(result))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
