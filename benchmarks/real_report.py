"""The rest of what benchmarks/real_images.sh records: the reward model, time and memory by stage, the figure.

    python benchmarks/real_report.py --runs runs/real_images/seed0/all runs/real_images/seed1/all ...
    python benchmarks/real_report.py --readme        writes the tables anew, from the committed result file

Reads   finished runs of the cycle with marks.json (real_images.py marks), and
        benchmarks/results/real_headline.json (collect.py)
Writes  benchmarks/results/real_report.json, the tables real_pairs, real_reward, real_marks and real_stages in
        docs/results.md, docs/figures/real.svg and .png
"""

import os
import sys
from collections import defaultdict
from datetime import datetime
from operator import itemgetter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]
import collect
import readme

from analysis import figures
from medgr2 import cli, runs

RESULT = os.path.join(collect.RESULTS, "real_report.json")
HEADLINE = os.path.join(collect.RESULTS, "real_headline.json")
BASELINES = ("most frequent answer", "most frequent position", "the last policy without the image")
KINDS = {"omnimed": "genuine OmniMedVQA questions", "label": "questions made from labels"}


def cycles_of(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("cycle"))


def measure_stages(folders):
    """{stage: {"processes", "seconds": mean per seed, "peak_bytes": most}}; all evaluations are one stage."""
    found = defaultdict(lambda: {"processes": 0, "seconds": 0.0, "peak_bytes": 0})
    for folder in folders:
        for meta in collect.read_stages(folder):
            name = os.path.basename(meta["args"]["out"])
            stage = found["evaluations" if name.startswith("eval_") else name]
            started, ended = (datetime.fromisoformat(meta[key]) for key in ("started", "ended"))
            stage["processes"] += 1 / len(folders)
            stage["seconds"] += (ended - started).total_seconds() / len(folders)
            stage["peak_bytes"] = max(stage["peak_bytes"], meta["peak_bytes"]["resident"])
    return dict(found)


def list_pairs(cycles):
    """{name: (evaluation, evaluation)}: the comparisons that the method's claims are about."""
    pairs = {"base → SFT on the expert tenth": ("eval_base", "eval_sft_expert")}
    pairs["SFT on the expert tenth → GRPO on it, rule reward"] = ("eval_sft_expert", "eval_rule")
    before = "SFT on the expert tenth", "eval_sft_expert"
    for cycle in cycles:
        name, sft = cycle.replace("cycle", "cycle "), f"{cycle}/eval_sft"
        accepted = f"{name}: SFT on accepted"
        pairs[f"{before[0]} → {accepted}"] = before[1], sft
        pairs[f"{name}: SFT on random → SFT on accepted"] = f"{cycle}/eval_sft_random", sft
        pairs[f"{accepted} → + GRPO"] = sft, f"{cycle}/eval_grpo"
        pairs[f"{name}: as many SFT steps → + GRPO"] = f"{cycle}/eval_sft_more", f"{cycle}/eval_grpo"
        before = accepted, sft
    return pairs


def compare(folders, pairs):
    """{name: difference of accuracy on the headline questions, by kind, with its interval}."""
    found = {}
    for name, (a, b) in pairs.items():
        only = collect.has_any(["headline=True"])
        questions, right = collect.read_answers(folders, {"a": a, "b": b}, itemgetter("kind"), only)
        found[name] = collect.measure_by(right["b"] - right["a"], questions, ("kind",))
    return found


def pairs_table(pairs):
    lines = []
    for name, found in pairs.items():
        parts = [found, *(found["by_kind"][kind] for kind in KINDS)]
        lines.append([name, *map(collect.format_difference, parts)])
    return readme.format_table(["headline questions", "all", *KINDS.values()], lines)


