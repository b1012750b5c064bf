"""comparisons.py and figures.py: several runs on the same items, their numbers by hand, their figures as files, the commands."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from analysis import compare, efficiency, figures, transfer
from medgr2 import records

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_rows(right, modality=("CT", "CT", "MRI", "MRI")):
    """Predictions of a run on four questions, right where `right` says so."""
    return [
        {
            "id": str(i),
            "image": f"/{i}.png",
            "question": "Which?",
            "options": ["yes", "no"],
            "answer": "yes",
            "modality": m,
            "prediction": "yes" if r else "no",
            "correct": bool(r),
            "image_hash": str(i),
        }
        for i, (r, m) in enumerate(zip(right, modality))
    ]


@pytest.fixture
def folder(tmp_path):
    for name, right in (
        ("base", (1, 0, 0, 0)),
        ("CT", (1, 1, 1, 0)),
        ("MRI", (1, 0, 1, 1)),
        ("none", (0, 0, 0, 0)),
    ):
        (tmp_path / name).mkdir()
        records.write_records(tmp_path / name / "predictions.jsonl", run_rows(right))
    return tmp_path


def command(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"analysis.{module}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def is_figure(path):
    """Both files are there, and hold an SVG and a PNG."""
    return "<svg" in path.with_suffix(".svg").read_text() and path.with_suffix(
        ".png"
    ).read_bytes().startswith(b"\x89PNG")


def test_the_matrix_equals_a_count_by_hand_and_its_diagonal_is_one_relative_to_itself():
    result = transfer.matrix(
        {"CT": run_rows((1, 1, 1, 0)), "MRI": run_rows((1, 0, 1, 1)), "base": run_rows((1, 0, 0, 0))},
        "modality",
    )
    assert (result["rows"], result["columns"], result["questions"]) == (
        ["CT", "MRI", "base"],
        ["CT", "MRI"],
        [2, 2],
    )
    assert result["accuracy"] == [[1, 0.5], [0.5, 1], [0.5, 0]] and result["relative"] == [
        [1, 0.5],
        [0.5, 1],
        [0.5, 0],
    ]
    # base is neither
    assert (result["on_diagonal"], result["off_diagonal"]) == (1, 0.5)


def test_relative_is_left_out_where_a_column_has_no_run_or_one_that_is_never_right():
    result = transfer.matrix({"CT": run_rows((0, 0, 1, 0)), "base": run_rows((1, 0, 1, 0))}, "modality")
    assert result["relative"] == [[None, None], [None, None]]


def test_the_curve_has_its_points_in_order_and_its_band_from_worst_to_best_seed():
    got = efficiency.curve([("top", 200, 0.9), ("top", 100, 0.5), ("top", 100, 0.7), ("random", 100, 0.4)])
    assert list(got) == ["top", "random"] and [p["k"] for p in got["top"]] == [100, 200]
    assert {k: pytest.approx(v) for k, v in got["top"][0].items()} == {
        "k": 100,
        "mean": 0.6,
        "low": 0.5,
        "high": 0.7,
        "seeds": [0.5, 0.7],
    }


def test_a_run_is_named_by_its_name_or_its_folder_and_a_path_may_hold_an_equals_sign(tmp_path):
    (tmp_path / "lr=1").mkdir()
    inside = os.path.join(tmp_path, "lr=1", "predictions.jsonl")
    assert compare.named_paths([f"{tmp_path}/lr=1", f"a={tmp_path}/lr=1", "x.jsonl"]) == [
        ("lr=1", inside),
        ("a", inside),
        ("x.jsonl", "x.jsonl"),
    ]


def test_changed_lists_the_items_that_one_run_has_right_and_the_other_wrong():
    got = list(compare.changed(run_rows((1, 1, 0, 0)), run_rows((1, 0, 1, 0))))
    assert [(c["id"], c["change"], c["a"], c["b"]) for c in got] == [
        ("1", "introduced", "yes", "no"),
        ("2", "corrected", "no", "yes"),
    ]


def test_compare_takes_more_than_two_runs_each_against_the_first(folder):
    done = command(
        "compare",
        folder / "base",
        f"ours={folder / 'CT'}",
        folder / "none",
        "--out",
        folder / "out",
        "--markdown",
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads((folder / "out" / "metrics.json").read_text())["pairs"]
    assert (first["from"], first["to"], first["corrected"], first["introduced"], first["p"]) == (
        "base",
        "ours",
        2,
        0,
        0.5,
    )
    assert (second["to"], second["corrected"], second["introduced"], second["p"]) == ("none", 0, 1, 1)
    assert first["modality"]["CT"]["corrected"] == first["modality"]["MRI"]["corrected"] == 1
    changed = [json.loads(line) for line in (folder / "out" / "changed.jsonl").read_text().splitlines()]
    assert [(c["to"], c["id"], c["change"]) for c in changed] == [
        ("ours", "1", "corrected"),
        ("ours", "2", "corrected"),
        ("none", "0", "introduced"),
    ]
    assert is_figure(folder / "out" / "changes") and "| all | 4 | 4 | 0.250 | 0.750 | 0.500 |" in done.stdout


def test_transfer_writes_the_matrix_and_its_figure(folder):
    done = command("transfer", folder / "CT", folder / "MRI", folder / "base", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "out" / "metrics.json").read_text())["accuracy"] == [
        [1, 0.5],
        [0.5, 1],
        [0.5, 0],
    ]
    assert (
        is_figure(folder / "out" / "transfer")
        and "on the diagonal 1.000, off the diagonal 0.500" in done.stdout
    )


@pytest.mark.parametrize("runs_", [["base", "none"], ["CT", "CT"]])
def test_transfer_of_runs_that_are_not_named_once_as_what_they_were_trained_on_is_refused(folder, runs_):
    done = command("transfer", *(folder / name for name in runs_), "--out", folder / "out")
    assert (
        done.returncode == 2
        and "NAME=RUN" in done.stderr
        and done.stderr.count("\n") == 1
        and not (folder / "out").exists()
    )


def test_efficiency_draws_the_runs_of_all_seeds_and_a_run_without_training(folder):
    named = [
        f"top:10={folder / 'CT'}",
        f"top:10={folder / 'MRI'}",
        f"top:20={folder / 'CT'}",
        f"base:0={folder / 'base'}",
    ]
    done = command("efficiency", *named, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    curves = json.loads((folder / "out" / "metrics.json").read_text())["curves"]
    assert [len(p["seeds"]) for p in curves["top"]] == [2, 1] and curves["base"][0]["mean"] == 0.25
    assert (
        is_figure(folder / "out" / "efficiency") and "top" in (folder / "out" / "efficiency.svg").read_text()
    )
    assert command("efficiency", f"top={folder / 'CT'}", "--out", folder / "x").returncode == 2


def test_the_same_numbers_give_the_same_svg(tmp_path):
    bins = [{"n": 3, "confidence": 0.5, "accuracy": 1 / 3}, {"n": 9, "confidence": 0.9, "accuracy": 1.0}]
    for name in "ab":
        figures.reliability(tmp_path / name, bins, 0.1)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes() and is_figure(
        tmp_path / "a"
    )


def test_a_subset_is_k_records_of_the_kind_in_the_order_of_the_file_and_depends_on_the_seed(tmp_path):
    rows = [{"id": str(i), "modality": "CT" if i % 2 else "MRI"} for i in range(60)]
    records.write_records(tmp_path / "all.jsonl", rows)

    def subset(*flags):
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "benchmarks" / "subset.py"),
                str(tmp_path / "all.jsonl"),
                "--out",
                str(tmp_path / "some.jsonl"),
                *flags,
            ],
            capture_output=True,
            text=True,
        )
        return done, [
            int(r["id"]) for r in records.read_records(tmp_path / "some.jsonl")
        ] if done.returncode == 0 else None

    _, got = subset("--where", "modality=CT", "--k", "10")
    assert len(got) == 10 and all(i % 2 for i in got) and got == sorted(got)
    assert (
        subset("--where", "modality=CT", "--k", "10")[1]
        == got
        != subset("--where", "modality=CT", "--k", "10", "--seed", "1")[1]
    )
    assert len(subset("--k", "60")[1]) == 60
    done, _ = subset("--where", "modality=CT", "--k", "31")
    assert (
        done.returncode == 2
        and "only 30 records with modality CT" in done.stderr
        and done.stderr.count("\n") == 1
    )
