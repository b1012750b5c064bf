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


def find_equivalents(curves, reference):
    """{other method: [k for each of its points]}: where `reference`'s curve has the point's accuracy.

    Interpolated in log k. None if no part of the curve has it.
    """
    points = [p for p in curves[reference] if p["k"]]
    found = {}
    for method, own in curves.items():
        if method != reference:
            found[method] = [interpolate_k(points, p["mean"]) for p in own]
    return found


def interpolate_k(points, accuracy):
    """The first k at which the curve through `points`, linear in log k, rises to `accuracy`, or None."""
    for a, b in zip(points, points[1:]):
        if a["mean"] <= accuracy <= b["mean"] and a["mean"] < b["mean"]:
            share = (accuracy - a["mean"]) / (b["mean"] - a["mean"])
            return float(a["k"] * (b["k"] / a["k"]) ** share)
    return None


def format_curves(curves, markdown):
    lines = []
    for method, points in curves.items():
        for p in points:
            lines.append([method, p["k"], p["mean"], p["low"], p["high"], len(p["seeds"])])
    return cli.format_table(lines, ["method", "k", "mean", "worst", "best", "seeds"], markdown)


def format_equivalents(curves, equivalents, reference, markdown):
    rows = []
    for method, found in equivalents.items():
        for point, k in zip(curves[method], found):
            rows.append([method, point["k"], point["mean"], "none" if k is None else round(k)])
    return cli.format_table(rows, ["method", "k", "mean", f"k of {reference}"], markdown)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("runs", nargs="+", metavar="METHOD:K=RUN", help="runs on K records; 0: not trained")
    equivalent = "also say how many of this METHOD's records reach each other point's accuracy"
    p.add_argument("--equivalent", metavar="METHOD", help=equivalent)
    add_output_arguments(p)
    return p.parse_args()


def main(args):
    named = named_runs(args.runs)
    points = [read_point(name, path) for name, path in named]
    methods = list(dict.fromkeys(method for method, _, _ in points))
    if args.equivalent and args.equivalent not in methods:
        raise RunError(f"--equivalent {args.equivalent}: no run of it; give one of {', '.join(methods)}")
    run = runs.start(args, [path for _, path in named], free=FREE)
    curves = make_curves(points)
    print(format_curves(curves, args.markdown))
    # A method whose only K is 0 is a level, not a curve.
    levels = {method: ps[0] for method, ps in curves.items() if [p["k"] for p in ps] == [0]}
    trained = {method: [p for p in ps if p["k"]] for method, ps in curves.items() if method not in levels}
    figures.efficiency(run.path("efficiency"), trained, levels)
    result = {"curves": curves}
    if args.equivalent:
        result["equivalents"] = find_equivalents(curves, args.equivalent)
        print(format_equivalents(curves, result["equivalents"], args.equivalent, args.markdown))
    run.finish(result, f"{len(named)} runs, {len(curves)} methods")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
