"""recipes/: a dry run shows what a recipe runs and checks it; the commands run with a small model."""

import itertools
import json
import os
import random
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, run_here
from PIL import Image
from test_sharding import over
from test_vlm import build_qwen

import sft
from medgr2.prompts import PARADIGMS, TASKS

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


@pytest.fixture(scope="module")
def tuned(source, tmp_path_factory):
    """That model, tuned until it replies the same well-formed question and answer to every image."""
    # Imported here, so that the processes forked from this one need not do it.
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("tuned")
    reply = {"question": "Which?", "options": ["CT", "MRI"], "answer": "CT", "rationale": "a"}
    asked = itertools.product(PARADIGMS, TASKS)
    rows = [reply | {"paradigm": paradigm, "task": task} for paradigm, task in asked]
    rows = [row | {"id": str(i), "image": str(source / f"Images/{i}.png")} for i, row in enumerate(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--model {source}/model --role generator --freeze nothing --steps 80 --batch 5 --lr 1e-2"
    flags += f" --data {folder}/rows.jsonl --image-root {source} --out {folder}/model"
    done = run_here(sft, *flags.split())
    assert done.returncode == 0, done.stderr
    return folder / "model"


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


# In place of the recipes' sizes, which take hours.
FEW = {
    "generate.py": "--part 1/6 --max-new-tokens 100",
    "reward.py train": "--steps 2",
    "sft.py": "--steps 1 --batch 4",
    "grpo.py": "--steps 1 --prompts 2 --group 4 --max-new-tokens 16 --watch-items 2",
    "eval.py": "--max-new-tokens 16",
}


def run_command(words):
    """work(accelerator) for `over`: a command line."""

    def work(accelerator):
        assert accelerator.num_processes == 2
        sys.argv = words
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")

    return work


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_commands_of_a_recipe_run_over_two_processes(source, tuned, tmp_path, recipe, capfd):
    done = dry_run(source, recipe, MODEL=tuned, REWARD_BACKBONE=tuned, OUT=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for words in commands(done):
        few = FEW.get(words[0]) or FEW.get(f"{words[0]} {words[1]}", "")
        statuses = over(2, run_command([*words, *few.split(), "--workers", "1"]))
        assert statuses is None, (words, statuses, capfd.readouterr().err)
        assert os.path.isfile(os.path.join(words[words.index("--out") + 1], "metrics.json"))
    trained = {"sft_expert", "cycle1/sft", "cycle1/grpo"}
    assert all((tmp_path / "run" / name / "model.safetensors").is_file() for name in trained)
