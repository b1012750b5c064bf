"""One file of predictions by every scorer: the file that the authors of MedGR2 published.

    python benchmarks/authors_file.py checkpoint_30.jsonl    the file is in github.com/HelmarZhi/MedGR-Square
    python benchmarks/authors_file.py --readme               writes the table from the committed result file

Writes benchmarks/results/scorers_checkpoint_30.json: every scorer's figures in all, by data set, and by
modality if the data set has only one; the interval, and the baselines that never see the image. The file
itself is not part of this project.
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

import eval as evaluation
from medgr2 import cli, runs, scorers

RESULT = os.path.join(ROOT, "benchmarks", "results", "scorers_checkpoint_30.json")
FIELDS = {"id": "question_id", "prediction": "model_answer", "answer": "gt_answer", "image": "image_path"}


def collect(path):
    """The result file of a file of predictions."""
    rows, unsure, _ = scorers.read_predictions(path, FIELDS)
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


def format_tables(result):
    """Every scorer in all, then by modality."""
    closed, by_modality = result["scorers"]["closed"], result["scorers"]["modality"]
    names, rows = [name for name in closed if name != "questions"], []
    for name in names:
        found = closed[name]
        shares = f"{found['of_read']:.4f}", f"{found['published']:.4f}"
        rows.append([name, f"{found['accuracy']:.4f}", found["unread"], *shares, found["left_out"]])
    headers = ["scorer", "right, of all", "could not read", "right, of those read", "as published"]
    overall = readme.format_table([*headers, "left out there"], rows)
    rows = []
    # The questions without a modality come last.
    for name, group in sorted(by_modality.items(), key=lambda item: (item[0] == "(none)", item[0])):
        label = "not known" if name == "(none)" else name
        accuracies = [f"{group['closed'][scorer]['accuracy']:.3f}" for scorer in names]
        rows.append([label, group["closed"]["questions"], *accuracies])
    modalities = readme.format_table(["modality", "questions", *names], rows)
    found = result["letter_or_text"]
    source = (
        f"{closed['questions']} questions on {found['images']} images. By *letter or text* "
        f"{found['accuracy']:.3f}, 95% interval over images {found['low']:.3f} to {found['high']:.3f}; "
        f"always the most frequent position: {found['position']:.3f}. Command `{result['command']}`; "
        f"result file: `{os.path.relpath(RESULT, ROOT)}`."
    )
    return f"{overall}\n\n{modalities}\n\n{source}"


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("file", nargs="?", help="the authors' checkpoint_30.jsonl")
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    args = p.parse_args()
    if bool(args.file) == args.readme:
        p.error("give the file, or --readme")
    return args


def main(args):
    if args.file:
        runs.write_json(RESULT, collect(args.file))
    with open(RESULT, encoding="utf-8") as f:
        result = json.load(f)
    readme.write_block("scorers", format_tables(result))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
