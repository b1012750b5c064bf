"""Data efficiency: accuracy over the number of training records, a line per method (the paper's Figure 2).

Reads   predictions.jsonl of runs trained on K records each, one run per seed
Writes  OUT/metrics.json (the curves), OUT/efficiency.svg and .png

    python -m analysis.efficiency random:100=runs/a/eval top:100=runs/b/eval --out runs/efficiency/curve
"""

import numpy as np

from analysis import figures
from analysis.run_files import FREE, add_output_arguments, named_runs, read_run
from medgr2 import cli, runs
from medgr2.errors import RunError
from medgr2.prompts import is_match


def read_point(name, path):
    """(method, K, accuracy) of a run named METHOD:K. Raises RunError if the name has another form."""
    method, _, k = name.rpartition(":")
    if not (method and k.isdigit()):
        raise RunError(f"{name}: give METHOD:K=RUN, as random:100=runs/a/eval")
    accuracy = np.mean([is_match(row["prediction"], row["answer"]) for row in read_run(path)])
    return method, int(k), float(accuracy)


def make_curves(points):
    """{method: [{"k", "mean", "low", "high", "seeds"}]} by rising k, of [(method, k, accuracy)], a point per
    seed.

    `low` and `high` are the worst and the best seed.
    """
    curves = {method: [] for method, _, _ in points}
    for method, k in sorted({(method, k) for method, k, _ in points}, key=lambda point: point[1]):
        seeds = [accuracy for m, n, accuracy in points if (m, n) == (method, k)]
        summary = {"mean": float(np.mean(seeds)), "low": min(seeds), "high": max(seeds), "seeds": seeds}
        curves[method].append({"k": k, **summary})
    return curves


def format_curves(curves, markdown):
    lines = []
    for method, points in curves.items():
        for p in points:
            lines.append([method, p["k"], p["mean"], p["low"], p["high"], len(p["seeds"])])
    return cli.format_table(lines, ["method", "k", "mean", "worst", "best", "seeds"], markdown)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("runs", nargs="+", metavar="METHOD:K=RUN", help="runs on K records; 0: not trained")
    add_output_arguments(p)
    return p.parse_args()


def main(args):
    named = named_runs(args.runs)
    points = [read_point(name, path) for name, path in named]
    run = runs.start(args, [path for _, path in named], free=FREE)
    curves = make_curves(points)
    print(format_curves(curves, args.markdown))
    # A method whose only K is 0 is a level, not a curve.
    levels = {method: ps[0] for method, ps in curves.items() if [p["k"] for p in ps] == [0]}
    trained = {method: [p for p in ps if p["k"]] for method, ps in curves.items() if method not in levels}
    figures.efficiency(run.path("efficiency"), trained, levels)
    run.finish({"curves": curves}, f"{len(named)} runs, {len(curves)} methods")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
