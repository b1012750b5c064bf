"""Commits a figure of analysis/: its result file and its images.

    python benchmarks/figure.py changes runs/compare --command "python -m analysis.compare ..."

Reads   a finished folder of analysis.compare, analysis.efficiency or analysis.transfer
Writes  benchmarks/results/figure_NAME.json: its metrics and what its args.json says;
        docs/figures/NAME.svg and .png
"""

import os
import shutil
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from medgr2 import cli, runs


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("name", help="of the figure")
    p.add_argument("folder", help="finished folder with metrics.json and the figure")
    p.add_argument("--command", required=True, help="what made it")
    return p.parse_args()


def main(args):
    rule = "give a finished folder of analysis/"
    meta, result = (
        runs.read_json(os.path.join(args.folder, name), rule) for name in ("args.json", "metrics.json")
    )
    kept = {key: meta[key] for key in ("args", "versions", "git", "hardware", "started", "ended")}
    path = os.path.join(ROOT, "benchmarks", "results", f"figure_{args.name}.json")
    runs.write_json(path, {"command": args.command, **kept, "result": result})
    for kind in ("svg", "png"):
        name = f"{args.name}.{kind}"
        shutil.copy(os.path.join(args.folder, name), os.path.join(ROOT, "docs", "figures", name))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
