"""Does --shard change what is learned, and what does a process hold? Against one plain process, on a CPU.

Two small models with random weights (LLaVA, its head tied; Qwen2.5-VL), the cases of tests/test_sharding.py,
over 1, 2 and 3 processes (gloo) and over two pretended nodes of two. Two cases make ten updates, the others
one. In these models the frozen vision tower, which is not sharded, is a large part; so the bytes are measured
on a LLaVA of 50 M parameters too, whose tower is 6% (Qwen2.5-VL-7B: 8%). It takes minutes, so tests/run.sh
computes a few of these only.

    python benchmarks/sharding.py              into benchmarks/results/sharding.json and docs/scale.md
    python benchmarks/sharding.py --readme     writes the table from the committed result file
"""

import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, *(os.path.join(ROOT, name) for name in ("toy", "tests", "benchmarks"))]
import grpo_step
import readme

from medgr2 import cli, runs

RESULT = os.path.join(ROOT, "benchmarks", "results", "sharding.json")
MODELS = ("llava", "qwen2_5_vl")
# {name: (processes, processes of a node)}.
PLACES = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "2 nodes of 2": (4, 2)}
LONG, STEPS = ("sft", "grpo --micro-group --kl"), 10
# A row of grpo_step.py: its model of 50 M.
LARGE = grpo_step.ROWS["mid-64"]


def measure():
    """({model: {place: {case: what test_sharding.compare finds}}}, {case: the same of LARGE over two})."""
    import clinic
    from test_sharding import CASES, compare
    from test_vlm import BUILD

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        clinic.write_clinic(folder, (3, 1, 1, 1, 1), seed=5)
        for model in MODELS:
            source = Path(folder, model)
            BUILD[model](source)
            found[model] = {place: {} for place in PLACES}
            data = Path(folder, "expert.jsonl")
            for place, (processes, per_node) in PLACES.items():
                for case in CASES:
                    steps = {case: STEPS if case in LONG else 1}
                    of_case = compare(str(source), data, processes, steps, LOCAL_WORLD_SIZE=str(per_node))
                    found[model][place] |= of_case
                    print(model, place, of_case, flush=True)
        source, large = os.path.join(folder, "large"), {}
        grpo_step.build_llava(LARGE, source)
        for case in CASES:
            large |= compare(source, data, 2, {case: 1})
            print("large", large[case], flush=True)
    return found, large


def format_table(result):
    """Per case the largest differences over models and places, and what a process holds."""
    found, rows = result["models"], []
    for case in found[MODELS[0]]["1"]:
        of_case = {place: [found[model][place][case] for model in MODELS] for place in PLACES}
        every = [differs for several in of_case.values() for differs in several]
        gradient, update = (max(0, *(d[key] for d in every)) for key in ("gradient", "update"))
        row = [case, f"{gradient:.0e}", f"{update:.0e}" if case in LONG else ""]
        row += [f"{max(d['bytes'] for d in of_case[place]):.2f}" for place in ("2", "3")]
        rows.append([*row, f"{result['large'][case]['bytes']:.2f}"])
    headers = ["case", "gradient, 1 - cosine", f"{STEPS} updates, 1 - cosine"]
    headers += ["bytes of 2", "bytes of 3", "bytes of 2, 50 M"]
    note = f"Command `{result['command']}`; commit `{(result['git']['commit'] or '?')[:10]}`."
    return readme.format_table(headers, rows) + "\n\n" + note


def main(args):
    if not args.readme:
        models, large = measure()
        result = {"command": "python benchmarks/sharding.py", "models": models, "large": large}
        runs.write_json(RESULT, result | runs.environment())
    with open(RESULT, encoding="utf-8") as f:
        readme.write_block("sharding", format_table(json.load(f)))


def parse_args():
    p = cli.Parser(description=__doc__)
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    return p.parse_args()


if __name__ == "__main__":
    cli.run_main(main, parse_args())
