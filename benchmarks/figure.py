"""Commits a figure of analysis/: its result file, its images and, of a curve, the table in docs/results.md.

    python benchmarks/figure.py changes runs/compare --command "python -m analysis.compare ..."
    python benchmarks/figure.py --readme    writes the table anew, from the committed result file

Reads   a finished folder of analysis.compare, analysis.efficiency or analysis.transfer
Writes  benchmarks/results/figure_NAME.json: its metrics and what its args.json says;
        docs/figures/NAME.svg and .png
"""

import os
import shutil
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]
import readme

from medgr2 import cli, runs


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("name", nargs="?", help="of the figure")
    p.add_argument("folder", nargs="?", help="finished folder with metrics.json and the figure")
    p.add_argument("--command", help="what made it")
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    args = p.parse_args()
    if not args.readme and not (args.name and args.folder and args.command):
        p.error("give NAME, FOLDER and --command, or --readme")
    return args


def result_file(name):
    return os.path.join(ROOT, "benchmarks", "results", f"figure_{name}.json")


def commit_figure(args):
    rule = "give a finished folder of analysis/"
    meta, result = (
        runs.read_json(os.path.join(args.folder, name), rule) for name in ("args.json", "metrics.json")
    )
    kept = {key: meta[key] for key in ("args", "versions", "git", "hardware", "started", "ended")}
    runs.write_json(result_file(args.name), {"command": args.command, **kept, "result": result})
    for kind in ("svg", "png"):
        name = f"{args.name}.{kind}"
        shutil.copy(os.path.join(args.folder, name), os.path.join(ROOT, "docs", "figures", name))


def write_table():
    """The curve of analysis.efficiency, and for each other point the k at which the curve reaches it."""
    found = runs.read_json(result_file("efficiency"), "run benchmarks/efficiency.sh")
    result, reference = found["result"], found["args"]["equivalent"]
    rows = []
    for method, points in result["curves"].items():
        worth = result["equivalents"].get(method, [None] * len(points))
        for p, k in zip(points, worth):
            seeds = ", ".join(f"{accuracy:.3f}" for accuracy in p["seeds"])
            rows.append([method, p["k"], f"**{p['mean']:.3f}**", seeds, "" if k is None else round(k)])
    headers = ["", "questions", "accuracy", "by seed", f"questions of {reference} for the same accuracy"]
    cpus, torch = found["hardware"]["cpus"], found["versions"]["torch"]
    source = f"Command `{found['command']}`; commit `{found['git']['commit'][:10]}`; {cpus} CPU cores, "
    source += f"torch {torch}. Result file: `{os.path.relpath(result_file('efficiency'), ROOT)}`."
    readme.write_block("efficiency", f"{readme.format_table(headers, rows)}\n\n{source}")


def main(args):
    if not args.readme:
        commit_figure(args)
    if args.readme or args.name == "efficiency":
        write_table()


if __name__ == "__main__":
    cli.run_main(main, parse_args())
