"""toy/: the records of the clinic are true and valid, its images follow the facts, its models are small."""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import clinic
import mark
import numpy as np
import pytest

from medgr2 import loading, records, runs
from medgr2.images import hash_image, open_image
from medgr2.prompts import MODALITIES, PARADIGMS, TASKS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("clinic") / "data"
    sizes = (20, 10, 10, 10, 30)
    heldout = {"heldout_modality": "OCT", "heldout_task": "Lesion Grading"}
    clinic.main(argparse.Namespace(out=str(out), seed=1, sizes=sizes, plenty=0, **heldout))
    return out


def test_a_clinic_that_another_process_draws_is_left_alone_and_the_rest_of_a_killed_one_is_removed(tmp_path):
    def draw():
        command = [
            sys.executable,
            ROOT / "toy" / "clinic.py",
            "--out",
            tmp_path / "data",
            "--sizes",
            *"22222",
        ]
        return subprocess.run(command, capture_output=True, text=True)

    lock = runs.take_lock(str(tmp_path / "data.part"))
    half = tmp_path / "data.part" / "half.jsonl"
    half.write_text("{")
    done = draw()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is writing there" in done.stderr
    assert half.exists()
    # As when its process is killed.
    lock.close()
    assert draw().returncode == 0
    assert not {path.name for path in (tmp_path / "data").iterdir()} & {"half.jsonl", "lock"}


FILES = ["expert.jsonl", "reports.jsonl", "unlabelled/images.jsonl", "val.jsonl", "test.jsonl"]


@pytest.mark.parametrize("file", FILES + [f"heldout/{f}" for f in FILES])
def test_every_file_is_valid_and_every_image_opens_at_64_pixels(folder, file):
    rows = list(records.read_records(folder / file, fields=("image", "modality")))
    assert rows and all(open_image(r["image"]).size == (64, 64) for r in rows)


def test_heldout_training_files_lack_the_modality_and_the_task_and_test_has_them(folder):
    for file in FILES[:3]:
        assert not any(
            r["modality"] == "OCT" or r.get("task") == "Lesion Grading"
            for r in records.read_records(folder / "heldout" / file)
        )
    rows = list(records.read_records(folder / "heldout" / "test.jsonl"))
    assert any(r["modality"] == "OCT" for r in rows) and any(r["task"] == "Lesion Grading" for r in rows)


def test_no_image_is_in_two_files(folder):
    hashes = [{hash_image(r["image"]) for r in records.read_records(folder / f)} for f in FILES]
    assert sum(map(len, hashes)) == len(set().union(*hashes))


def test_a_seed_draws_the_same_image_again_and_another_seed_another_image():
    def draw(seed):
        return np.array(clinic.draw(clinic.draw_facts(random.Random(seed)), random.Random(seed)))

    assert (draw(1) == draw(1)).all() and (draw(1) != draw(2)).any()


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("finding", clinic.FINDINGS[:4])
def test_the_lesion_is_drawn_on_its_side_and_grows_with_its_degree(modality, finding):
    area = {}
    for degree in clinic.DEGREES:
        for side in clinic.SIDES:
            facts = {"modality": modality, "anatomy": "brain"}
            facts |= {"finding": finding, "degree": degree, "side": side}
            mask = np.mean([clinic.lesion_mask(facts, random.Random(k)) for k in range(20)], 0)
            left, right = mask[:, :32].sum(), mask[:, 32:].sum()
            # Radiographs show the patient's right on the left.
            is_left = (side == "left") != (modality in ("CT", "X-Ray"))
            assert (left > 5 * right) if is_left else (right > 5 * left)
            area[degree] = mask.sum()
    assert area["mild"] < area["moderate"] < area["severe"]


@pytest.mark.parametrize("fact", ["finding", "anatomy", "degree"])
def test_the_same_sign_is_another_fact_in_another_family(fact):
    signs = {
        "finding": (clinic.shape_of, clinic.FINDINGS[:4]),
        "anatomy": (clinic.outline_of, clinic.ANATOMIES),
        "degree": (clinic.size_of, clinic.DEGREES),
    }
    sign_of, values = signs[fact]
    readings = []
    for modality in ("X-Ray", "Ultrasound", "Dermoscopy"):
        reading = {sign_of(modality, value): value for value in values}
        # Within a modality a sign has one meaning.
        assert len(reading) == len(values)
        readings.append(reading)
    radiographic, acoustic, optical = readings
    differing = {
        "finding": [(radiographic, acoustic), (radiographic, optical), (acoustic, optical)],
        "anatomy": [(radiographic, optical), (acoustic, optical)],
        "degree": [(radiographic, acoustic), (radiographic, optical)],
    }
    for one, other in differing[fact]:
        shared = one.keys() & other.keys()
        assert shared and all(one[sign] != other[sign] for sign in shared)


