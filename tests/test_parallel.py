"""Stages that share their batches over processes write what one process writes, byte for byte."""

import clinic
import pytest
import torch
from helpers import run_in_one_and_two

from medgr2 import loading
from reward import Heads, RewardModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three stages in one process and in two. Seven images: in batches of two, the last holds one."""
    out = tmp_path_factory.mktemp("parallel")
    clinic.write_clinic(str(out / "data"), (2, 1, 7, 1, 4), seed=3)
    torch.manual_seed(0)
    (out / "rm").mkdir()
    RewardModel(loading.load("toy/backbone"), Heads(30, 8), True).save(str(out / "rm"))
    images, data = f"--images {out}/data/unlabelled/images.jsonl", f"--data {out}/data/expert.jsonl"
    run_in_one_and_two(
        out,
        f"generate.py --model toy/generator {images} --batch 2 --out OUT/asked",
        f"reward.py score --model {out}/rm {data} --keep 0.5 --batch 2 --out OUT/scored",
        f"eval.py --model toy/policy {data} --batch 2 --scores --samples 2 --out OUT/answered",
    )
    return out


@pytest.mark.parametrize(
    "stage, names",
    [
        ("asked", ("candidates.jsonl", "rejected.jsonl", "metrics.json")),
        ("scored", ("scored.jsonl", "accepted.jsonl", "random.jsonl", "metrics.json")),
        ("answered", ("predictions.jsonl", "metrics.json")),
    ],
)
def test_what_is_written_does_not_depend_on_the_number_of_processes(folder, stage, names):
    for name in names:
        one, two = ((folder / run / stage / name).read_bytes() for run in ("one", "two"))
        assert one == two and one
