"""How well the reward model ranks the same candidates once it has learned from rollouts.

On clinics of which no accuracy is reported: one cycle about 300 images, whose GRPO leaves rollouts. Then
reward models that learn from them in several ways (VARIANTS) score that cycle's candidates. AUROC is of right
against wrong candidates, by the facts that the toy clinic drew. GRPO has no unlabelled questions here.

    python benchmarks/reward_rollouts.py            into runs/reward_rollouts; the same command resumes
    python benchmarks/reward_rollouts.py --readme   writes the table from the committed result file

Writes benchmarks/results/reward_rollouts.json and its table in docs/results.md. A seed takes about 8 minutes
on one core.
"""

import os
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

from medgr2 import cli, runs

RESULT = os.path.join(ROOT, "benchmarks", "results", "reward_rollouts.json")
ALL = "--per-outcome 1000000"
# {name: flags}. The last --rollouts counts; without files after it the model learns from none.
VARIANTS = {
    "no rollouts": "--rollouts",
    "all rollouts": ALL,
    "three of each question and outcome (the default)": "",
    "one of each question and outcome": "--per-outcome 1",
    "all, three times the resamples": f"--resamples 9 {ALL}",
    "no rollouts, a third of the steps": "--steps 800 --rollouts",
}


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--out", default="runs/reward_rollouts", help="folder of the runs")
    p.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102], help="of clinics and training")
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    return p.parse_args()


def stage(out, seed, command):
    """Run the command of a stage unless its output is there."""
    if not os.path.exists(out):
        command = [sys.executable, *shlex.split(command), "--out", out]
        subprocess.run(command + (["--seed", str(seed)] if seed is not None else []), check=True, cwd=ROOT)


def run_cycle(d, seed):
    """One cycle without its evaluations, into the folder d → the commands that train and score again."""
    stage(f"{d}/data", seed, "toy/clinic.py --sizes 100 200 300 200 100")
    expert, root = f"{d}/data/expert.jsonl", f"--image-root {d}/data"
    learn = f"reward.py train --model toy/backbone --data {expert} {d}/data/reports.jsonl {root}"
    stage(f"{d}/reward", seed, learn)
    images = f"{d}/data/unlabelled/images.jsonl"
    ask = f"generate.py --model toy/generator --images {images} --per-image 2 {root}"
    stage(f"{d}/candidates", seed, ask)
    score = f"reward.py score --data {d}/candidates/candidates.jsonl --threshold 8 {root}"
    stage(f"{d}/scored", seed, f"{score} --model {d}/reward")
    questions = f"--data {d}/scored/accepted.jsonl {expert} {root}"
    stage(f"{d}/sft", seed, f"sft.py --model toy/policy --steps 700 {questions}")
    stage(f"{d}/grpo", seed, f"grpo.py --model {d}/sft --reward {d}/reward {questions}")
    return f"{learn} --rollouts {d}/grpo/rollouts.jsonl", score


def measure(d, seed):
    """{variant: AUROC, overall and by task} on one clinic."""
    learn, score = run_cycle(d, seed)
    found = {}
    for number, (name, flags) in enumerate(VARIANTS.items()):
        model = f"{d}/variant{number}"
        stage(model, seed, f"{learn} {flags}")
        stage(f"{model}_scored", seed, f"{score} --model {model}")
        truth = f"--truth {d}/data/unlabelled/truth.jsonl"
        stage(f"{model}.json", None, f"toy/mark.py --scored {model}_scored {truth}")
        marks = runs.read_json(f"{model}.json", "remove it")
        found[name] = {"auroc": marks["auroc"]}
        found[name]["by_task"] = {task: mark["auroc"] for task, mark in marks["by_task"].items()}
    return found


def mean(values):
    return sum(values) / len(values)


def write_table(result):
    seeds = list(result["seeds"].values())
    tasks = sorted(next(iter(seeds[0].values()))["by_task"])
    lines = []
    for name in VARIANTS:
        own = [seed[name] for seed in seeds]
        by_seed = ", ".join(f"{found['auroc']:.3f}" for found in own)
        by_task = [f"{mean([found['by_task'][task] for found in own]):.3f}" for task in tasks]
        lines.append([name, f"**{mean([found['auroc'] for found in own]):.3f}**", by_seed, *by_task])
    hardware, versions = result["hardware"], result["versions"]
    source = (
        f"Command `{result['command']}`; seeds {', '.join(result['seeds'])}; commit "
        f"`{(result['git']['commit'] or '?')[:10]}`; {hardware['cpus']} CPU cores ({hardware['machine']}), "
        f"torch {versions['torch']}. Result file: `{os.path.relpath(RESULT, ROOT)}`."
    )
    table = readme.format_table(["the reward model learns from", "AUROC", "by seed", *tasks], lines)
    readme.write_block("reward_rollouts", f"{table}\n\n{source}")


def main(args):
    if not args.readme:
        # Before the work: the table must have a place.
        readme.find_page("reward_rollouts")
        found = {seed: measure(os.path.abspath(f"{args.out}/seed{seed}"), seed) for seed in args.seeds}
        command = "python benchmarks/reward_rollouts.py"
        runs.write_json(RESULT, {"command": command, "seeds": found} | runs.environment())
    write_table(runs.read_json(RESULT, "run benchmarks/reward_rollouts.py"))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
