"""eval.py: figures against computations by hand, baselines, and real runs of the toy policy."""

import base64
import copy
import functools
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import clinic
import numpy as np
import pytest
from helpers import run_here
from PIL import Image

import eval as evaluation
import medgr2.context
import medgr2.loading
import medgr2.vlm
from medgr2 import answering, measures, records
from medgr2.images import open_image
from medgr2.prompts import policy_prompt

ROOT = pathlib.Path(__file__).resolve().parent.parent

POLICY = ROOT / "toy" / "policy"
# Questions per batch in the real runs: few, so that there are many commits to be killed between.
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


command = functools.partial(run_here, evaluation)


def assert_refused(done, *words):
    """A user's mistake: status 2, one line on stderr with these words in it, nothing on stdout."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("eval.py: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


# Predictions --------------------------------------------------------------------------------------------


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
def test_a_response_is_parsed_by_text_or_letter_and_compared_with_the_answer(
    question, answer, prediction, correct
):
    before = copy.deepcopy(question)
    row = evaluation.with_prediction(question, f"<think>x</think><answer>{answer}</answer>")
    assert (row["prediction"], row["correct"]) == (prediction, correct)
    assert (row["reason"] is None) == (prediction is not None)
    # Fields are added, none is changed.
    assert question == before and before.items() <= row.items()
    assert set(row) - set(before) == set(evaluation.ADDED)


def test_an_open_answer_is_right_if_the_text_is_the_same_up_to_case_and_punctuation(question):
    del question["options"]
    question["answer"] = "Left lung"
    responses = {"left  lung.": True, "lung": False, "the left lung": False}
    for text, correct in responses.items():
        assert evaluation.with_prediction(question, f"<answer>{text}</answer>")["correct"] == correct


def test_truncation_is_the_reason_only_if_the_answer_is_lost(question):
    def reason(response, truncated):
        return evaluation.with_prediction(question, response, truncated)["reason"]

    assert reason("<think>x", truncated=True) == "cut at --max-new-tokens"
    assert reason("<think>x", truncated=False) == "no answer"
    assert reason("<answer>CT</answer> and", truncated=True) is None


class Prompts(list):
    """In place of encoded prompts."""

    def to(self, device):
        return self


def test_each_record_gets_its_own_response_and_one_without_an_end_is_truncated(monkeypatch, question):
    torch = pytest.importorskip("torch")
    stop, opened = 9, []
    ids, mask = (
        torch.tensor([[1, 9, 0], [2, 2, 2], [3, 3, 9]]),
        torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
    )
    fake = types.SimpleNamespace(
        load=lambda name, dtype: types.SimpleNamespace(stop_ids=[stop], device="cpu"),
        best_dtype=lambda: None,
        limit_pixels=lambda *_: None,
        encode_by_image=lambda vlm_, images, texts, device: Prompts(text.split("\n")[0] for text in texts),
        sample=lambda vlm_, prompts, seeds, n, temperature, group: (
            ids[: len(prompts)],
            mask[: len(prompts)],
            torch.tensor([False, True, False])[: len(prompts)],
        ),
        decode=lambda vlm_, ids, mask: [f"{token}" for token in ids[:, 0].tolist()],
    )
    for name in ("loading", "vlm", "encoding"):
        monkeypatch.setattr(medgr2, name, fake)
    monkeypatch.setattr(evaluation, "open_images", lambda paths: [opened.append(path) for path in paths])
    monkeypatch.setattr(answering, "for_preparing", lambda loaded: loaded)
    asked = [question | {"id": name} for name in "abc"]
    model = evaluation.open_model("model", 3)._replace(find_too_long=None)
    got = [predict(model, batch) for batch in (asked[:3], asked[:1])]
    assert [[(r["id"], r["response"]) for r in batch] for batch in got] == [
        [("a", "1"), ("b", "2"), ("c", "3")],
        [("a", "1")],
    ]
    assert [r["reason"] for r in got[0]] == ["no answer", "cut at --max-new-tokens", "no answer"]
    # Each record's image is opened once.
    assert len(opened) == 4


# The table of one run -----------------------------------------------------------------------------------


def test_figures_equal_a_computation_by_hand_in_all_and_by_group():
    rows = [
        row("1", "CT", modality="CT", task="T", image="a"),
        row("2", "MRI", modality="CT", task="U", image="a"),
        row("3", "CT", modality="CT", task="T", image="b"),
        row("4", "ct.", modality="MRI", task="T", image="c"),
        row("5", None, modality="MRI", task="U", image="d"),
    ]
    result = evaluation.compute_metrics(rows, 0)

    def figures(group):
        return group["questions"], group["images"], group["accuracy"], group["unparsed"]

    assert figures(result) == (5, 4, 0.6, 0.2)
    assert figures(result["modality"]["CT"]) == (3, 2, 2 / 3, 0)
    assert figures(result["modality"]["MRI"]) == (2, 2, 0.5, 0.5)
    assert figures(result["task"]["T"]) == (3, 3, 1.0, 0)
    assert figures(result["task"]["U"]) == (2, 2, 0.0, 0.5)
    assert result["modality"]["MRI"]["low"] == 0 and result["modality"]["MRI"]["high"] == 1
    # Only plain numbers.
    json.dumps(result, allow_nan=False)


def test_rows_without_a_field_are_a_group_only_if_others_have_the_field():
    rows = [row("1", "CT", modality="CT"), row("2", "CT")]
    result = evaluation.compute_metrics(rows, 0)
    assert set(result["modality"]) == {"CT", "(none)"} and "task" not in result


def test_an_unparsed_answer_is_wrong_and_stays_in_the_denominator():
    rows = [row(str(i), p, image=str(i)) for i, p in enumerate(["CT", "CT", "MRI", None])]
    result = evaluation.compute_metrics(rows, 0)
    # Not 2 of 3.
    assert (result["accuracy"], result["unparsed"], result["questions"]) == (0.5, 0.25, 4)


def test_the_table_has_a_line_for_all_rows_and_for_each_group():
    rows = [
        row("1", "CT", modality="CT", task="T", image="a"),
        row("2", None, modality="OCT", task="T", image="b"),
    ]
    lines = measures.format_groups(evaluation.compute_metrics(rows, 0)).split("\n")
    columns = "questions images accuracy low high balanced f1 majority position unparsed"
    assert lines[0].split() == columns.split()
    assert [line.split("  ")[0] for line in lines[2:]] == ["all", "modality: CT", "modality: OCT", "task: T"]
    assert lines[2].split() == "all 2 2 0.500 0.000 1.000 0.500 0.667 1.000 1.000 0.500".split()


# Baselines ----------------------------------------------------------------------------------------------


def test_majority_is_the_most_frequent_normalised_answer_of_the_task():
    answers = [("yes", "T"), ("no", "T"), ("Yes.", "T"), ("no", "U"), ("no", "U"), ("yes", "U")]
    rows = [row(str(i), None, answer, None, task=task) for i, (answer, task) in enumerate(answers)]
    assert evaluation.majority_baseline(rows) == [True, False, True, True, True, False]
    # All are one group with 3 times no and 3 times yes: the first met wins.
    without = [{k: v for k, v in r.items() if k != "task"} for r in rows]
    assert evaluation.majority_baseline(without) == [True, False, True, False, False, True]


def test_position_is_where_most_right_options_are_and_an_open_question_counts_as_wrong():
    closed = [row(str(i), None, answer) for i, answer in enumerate(["MRI", "CT", "MRI", "OCT"])]
    rows = [*closed, row("4", "CT", options=None)]
    assert evaluation.position_baseline(rows) == [True, False, True, False, False]
    assert evaluation.position_baseline([row("1", None, options=None)]) == [False]


def test_baselines_are_fitted_to_the_whole_file_and_scored_by_group():
    answers = [("CT", "a"), ("CT", "a"), ("CT", "a"), ("MRI", "b"), ("MRI", "b"), ("CT", "b")]
    rows = [row(str(i), None, answer, modality=m, task="T") for i, (answer, m) in enumerate(answers)]
    result = evaluation.compute_metrics(rows, 0)
    for baseline in ("majority", "position"):
        assert [result[baseline], result["modality"]["a"][baseline]] == [4 / 6, 1]
        # Fitted to its own group it would have 2/3.
        assert result["modality"]["b"][baseline] == 1 / 3


# --scores, --blind, --samples ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return evaluation.open_model(str(POLICY), 64)


def predict(model, rows, blind=False, scores=False, **drawn):
    batch = evaluation.prepare_batch(model, rows, blind, scores)
    return evaluation.predict_batch(model, batch, blind, scores, **drawn)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, policy):
    """Seven rows of a real run with every flag: options of four, three and two, and an open question."""
    home = tmp_path_factory.mktemp("asked")
    rows = list(clinic.question_rows(str(home), "test", 3, 0, 2))
    rows[2]["options"] = [rows[2]["answer"], next(o for o in rows[2]["options"] if o != rows[2]["answer"])]
    rows.append({k: v for k, v in rows[0].items() if k != "options"} | {"id": "open"})
    got = predict(policy, rows, blind=True, scores=True, samples=3, seed=0)
    assert {len(r.get("options", ())) for r in got} == {0, 2, 3, 4}
    return got


def test_option_scores_equal_a_plain_forward_of_each_option_on_its_own(asked):
    import torch

    from medgr2 import encoding, loading

    vlm_ = loading.load(str(POLICY), dtype=torch.float32, device="cpu")
    for r in asked[:-1]:
        prompt = encoding.encode_prompts(vlm_, [open_image(r["image"])], [policy_prompt(r)])
        for option, logp, tokens in zip(r["options"], r["option_logps"], r["option_tokens"]):
            ids = [
                vlm_.tokenizer(t, add_special_tokens=False)["input_ids"]
                for t in ("<answer>", option + "</answer>")
            ]
            whole = prompt | {"input_ids": torch.cat([prompt["input_ids"], torch.tensor([sum(ids, [])])], 1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            with torch.no_grad():
                logits = vlm_.model(**whole).logits[0]  # (P + C, V)
            # What is never sampled has no probability.
            logits[:, vlm_.banned_ids] = -torch.inf
            # The logits before each token of the option and its closing tag.
            last = logits.log_softmax(-1)[-len(ids[1]) - 1 : -1]
            assert tokens == len(ids[1]) and logp == pytest.approx(
                sum(row[i].item() for row, i in zip(last, ids[1])), abs=1e-3
            )


def test_an_open_question_has_no_option_scores_and_is_wrong_by_them(asked):
    assert asked[-1]["option_logps"] is None and evaluation.score_columns(asked)["prefix"][-1] == 0
    assert evaluation.calibrate(asked[-1:]) == {}


def test_blind_predictions_are_those_on_a_grey_image_of_the_same_size(asked, policy, tmp_path):
    grey = [r | {"id": r["id"] + "-grey", "image": str(tmp_path / f"{i}.png")} for i, r in enumerate(asked)]
    for r, old in zip(grey, asked):
        Image.new("RGB", Image.open(old["image"]).size, (128, 128, 128)).save(r["image"])
    got = predict(policy, grey)
    assert [r["prediction"] for r in got] == [r["blind"] for r in asked]
    assert [r["blind"] for r in asked] != [r["prediction"] for r in asked]


def test_samples_depend_only_on_the_seed_and_their_own_record(asked, policy):
    again = predict(policy, asked[3:5], samples=3, seed=0)
    assert [r["samples"] for r in again] == [r["samples"] for r in asked[3:5]] and all(
        len(r["samples"]) == 3 for r in asked
    )
    other = predict(policy, asked, samples=3, seed=1)
    assert [r["samples"] for r in other] != [r["samples"] for r in asked]


def test_flags_change_no_answer(asked, policy):
    got = predict(policy, asked)
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
    got = evaluation.compute_metrics(rows, 0)
    # The means per token are -1, -2, -3 and -1/3, -4, -4/3.
    assert (got["prefix"], got["vote"], got["blind"]) == (1, 1, 0.5)
    assert [got["pass@1"], got["pass@2"], got["pass@4"]] == pytest.approx([1 / 2, 1 - 1 / 6, 1])
    p, q = [np.exp(x) / sum(np.exp(x)) for x in (np.array([-3.0, -2, -9]), np.array([-1.0, -4, -4]))]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in (p[0], q[0]) for b in (p[1], p[2], q[1], q[2])]
    assert got["auroc"] == pytest.approx(np.mean(pairs))
    # The two are in different bins.
    assert got["ece"] == pytest.approx(abs(p[1] - 0) / 2 + abs(q[0] - 1) / 2)
    assert "prefix" not in evaluation.compute_metrics([row("1", "CT")], 0)
    json.dumps(got, allow_nan=False)


# The command --------------------------------------------------------------------------------------------


def test_help_and_the_metrics_do_not_import_torch():
    done = command("--help")
    assert done.returncode == 0 and "--predictions" in done.stdout
    code = (
        "import sys, runpy\ntry: runpy.run_path('eval.py', run_name='__main__')\nexcept SystemExit: pass\n"
        "import eval; assert eval.compute_metrics and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("", "one of the arguments --model --endpoint --predictions is required"),
        ("--data d", "one of the arguments --model --endpoint --predictions is required"),
        ("--model m", "give --data"),
        ("--endpoint http://h --endpoint-model m", "give --data"),
        ("--predictions p --data d", "not with --predictions"),
        ("--predictions p --model m", "not allowed with argument --predictions"),
        ("--predictions p --model m --data d", "not allowed with argument --predictions"),
        ("--endpoint http://h --model m --data d", "not allowed with argument --endpoint"),
        ("--endpoint http://h --data d", "--endpoint-model go together"),
        ("--model m --endpoint-model m --data d", "--endpoint-model go together"),
        ("--endpoint http://me:secret@h --endpoint-model m --data d", "--endpoint: give a URL"),
        ("--endpoint http://h --endpoint-model m --data d --scores", "--scores"),
        ("--model m --data d --answers a", "--answers: belongs to --predictions"),
        ("--model m --data d --fields a=b", "--fields: belongs to --predictions"),
        ("--predictions p --samples 2", "--predictions has none; leave them out"),
        ("--endpoint http://h --endpoint-model m --data d --max-pixels 784", "the server resizes images"),
        ("--model m --data d --batch 0", "0 is not at least 1"),
        ("--model m --data d --max-new-tokens 0", "0 is not at least 1"),
        ("--model m --data d --samples -1", "--samples"),
        ("--model m --data d --temperature 0.0", "--temperature"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, arguments, says):
    assert_refused(command(*arguments.split(), "--out", tmp_path / "out"), says)
    assert os.listdir(tmp_path) == []


def test_a_test_file_that_cannot_be_used_is_refused_and_nothing_is_written(tmp_path, question):
    for change, words in [
        ({"image": str(tmp_path / "gone.png")}, ["record q", "no image", "gone.png"]),
        ({"prediction": "CT"}, ["record q", "`prediction`"]),
        ({"answer": "OCT"}, [".jsonl:1:", "`answer`"]),
    ]:
        records.write_records(tmp_path / "test.jsonl", [question | change])
        assert_refused(
            command("--model", POLICY, "--data", tmp_path / "test.jsonl", "--out", tmp_path / "out"), *words
        )
        assert sorted(os.listdir(tmp_path)) == ["a.png", "test.jsonl"]


def test_third_party_predictions_are_scored_with_their_own_names_of_fields(tmp_path):
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
    given = ["--predictions", tmp_path / "p.jsonl"]
    fields = ["--fields", "id=qid", "prediction=said", "answer=gt"]
    done = command(*given, *fields, "--out", tmp_path / "out", "--markdown")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (result["accuracy"], result["unparsed"], list(result["modality"])) == (0.25, 0.25, ["CT"])
    closed = result["scorers"]["closed"]
    counts = {name: (closed[name]["right"], closed[name]["unread"]) for name in closed if name != "questions"}
    assert (counts["strict"], counts["letter or text"]) == ((1, 2), (1, 1))
    # For a unique mention, `yes` lacks the full stop of the option `Yes.`.
    assert (counts["MedGR-Square"], counts["unique mention"]) == ((1, 2), (0, 2))
    assert "| strict | 0.250 | 1 | 2 | 0.500 | 0.250 | 0 |" in done.stdout
    for fields, words in [
        (["--fields", "said"], ["--fields said", "OURS=THEIRS"]),
        (["--fields", "prediction=sad"], ["row 1", "`sad`"]),
        (["--answers", tmp_path / "none.json"], ["none.json", "No such file"]),
        ([], ["row 1", "`prediction`"]),
    ]:
        assert_refused(command(*given, *fields, "--out", tmp_path / "x"), *words)


def answer(home, out):
    files = ["--model", POLICY, "--data", home / "test.jsonl", "--out", home / out]
    return [*files, "--batch", BATCH, "--max-new-tokens", 64]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with test.jsonl (25 questions on 12 images, one under two names) and a finished run, a/."""
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


