"""eval.py: figures against computations by hand, intervals, baselines, comparing, and real runs of the toy policy."""

import copy
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import clinic
import numpy as np
import pytest

import eval as evaluation
import medgr2.loading
import medgr2.vlm
from analysis import compare
from medgr2 import measures, records
from medgr2.errors import RunError
from medgr2.images import open_image
from medgr2.prompts import policy_prompt

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPARE = ("-m", "analysis.compare")

POLICY = ROOT / "toy" / "policy"
# questions at a time in the real runs: many commits to be killed between
BATCH = 4


def row(name, prediction, answer="CT", options=("CT", "MRI", "OCT"), image="a", **fields):
    """A line of predictions.jsonl, in memory. `options=None` is an open question."""
    closed = {"options": list(options)} if options else {}
    return (
        {
            "id": name,
            "image": f"/{image}.png",
            "question": "Which?",
            "answer": answer,
            "prediction": prediction,
            "image_hash": image,
        }
        | closed
        | fields
    )


def command(*arguments, script=(str(ROOT / "eval.py"),), **options):
    return subprocess.run(
        [sys.executable, *script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **{"cwd": ROOT} | options,
    )


def assert_refused(done, *words):
    """A user's mistake: status 2, one line on stderr with these words in it, nothing on stdout."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith(("eval.py: ", "compare.py: ")) and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


# Marking -------------------------------------------------------------------------------------------------


@pytest.fixture
def question(tmp_path):
    clinic.draw(clinic.draw_facts(random.Random(0)), random.Random(0)).save(tmp_path / "a.png")
    return {
        "id": "q",
        "image": str(tmp_path / "a.png"),
        "question": "Which?",
        "options": ["CT", "MRI"],
        "answer": "MRI",
    }


@pytest.mark.parametrize(
    "answer, prediction, correct",
    [("MRI", "MRI", True), ("b)", "MRI", True), ("(A) CT.", "CT", False), ("OCT", None, False)],
)
def test_a_response_is_read_by_text_or_letter_and_marked(question, answer, prediction, correct):
    before = copy.deepcopy(question)
    marked = evaluation.mark(question, f"<think>x</think><answer>{answer}</answer>")
    assert (marked["prediction"], marked["correct"]) == (prediction, correct)
    assert (marked["reason"] is None) == (prediction is not None)
    # fields are added, none is changed
    assert question == before and before.items() <= marked.items()
    assert set(marked) - set(before) == set(evaluation.ADDED)


def test_an_open_question_is_right_where_the_text_is_but_for_case_and_punctuation(question):
    del question["options"]
    question["answer"] = "Left lung"
    responses = {"left  lung.": True, "lung": False, "the left lung": False}
    assert {r: evaluation.mark(question, f"<answer>{r}</answer>")["correct"] for r in responses} == responses


def test_a_cut_response_is_named_as_such_only_where_its_answer_is_lost(question):
    assert evaluation.mark(question, "<think>x", cut=True)["reason"] == "cut at --max-new-tokens"
    assert evaluation.mark(question, "<think>x", cut=False)["reason"] == "no answer"
    assert evaluation.mark(question, "<answer>CT</answer> and", cut=True)["reason"] is None


def test_each_record_gets_its_own_response_and_one_without_an_end_is_cut(monkeypatch, question):
    torch = pytest.importorskip("torch")
    stop, opened = 9, []
    ids, mask = (
        torch.tensor([[1, 9, 0], [2, 2, 2], [3, 3, 9]]),
        torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
    )
    fake = types.SimpleNamespace(
        load=lambda name, dtype: types.SimpleNamespace(stop_ids=[stop]),
        best_dtype=lambda: None,
        encode_prompts=lambda vlm_, images, texts: [text.split("\n")[0] for text in texts],
        sample=lambda vlm_, prompts, seeds, n, temperature, group: (
            ids[: len(prompts)],
            mask[: len(prompts)],
            torch.tensor([False, True, False])[: len(prompts)],
        ),
        decode=lambda vlm_, ids, mask: [f"{token}" for token in ids[:, 0].tolist()],
    )
    for name in ("loading", "vlm"):
        monkeypatch.setattr(medgr2, name, fake)
    monkeypatch.setattr(evaluation, "open_image", lambda path: opened.append(path))
    asked = [question | {"id": name} for name in "abc"]
    got = list(evaluation.predict("model", [asked[:3], asked[:1]], 3))
    assert [[(r["id"], r["response"]) for r in batch] for batch in got] == [
        [("a", "1"), ("b", "2"), ("c", "3")],
        [("a", "1")],
    ]
    assert [r["reason"] for r in got[0]] == ["no answer", "cut at --max-new-tokens", "no answer"]
    # each record's image once
    assert len(opened) == 4


# The table of one run ------------------------------------------------------------------------------------


def test_figures_equal_a_computation_by_hand_in_all_and_by_group():
    rows = [
        row("1", "CT", modality="CT", task="T", image="a"),
        row("2", "MRI", modality="CT", task="U", image="a"),
        row("3", "CT", modality="CT", task="T", image="b"),
        row("4", "ct.", modality="MRI", task="T", image="c"),
        row("5", None, modality="MRI", task="U", image="d"),
    ]
    result = evaluation.metrics(rows, 0)
    pick = lambda r: (r["questions"], r["images"], r["accuracy"], r["unparsed"])  # noqa: E731
    assert pick(result) == (5, 4, 0.6, 0.2)
    assert {m: pick(r) for m, r in result["modality"].items()} == {
        "CT": (3, 2, 2 / 3, 0),
        "MRI": (2, 2, 0.5, 0.5),
    }
    assert {t: pick(r) for t, r in result["task"].items()} == {"T": (3, 3, 1.0, 0), "U": (2, 2, 0.0, 0.5)}
    assert result["modality"]["MRI"]["low"] == 0 and result["modality"]["MRI"]["high"] == 1
    # plain numbers
    json.dumps(result, allow_nan=False)


def test_a_group_that_is_not_known_is_shown_only_beside_known_ones():
    rows = [row("1", "CT", modality="CT"), row("2", "CT")]
    result = evaluation.metrics(rows, 0)
    assert set(result["modality"]) == {"CT", "(none)"} and "task" not in result


def test_unparsed_is_wrong_and_stays_in_the_denominator():
    rows = [row(str(i), p, image=str(i)) for i, p in enumerate(["CT", "CT", "MRI", None])]
    result = evaluation.metrics(rows, 0)
    # not 2 of 3
    assert (result["accuracy"], result["unparsed"], result["questions"]) == (0.5, 0.25, 4)


def test_the_table_has_a_line_for_all_and_for_each_group():
    rows = [
        row("1", "CT", modality="CT", task="T", image="a"),
        row("2", None, modality="OCT", task="T", image="b"),
    ]
    lines = measures.format_groups(evaluation.metrics(rows, 0)).split("\n")
    assert lines[0].split() == [
        "questions",
        "images",
        "accuracy",
        "low",
        "high",
        "balanced",
        "f1",
        "majority",
        "position",
        "unparsed",
    ]
    assert [line.split("  ")[0] for line in lines[2:]] == ["all", "modality: CT", "modality: OCT", "task: T"]
    assert lines[2].split() == [
        "all",
        "2",
        "2",
        "0.500",
        "0.000",
        "1.000",
        "0.500",
        "0.667",
        "1.000",
        "1.000",
        "0.500",
    ]


# Baselines -----------------------------------------------------------------------------------------------


def test_majority_is_the_most_frequent_normalised_answer_of_the_task():
    answers = [("yes", "T"), ("no", "T"), ("Yes.", "T"), ("no", "U"), ("no", "U"), ("yes", "U")]
    rows = [row(str(i), None, answer, None, task=task) for i, (answer, task) in enumerate(answers)]
    assert evaluation.majority_baseline(rows) == [True, False, True, True, True, False]
    # one group: no 3, yes 3, the first met wins
    without = [{k: v for k, v in r.items() if k != "task"} for r in rows]
    assert evaluation.majority_baseline(without) == [True, False, True, False, False, True]


def test_position_is_where_most_right_options_are_and_open_questions_count_as_wrong():
    closed = [row(str(i), None, answer) for i, answer in enumerate(["MRI", "CT", "MRI", "OCT"])]
    assert evaluation.position_baseline([*closed, row("4", "CT", options=None)]) == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert evaluation.position_baseline([row("1", None, options=None)]) == [False]


def test_baselines_are_taken_from_the_whole_file_and_marked_by_row():
    rows = [
        row(str(i), None, answer, modality=modality, task="T")
        for i, (answer, modality) in enumerate(
            [("CT", "a"), ("CT", "a"), ("CT", "a"), ("MRI", "b"), ("MRI", "b"), ("CT", "b")]
        )
    ]
    result = evaluation.metrics(rows, 0)
    for baseline in ("majority", "position"):
        assert [result[baseline], result["modality"]["a"][baseline]] == [4 / 6, 1]
        # fitted to its own row it would have 2/3
        assert result["modality"]["b"][baseline] == 1 / 3


# Intervals -----------------------------------------------------------------------------------------------


def width(values, images):
    low, high = evaluation.interval(np.array(values, float), np.array(images), seed=0)
    assert low <= np.mean(values) <= high
    return high - low


def test_by_image_is_wider_than_by_question_where_answers_within_an_image_agree():
    rng = np.random.default_rng(1)
    # 100 images of 9 questions, all right or all wrong
    right = np.repeat(rng.random(100) < 0.6, 9)
    ratio = width(right, np.repeat(np.arange(100), 9)) / width(right, np.arange(900))
    # the square root of 9: 100 independent answers, not 900
    assert 2.7 < ratio < 3.3


def test_of_independent_questions_it_is_the_textbook_interval():
    right = np.arange(400) < 120
    assert width(right, np.arange(400)) == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 400) ** 0.5, rel=0.08)


def test_it_is_the_distribution_over_all_draws_of_images_of_unequal_size():
    # by image
    questions, right = [1, 2, 5, 9], [1, 0, 4, 2]
    values = np.concatenate([np.arange(n) < r for n, r in zip(questions, right)]).astype(float)
    draws = [
        (sum(right[i] for i in d) / sum(questions[i] for i in d))
        for d in itertools.product(range(4), repeat=4)
    ]
    got = evaluation.interval(values, np.repeat(list("dacb"), questions), seed=0, resamples=20000)
    assert got == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.01)


def test_it_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    rng = np.random.default_rng(2)
    values, images, order = (
        (rng.random(60) < 0.5).astype(float),
        rng.integers(20, size=60),
        rng.permutation(60),
    )
    first = evaluation.interval(values, images, 0)
    assert evaluation.interval(values[order], images[order], 0) == first
    assert evaluation.interval(values, images, 1) != first


def test_one_image_has_no_interval():
    assert evaluation.interval(np.array([1.0, 0.0]), np.array(["a", "a"]), 0) == (None, None)


# What is asked for beside the answers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Seven rows of a real run with every flag: options of four, three and two, and an open question."""
    home = tmp_path_factory.mktemp("asked")
    rows = list(clinic.question_rows(str(home), "test", 3, 0, 2))
    rows[2]["options"] = [rows[2]["answer"], next(o for o in rows[2]["options"] if o != rows[2]["answer"])]
    rows.append({k: v for k, v in rows[0].items() if k != "options"} | {"id": "open"})
    (got,) = evaluation.predict(
        str(POLICY), [rows], 64, scores=True, blind=True, samples=3, temperature=1.0, seed=0
    )
    assert {len(r.get("options", ())) for r in got} == {0, 2, 3, 4}
    return got


def test_option_scores_equal_a_plain_forward_of_each_option_on_its_own(asked):
    import torch

    from medgr2 import loading, vlm

    vlm_ = loading.load(str(POLICY), dtype=torch.float32, device="cpu")
    for r in asked[:-1]:
        prompt = vlm.encode_prompts(vlm_, [open_image(r["image"])], [policy_prompt(r)])
        for option, logp, tokens in zip(r["options"], r["option_logps"], r["option_tokens"]):
            ids = [
                vlm_.tokenizer(t, add_special_tokens=False)["input_ids"]
                for t in ("<think></think><answer>", option + "</answer>")
            ]
            whole = prompt | {"input_ids": torch.cat([prompt["input_ids"], torch.tensor([sum(ids, [])])], 1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            with torch.no_grad():
                logits = vlm_.model(**whole).logits[0].log_softmax(-1)  # (P + C, V)
            # what precedes each token of the option and its closing tag
            last = logits[-len(ids[1]) - 1 : -1]
            assert tokens == len(ids[1]) and logp == pytest.approx(
                sum(row[i].item() for row, i in zip(last, ids[1])), abs=1e-3
            )


def test_an_open_question_has_no_option_scores_and_is_wrong_by_them(asked):
    assert asked[-1]["option_logps"] is None and evaluation.marks(asked)["prefix"][-1] == 0
    assert evaluation.calibrate(asked[-1:]) == {}


def test_blind_answers_are_those_to_a_grey_image_of_the_same_size(asked, tmp_path):
    from PIL import Image

    grey = [r | {"id": r["id"] + "-grey", "image": str(tmp_path / f"{i}.png")} for i, r in enumerate(asked)]
    for r, old in zip(grey, asked):
        Image.new("RGB", Image.open(old["image"]).size, (128, 128, 128)).save(r["image"])
    (got,) = evaluation.predict(str(POLICY), [grey], 64)
    assert [r["prediction"] for r in got] == [r["blind"] for r in asked]
    assert [r["blind"] for r in asked] != [r["prediction"] for r in asked]


def test_samples_depend_on_the_seed_and_their_own_record_alone(asked):
    (again,) = evaluation.predict(str(POLICY), [asked[3:5]], 64, samples=3, seed=0)
    assert [r["samples"] for r in again] == [r["samples"] for r in asked[3:5]] and all(
        len(r["samples"]) == 3 for r in asked
    )
    other = evaluation.predict(str(POLICY), [asked], 64, samples=3, seed=1)
    assert [r["samples"] for r in next(other)] != [r["samples"] for r in asked]


def test_flags_change_no_answer(asked):
    (got,) = evaluation.predict(str(POLICY), [asked], 64)
    assert [r["response"] for r in got] == [r["response"] for r in asked]


def test_columns_of_scores_samples_and_blindness_equal_a_count_by_hand():
    extra = {
        "option_logps": [-3.0, -2.0, -9.0],
        "option_tokens": [3, 1, 3],
        "samples": ["CT", "MRI", "CT", None],
        "blind": "MRI",
    }
    rows = [
        row("1", "CT", image="a", **extra),
        row("2", "CT", image="b", **extra | {"option_logps": [-1.0, -4.0, -4.0], "blind": "CT"}),
    ]
    got = evaluation.metrics(rows, 0)
    # means of -1, -2, -3 and of -1/3, -4, -4/3
    assert (got["prefix"], got["vote"], got["blind"]) == (1, 1, 0.5)
    assert [got["pass@1"], got["pass@2"], got["pass@4"]] == pytest.approx([1 / 2, 1 - 1 / 6, 1])
    p, q = [np.exp(x) / sum(np.exp(x)) for x in (np.array([-3.0, -2, -9]), np.array([-1.0, -4, -4]))]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in (p[0], q[0]) for b in (p[1], p[2], q[1], q[2])]
    assert got["auroc"] == pytest.approx(np.mean(pairs))
    # in two bins
    assert got["ece"] == pytest.approx(abs(p[1] - 0) / 2 + abs(q[0] - 1) / 2)
    assert "prefix" not in evaluation.metrics([row("1", "CT")], 0)
    json.dumps(got, allow_nan=False)


# Comparing -----------------------------------------------------------------------------------------------


def pair():
    a = [
        row("1", "CT", image="a", modality="CT"),
        row("2", "MRI", image="a", modality="CT"),
        row("3", None, image="b", modality="MRI"),
        row("4", "OCT", image="c", modality="MRI"),
    ]
    # broken, mended, mended, still wrong
    b = [r | {"prediction": p} for r, p in zip(a, ["MRI", "CT", "CT", "OCT"])]
    return a, b


def test_corrected_and_introduced_equal_a_count_by_hand():
    result = compare.comparison(*pair(), 0)
    pick = lambda r: [
        r[k] for k in ("questions", "images", "a", "b", "difference", "corrected", "introduced")
    ]  # noqa: E731
    assert pick(result) == [4, 3, 0.25, 0.5, 0.25, 2, 1]
    assert pick(result["modality"]["CT"]) == [2, 1, 0.5, 0.5, 0, 1, 1]
    assert pick(result["modality"]["MRI"]) == [2, 2, 0, 0.5, 0.5, 1, 0]


def test_swapping_the_runs_changes_the_sign_and_nothing_else():
    a, b = pair()
    there, back = compare.comparison(a, b, 0), compare.comparison(b, a, 0)
    assert back["difference"] == -there["difference"] != 0
    assert (back["low"], back["high"]) == pytest.approx((-there["high"], -there["low"]))
    assert (back["corrected"], back["introduced"]) == (there["introduced"], there["corrected"])


def test_paired_interval_is_narrower_than_the_unpaired_where_the_runs_agree_mostly():
    rng = np.random.default_rng(3)
    a = [
        row(str(i), "CT" if right else None, image=str(i // 2))
        for i, right in enumerate(rng.random(400) < 0.6)
    ]
    b = [r | {"prediction": "CT"} if i % 20 == 0 else r for i, r in enumerate(a)]
    result = compare.comparison(a, b, 0)
    assert result["low"] <= result["difference"] <= result["high"]
    widths = [r["high"] - r["low"] for r in (evaluation.metrics(a, 0), evaluation.metrics(b, 0))]
    assert result["high"] - result["low"] < 0.5 * np.hypot(*widths)


def test_runs_on_different_items_are_refused_with_the_number_missing_in_each(tmp_path):
    a, b = pair()
    records.write_records(tmp_path / "a.jsonl", a)
    records.write_records(tmp_path / "b.jsonl", [*b[2:], row("5", None)])
    done = command(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "out", script=COMPARE)
    assert_refused(
        done, f"{tmp_path / 'a.jsonl'} lacks 1 of 3 (5)", f"{tmp_path / 'b.jsonl'} lacks 2 of 4 (1)"
    )
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
        compare.read_pair(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_the_second_run_may_hold_the_items_in_another_order(tmp_path):
    a, b = pair()
    records.write_records(tmp_path / "a.jsonl", a)
    records.write_records(tmp_path / "b.jsonl", b[::-1])
    rows_a, rows_b = compare.read_pair(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert [r["id"] for r in rows_a] == [r["id"] for r in rows_b] == ["1", "2", "3", "4"]
    assert [r["prediction"] for r in rows_b] == ["MRI", "CT", "CT", "OCT"]


# The command ---------------------------------------------------------------------------------------------


def test_help_and_the_metrics_do_not_import_torch():
    done = command("--help")
    assert done.returncode == 0 and "--predictions" in done.stdout
    code = (
        "import sys, runpy\ntry: runpy.run_path('eval.py', run_name='__main__')\nexcept SystemExit: pass\n"
        "import eval; assert eval.metrics and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "m"],
        ["--data", "d"],
        ["--predictions", "p", "--model", "m"],
        ["--predictions", "p", "--data", "d"],
        ["--model", "m", "--data", "d", "--batch", "0"],
        ["--model", "m", "--data", "d", "--max-new-tokens", "0"],
        ["--predictions", "p", "--model", "m", "--data", "d"],
        ["--model", "m", "--data", "d", "--samples", "-1"],
        ["--model", "m", "--data", "d", "--temperature", "0.0"],
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, arguments):
    words = {"0": "0 is not at least 1", "-1": "--samples", "0.0": "--temperature"}.get(
        arguments[-1] if arguments else "", "--model and --data, or --predictions"
    )
    assert_refused(command(*arguments, "--out", tmp_path / "out"), words)
    assert os.listdir(tmp_path) == []


def test_a_test_file_that_cannot_be_used_is_refused_and_nothing_is_written(tmp_path, question):
    for change, words in [
        ({"image": str(tmp_path / "gone.png")}, ["record q", "no such image", "gone.png"]),
        ({"prediction": "CT"}, ["record q", "`prediction`"]),
        ({"answer": "OCT"}, [".jsonl:1:", "`answer`"]),
    ]:
        records.write_records(tmp_path / "test.jsonl", [question | change])
        assert_refused(
            command("--model", POLICY, "--data", tmp_path / "test.jsonl", "--out", tmp_path / "out"), *words
        )
        assert sorted(os.listdir(tmp_path)) == ["a.png", "test.jsonl"]


def test_anybodys_predictions_are_scored_with_their_own_names_of_fields(tmp_path):
    theirs = [
        {
            "qid": f"Chest CT Scan_{i}",
            "said": said,
            "gt": "Yes",
            "question": "Well? Please choose one of the following: Yes. or No. "
            "You must pick only one answer.",
        }
        for i, said in enumerate(["yes", "No", "Maybe", "B"])
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in theirs))
    done = command(
        "--predictions",
        tmp_path / "p.jsonl",
        "--fields",
        "id=qid",
        "prediction=said",
        "answer=gt",
        "--out",
        tmp_path / "out",
        "--markdown",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (result["accuracy"], result["unparsed"], list(result["modality"])) == (0.25, 0.25, ["CT"])
    closed = result["scorers"]["closed"]
    assert {
        name: (closed[name]["right"], closed[name]["unread"])
        for name in ("strict", "letter or text", "MedGR-Square", "unique mention")
    } == {
        # `Yes.` is not in `yes`
        "strict": (1, 2),
        "letter or text": (1, 1),
        "MedGR-Square": (1, 2),
        "unique mention": (0, 2),
    }
    assert "| strict | 0.250 | 1 | 2 | 0.500 | 0.250 | 0 |" in done.stdout
    assert_refused(
        command("--predictions", tmp_path / "p.jsonl", "--fields", "said", "--out", tmp_path / "x"),
        "--fields said",
        "OURS=THEIRS",
    )
    assert_refused(
        command("--predictions", tmp_path / "p.jsonl", "--fields", "prediction=sad", "--out", tmp_path / "x"),
        "row 1",
        "`sad`",
    )
    assert_refused(
        command("--predictions", tmp_path / "p.jsonl", "--out", tmp_path / "x"), "row 1", "`prediction`"
    )


def answer(home, out):
    return [
        "--model",
        POLICY,
        "--data",
        home / "test.jsonl",
        "--out",
        home / out,
        "--batch",
        BATCH,
        "--max-new-tokens",
        64,
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with test.jsonl (25 questions on 12 images, one image under two names) and a finished run on it in a/."""
    home = tmp_path_factory.mktemp("eval")
    rows = list(clinic.question_rows(str(home), "test", 12, 0, 2))
    shutil.copy(rows[0]["image"], home / "images" / "copy.png")
    rows.insert(
        7,
        {k: v for k, v in rows[0].items() if k != "options"}
        | {"id": "open", "image": str(home / "images" / "copy.png")},
    )
    records.write_records(home / "test.jsonl", rows)
    before = (home / "test.jsonl").read_bytes()
    done = command(*answer(home, "a"))
    assert done.returncode == 0, done.stderr
    assert (home / "test.jsonl").read_bytes() == before
    (home / "stdout.txt").write_text(done.stdout)
    return home


def test_predictions_are_the_records_in_order_with_what_is_recomputed_here(home):
    given, got = lines(home / "test.jsonl"), lines(home / "a" / "predictions.jsonl")
    assert [{k: v for k, v in r.items() if k not in evaluation.ADDED and k != "image"} for r in got] == [
        {k: v for k, v in r.items() if k != "image"} for r in given
    ]
    for old, new in zip(given, got):
        assert os.path.samefile(home / "a" / new["image"], home / old["image"])
        answers = new["response"].split("<answer>")[1:]
        said = (
            answers[0].split("</answer>")[0].strip()
            if len(answers) == 1 and "</answer>" in answers[0]
            else None
        )
        # the toy writes no letters
        assert new["correct"] == (said is not None and said.lower() == new["answer"].lower())
        assert (new["prediction"] is None) == (new["reason"] is not None)
    # it looks at what it is asked
    assert len({r["response"] for r in got}) > 3


def test_metrics_json_and_the_printed_table_say_what_predictions_jsonl_holds(home):
    got, result = (
        lines(home / "a" / "predictions.jsonl"),
        json.loads((home / "a" / "metrics.json").read_text()),
    )
    # the copy is no image of its own
    assert (result["questions"], result["images"]) == (25, 12)
    assert result["accuracy"] == pytest.approx(sum(r["correct"] for r in got) / 25)
    assert result["unparsed"] == pytest.approx(sum(result["reasons"].values()) / 25)
    assert sum(r["questions"] for r in result["task"].values()) == 25
    printed = (home / "stdout.txt").read_text()
    assert measures.format_groups({k: v for k, v in result.items() if k != "reasons"}) in printed
    assert printed.splitlines()[-1].startswith(
        f"{home / 'a'}: accuracy {result['accuracy']:.3f} on 25 questions, 12 images"
    )


def test_killed_and_called_again_it_gives_the_same_bytes_and_then_is_complete(home):
    process = subprocess.Popen(
        [sys.executable, ROOT / "eval.py", *map(str, answer(home, "b"))], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not list(home.glob("b.part/state/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # else the kill came too late to test anything
    assert not (home / "b").exists()
    with open(home / "b.part" / "predictions.jsonl", "a") as file:
        # what a crash in the middle of a line leaves
        file.write('{"id": "half')
    done = command(*answer(home, "b"))
    assert "resuming from step" in done.stdout and "resuming from step 0" not in done.stdout
    for name in ("predictions.jsonl", "metrics.json"):
        assert (home / "b" / name).read_bytes() == (home / "a" / name).read_bytes()
    again = command(*answer(home, "b"))
    assert (again.returncode, again.stdout) == (0, f"{home / 'b'}: complete already\n")


def test_compare_takes_a_folder_or_a_file_and_writes_what_it_prints(home):
    changed = list(records.read_records(home / "a" / "predictions.jsonl", root=home))
    wrong = [r for r in changed if not r["correct"]][:2]
    wanted = [r | {"prediction": r["answer"]} if r in wrong else r for r in changed]
    records.write_records(home / "changed.jsonl", wanted)
    done = command(home / "a", home / "changed.jsonl", "--out", home / "compare", script=COMPARE)
    (result,) = json.loads((home / "compare" / "metrics.json").read_text())["pairs"]
    assert len(wrong) == 2 and (result["corrected"], result["introduced"]) == (2, 0)
    assert result["difference"] == pytest.approx(2 / 25)
    assert (
        measures.format_groups({k: v for k, v in result.items() if k not in ("from", "to")}) in done.stdout
        and "errors corrected 2, introduced 0" in done.stdout
    )
