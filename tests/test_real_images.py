"""benchmarks/real_images.py: no group crosses the parts, candidates are judged by held labels, baselines."""

import argparse
import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

sys.path.append(os.path.join(ROOT, "benchmarks"))
import real_images
import real_report

from medgr2 import records


def row(name, **more):
    fields = {
        "task": "Disease Diagnosis",
        "dataset": "D",
        "modality": "CT",
        "source": "expert",
        "group": name,
    }
    asked = {"question": "Which?", "options": ["cyst", "mass"], "answer": "cyst"}
    return {"id": name, "image": f"{name}.png"} | asked | fields | more


def test_no_group_is_in_two_parts_and_every_record_is_in_one():
    rows = [row(f"{i}", group=f"g{i % 40}") for i in range(200)]
    parts = real_images.divide(rows, real_images.SHARES, 0)
    groups = [{r["group"] for r in part} for part in parts.values()]
    assert [len(part) for part in groups] == [20, 4, 2, 14] and len(set.union(*groups)) == 40
    assert sum(map(len, parts.values())) == 200
    assert parts != real_images.divide(rows, real_images.SHARES, 1)


def test_all_headline_questions_are_kept_and_few_of_each_trivial_kind():
    rows = [row(f"d{i}") for i in range(50)]
    rows += [row(f"m{i}", task="Modality Recognition") for i in range(50)]
    rows += [row(f"b{i}", task="Anatomy Identification", dataset="Blood Cell") for i in range(50)]
    rows += [row(f"a{i}", task="Anatomy Identification", dataset="E") for i in range(5)]
    kept = Counter(r["id"][0] for r in real_images.thin_out(rows, 0))
    assert kept == {"d": 50, "m": real_images.MOST_TRIVIAL, "b": 50, "a": 5}


def write(folder, name, rows):
    for k, r in enumerate(rows):
        path = folder / r["image"]
        if not path.exists():
            noise = np.random.default_rng(sum(map(ord, r["image"]))).integers(0, 256, (32, 32, 3))
            Image.fromarray(noise.astype("uint8")).save(path)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_groups_with_a_copy_of_a_test_image_are_left_out(tmp_path):
    train = [row(f"{i}") for i in range(40)] + [row("copy", group="3")]
    write(tmp_path, "test", [row("t", group="other")])
    write(tmp_path, "train", train[:-1])
    # The same pixels in another file.
    Image.open(tmp_path / "t.png").save(tmp_path / "copy.png", compress_level=1)
    write(tmp_path, "train", train)
    real_images.split(argparse.Namespace(data=str(tmp_path), out=str(tmp_path / "out"), seed=0))
    found = {}
    for name in ("shown", "expert", "val", "truth", "plenty", "test", "images"):
        found[name] = list(records.read_records(tmp_path / "out" / f"{name}.jsonl", root=tmp_path))
    parts = [{r["group"] for r in found[name]} for name in real_images.SHARES]
    assert sum(map(len, parts)) == 39 and not any("3" in part for part in parts)
    assert {r["id"] for r in found["plenty"]} == {
        r["id"] for name in ("shown", "expert", "truth") for r in found[name]
    }
    assert all("answer" not in r and "question" not in r for r in found["images"])
    assert len(found["images"]) == len(found["truth"]) and found["test"][0]["headline"]


def test_a_test_file_with_a_training_group_is_refused(tmp_path):
    write(tmp_path, "train", [row(f"{i}") for i in range(40)])
    write(tmp_path, "test", [row("t", group="7")])
    with pytest.raises(records.RecordError, match="groups of the training file .* such as 7"):
        real_images.split(argparse.Namespace(data=str(tmp_path), out=str(tmp_path / "out"), seed=0))


KNOWN = [
    row("k", answer="Cyst."),
    row("k2", question="Is it a cyst?", options=["Yes", "No"], answer="Yes"),
    row("k3", task="Lesion Grading", answer="mild", options=["mild", "severe"]),
]


@pytest.mark.parametrize(
    "candidate, right",
    [
        ({"answer": "cyst"}, True),
        ({"answer": "mass"}, False),
        # Yes and no answer one question only.
        ({"answer": "yes", "question": "is it a cyst"}, True),
        ({"answer": "No", "question": "Is it a cyst?"}, False),
        ({"answer": "No", "question": "Is it a mass?"}, None),
        ({"answer": "mild", "task": "Lesion Grading"}, True),
        ({"answer": "cyst", "task": "Lesion Grading"}, False),
        ({"answer": "CT", "task": "Modality Recognition"}, None),
    ],
)
def test_a_candidate_is_judged_by_the_records_about_its_image_and_of_its_task(candidate, right):
    assert real_images.judge(row("c") | candidate, KNOWN) is right


