"""The reliability diagram of a run that scored the options: how often answers of some probability are right.

Reads   metrics.json of `eval.py --scores`
Writes  OUT.svg and OUT.png

    python -m analysis.reliability runs/toy/eval_base --out runs/toy/eval_base/reliability
"""

import json
import os

from analysis import figures
from medgr2 import cli
from medgr2.errors import RunError


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("run", help="folder of a run of eval.py --scores")
    p.add_argument("--out", required=True, help="files to write, without .svg and .png")
    return p.parse_args()


def main(args):
    path = os.path.join(args.run, "metrics.json")
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        bins, ece = result["bins"], result["ece"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        problem = f"{path}: no bins of option probabilities ({error})"
        raise RunError(f"{problem}; give a run of eval.py --scores") from None
    figures.reliability(args.out, bins, ece)
    print(f"{args.out}.svg, {args.out}.png: ECE {ece:.3f}")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