def test_predictions_are_the_records_by_image_and_a_second_parser_agrees(home):
    given, got = lines(home / "test.jsonl"), lines(home / "a" / "predictions.jsonl")
    # Two questions per image, one after the other; the open question came in between two of them.
    open_question = given.pop(7)
    assert open_question["id"] == "open" and given[6]["image"] == given[7]["image"]
    given.insert(8, open_question)
    assert [{k: v for k, v in r.items() if k not in evaluation.ADDED and k != "image"} for r in got] == [
        {k: v for k, v in r.items() if k != "image"} for r in given
    ]
    for old, new in zip(given, got):
        assert os.path.samefile(home / "a" / new["image"], home / old["image"])
        answers = new["response"].split("<answer>")[1:]
        is_form = len(answers) == 1 and "</answer>" in answers[0]
        text = answers[0].split("</answer>")[0].strip() if is_form else None
        # The toy writes no letters.
        assert new["correct"] == (is_form and text.lower() == new["answer"].lower())
        assert (new["prediction"] is None) == (new["reason"] is not None)
    # Responses depend on image and question.
    assert len({r["response"] for r in got}) > 3


def test_metrics_json_and_the_printed_table_say_what_predictions_jsonl_holds(home):
    got, result = (
        lines(home / "a" / "predictions.jsonl"),
        json.loads((home / "a" / "metrics.json").read_text()),
    )
    # The copy is not counted as another image.
    assert (result["questions"], result["images"]) == (25, 12)
    assert result["accuracy"] == pytest.approx(sum(r["correct"] for r in got) / 25)
    assert result["unparsed"] == pytest.approx(sum(result["reasons"].values()) / 25)
    assert sum(r["questions"] for r in result["task"].values()) == 25
    printed = (home / "stdout.txt").read_text()
    assert measures.format_groups({k: v for k, v in result.items() if k != "reasons"}) in printed
    assert printed.splitlines()[-1].startswith(
        f"{home / 'a'}: accuracy {result['accuracy']:.3f} on 25 questions, 12 images"
    )


