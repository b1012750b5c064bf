"""Data efficiency: accuracy over the number of training records, a line per method (the paper's Figure 2).

Reads   predictions.jsonl of runs trained on K records each, one run per seed
Writes  OUT/metrics.json (the curves), OUT/efficiency.svg and .png

    python -m analysis.efficiency random:100=runs/a/eval top:100=runs/b/eval --out runs/efficiency/curve
"""

import numpy as np

from analysis import figures
from analysis.compare import FREE, add_arguments, named_paths
from medgr2 import cli, records, runs
from medgr2.errors import RunError
from medgr2.prompts import is_match


def curve(points):
    """{method: [{"k", "mean", "low", "high", "seeds"}]}, k rising, of [(method, k, accuracy)]; low and high: worst and best seed."""
    curves = {method: [] for method, _, _ in points}
    for method, k in sorted({(method, k) for method, k, _ in points}, key=lambda p: p[1]):
        seeds = [accuracy for m, n, accuracy in points if (m, n) == (method, k)]
        curves[method].append(
            {"k": k, "mean": float(np.mean(seeds)), "low": min(seeds), "high": max(seeds), "seeds": seeds}
        )
    return curves


def read_point(name, path):
    """(method, K, accuracy) of a run named METHOD:K. Raises RunError if the name has another form."""
    method, _, k = name.rpartition(":")
    if not (method and k.isdigit()):
        raise RunError(f"{name}: give METHOD:K=RUN, as random:100=runs/a/eval")
    rows = records.read_records(path, (*records.QUESTION, "prediction"), records.ANYWHERE)
    return method, int(k), float(np.mean([is_match(r["prediction"], r["answer"]) for r in rows]))


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument(
        "runs",
        nargs="+",
        metavar="METHOD:K=RUN",
        help="runs trained on K records, one per seed; K of 0: no training",
    )
    add_arguments(p)
    return p.parse_args()


def main(args):
    named = named_paths(args.runs)
    points = [read_point(name, path) for name, path in named]
    run, curves = runs.start(args, [path for _, path in named], free=FREE), curve(points)
    lines = [
        [method, p["k"], p["mean"], p["low"], p["high"], len(p["seeds"])]
        for method, ps in curves.items()
        for p in ps
    ]
    print(cli.format_table(lines, ["method", "k", "mean", "worst", "best", "seeds"], args.markdown))
    untrained = {method: ps[0] for method, ps in curves.items() if [p["k"] for p in ps] == [0]}
    trained = {method: [p for p in ps if p["k"]] for method, ps in curves.items() if method not in untrained}
    figures.efficiency(run.path("efficiency"), trained, untrained)
    run.finish({"curves": curves}, f"{len(named)} runs, {len(curves)} methods")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
