"""Runs the default cycle over several seeds and writes down what came of it; the README's table is made from that file.

    python benchmarks/seeds.py --seeds 0 1 2            runs OUT=runs/seed$S SEED=$S bash cycle.sh, one after the other
    python benchmarks/seeds.py --seeds 0 1 2 --collect  reads those runs' files again; seconds and commit stay those of the runs
    python benchmarks/seeds.py --readme                 writes the README's table anew from the committed result file

Writes benchmarks/results/toy_cycle.json: every accuracy by stage and seed, paired differences with bootstrap intervals over
the images of all seeds together, reward-model quality, seconds, command, commit, versions, hardware.
"""

import argparse
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

from medgr2 import measures, records, runs
from medgr2.prompts import PARADIGMS

RESULT = os.path.join(ROOT, "benchmarks", "results", "toy_cycle.json")
STAGES = {
    "base": "eval_base",
    "SFT on expert data": "eval_sft_expert",
    **{
        f"cycle {c}: {label}": f"cycle{c}/{folder}"
        for c in (1, 2)
        for label, folder in (
            ("SFT on random", "eval_sft_random"),
            ("SFT on accepted", "eval_sft"),
            ("SFT on accepted + expert", "eval_sft_both"),
            ("+ GRPO", "eval_grpo"),
        )
    },
}
PAIRS = [
    ("base", "cycle 2: + GRPO"),
    ("SFT on expert data", "cycle 1: SFT on accepted"),
    ("cycle 1: + GRPO", "cycle 2: + GRPO"),
    *(
        (f"cycle {c}: {a}", f"cycle {c}: {b}")
        for c in (1, 2)
        for a, b in (
            ("SFT on random", "SFT on accepted"),
            ("SFT on accepted", "+ GRPO"),
            ("SFT on accepted + expert", "+ GRPO"),
        )
    ),
]


def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)


def paired(folders, a, b):
    """b minus a over the test items of all seeds together: difference, 95% interval by image, and the difference by seed."""
    import numpy as np

    values, images, by_seed = [], [], []
    for folder in folders:
        rows = [
            list(
                records.read_records(
                    os.path.join(folder, STAGES[s], "predictions.jsonl"), root=records.ANYWHERE
                )
            )
            for s in (a, b)
        ]
        change = [int(y["correct"]) - int(x["correct"]) for x, y in zip(*rows)]
        values, images, by_seed = (
            values + change,
            images + [r["image_hash"] for r in rows[0]],
            by_seed + [sum(change) / len(change)],
        )
    low, high = measures.interval(np.array(values, float), np.array(images), 0)
    return {
        "from": a,
        "to": b,
        "difference": sum(values) / len(values),
        "low": low,
        "high": high,
        "by_seed": by_seed,
    }


def collect(seeds, seconds):
    folders = [os.path.join(ROOT, "runs", f"seed{s}") for s in seeds]
    cycles = [
        [
            {
                "reward": read_json(f, f"cycle{c}", "reward", "metrics.json"),
                "marks": read_json(f, f"cycle{c}", "marks.json"),
                "candidates": read_json(f, f"cycle{c}", "candidates", "metrics.json"),
                "grpo": read_json(f, f"cycle{c}", "grpo", "metrics.json"),
            }
            for c in (1, 2)
        ]
        for f in folders
    ]
    return {
        "command": f"python benchmarks/seeds.py --seeds {' '.join(map(str, seeds))}",
        "seeds": seeds,
        "seconds": seconds,
        "accuracy": {
            s: [read_json(f, d, "metrics.json")["accuracy"] for f in folders] for s, d in STAGES.items()
        },
        "questions": read_json(folders[0], "eval_base", "metrics.json")["questions"],
        "paired": [paired(folders, a, b) for a, b in PAIRS],
        "cycles": cycles,
        **runs.environment(),
    }


