"""analysis: runs on the same items; their numbers against counts by hand, the figures, the commands."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import run_here

import eval as evaluation
from analysis import compare, efficiency, figures, run_files, transfer
from medgr2 import measures, records
from medgr2.errors import RunError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def row(name, prediction, answer="CT", options=("CT", "MRI", "OCT"), image="a", **fields):
    """A line of predictions.jsonl, in memory."""
    return {
        "id": name,
        "image": f"/{image}.png",
        "question": "Which?",
        "options": list(options),
        "answer": answer,
        "prediction": prediction,
        "image_hash": image,
    } | fields


def run_rows(correct, modality=("CT", "CT", "MRI", "MRI")):
    """Predictions of a run on four questions, each correct or not."""
    rows = []
    for i, (c, m) in enumerate(zip(correct, modality)):
        prediction = "yes" if c else "no"
        rows.append(row(str(i), prediction, "yes", ["yes", "no"], str(i), modality=m, correct=bool(c)))
    return rows


@pytest.fixture
def folder(tmp_path):
    runs = {"base": (1, 0, 0, 0), "CT": (1, 1, 1, 0), "MRI": (1, 0, 1, 1), "none": (0, 0, 0, 0)}
    for name, correct in runs.items():
        (tmp_path / name).mkdir()
        records.write_records(tmp_path / name / "predictions.jsonl", run_rows(correct))
    return tmp_path


def command(module, *arguments):
    return run_here(importlib.import_module(f"analysis.{module}"), *arguments)


def assert_refused(done, *words):
    """A user's mistake: status 2, one line on stderr with these words in it, nothing on stdout."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    for word in words:
        assert word in done.stderr


def is_figure(path):
    """Are both files there, an SVG and a PNG?"""
    svg, png = path.with_suffix(".svg").read_text(), path.with_suffix(".png").read_bytes()
    return "<svg" in svg and png.startswith(b"\x89PNG")


# Two runs -------------------------------------------------------------------------------------------------


def pair():
    a = [
        row("1", "CT", image="a", modality="CT"),
        row("2", "MRI", image="a", modality="CT"),
        row("3", None, image="b", modality="MRI"),
        row("4", "OCT", image="c", modality="MRI"),
    ]
    # Introduced, corrected, corrected, still wrong.
    b = [r | {"prediction": p} for r, p in zip(a, ["MRI", "CT", "CT", "OCT"])]
    return a, b


def test_corrected_and_introduced_equal_a_count_by_hand():
    result = compare.compare_rows(*pair(), 0)
    fields = ("questions", "images", "a", "b", "difference", "corrected", "introduced")

    def figures(group):
        return [group[field] for field in fields]

    assert figures(result) == [4, 3, 0.25, 0.5, 0.25, 2, 1]
    assert figures(result["modality"]["CT"]) == [2, 1, 0.5, 0.5, 0, 1, 1]
    assert figures(result["modality"]["MRI"]) == [2, 2, 0, 0.5, 0.5, 1, 0]


def test_swapping_the_runs_changes_the_sign_and_nothing_else():
    a, b = pair()
    there, back = compare.compare_rows(a, b, 0), compare.compare_rows(b, a, 0)
    assert back["difference"] == -there["difference"] != 0
    assert (back["low"], back["high"]) == pytest.approx((-there["high"], -there["low"]))
    assert (back["corrected"], back["introduced"]) == (there["introduced"], there["corrected"])


