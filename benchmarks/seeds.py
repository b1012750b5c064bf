"""Runs the default cycle over several seeds, collects its results, and writes their tables.

    python benchmarks/seeds.py --seeds 0 1 2    runs OUT=runs/seed$S SEED=$S bash cycle.sh for each seed
    python benchmarks/seeds.py --collect        reads those finished runs again
    python benchmarks/seeds.py --collect --runs runs/toy --out FILE    reads any finished runs of two cycles
    python benchmarks/seeds.py --readme         writes the tables from the committed result files

Writes benchmarks/results/toy_cycle.json: every accuracy by stage and seed, paired differences with
bootstrap intervals over the images of all seeds together, reward-model quality, seconds, command, commit,
versions and hardware. The last three are those that the runs wrote down. Seconds are those of cycle.sh;
with --collect they are those from the start of the first stage to the end of the last.
"""

import datetime
import glob
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

from medgr2 import cli, measures, records, runs
from medgr2.errors import RunError
from medgr2.prompts import PARADIGMS

RESULT = os.path.join(ROOT, "benchmarks", "results", "toy_cycle.json")
# One more run of seed 0, on another machine.
AGAIN = os.path.join(ROOT, "benchmarks", "results", "toy_cycle_again.json")
# The folder of each row.
STAGES = {
    "base": "eval_base",
    "SFT on expert data": "eval_sft_expert",
    "cycle 1: SFT on random": "cycle1/eval_sft_random",
    "cycle 1: SFT on accepted": "cycle1/eval_sft",
    "cycle 1: SFT on accepted + expert": "cycle1/eval_sft_both",
    "cycle 1: + GRPO": "cycle1/eval_grpo",
    "cycle 2: SFT on random": "cycle2/eval_sft_random",
    "cycle 2: SFT on accepted": "cycle2/eval_sft",
    "cycle 2: SFT on accepted + expert": "cycle2/eval_sft_both",
    "cycle 2: + GRPO": "cycle2/eval_grpo",
}
PAIRS = [
    ("base", "cycle 2: + GRPO"),
    ("SFT on expert data", "cycle 1: SFT on accepted"),
    ("cycle 1: + GRPO", "cycle 2: + GRPO"),
    ("cycle 1: SFT on random", "cycle 1: SFT on accepted"),
    ("cycle 1: SFT on accepted", "cycle 1: + GRPO"),
    ("cycle 1: SFT on accepted + expert", "cycle 1: + GRPO"),
    ("cycle 2: SFT on random", "cycle 2: SFT on accepted"),
    ("cycle 2: SFT on accepted", "cycle 2: + GRPO"),
    ("cycle 2: SFT on accepted + expert", "cycle 2: + GRPO"),
]


# ---------------------------------------------------------------------------------------------------------
# From the runs to the result file.


def read_json(*path):
    path = os.path.join(*path)
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}; give finished runs of two cycles") from None


def read_predictions(folder, stage):
    return records.read_records(
        os.path.join(folder, STAGES[stage], "predictions.jsonl"), root=records.ANYWHERE
    )


def paired_difference(folders, a, b):
    """Accuracy of stage b minus that of a, over the test items of all runs together and by run.

    The 95% interval is over images.
    """
    import numpy as np

    changes, images, by_seed = [], [], []
    for folder in folders:
        own = []
        for before, after in zip(read_predictions(folder, a), read_predictions(folder, b), strict=True):
            own.append(int(after["correct"]) - int(before["correct"]))
            images.append(before["image_hash"])
        changes += own
        by_seed.append(sum(own) / len(own))
    low, high = measures.interval(np.array(changes, float), np.array(images), 0)
    difference = sum(changes) / len(changes)
    return {"from": a, "to": b, "difference": difference, "low": low, "high": high, "by_seed": by_seed}


def read_cycle(folder):
    return {
        "reward": read_json(folder, "reward", "metrics.json"),
        "marks": read_json(folder, "marks.json"),
        "candidates": read_json(folder, "candidates", "metrics.json"),
        "grpo": read_json(folder, "grpo", "metrics.json"),
    }


def read_stages(folder):
    """The args.json of every stage of a run."""
    paths = glob.glob(os.path.join(glob.escape(folder), "**", "args.json"), recursive=True)
    return [read_json(path) for path in sorted(paths)]


def count_seconds(folder):
    """From the start of the run's first stage to the end of its last."""
    stages = read_stages(folder)
    first = min(datetime.datetime.fromisoformat(stage["started"]) for stage in stages)
    last = max(datetime.datetime.fromisoformat(stage["ended"]) for stage in stages)
    return (last - first).total_seconds()


def read_environment(folders):
    """Versions, commit and hardware as all stages of all runs wrote them. Raises RunError if they differ."""
    found = []
    for stage in (stage for folder in folders for stage in read_stages(folder)):
        environment = {key: stage[key] for key in ("versions", "git", "hardware")}
        if environment not in found:
            found.append(environment)
    if len(found) != 1:
        raise RunError(
            f"{folders[0]}: {len(found)} commits, machines or sets of versions; one result has one"
        )
    return found[0]


def collect(folders, seconds, command=None):
    """The result file of finished runs. Without `command` it is that of the cycles themselves."""
    arguments = [read_json(folder, "eval_base", "args.json")["args"] for folder in folders]
    seeds = [args["seed"] for args in arguments]
    cycles = [f"OUT={os.path.dirname(args['out'])} SEED={args['seed']} bash cycle.sh" for args in arguments]
    accuracy = {}
    for stage, part in STAGES.items():
        accuracy[stage] = [read_json(folder, part, "metrics.json")["accuracy"] for folder in folders]
    return {
        "command": command or "; ".join(cycles),
        "seeds": seeds,
        "seconds": seconds,
        "accuracy": accuracy,
        "questions": read_json(folders[0], "eval_base", "metrics.json")["questions"],
        "paired": [paired_difference(folders, a, b) for a, b in PAIRS],
        "cycles": [[read_cycle(os.path.join(folder, f"cycle{c}")) for c in (1, 2)] for folder in folders],
        **read_environment(folders),
    }


