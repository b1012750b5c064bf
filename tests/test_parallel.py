"""Stages that share their batches over processes write what one process writes, byte for byte."""

import clinic
import pytest
import torch
from helpers import run_in_one_and_two

from medgr2 import loading
from reward import Heads, RewardModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images, so that two processes have batches of two, and the last turn has one batch of one."""
    out = tmp_path_factory.mktemp("parallel")
    clinic.write_clinic(str(out / "data"), (2, 1, 7, 1, 4), seed=3)
    torch.manual_seed(0)
    (out / "rm").mkdir()
    RewardModel(loading.load("toy/backbone"), Heads(30, 8), True).save(str(out / "rm"))
    return out


@pytest.fixture(scope="module")
def generated(folder):
    out = folder / "generated"
    out.mkdir()
    images = f"{folder}/data/unlabelled/images.jsonl"
    run_in_one_and_two(out, f"generate.py --model toy/generator --images {images} --batch 2")
    return out


def assert_same(folder, names):
    for name in names:
        one, two = ((folder / run / name).read_bytes() for run in ("one", "two"))
        assert one == two and one


def test_candidates_do_not_depend_on_the_number_of_processes(generated):
    assert_same(generated, ("candidates.jsonl", "rejected.jsonl", "metrics.json"))
    assert len((generated / "two" / "metrics.jsonl").read_text().splitlines()) == 4


def test_scores_do_not_depend_on_the_number_of_processes(folder, generated):
    out = folder / "scored"
    out.mkdir()
    data = f"--data {generated}/one/candidates.jsonl --image-root {folder}"
    run_in_one_and_two(out, f"reward.py score --model {folder}/rm {data} --keep 0.5 --batch 4")
    assert_same(out, ("scored.jsonl", "accepted.jsonl", "random.jsonl", "metrics.json"))


def test_answers_do_not_depend_on_the_number_of_processes(folder):
    out = folder / "answered"
    out.mkdir()
    data = f"--data {folder}/data/expert.jsonl --image-root {folder}"
    run_in_one_and_two(out, f"eval.py --model toy/policy {data} --batch 2 --scores --samples 2")
    assert_same(out, ("predictions.jsonl", "metrics.json"))
