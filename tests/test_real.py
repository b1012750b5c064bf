"""All five stages on real images and questions, if ../shared/data is there. The toy policy is the model."""

import itertools
import sys

import pytest
from helpers import DATA, ROOT

import eval as evaluation
import generate
import grpo
import reward
import sft
from medgr2 import formats, records
from medgr2.images import hash_image

SOURCES = {
    "vqa_rad": DATA / "vqa_rad" / "vqa_rad.json",
    "omnimedvqa": DATA / "omnimedvqa_mhsma" / "MHSMA.json",
}


@pytest.fixture(params=SOURCES)
def folder(request, tmp_path):
    """A folder with 24 questions of one real source, real.jsonl, and their images, images.jsonl."""
    if not SOURCES[request.param].exists():
        pytest.skip(f"no {SOURCES[request.param]}")
    rows, _ = formats.import_records(str(SOURCES[request.param]))
    rows.sort(key=lambda row: (hash_image(row["image"]), row["id"]))
    few = []
    # At most two questions per image, so that there are at least 12 images.
    for _, group in itertools.groupby(rows, key=lambda row: row["image"]):
        few += itertools.islice(group, 2)
    few = few[:24]
    records.write_records(tmp_path / "real.jsonl", few)
    images = {row["image"]: {"id": row["id"], "image": row["image"]} for row in few}
    records.write_records(tmp_path / "images.jsonl", images.values())
    return tmp_path


def test_all_five_stages_read_real_images_and_questions_and_finish(monkeypatch, folder):
    def run(stage, command):
        """Run a stage as from the command line; {d} is the folder, {t} that of the toy's models."""
        words = [word.format(d=folder, t=ROOT / "toy") for word in command.split()]
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *words, "--image-root", str(DATA)])
        stage.main(stage.parse_args())

    run(generate, "--images {d}/images.jsonl --model {t}/generator --out {d}/candidates")
    flags = "--resamples 1 --steps 20 --holdout 0.3"
    run(reward, "train --model {t}/policy --data {d}/real.jsonl --out {d}/rm " + flags)
    run(reward, "score --model {d}/rm --data {d}/real.jsonl --keep 0.5 --out {d}/scored")
    run(sft, "--model {t}/policy --data {d}/scored/accepted.jsonl --epochs 1 --batch 4 --out {d}/sft")
    flags = "--steps 1 --prompts 2 --group 4"
    run(grpo, "--model {d}/sft --reward {d}/rm --data {d}/real.jsonl --out {d}/grpo " + flags)
    run(evaluation, "--model {d}/grpo --data {d}/real.jsonl --out {d}/eval")
    answered = list(records.read_records(folder / "eval" / "predictions.jsonl", ("response",), DATA))
    assert len(answered) == 24
    kept = sum(1 for _ in open(folder / "candidates" / "candidates.jsonl"))
    rejected = sum(1 for _ in open(folder / "candidates" / "rejected.jsonl"))
    assert kept + rejected == 3 * len(list(records.read_records(folder / "images.jsonl", root=DATA)))
