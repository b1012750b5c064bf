"""Does --shard change what is learned, and what does a process hold? Against one plain process, on a CPU.

Two small models with random weights (LLaVA, its head tied; Qwen2.5-VL), the cases of test_sharding.py, over
1, 2 and 3 processes (gloo), ten updates. It takes minutes, so tests/run.sh computes a few of these only.

    python benchmarks/sharding.py              into benchmarks/results/sharding.json and docs/scale.md
    python benchmarks/sharding.py --readme     writes the table from the committed result file
"""

import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "toy"), os.path.join(ROOT, "tests")]
import readme

from medgr2 import cli, runs

RESULT = os.path.join(ROOT, "benchmarks", "results", "sharding.json")
MODELS, PROCESSES, STEPS = ("llava", "qwen2_5_vl"), (1, 2, 3), 10


def measure():
    """{model: {number of processes: {case: what test_sharding.compare finds}}}."""
    import clinic
    from test_sharding import CASES, compare
    from test_vlm import BUILD

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        clinic.write_clinic(folder, (3, 1, 1, 1, 1), seed=5)
        for model in MODELS:
            source = Path(folder, model)
            BUILD[model](source)
            found[model] = {str(n): {} for n in PROCESSES}
            for n in PROCESSES:
                for case in CASES:
                    of_case = compare(str(source), Path(folder, "expert.jsonl"), n, {case: STEPS})
                    found[model][str(n)] |= of_case
                    print(model, n, of_case, flush=True)
    return found


def format_table(result):
    """Per case the largest differences over models and numbers of processes, and what a process holds."""
    found, rows = result["models"], []
    for case in found[MODELS[0]]["1"]:
        of_case = {n: [found[model][str(n)][case] for model in MODELS] for n in PROCESSES}
        every = [differs for several in of_case.values() for differs in several]
        row = [case, *(f"{max(max(d[key] for d in every), 0):.0e}" for key in ("gradient", "update"))]
        rows.append(row + [f"{max(d['bytes'] for d in of_case[n]):.2f}" for n in (2, 3)])
    headers = ["case", "gradients, 1 - cosine", "ten updates, 1 - cosine", "bytes of 2", "bytes of 3"]
    note = f"Command `{result['command']}`; commit `{(result['git']['commit'] or '?')[:10]}`."
    return readme.format_table(headers, rows) + "\n\n" + note


def main(args):
    if not args.readme:
        result = {"command": "python benchmarks/sharding.py", "models": measure(), **runs.environment()}
        runs.write_json(RESULT, result)
    with open(RESULT, encoding="utf-8") as f:
        readme.write_block("sharding", format_table(json.load(f)))


def parse_args():
    p = cli.Parser(description=__doc__)
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    return p.parse_args()


if __name__ == "__main__":
    cli.run_main(main, parse_args())