def readme_table(r):
    """The README's block: accuracy by stage and seed, the paired differences, the reward model."""
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    lines = [
        "| stage | " + " | ".join(f"seed {s}" for s in r["seeds"]) + " | mean |",
        "|---|" + "---:|" * (len(r["seeds"]) + 1),
    ]
    lines += [
        f"| {stage} | " + " | ".join(f"{v:.3f}" for v in values) + f" | **{mean(values):.3f}** |"
        for stage, values in r["accuracy"].items()
    ]
    lines += [
        "",
        "| paired on the same items, all seeds | difference | 95% interval | by seed |",
        "|---|---:|---|---|",
    ]
    lines += [
        f"| {p['from']} → {p['to']} | {p['difference']:+.3f} | {p['low']:+.3f} to {p['high']:+.3f} | "
        + ", ".join(f"{d:+.3f}" for d in p["by_seed"])
        + " |"
        for p in r["paired"]
    ]
    lines += [
        "",
        "| generated candidates | "
        + " | ".join(f"seed {s}, cycle {c}" for s in r["seeds"] for c in (1, 2))
        + " |",
        "|---|" + "---:|" * (2 * len(r["seeds"])),
    ]
    flat = [c for cycle in r["cycles"] for c in cycle]
    for label, value in (
        ("kept by the parser", lambda c: f"{c['candidates']['kept']} of {c['candidates']['asked']}"),
        ("right, of all", lambda c: f"{c['marks']['right_scored']:.3f}"),
        ("right, of the accepted half", lambda c: f"{c['marks']['right_accepted']:.3f}"),
        ("reward AUROC, right against wrong", lambda c: f"{c['marks']['auroc']:.3f}"),
        ("held-out expert AUROC", lambda c: f"{c['reward']['auroc']:.3f}"),
        ("image-swap drop (of 16)", lambda c: f"{c['reward']['image_swap_drop']:.1f}"),
        *((f"right, {p}", lambda c, p=p: f"{c['marks'][f'right_{p}']:.3f}") for p in PARADIGMS),
    ):
        lines.append(f"| {label} | " + " | ".join(value(c) for c in flat) + " |")
    hardware = r["hardware"]
    lines += [
        "",
        f"Command `{r['command']}`; {r['questions']} test questions a seed; commit `{(r['git']['commit'] or '?')[:10]}`; "
        f"{hardware['cpus']} CPU cores ({hardware['machine']}), torch {r['versions']['torch']}, transformers {r['versions']['transformers']}; "
        f"{', '.join(f'{s / 60:.1f}' for s in r['seconds'])} minutes a seed. Result file: `benchmarks/results/toy_cycle.json`.",
    ]
    return "\n".join(lines)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of the cycle each")
    p.add_argument("--collect", action="store_true", help="run nothing; read the finished runs again")
    p.add_argument(
        "--readme", action="store_true", help="only write the README's table, from the result file"
    )
    return p.parse_args()


def main(args):
    if args.collect:
        old = read_json(RESULT)
        runs.write_json(
            RESULT, collect(args.seeds, old["seconds"]) | {k: old[k] for k in ("git", "versions", "hardware")}
        )
    elif not args.readme:
        there = [
            f"runs/seed{s}" for s in args.seeds if os.path.exists(os.path.join(ROOT, "runs", f"seed{s}"))
        ]
        # their stages would be skipped, and whatever made them be taken for this commit's
        if there:
            sys.exit(f"seeds.py: {', '.join(there)} there already; remove them, or read them with --collect")
        seconds = []
        for seed in args.seeds:
            start = time.time()
            subprocess.run(
                ["bash", "cycle.sh"],
                cwd=ROOT,
                check=True,
                env=os.environ | {"OUT": f"runs/seed{seed}", "SEED": str(seed)},
            )
            seconds.append(time.time() - start)
        runs.write_json(RESULT, collect(args.seeds, seconds))
    readme.write_block("results", readme_table(read_json(RESULT)))


if __name__ == "__main__":
    main(parse_args())