def test_the_baselines_answer_by_the_training_questions_and_without_the_image(tmp_path):
    train = [row(f"{i}", answer="mass") for i in range(3)] + [row("x"), row("y", dataset="E")]
    asked = [row("a"), row("b", options=["mass", "none"], answer="mass"), row("c", dataset="E")]
    asked = [r | {"blind": "cyst", "correct": True} for r in asked]
    (tmp_path / "eval").mkdir()
    write(tmp_path, "train", train)
    write(tmp_path, "eval/predictions", asked)
    real_images.baselines(
        argparse.Namespace(
            eval=str(tmp_path / "eval"), train=str(tmp_path / "train.jsonl"), out=str(tmp_path)
        )
    )
    said = {}
    for name in ("majority", "position", "blind"):
        lines = (tmp_path / f"eval_{name}" / "predictions.jsonl").read_text().splitlines()
        said[name] = [(r["prediction"], r["correct"]) for r in map(json.loads, lines)]
    assert said == {
        "majority": [("mass", False), ("mass", True), ("cyst", True)],
        # Three of the five right options are the second.
        "position": [("mass", False), ("none", False), ("mass", False)],
        "blind": [("cyst", True), ("cyst", False), ("cyst", True)],
    }


CONTROLS = ("sft", "sft_random", "sft_more", "grpo")


def write_run(folder, auroc, right, minutes):
    """A finished run with one cycle: its reward model, marks, and a stage and an evaluation of so long."""
    marks = {"judged": 4, "right": right, "auroc": 0.75}
    marks = {
        name: marks | {"by_task": {"Disease Diagnosis": marks}} for name in ("scored", "random", "accepted")
    }
    level = {"mean": 7.0, "n": 1, "mae": 3.0}
    files = {
        "cycle1/marks.json": marks,
        "cycle1/reward/metrics.json": {"levels": {"original": level}, "auroc": auroc, "image_swap_drop": 8.0},
    }
    for name in ("eval_base", "cycle1/eval_sft", "cycle1/reward"):
        files[f"{name}/args.json"] = {
            "args": {"seed": 0, "out": f"{folder}/{name}"},
            "started": "2026-01-01T10:00:00+00:00",
            "ended": f"2026-01-01T10:{minutes:02}:00+00:00",
            "peak_bytes": {"resident": minutes * 10**9},
        } | {"versions": {}, "git": {"commit": "a" * 40}, "hardware": {"cpus": 2, "machine": "x86_64"}}
    # Only SFT on accepted answers the first headline question rightly; the third question is none.
    kinds = [("omnimed", True), ("label", True), ("label", False)]
    stages = ("eval_base", "eval_sft_expert", "eval_rule", *(f"cycle1/eval_{name}" for name in CONTROLS))
    for name in stages:
        rows = []
        for k, (kind, headline) in enumerate(kinds):
            right = not headline or (k == 0 and name == "cycle1/eval_sft")
            more = {"kind": kind, "headline": headline, "correct": right, "image_hash": f"{k}"}
            rows.append(row(f"{k}", image=f"/{k}.png", prediction="cyst") | more)
        records.write_records(str(folder / name / "predictions.jsonl"), rows)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def test_the_report_has_means_and_ranges_of_the_seeds_and_time_and_memory_by_stage(tmp_path):
    write_run(tmp_path / "0", 0.9, 0.5, 2)
    write_run(tmp_path / "1", 0.8, None, 4)
    result = real_report.gather([str(tmp_path / "0"), str(tmp_path / "1")])
    line = real_report.reward_table(result["reward"]).splitlines()[-1]
    assert line == "| cycle1 | 7.0 (7.0 to 7.0) | 0.850 (0.800 to 0.900) | 8.0 (8.0 to 8.0) |"
    lines = real_report.pairs_table(result["pairs"]).splitlines()
    (line,) = [line for line in lines if line.startswith("| cycle 1: SFT on random → SFT on accepted ")]
    assert [cell.split()[0] for cell in line.split(" | ")[1:4]] == ["+0.500", "+1.000", "+0.000"]
    lines = real_report.marks_table(result["marks"]).splitlines()[2:]
    right = "0.500 (0.500 to 0.500)"
    rest = f"4 (4 to 4) | {right} | {right} | {right} | 0.750 (0.750 to 0.750) |"
    assert lines == [f"| cycle1, all | {rest}", f"| cycle1, Disease Diagnosis | {rest}"]
    lines = real_report.stages_table(result["stages"]).splitlines()[2:]
    assert sorted(lines) == [
        "| all | 3 | 9.0 | 4.00 |",
        "| evaluations | 2 | 6.0 | 4.00 |",
        "| reward | 1 | 3.0 | 4.00 |",
    ]