def test_plenty_has_questions_on_images_of_its_own(tmp_path):
    sizes = (2, 1, 1, 1, 2)
    given = {"seed": 1, "sizes": sizes, "plenty": 4, "heldout_modality": "OCT", "heldout_task": TASKS[3]}
    clinic.main(argparse.Namespace(out=str(tmp_path / "clinic"), **given))
    plenty = list(records.read_records(tmp_path / "clinic" / "plenty.jsonl"))
    assert len(plenty) == 4 * 3
    others = [records.read_records(tmp_path / "clinic" / f"{name}.jsonl") for name in ("expert", "test")]
    assert not {r["image"] for r in plenty} & {r["image"] for rows in others for r in rows}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_answer_of_a_record_is_true_and_among_its_options(task, paradigm):
    for k in range(50):
        rng = random.Random(k)
        facts = clinic.draw_facts(rng)
        row = clinic.question(facts, task, rng, paradigm)
        answer = clinic.truth(facts, task)[0]
        assert row["answer"] == answer and row["options"].count(answer) == 1 and answer in row["rationale"]
        assert mark.is_right(row, facts)
        wrong = next(o for o in row["options"] if o != answer)
        assert not mark.is_right(row | {"answer": wrong}, facts)


def test_the_right_option_has_every_position_equally_often():
    rng = random.Random(0)
    places = [
        row["options"].index(row["answer"])
        for row in (clinic.question(clinic.draw_facts(rng), "Disease Diagnosis", rng) for _ in range(2000))
    ]
    assert all(0.2 < places.count(i) / 2000 < 0.3 for i in range(4))


FACTS = {"modality": "CT", "anatomy": "knee", "finding": "mass", "degree": "mild", "side": "left"}
TEXTS = {
    "Disease Diagnosis": "Which finding is present?",
    "Anatomy Identification": "Which anatomy is shown?",
}


def write_scored(folder, given, accepted, drawn):
    """What `reward.py score` leaves: `given` is (task, answer, R) of each, the others are indices into it."""
    rows = []
    for k, (task, answer, score) in enumerate(given):
        row = {"id": str(k), "image": "x.png", "parent": "p", "question": TEXTS[task], "answer": answer}
        row |= {"options": [answer, "other"], "task": task, "paradigm": "direct"}
        rows.append(row | {"reward": {"overall": score}})
    for name, part in (("scored", range(len(rows))), ("accepted", accepted), ("random", drawn)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(rows[k]) + "\n" for k in part))


def test_measures_of_candidates_computed_by_hand(tmp_path):
    finding, anatomy = TEXTS
    given = [(finding, "mass", 3.0), (finding, "cyst", 2.0), (finding, "mass", 1.0), (finding, "cyst", 1.0)]
    write_scored(tmp_path, [*given, (anatomy, "knee", 0.0)], accepted=[0, 1], drawn=[1])
    found = mark.check_candidates(str(tmp_path), {"p": FACTS})
    assert (found["right_scored"], found["right_accepted"], found["right_random"]) == (0.6, 0.5, 0.0)
    assert (found["right_direct"], found["right_stepwise"]) == (0.6, None)
    # Of the six pairs of a right and a wrong one, two are ordered by R and one is a tie.
    assert found["auroc"] == (1 + 1 + 0 + 0.5 + 0 + 0) / 6
    assert (found["candidates"], found["accepted"]) == (5, 2)
    of_finding = {
        "right_scored": 0.5,
        "right_accepted": 0.5,
        "auroc": 2.5 / 4,
        "candidates": 4,
        "accepted": 2,
    }
    of_anatomy = {"right_scored": 1, "right_accepted": None, "auroc": None, "candidates": 1, "accepted": 0}
    assert found["by_task"] == {finding: of_finding, anatomy: of_anatomy}


def test_marks_are_written_from_any_folder_of_scored_candidates(tmp_path, capsys):
    write_scored(tmp_path, [("Disease Diagnosis", "mass", 3.0)], accepted=[0], drawn=[0])
    (tmp_path / "truth.jsonl").write_text(json.dumps({"id": "p", "facts": FACTS}))
    paths = {"scored": tmp_path, "truth": tmp_path / "truth.jsonl", "out": tmp_path / "frozen.json"}
    mark.main(argparse.Namespace(**{name: str(path) for name, path in paths.items()}))
    found = json.loads((tmp_path / "frozen.json").read_text())
    assert found == mark.check_candidates(str(tmp_path), {"p": FACTS}) and found["right_accepted"] == 1
    assert "right_scored 1.000" in capsys.readouterr().out


@pytest.mark.parametrize("role", ["policy", "generator", "backbone"])
def test_a_committed_model_is_small_and_loads_like_any_model(role):
    model = loading.load(str(ROOT / "toy" / role)).model
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert (ROOT / "toy" / role / "model.safetensors").stat().st_size < 4e6
