"""All five stages on a slice of real images and questions, where ../shared/data is at hand; the toy policy is the model."""

import itertools
import sys
from pathlib import Path

import pytest

import eval as evaluation
import generate
import grpo
import reward
import sft
from medgr2 import formats, records
from medgr2.images import hash_image

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
SOURCES = {
    "vqa_rad": DATA / "vqa_rad" / "vqa_rad.json",
    "omnimedvqa": DATA / "omnimedvqa_mhsma" / "MHSMA.json",
}


@pytest.fixture(params=SOURCES)
def slice_of(request, tmp_path):
    """24 questions on at least 6 images, of one real source."""
    if not SOURCES[request.param].exists():
        pytest.skip(f"no {SOURCES[request.param]}")
    rows, _ = formats.import_records(str(SOURCES[request.param]))
    by_image = sorted(rows, key=lambda r: (hash_image(r["image"]), r["id"]))
    few = [
        r
        for _, group in itertools.groupby(by_image, key=lambda r: r["image"])
        for r in itertools.islice(group, 2)
    ][:24]
    records.write_records(tmp_path / "real.jsonl", few)
    images = {r["image"]: {"id": r["id"], "image": r["image"]} for r in few}
    records.write_records(tmp_path / "images.jsonl", images.values())
    return tmp_path


def run(monkeypatch, stage, *command):
    monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, command), "--image-root", str(DATA)])
    stage.main(stage.parse_args())


def test_all_five_stages_read_real_images_and_questions_and_finish(monkeypatch, slice_of):
    d, policy = slice_of, ROOT / "toy" / "policy"
    run(
        monkeypatch,
        generate,
        "--images",
        d / "images.jsonl",
        "--model",
        ROOT / "toy" / "generator",
        "--out",
        d / "candidates",
    )
    run(
        monkeypatch,
        reward,
        "train",
        "--model",
        policy,
        "--data",
        d / "real.jsonl",
        "--resamples",
        1,
        "--steps",
        20,
        "--holdout",
        0.3,
        "--out",
        d / "rm",
    )
    run(
        monkeypatch,
        reward,
        "score",
        "--model",
        d / "rm",
        "--data",
        d / "real.jsonl",
        "--keep",
        0.5,
        "--out",
        d / "scored",
    )
    run(
        monkeypatch,
        sft,
        "--model",
        policy,
        "--data",
        d / "scored" / "accepted.jsonl",
        "--epochs",
        1,
        "--batch",
        4,
        "--out",
        d / "sft",
    )
    run(
        monkeypatch,
        grpo,
        "--model",
        d / "sft",
        "--reward",
        d / "rm",
        "--data",
        d / "real.jsonl",
        "--steps",
        1,
        "--prompts",
        2,
        "--group",
        4,
        "--out",
        d / "grpo",
    )
    run(monkeypatch, evaluation, "--model", d / "grpo", "--data", d / "real.jsonl", "--out", d / "eval")
    answered = list(records.read_records(d / "eval" / "predictions.jsonl", ("response",), DATA))
    assert len(answered) == 24
    kept = sum(1 for _ in open(d / "candidates" / "candidates.jsonl"))
    rejected = sum(1 for _ in open(d / "candidates" / "rejected.jsonl"))
    assert kept + rejected == 3 * len(list(records.read_records(d / "images.jsonl", root=DATA)))
