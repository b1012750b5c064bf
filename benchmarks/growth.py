"""Time and memory of what reads record files, by the number of records: do they grow in proportion?

A file has 4 questions about each image, of 32 x 32 pixels, and scores. It is checked (every image is
opened) and split by image; its parts are audited against each other (exact and near); a report is made of it.
`sft.py, read` is what sft.py does with a train and a test part before it loads a model: it reads both and
refuses leakage (exact). Each measurement is a process of its own.

    python benchmarks/growth.py --records 10000 100000 1000000    into benchmarks/results/growth.json and docs
    python benchmarks/growth.py --readme                          writes the table from that file
"""

import json
import os
import random
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]
import cycle
import readme

from medgr2 import cli, runs
from medgr2.errors import RunError

RESULT = os.path.join(ROOT, "benchmarks", "results", "growth.json")
# Questions about an image; images in a folder.
QUESTIONS, FOLDER = 4, 1000
OPTIONS = ["no lesion", "mild", "moderate", "severe"]
TASKS = ["Lesion Grading", "Disease Diagnosis", "Anatomy Identification", "Modality Recognition"]
READ = """
import argparse, sys
from medgr2 import training
train, test, root = sys.argv[1:]
args = argparse.Namespace(test=test, image_root=root, out="x")
args.on_error, args.allow_leakage = "stop", False
print(len(training.read_data(args, [(train, ("image",))], True)[0][1]))
"""


def parse_args():
    p = cli.Parser(description=__doc__)
    count = cli.number(int, 100)
    p.add_argument(
        "--records", type=count, nargs="+", default=[10**4, 10**5, 10**6], help="numbers of records"
    )
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    return p.parse_args()


def write_files(folder, number):
    """folder/all.jsonl: `number` scored records, and their images."""
    from PIL import Image

    rng = random.Random(0)
    with open(f"{folder}/all.jsonl", "w", encoding="utf-8") as file:
        for n in range(number):
            i, k = divmod(n, QUESTIONS)
            image = f"images/{i // FOLDER}/{i}.png"
            if k == 0:
                os.makedirs(f"{folder}/images/{i // FOLDER}", exist_ok=True)
                picture = Image.frombytes("RGB", (32, 32), rng.randbytes(3 * 32 * 32))
                picture.save(f"{folder}/{image}", compress_level=1)
            row = {"id": f"img{i}-c1-direct-{k}", "image": image, "task": TASKS[k], "modality": "CT"}
            row |= {"source": "generated", "paradigm": "direct", "cycle": 1, "parent": f"img{i}"}
            row |= {"question": f"How severe is lesion {n}?", "options": OPTIONS, "answer": OPTIONS[k]}
            row |= {
                "rationale": f"CT of the knee. Lesion {n} is at the left, round and small. So {OPTIONS[k]}."
            }
            row |= {"reward": {"overall": 7.5, "accuracy": 0.9, "coherence": 0.8, "relevance": 0.7}}
            file.write(json.dumps(row) + "\n")


def measure(number):
    """{operation: {"seconds", "cpu_seconds", "peak_bytes"}} for files of so many records."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_files(folder, number)
        parts = f"--train {folder}/parts/train.jsonl --test {folder}/parts/test.jsonl --image-root {folder}"
        split = f"split {folder}/all.jsonl --out {folder}/parts --train 0.8 --val 0.1 --test 0.1"
        read = ["-c", READ, f"{folder}/parts/train.jsonl", f"{folder}/parts/test.jsonl", folder]
        operations = {
            "records check": f"-m medgr2.records check {folder}/all.jsonl".split(),
            "records split": f"-m medgr2.records {split}".split(),
            "leakage": f"-m medgr2.leakage {parts} --out {folder}/leaks".split(),
            "sft.py, read": read,
            "report": f"-m analysis.report --scored {folder}/all.jsonl --out {folder}/report.html".split(),
        }
        for name, command in operations.items():
            log = f"{folder}/{name}.log"
            if cycle.measure(log, *command):
                raise RunError(f"{name} of {number} records failed; its message is above")
            with open(log, encoding="utf-8") as file:
                line = json.loads(file.read())
            found[name] = {key: line[key] for key in ("seconds", "cpu_seconds", "peak_bytes")}
            print(number, name, found[name], flush=True)
    return found


def write_table(result):
    sizes = list(result["records"])
    headers = [""] + [f"{int(n):,}: {unit}" for unit in ("CPU s", "MB") for n in sizes]
    rows = []
    for name in result["records"][sizes[0]]:
        own = [result["records"][n][name] for n in sizes]
        seconds = [f"{one['cpu_seconds']:.1f}" for one in own]
        rows.append([name, *seconds, *(f"{one['peak_bytes'] / 1e6:.0f}" for one in own)])
    hardware = result["hardware"]
    source = f"Command `{result['command']}`; commit `{(result['git']['commit'] or '?')[:10]}`; "
    source += f"{hardware['cpus']} CPU cores ({hardware['machine']}). "
    source += f"Result file: `{os.path.relpath(RESULT, ROOT)}`."
    readme.write_block("growth", f"{readme.format_table(headers, rows)}\n\n{source}")


def main(args):
    if not args.readme:
        command = f"python benchmarks/growth.py --records {' '.join(map(str, args.records))}"
        found = {str(n): measure(n) for n in args.records}
        runs.write_json(RESULT, {"command": command, "records": found, **runs.environment()})
    write_table(runs.read_json(RESULT, "run benchmarks/growth.py"))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