def test_the_paired_interval_is_narrower_than_the_unpaired_one_if_the_runs_mostly_agree():
    correct = np.random.default_rng(3).random(400) < 0.6
    a = [row(str(i), "CT" if c else None, image=str(i // 2)) for i, c in enumerate(correct)]
    b = [r | {"prediction": "CT"} if i % 20 == 0 else r for i, r in enumerate(a)]
    result = compare.compare_rows(a, b, 0)
    assert result["low"] <= result["difference"] <= result["high"]
    widths = [m["high"] - m["low"] for m in (evaluation.compute_metrics(rows, 0) for rows in (a, b))]
    assert result["high"] - result["low"] < 0.5 * np.hypot(*widths)


def test_runs_on_different_items_are_refused_with_the_number_missing_in_each(tmp_path):
    a, b = pair()
    records.write_records(tmp_path / "a.jsonl", a)
    records.write_records(tmp_path / "b.jsonl", [*b[2:], row("5", None)])
    done = command("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "out")
    words = f"{tmp_path / 'a.jsonl'} lacks 1 of 3 (5)", f"{tmp_path / 'b.jsonl'} lacks 2 of 4 (1)"
    assert_refused(done, "compare.py: ", *words)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    "field, value",
    [("answer", "MRI"), ("question", "What?"), ("image_hash", "z"), ("options", ["CT", "MRI"])],
)
def test_the_same_id_on_another_item_is_refused(tmp_path, field, value):
    a, b = pair()
    records.write_records(tmp_path / "a.jsonl", a)
    records.write_records(tmp_path / "b.jsonl", [*b[:2], b[2] | {field: value}, b[3]])
    with pytest.raises(RunError, match=f"item 3 has another `{field}`"):
        run_files.read_pair(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_the_second_run_may_have_the_items_in_another_order(tmp_path):
    a, b = pair()
    records.write_records(tmp_path / "a.jsonl", a)
    records.write_records(tmp_path / "b.jsonl", b[::-1])
    rows_a, rows_b = run_files.read_pair(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert [r["id"] for r in rows_a] == [r["id"] for r in rows_b] == ["1", "2", "3", "4"]
    assert [r["prediction"] for r in rows_b] == ["MRI", "CT", "CT", "OCT"]


def test_changed_items_are_those_that_one_run_has_right_and_the_other_wrong():
    got = list(compare.changed_items(run_rows((1, 1, 0, 0)), run_rows((1, 0, 1, 0))))
    assert [(c["id"], c["change"], c["a"], c["b"]) for c in got] == [
        ("1", "introduced", "yes", "no"),
        ("2", "corrected", "no", "yes"),
    ]


def test_compare_takes_a_folder_or_a_file_and_writes_what_it_prints(folder):
    done = command("compare", folder / "base", folder / "CT" / "predictions.jsonl", "--out", folder / "out")
    (result,) = json.loads((folder / "out" / "metrics.json").read_text())["pairs"]
    assert (result["corrected"], result["introduced"], result["difference"]) == (2, 0, 0.5)
    numbers = {field: value for field, value in result.items() if field not in ("from", "to")}
    assert measures.format_groups(numbers) in done.stdout
    assert "errors corrected 2, introduced 0" in done.stdout


def test_compare_takes_more_than_two_runs_and_compares_each_with_the_first(folder):
    runs = [folder / "base", f"ours={folder / 'CT'}", folder / "none"]
    done = command("compare", *runs, "--out", folder / "out", "--markdown")
    assert done.returncode == 0, done.stderr
    first, second = json.loads((folder / "out" / "metrics.json").read_text())["pairs"]
    assert (first["from"], first["to"], second["to"]) == ("base", "ours", "none")
    assert (first["corrected"], first["introduced"], first["p"]) == (2, 0, 0.5)
    assert (second["corrected"], second["introduced"], second["p"]) == (0, 1, 1)
    assert first["modality"]["CT"]["corrected"] == first["modality"]["MRI"]["corrected"] == 1
    changed = [json.loads(line) for line in (folder / "out" / "changed.jsonl").read_text().splitlines()]
    assert [(c["to"], c["id"], c["change"]) for c in changed] == [
        ("ours", "1", "corrected"),
        ("ours", "2", "corrected"),
        ("none", "0", "introduced"),
    ]
    assert is_figure(folder / "out" / "changes") and "| all | 4 | 4 | 0.250 | 0.750 | 0.500 |" in done.stdout


def test_a_run_is_named_by_its_name_or_its_folder_and_a_path_may_have_an_equals_sign(tmp_path):
    (tmp_path / "lr=1").mkdir()
    inside = os.path.join(tmp_path, "lr=1", "predictions.jsonl")
    assert run_files.named_runs([f"{tmp_path}/lr=1", f"a={tmp_path}/lr=1", "x.jsonl"]) == [
        ("lr=1", inside),
        ("a", inside),
        ("x.jsonl", "x.jsonl"),
    ]


# Transfer and efficiency ----------------------------------------------------------------------------------


def test_the_matrix_equals_a_count_by_hand_and_its_diagonal_is_one_relative_to_itself():
    runs = {"CT": (1, 1, 1, 0), "MRI": (1, 0, 1, 1), "base": (1, 0, 0, 0)}
    result = transfer.transfer_matrix({name: run_rows(c) for name, c in runs.items()}, "modality")
    assert (result["rows"], result["columns"]) == (["CT", "MRI", "base"], ["CT", "MRI"])
    assert result["questions"] == [2, 2]
    assert result["accuracy"] == [[1, 0.5], [0.5, 1], [0.5, 0]]
    assert result["relative"] == [[1, 0.5], [0.5, 1], [0.5, 0]]
    # `base` is neither on nor off the diagonal.
    assert (result["on_diagonal"], result["off_diagonal"]) == (1, 0.5)


def test_relative_is_left_out_if_a_column_has_no_run_or_one_that_is_never_right():
    runs = {"CT": run_rows((0, 0, 1, 0)), "base": run_rows((1, 0, 1, 0))}
    assert transfer.transfer_matrix(runs, "modality")["relative"] == [[None, None], [None, None]]


def test_transfer_writes_the_matrix_and_its_figure(folder):
    done = command("transfer", folder / "CT", folder / "MRI", folder / "base", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "metrics.json").read_text())
    assert result["accuracy"] == [[1, 0.5], [0.5, 1], [0.5, 0]]
    assert is_figure(folder / "out" / "transfer")
    assert "on the diagonal 1.000, off the diagonal 0.500" in done.stdout


@pytest.mark.parametrize("names", [["base", "none"], ["CT", "CT"]])
def test_transfer_refuses_runs_that_are_not_named_once_after_what_they_were_trained_on(folder, names):
    done = command("transfer", *(folder / name for name in names), "--out", folder / "out")
    assert_refused(done, "NAME=RUN")
    assert not (folder / "out").exists()


def test_the_curve_has_its_points_in_order_and_its_band_from_worst_to_best_seed():
    points = [("top", 200, 0.9), ("top", 100, 0.5), ("top", 100, 0.7), ("random", 100, 0.4)]
    got = efficiency.make_curves(points)
    assert list(got) == ["top", "random"] and [p["k"] for p in got["top"]] == [100, 200]
    first = got["top"][0]
    assert first == {"k": 100, "mean": pytest.approx(0.6), "low": 0.5, "high": 0.7, "seeds": [0.5, 0.7]}


def test_a_point_is_equivalent_to_the_k_at_which_the_curve_has_its_accuracy_in_log_k():
    points = [("expert", 100, 0.5), ("expert", 400, 0.7), ("expert", 1600, 0.7)]
    points += [("ours", 50, 0.6), ("better", 50, 0.8), ("worse", 50, 0.4), ("as good", 50, 0.7)]
    found = efficiency.find_equivalents(efficiency.make_curves(points), "expert")
    # Halfway from 0.5 to 0.7 is halfway from 100 to 400 in log k. 0.7 is first reached at 400.
    assert found == {
        "ours": [pytest.approx(200)],
        "better": [None],
        "worse": [None],
        "as good": [pytest.approx(400)],
    }


def test_efficiency_draws_the_runs_of_all_seeds_and_a_run_without_training(folder):
    runs = {"top:10": "CT", "top:20": "CT", "base:0": "base"}
    named = [f"top:10={folder / 'MRI'}", *(f"{name}={folder / run}" for name, run in runs.items())]
    done = command("efficiency", *named, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    curves = json.loads((folder / "out" / "metrics.json").read_text())["curves"]
    assert [len(p["seeds"]) for p in curves["top"]] == [2, 1] and curves["base"][0]["mean"] == 0.25
    assert is_figure(folder / "out" / "efficiency")
    assert "top" in (folder / "out" / "efficiency.svg").read_text()
    assert_refused(command("efficiency", f"top={folder / 'CT'}", "--out", folder / "x"), "METHOD:K=RUN")
    typo = command("efficiency", *named, "--equivalent", "tip", "--out", folder / "y")
    assert_refused(typo, "--equivalent tip: no run of it; give one of top, base")


def test_the_same_numbers_give_the_same_svg(tmp_path):
    bins = [{"n": 3, "confidence": 0.5, "accuracy": 1 / 3}, {"n": 9, "confidence": 0.9, "accuracy": 1.0}]
    for name in "ab":
        figures.reliability(tmp_path / name, bins, 0.1)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert is_figure(tmp_path / "a")


def test_a_subset_is_k_records_of_the_kind_in_the_order_of_the_file_and_depends_on_the_seed(tmp_path):
    rows = [{"id": str(i), "modality": "CT" if i % 2 else "MRI"} for i in range(60)]
    source, out = tmp_path / "all.jsonl", tmp_path / "some.jsonl"
    records.write_records(source, rows)

    def subset(*flags):
        script = ROOT / "benchmarks" / "subset.py"
        words = [sys.executable, str(script), str(source), "--out", str(out), *flags]
        done = subprocess.run(words, capture_output=True, text=True)
        return done, [int(r["id"]) for r in records.read_records(out)] if done.returncode == 0 else None

    ten = ["--where", "modality=CT", "--k", "10"]
    _, got = subset(*ten)
    assert len(got) == 10 and all(i % 2 for i in got) and got == sorted(got)
    assert subset(*ten)[1] == got != subset(*ten, "--seed", "1")[1]
    assert len(subset("--k", "60")[1]) == 60
    done, _ = subset("--where", "modality=CT", "--k", "31")
    assert_refused(done, "only 30 records with modality CT")