def gather(folders):
    """The result file: by cycle, each seed's reward model and marks; comparisons; the stages."""
    cycles = cycles_of(folders[0])
    return {
        "seeds": [collect.read_json(f, "eval_base", "args.json")["args"]["seed"] for f in folders],
        "reward": {c: [collect.read_json(f, c, "reward", "metrics.json") for f in folders] for c in cycles},
        "marks": {c: [collect.read_json(f, c, "marks.json") for f in folders] for c in cycles},
        "pairs": compare(folders, list_pairs(cycles)),
        "stages": measure_stages(folders),
        **collect.read_environment(folders),
    }


def spread(values, form=".3f"):
    """Mean, least and greatest of the seeds; seeds without the number are left out."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def reward_table(reward):
    """Held-out expert questions: the mean R of each level, and what the reward model tells apart."""
    first = next(iter(reward.values()))[0]
    levels = list(first["levels"])
    lines = []
    for cycle, seeds in reward.items():
        means = [spread([s["levels"].get(level, {}).get("mean") for s in seeds], ".1f") for level in levels]
        rest = [spread([s["auroc"] for s in seeds]), spread([s["image_swap_drop"] for s in seeds], ".1f")]
        lines.append([cycle, *means, *rest])
    return readme.format_table(["", *(f"R of *{level}*" for level in levels), "AUROC", "image swap"], lines)


def marks_table(marks):
    """Candidates judged by held labels: how many, how many of them are right, and AUROC of R, by task."""
    lines = []
    for cycle, seeds in marks.items():
        tasks = sorted({task for s in seeds for task in s["scored"]["by_task"]})
        for task in ["all", *tasks]:
            parts = [
                {name: part if task == "all" else part["by_task"].get(task, {}) for name, part in s.items()}
                for s in seeds
            ]
            right = [
                spread([p[name].get("right") for p in parts]) for name in ("scored", "random", "accepted")
            ]
            judged = spread([p["scored"].get("judged", 0) for p in parts], ".0f")
            lines.append(
                [f"{cycle}, {task}", judged, *right, spread([p["scored"].get("auroc") for p in parts])]
            )
    headers = ["", "judged", "right, of scored", "of random", "of accepted", "AUROC of R"]
    return readme.format_table(headers, lines)


def stages_table(stages):
    lines = [
        [name, f"{s['processes']:.0f}", f"{s['seconds'] / 60:.1f}", f"{s['peak_bytes'] / 1e9:.2f}"]
        for name, s in stages.items()
    ]
    total = [sum(s[key] for s in stages.values()) for key in ("processes", "seconds")]
    most = max(s["peak_bytes"] for s in stages.values()) / 1e9
    lines.append(["all", f"{total[0]:.0f}", f"{total[1] / 60:.1f}", f"{most:.2f}"])
    return readme.format_table(["stage", "processes per seed", "minutes per seed", "peak GB"], lines)


def write_tables(result):
    hardware = result["hardware"]
    seeds = ", ".join(map(str, result["seeds"]))
    source = (
        f"Seeds {seeds}: mean (least to greatest); commit `{result['git']['commit'][:10]}`; "
        f"{hardware['cpus']} CPU cores ({hardware['machine']}). "
        f"Result file: `{os.path.relpath(RESULT, ROOT)}`."
    )
    readme.write_block("real_reward", f"{reward_table(result['reward'])}\n\n{source}")
    readme.write_block("real_marks", marks_table(result["marks"]))
    readme.write_block("real_pairs", pairs_table(result["pairs"]))
    readme.write_block("real_stages", stages_table(result["stages"]))


def draw_figure():
    accuracy = collect.read_json(HEADLINE)["accuracy"]
    panels = {
        title: {row: found["by_kind"][kind] for row, found in accuracy.items()}
        for kind, title in KINDS.items()
    }
    figures.stages(os.path.join(ROOT, "docs", "figures", "real"), panels, BASELINES)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--runs", required=True, nargs="+", help="a folder per seed")
    return p.parse_args()


def main(args):
    result = gather(args.runs)
    runs.write_json(RESULT, result)
    write_tables(result)
    draw_figure()


if __name__ == "__main__":
    if sys.argv[1:] == ["--readme"]:
        write_tables(collect.read_json(RESULT))
    else:
        cli.run_main(main, parse_args())
