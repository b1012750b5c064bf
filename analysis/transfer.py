"""Transfer: the accuracy of runs trained on one modality or task each, on all of them (the paper's Figure 4).

Reads   predictions.jsonl of several runs on the same items, each named after what it was trained on
Writes  OUT/metrics.json (the matrix), OUT/transfer.svg and .png

    python -m analysis.transfer CT=runs/transfer/eval_CT MRI=runs/transfer/eval_MRI --out runs/transfer/matrix
"""

import numpy as np

from analysis import figures
from analysis.run_files import FREE, add_output_arguments, named_runs, read_pair
from medgr2 import cli, runs
from medgr2.errors import RunError
from medgr2.prompts import is_match


def transfer_matrix(named, by):
    """The accuracy of each run (rows) on each modality or task (columns), as metrics.json has it.

    `named`: {run: its predictions}, all on the same items. `by`: "modality" or "task". `relative` divides an
    accuracy by that of the column's own run, the one named after it; None if there is none, or it has none
    right.
    """
    groups = np.array([row.get(by, "(none)") for row in next(iter(named.values()))])  # (n,)
    columns = sorted(set(groups.tolist()))
    accuracy = {}
    for name, rows in named.items():
        correct = np.array([is_match(row["prediction"], row["answer"]) for row in rows])  # (n,)
        accuracy[name] = [float(np.mean(correct[groups == column])) for column in columns]
    own = [accuracy[column][i] if column in accuracy else None for i, column in enumerate(columns)]
    relative = [[v / best if best else None for v, best in zip(row, own)] for row in accuracy.values()]
    on, off = [], []
    for name in [name for name in named if name in columns]:
        for column, value in zip(columns, accuracy[name]):
            (on if name == column else off).append(value)
    return {
        "by": by,
        "rows": list(named),
        "columns": columns,
        "questions": [int((groups == column).sum()) for column in columns],
        "accuracy": list(accuracy.values()),
        "relative": relative,
        "on_diagonal": float(np.mean(on)) if on else None,
        "off_diagonal": float(np.mean(off)) if off else None,
    }


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="a run for each modality or task NAME")
    p.add_argument("--by", choices=("modality", "task"), default="modality", help="what NAME is")
    add_output_arguments(p)
    return p.parse_args()


def main(args):
    named = named_runs(args.runs)
    rows = {name: read_pair(named[0][1], path)[1] for name, path in named}
    result = transfer_matrix(rows, args.by)
    if len(rows) < len(named) or not set(rows) & set(result["columns"]):
        names, columns = ", ".join(name for name, _ in named), ", ".join(result["columns"])
        what = f"as the {args.by} that it was trained on ({columns})"
        raise RunError(f"{names}: name each run once, NAME=RUN, {what}")
    run = runs.start(args, [path for _, path in named], free=FREE)
    headers = [f"trained on {args.by}", *result["columns"]]
    for field, title in (("accuracy", "accuracy"), ("relative", "relative to the column's own run")):
        lines = [[name, *values] for name, values in zip(result["rows"], result[field])]
        print(f"{title}\n{cli.format_table(lines, headers, args.markdown)}\n")
    figures.transfer(run.path("transfer"), result)
    means = [(label, result[f"{label}_diagonal"]) for label in ("on", "off")]
    shown = [f"{label} the diagonal {mean:.3f}" for label, mean in means if mean is not None]
    run.finish(result, ", ".join(shown))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