# ---------------------------------------------------------------------------------------------------------
# From the result file to the tables.


def accuracy_table(result):
    rows = []
    for stage, values in result["accuracy"].items():
        mean = sum(values) / len(values)
        rows.append([stage, *(f"{value:.3f}" for value in values), f"**{mean:.3f}**"])
    return readme.format_table(["stage", *(f"seed {seed}" for seed in result["seeds"]), "mean"], rows)


def paired_table(result):
    rows = []
    for pair in result["paired"]:
        interval = f"{pair['low']:+.3f} to {pair['high']:+.3f}"
        by_seed = ", ".join(f"{difference:+.3f}" for difference in pair["by_seed"])
        rows.append([f"{pair['from']} → {pair['to']}", f"{pair['difference']:+.3f}", interval, by_seed])
    headers = ["paired on the same items, all seeds", "difference", "95% interval", "by seed"]
    return readme.format_table(headers, rows)


def candidates_table(result):
    """One column per seed and cycle."""
    headers, columns = ["generated candidates"], []
    for seed, cycles in zip(result["seeds"], result["cycles"]):
        for number, cycle in enumerate(cycles, 1):
            headers.append(f"seed {seed}, cycle {number}")
            candidates, marks, reward = cycle["candidates"], cycle["marks"], cycle["reward"]
            column = {
                "kept by the parser": f"{candidates['kept']} of {candidates['asked']}",
                "right, of all": f"{marks['right_scored']:.3f}",
                "right, of the accepted half": f"{marks['right_accepted']:.3f}",
                "reward AUROC, right against wrong": f"{marks['auroc']:.3f}",
                "held-out expert AUROC": f"{reward['auroc']:.3f}",
                "image-swap drop (of 16)": f"{reward['image_swap_drop']:.1f}",
            }
            for paradigm in PARADIGMS:
                column[f"right, {paradigm}"] = f"{marks[f'right_{paradigm}']:.3f}"
            columns.append(column)
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return readme.format_table(headers, rows)


def again_table(result, again):
    """The rerun beside the column of its seed."""
    (seed,), rows = again["seeds"], []
    column = result["seeds"].index(seed)
    for stage, values in result["accuracy"].items():
        rows.append([stage, f"{values[column]:.3f}", f"{again['accuracy'][stage][0]:.3f}"])
    return readme.format_table(["stage", f"seed {seed} in the table", f"seed {seed} again"], rows)


def provenance(result, path):
    hardware, versions = result["hardware"], result["versions"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpus']} CPU cores ({hardware['machine']})"
    minutes = ", ".join(f"{seconds / 60:.1f}" for seconds in result["seconds"])
    return (
        f"Command `{result['command']}`; {result['questions']} test questions per seed; "
        f"commit `{(result['git']['commit'] or '?')[:10]}`; {machine}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {minutes} minutes per seed. "
        f"Result file: `{os.path.relpath(path, ROOT)}`."
    )


def write_tables():
    result, again = read_json(RESULT), read_json(AGAIN)
    source = provenance(result, RESULT)
    readme.write_block("results", f"{accuracy_table(result)}\n\n{source}")
    readme.write_block("results-detail", f"{paired_table(result)}\n\n{candidates_table(result)}\n\n{source}")
    readme.write_block("results-again", f"{again_table(result, again)}\n\n{provenance(again, AGAIN)}")


# ---------------------------------------------------------------------------------------------------------


def run_cycles(seeds):
    """Run one cycle per seed → (folders, seconds of each). Raises RunError if a folder is there."""
    folders, seconds = [os.path.join(ROOT, "runs", f"seed{seed}") for seed in seeds], []
    for folder in folders:
        if os.path.exists(folder):
            # Its stages would be skipped, and whatever made them would be taken for this commit's.
            raise RunError(f"{folder}: there already; remove it, or read it with --collect")
    for seed, folder in zip(seeds, folders):
        environment = os.environ | {"OUT": os.path.relpath(folder, ROOT), "SEED": str(seed)}
        start = time.time()
        subprocess.run(["bash", "cycle.sh"], cwd=ROOT, check=True, env=environment)
        seconds.append(time.time() - start)
    return folders, seconds


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of the cycle each")
    cli.add_switch(p, "--collect", "run nothing; read finished runs again")
    p.add_argument("--runs", nargs="+", help="with --collect: their folders (runs/seed0, ... by --seeds)")
    p.add_argument("--out", default=RESULT, help="result file")
    cli.add_switch(p, "--readme", "only write the tables, from the committed result files")
    args = p.parse_args()
    if args.runs and not args.collect:
        p.error("--runs goes with --collect")
    return args


def main(args):
    if not args.readme:
        command = (
            None if args.runs else f"python benchmarks/seeds.py --seeds {' '.join(map(str, args.seeds))}"
        )
        if args.collect:
            folders = args.runs or [os.path.join(ROOT, "runs", f"seed{seed}") for seed in args.seeds]
            seconds = [count_seconds(folder) for folder in folders]
        else:
            folders, seconds = run_cycles(args.seeds)
        runs.write_json(args.out, collect(folders, seconds, command))
    write_tables()


if __name__ == "__main__":
    cli.run_main(main, parse_args())
