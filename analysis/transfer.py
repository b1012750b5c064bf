"""Transfer: the accuracy of runs trained on one modality or task each, on all of them (the paper's Figure 4).

Reads   predictions.jsonl of several runs on the same items, each named as what it was trained on
Writes  OUT/metrics.json (the matrix), OUT/transfer.svg and .png

    python -m analysis.transfer CT=runs/transfer/eval_CT MRI=runs/transfer/eval_MRI --out runs/transfer/matrix
"""

import numpy as np

from analysis import figures
from analysis.compare import FREE, add_arguments, named_paths, read_pair
from medgr2 import cli, runs
from medgr2.errors import RunError
from medgr2.prompts import is_match


def matrix(named, by):
    """Accuracy of each run (rows) on each modality or task (columns): {"rows", "columns", "questions", "accuracy", "relative", ...}.

    `relative` divides a column by the accuracy of the run that is named as it: what is left of training on the thing itself.
    `named`: {run: its predictions}, all on the same items.
    """
    groups = [row.get(by, "(none)") for row in next(iter(named.values()))]
    columns = sorted(set(groups))
    right = {name: [is_match(r["prediction"], r["answer"]) for r in rows] for name, rows in named.items()}
    accuracy = {
        name: [float(np.mean([r for r, g in zip(marks, groups) if g == c])) for c in columns]
        for name, marks in right.items()
    }
    own = [accuracy[c][i] if c in accuracy else None for i, c in enumerate(columns)]
    pairs = [
        (name == c, value) for name in named if name in columns for c, value in zip(columns, accuracy[name])
    ]
    return {
        "by": by,
        "rows": list(named),
        "columns": columns,
        "questions": [groups.count(c) for c in columns],
        "accuracy": list(accuracy.values()),
        "relative": [[v / o if o else None for v, o in zip(row, own)] for row in accuracy.values()],
        **{
            f"{label}_diagonal": float(np.mean(v)) if (v := [x for d, x in pairs if d == on]) else None
            for label, on in (("on", True), ("off", False))
        },
    }


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a run trained on each modality or task NAME: its folder or predictions.jsonl",
    )
    p.add_argument(
        "--by", choices=("modality", "task"), default="modality", help="what each run was trained on one of"
    )
    add_arguments(p)
    return p.parse_args()


def main(args):
    named = named_paths(args.runs)
    rows = {name: read_pair(named[0][1], path)[1] for name, path in named}
    result = matrix(rows, args.by)
    if len(rows) < len(named) or not set(rows) & set(result["columns"]):
        raise RunError(
            f"{', '.join(name for name, _ in named)}: name each run once, NAME=RUN, as the {args.by} that it was "
            f"trained on ({', '.join(result['columns'])})"
        )
    run = runs.start(args, [path for _, path in named], free=FREE)
    for field, title in (("accuracy", "accuracy"), ("relative", "relative to the column's own run")):
        lines = [[name, *values] for name, values in zip(result["rows"], result[field])]
        print(
            f"{title}\n{cli.format_table(lines, [f'trained on {args.by}', *result['columns']], args.markdown)}\n"
        )
    figures.transfer(run.path("transfer"), result)
    where = [(label, result[f"{label}_diagonal"]) for label in ("on", "off")]
    run.finish(
        result, ", ".join(f"{label} the diagonal {value:.3f}" for label, value in where if value is not None)
    )


if __name__ == "__main__":
    cli.run_main(main, parse_args())
