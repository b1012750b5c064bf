"""Seconds of a stage with --workers: reward.py score on JPEGs of 1,024 x 1,024 pixels.

To open such an image and to resize it takes longer than a pass of the toy's backbone; on a GPU it may take
longer than a pass of a large one. `one image` is the same command on one candidate: its start. Each
measurement is a process of its own, and the variants take turns.

    python benchmarks/workers.py            into benchmarks/results/workers.json and docs/performance.md
    python benchmarks/workers.py --readme   writes the table from the committed result file
"""

import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]
import readme
from grpo_step import spread

from medgr2 import cli, runs
from medgr2.errors import RunError

RESULTS = os.path.join(ROOT, "benchmarks", "results", "workers.json")
IMAGES, SIDE, WORKERS = 400, 1024, (0, 1, 2)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--rounds", type=cli.number(int, 1), default=3, help="processes of each variant")
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    return p.parse_args()


def build(folder):
    """Candidates about images of noise, and a reward model whose heads are random."""
    import numpy
    from PIL import Image

    import reward
    from medgr2 import loading

    rng, rows = numpy.random.default_rng(0), []
    for i in range(IMAGES):
        # Smooth, so that the files are as large as photographs.
        noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=numpy.uint8))
        noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg", quality=90)
        row = {"id": str(i), "image": f"{i}.jpg", "question": "Which?", "options": ["CT", "MRI"]}
        rows.append(row | {"answer": "CT"})
    for name, some in (("all", rows), ("one", rows[:1])):
        with open(f"{folder}/{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)
    backbone = loading.load(os.path.join(ROOT, "toy", "backbone"), "cpu")
    heads = reward.Heads(reward.LIKELIHOOD_FEATURES, 8)
    os.mkdir(f"{folder}/rm")
    reward.RewardModel(backbone, heads, True).save(f"{folder}/rm")


def call(folder, data, workers):
    """The seconds of the command."""
    out = tempfile.mktemp(dir=folder)
    flags = f"--model {folder}/rm --data {folder}/{data}.jsonl --top-k 1 --batch 16 --workers {workers}"
    command = [sys.executable, "reward.py", "score", *flags.split(), "--out", out]
    started = time.monotonic()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{data}, {workers} workers: {done.stderr[-3000:]}")
    return time.monotonic() - started


def measure(rounds):
    """{variant: seconds of each round}, in turns."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        for _ in range(rounds):
            for name, data, workers in [
                ("one image", "one", 0),
                *((f"{n} workers", "all", n) for n in WORKERS),
            ]:
                found.setdefault(name, []).append(call(folder, data, workers))
                print(name, f"{found[name][-1]:.2f} s", flush=True)
    return found


def write_table(result):
    rows = []
    for name, seconds in result["seconds"].items():
        own = spread(seconds)
        ratios = [mine / thread for mine, thread in zip(seconds, result["seconds"]["0 workers"])]
        ratio = spread(ratios)
        compared = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        is_other = name not in ("one image", "0 workers")
        rows.append([name, f"{own['median']:.1f}", compared if is_other else ""])
    rounds = len(result["seconds"]["one image"])
    source = f"Command `python benchmarks/workers.py`; {IMAGES} images, {rounds} rounds; commit "
    source += f"`{result['git']['commit'][:10]}`; {result['hardware']['cpus']} CPU cores. "
    source += f"Result file: `{os.path.relpath(RESULTS, ROOT)}`."
    table = readme.format_table(["", "seconds", "time / 0 workers"], rows)
    readme.write_block("workers", f"{table}\n\n{source}")


def main(args):
    if args.readme:
        return write_table(runs.read_json(RESULTS, "run benchmarks/workers.py"))
    result = {"seconds": measure(args.rounds), **runs.environment()}
    runs.write_json(RESULTS, result)
    write_table(result)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
