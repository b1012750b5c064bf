"""Memory and time of a GRPO step with --micro-group and --gradient-checkpointing, on a LLaVA of 50 M.

P = 300 prompt tokens (256 of an image), C = 128 response tokens, G = 8 responses to one question. The step is
that of benchmarks/grpo_step.py's `ours`. `whole` learns from the eight responses at once; parts of 4, 2 and 1
compute the same gradient in several passes over the prompt's keys and values, and recompute nothing. A layer
that is checkpointed (--gradient-checkpointing) keeps its input and computes the rest once more. Each
measurement is a process of its own, and the variants take turns. *MB beyond weights, gradient and moments* is
the growth of the process's peak memory above model and optimiser, without a gradient and AdamW's moments. As
`whole` peaks before its gradient exists, its activations are more than that, and the ratios are too high.

    python benchmarks/micro_group.py            into benchmarks/results/micro_group.json and docs/scale.md
    python benchmarks/micro_group.py --readme   writes the table from the committed result file
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]
import grpo_step
import readme

from medgr2 import cli, runs
from medgr2.errors import RunError

RESULTS = os.path.join(ROOT, "benchmarks", "results", "micro_group.json")
ROW, STEPS, RESPONSE_TOKENS = grpo_step.ROWS["mid-256"]._replace(prompts=1), 2, 128
# --micro-group (None is a whole group), --gradient-checkpointing.
VARIANTS = {
    "whole": (None, False),
    "parts of 4": (4, False),
    "parts of 2": (2, False),
    "parts of 1": (1, False),
    "whole, checkpointed": (None, True),
    "parts of 2, checkpointed": (2, True),
    "parts of 1, checkpointed": (1, True),
}


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--rounds", type=cli.number(int, 1), default=2, help="processes of each variant")
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    # VARIANT FOLDER: what to measure in this process.
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return p.parse_args()


def child(variant, folder):
    """Measure in this process; the result is the last line of stdout."""
    import torch

    from medgr2 import loading

    torch.set_num_threads(1)
    grpo_step.C = RESPONSE_TOKENS
    if not os.path.exists(os.path.join(folder, "model")):
        grpo_step.build(ROW, folder, 1 + STEPS)
    size, checkpointing = VARIANTS[variant]
    found = grpo_step.ours(ROW, folder, STEPS, False, micro_group=size, checkpointing=checkpointing)
    # Loaded once more, after the measurement, to count what learns: gradient and two moments in fp32.
    policy = loading.load(os.path.join(folder, "model"), "cpu")
    loading.freeze_images(policy)
    held = 3 * sum(p.nbytes for p in policy.model.parameters() if p.requires_grad)
    print(json.dumps(found | {"activation_bytes": found["growth_bytes"] - held}))


def call(variant, folder):
    command = [sys.executable, os.path.abspath(__file__), "--child", variant, folder]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RunError(f"{variant}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(rounds):
    """{variant: its measurements}, in turns."""
    found = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        # Makes the model.
        call("whole", folder)
        for k in range(rounds):
            for variant in VARIANTS:
                last = call(variant, folder)
                found[variant].append(last)
                line = f"{last['seconds']:.1f} s, activations {last['activation_bytes'] / 1e6:.0f} MB"
                print(f"round {k}, {variant}: {line}", flush=True)
    return found


def ratios(result, variant, key):
    """Median, least and greatest of variant / whole, round by round."""
    pairs = zip(result["rounds"][variant], result["rounds"]["whole"])
    return grpo_step.spread([part[key] / whole[key] for part, whole in pairs])


def write_table(result):
    lines = []
    for variant, rounds in result["rounds"].items():
        cells = [
            grpo_step.spread([r[key] for r in rounds])["median"] for key in ("activation_bytes", "seconds")
        ]
        line = [variant, f"{cells[0] / 1e6:.0f}", f"{cells[1]:.2f}"]
        for key in ("activation_bytes", "seconds"):
            ratio = ratios(result, variant, key)
            cell = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            line.append("" if variant == "whole" else cell)
        lines.append(line)
    headers = ["", "MB beyond weights, gradient and moments", "seconds", "memory / whole", "time / whole"]
    source = (
        f"Command `python benchmarks/micro_group.py`; {len(result['rounds']['whole'])} rounds, one thread; "
        f"commit `{result['git']['commit'][:10]}`. Result file: `{os.path.relpath(RESULTS, ROOT)}`."
    )
    readme.write_block("micro_group", f"{readme.format_table(headers, lines)}\n\n{source}")


def main(args):
    if args.child:
        return child(*args.child)
    if args.readme:
        return write_table(runs.read_json(RESULTS, "run benchmarks/micro_group.py"))
    result = {"rounds": measure(args.rounds), **runs.environment()}
    runs.write_json(RESULTS, result)
    write_table(result)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
