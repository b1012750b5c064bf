"""recipes/: a dry run shows what a recipe runs and checks it; the commands run with a small model."""

import json
import os
import random
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT
from PIL import Image
from test_vlm import build_qwen

RECIPES = sorted(path.stem for path in ROOT.glob("recipes/qwen*.sh"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a data set of 100 questions and images, and a small Qwen2.5-VL with random weights."""
    folder, rng, rows = tmp_path_factory.mktemp("omni"), random.Random(0), []
    (folder / "Images").mkdir()
    (folder / "QA_information").mkdir()
    for i in range(100):
        # Noise, so that no two images are alike.
        Image.frombytes("RGB", (32, 24), rng.randbytes(32 * 24 * 3)).save(folder / "Images" / f"{i}.png")
        row = {"question_id": str(i), "question": "Which?", "option_A": "CT", "option_B": "MRI"}
        row |= {"gt_answer": rng.choice(["CT", "MRI"]), "question_type": "Modality Recognition"}
        rows.append(row | {"modality_type": "X-Ray", "image_path": f"Images/{i}.png"})
    (folder / "QA_information" / "x.json").write_text(json.dumps(rows))
    (folder / "model").mkdir()
    build_qwen(folder / "model", "Qwen2_5_")
    return folder


def dry_run(source, recipe, **more):
    """The finished process of a recipe's dry run, of one cycle, with the small model and little disk."""
    own = {"OMNIMEDVQA": source, "DATA": source / "data", "OUT": source / "run", "MODEL": source / "model"}
    own |= {"REWARD_BACKBONE": source / "model", "PYTHON": sys.executable, "CYCLES": "1", "DISK_GB": "0"}
    # srun is not everywhere.
    own |= {"START": "env", "DRY_RUN": "1"} | more
    env = os.environ | {name: str(value) for name, value in own.items()}
    return subprocess.run(["bash", f"recipes/{recipe}.sh"], cwd=ROOT, env=env, capture_output=True, text=True)


def commands(done):
    """The command lines that a dry run shows."""
    return [shlex.split(line) for line in done.stdout.splitlines() if ".py " in line]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_prepares_the_records_and_accepts_every_flag_and_the_memory_plan(source, recipe):
    done = dry_run(source, recipe)
    assert done.returncode == 0, done.stderr
    stages = "eval sft eval reward generate reward sft eval grpo eval".split()
    assert [words[0] for words in commands(done)] == [f"{stage}.py" for stage in stages]
    assert all("401408" in words for words in commands(done))
    planned = [line for line in done.stdout.splitlines() if line.startswith("plan ")]
    assert len(planned) == 2 and all("GB of" in line for line in planned)
    # The recipe's own text has the plan's figures.
    text = (ROOT / "recipes" / f"{recipe}.sh").read_text()
    assert all(re.search(r"[\d.]+ GB", line)[0] in text for line in planned), planned
    assert not (source / "run").exists()
    counts = {path.name: len(path.read_text().splitlines()) for path in (source / "data").glob("*.jsonl")}
    assert counts == {"omni.jsonl": 100, "train.jsonl": 5, "val.jsonl": 75, "test.jsonl": 20}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"OMNIMEDVQA": "nowhere"}, "no folder QA_information"),
        ({"MODEL": str(ROOT / "docs")}, "POLICY={}: no config.json in it".format(ROOT / "docs")),
        ({"DISK_GB": "99999999"}, "it needs 99999999; make room"),
        ({"LAUNCH": "no_such_launcher -n 8"}, "LAUNCH: no command no_such_launcher"),
        ({"EVAL": "sft.py"}, "unrecognized arguments: --max-new-tokens 512"),
    ],
)
def test_what_would_fail_later_ends_a_dry_run_in_one_line(source, change, told):
    done = dry_run(source, "qwen2.5vl_3b_1x80gb", **change)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not (source / "run").exists()