def test_a_question_longer_than_the_context_is_not_asked_and_counts_as_wrong(home):
    rows = lines(home / "test.jsonl")[:3]
    rows[1] |= {"question": "Which side is it, " * 300 + "left?"}
    (home / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--model", POLICY, "--data", home / "long.jsonl", "--scores", "--blind", "--samples", 2
    done = command(*flags, "--max-new-tokens", 64, "--out", home / "long")
    got = lines(home / "long" / "predictions.jsonl")
    assert [row["reason"] == "longer than the model's context" for row in got] == [False, True, False]
    assert [row["response"] == "" for row in got] == [False, True, False]
    asked = [{field: row[field] for field in ("prediction", "response")} for row in (got[0], got[2])]
    before = lines(home / "a" / "predictions.jsonl")
    assert asked == [{field: before[i][field] for field in asked[0]} for i in (0, 2)]
    result = json.loads((home / "long" / "metrics.json").read_text())
    assert result["questions"] == 3 and result["reasons"]["longer than the model's context"] == 1
    assert "longer than the model's context (1)" in done.stdout


def test_if_most_replies_are_cut_the_first_batch_says_so(home):
    done = command(*answer(home, "cut"), "--max-new-tokens", 3)
    said = [line for line in done.stdout.splitlines() if "replies were cut" in line]
    assert (
        said == [line for line in said if line.startswith(f"{BATCH} of {BATCH} replies")] and len(said) == 1
    )
    assert "--max-new-tokens 3: raise it" in said[0] and "stop tokens" in said[0]
    assert "replies were cut" not in (home / "stdout.txt").read_text()


def test_killed_and_called_again_it_gives_the_same_bytes_and_then_is_complete(home):
    process = subprocess.Popen(
        [sys.executable, ROOT / "eval.py", *map(str, answer(home, "b"))], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not list(home.glob("b.part/state/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Otherwise the kill came too late to test anything.
    assert not (home / "b").exists()
    with open(home / "b.part" / "predictions.jsonl", "a") as file:
        # What a crash in the middle of a line leaves.
        file.write('{"id": "half')
    done = command(*answer(home, "b"))
    assert "resuming from step" in done.stdout and "resuming from step 0" not in done.stdout
    for name in ("predictions.jsonl", "metrics.json"):
        assert (home / "b" / name).read_bytes() == (home / "a" / name).read_bytes()
    again = command(*answer(home, "b"))
    assert (again.returncode, again.stdout) == (0, f"{home / 'b'}: complete already\n")


# --endpoint ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    """chat(body) → (text, finish_reason): the toy policy as a server would ask it, by transformers alone."""
    import torch
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(POLICY).eval()
    processor = transformers.AutoProcessor.from_pretrained(POLICY, backend="pil")
    lock = threading.Lock()

    def reply(body):
        image, text = image_of(body), text_of(body)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(text=prompt, images=image, return_tensors="pt", add_special_tokens=False)
        settings = {"do_sample": body["temperature"] > 0, "max_new_tokens": body["max_tokens"]}
        with lock, torch.no_grad():
            torch.manual_seed(body["seed"])
            ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        is_whole = ids[-1].item() == processor.tokenizer.eos_token_id
        return processor.decode(ids, skip_special_tokens=True), "stop" if is_whole else "length"

    return reply


def image_of(body):
    data = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def text_of(body):
    return body["messages"][0]["content"][1]["text"]


@pytest.fixture
def ask(call):
    """ask(server, words) calls eval.py → (exit status, stdout, stderr)."""
    return lambda server, words: call(
        evaluation, "--endpoint", server.url, "--endpoint-model", "m", *words.split()
    )


def test_a_server_of_the_same_model_gives_the_same_predictions_and_table(home, chat, serve, ask):
    server = serve(chat)
    words = f"--data {home}/test.jsonl --batch {BATCH} --max-new-tokens 64 --out {home}/served"
    status, printed, _ = ask(server, words)
    assert status == 0 and {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    for name in ("predictions.jsonl", "metrics.json"):
        assert (home / "served" / name).read_bytes() == (home / "a" / name).read_bytes()
    # The first line says where it was asked.
    first, *table = printed.replace(f"{home}/served", f"{home}/a").splitlines()
    assert first == f"{home}/a: 25 questions to answer, on {server.url}"
    # This machine also tells how many tokens an image has.
    assert table == (home / "stdout.txt").read_text().splitlines()[2:]
    assert all((b["model"], b["temperature"], b["max_tokens"]) == ("m", 0, 64) for _, _, b in server.seen)


def test_blind_questions_and_samples_go_to_the_server_too(home, serve, ask):
    def script(body):
        colours = image_of(body).getcolors(1)
        answer = "grey" if colours and colours[0][1] == (128, 128, 128) else "seen"
        return f"<answer>{answer if body['temperature'] == 0 else body['seed']}</answer>", "stop"

    rows = [{k: v for k, v in r.items() if k != "options"} for r in lines(home / "test.jsonl")[:3]]
    (home / "open.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = f"--data {home}/open.jsonl --blind --samples 2 --temperature 0.7 --out {home}/sampled"
    server = serve(script)
    assert ask(server, words)[0] == 0
    found = lines(home / "sampled" / "predictions.jsonl")
    assert [(r["prediction"], r["blind"]) for r in found] == [("seen", "grey")] * 3
    seeds = [int(seed) for r in found for seed in r["samples"]]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    sent = {body["seed"]: (body["temperature"], text_of(body)) for _, _, body in server.seen}
    assert [sent[seed] for seed in seeds] == [(0.7, policy_prompt(r)) for r in rows for _ in range(2)]


def test_an_image_is_sent_at_a_bounded_size_and_a_small_one_as_it_is(tmp_path, serve, ask, question):
    sizes = {"small": (64, 48), "wide": (3000, 1500), "tall": (20, 4000)}
    rows = []
    for name, size in sizes.items():
        Image.linear_gradient("L").resize(size).save(tmp_path / f"{name}.png")
        rows.append(question | {"id": name, "question": name, "image": str(tmp_path / f"{name}.png")})
    records.write_records(tmp_path / "test.jsonl", rows)
    for flags, expected in [
        ("", {"small": (64, 48), "wide": (2048, 1024), "tall": (10, 2048)}),
        ("--endpoint-side 32", {"small": (32, 24), "wide": (32, 16), "tall": (1, 32)}),
    ]:
        server = serve(lambda body: ("<answer>CT</answer>", "stop"))
        words = f"--data {tmp_path}/test.jsonl {flags} --out {tmp_path}/out{len(flags)}"
        assert ask(server, words)[0] == 0
        sent = {text_of(body).split("\n")[0]: image_of(body).size for _, _, body in server.seen}
        assert {name: sent[key] for name in sizes for key in sent if name in key} == expected


def test_if_the_server_goes_away_the_same_command_asks_only_what_is_left(home, chat, serve, ask):
    away = threading.Event()

    def script(body):
        if len(server.seen) > 2 * BATCH:
            away.set()
        return (503, {"error": "out for lunch"}) if away.is_set() else chat(body)

    server = serve(script)
    words = f"--data {home}/test.jsonl --batch {BATCH} --max-new-tokens 64 --retries 1 --out {home}/back"
    status, _, err = ask(server, words)
    assert status == 2 and err.count("\n") == 1 and "HTTP 503 out for lunch; gave up after 1 retries" in err
    del server.seen[:]
    server.script = chat
    assert ask(server, words + " --concurrency 2")[0] == 0 and len(server.seen) == 25 - 2 * BATCH
    for name in ("predictions.jsonl", "metrics.json"):
        assert (home / "back" / name).read_bytes() == (home / "a" / name).read_bytes()
