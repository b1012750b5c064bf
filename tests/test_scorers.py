"""scorers.py: every scorer on odd answers, the authors' figure on their file, third-party rows as ours."""

import difflib
import json
import pathlib
import string

import pytest

from medgr2 import scorers
from medgr2.errors import RecordError

SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared"
AUTHORS = SHARED / "data" / "medgr_square" / "checkpoint_30.jsonl"
MODALITIES = ["MRI", "CT", "Ultrasound"]
# An option that contains another.
NESTED = ["CT", "CT scan", "X-ray"]
WITH_OR = ["Left or right lung", "Liver", "Left", "Spleen or kidney"]
NUMBERS = ["2", "12", "21"]
NAMES = ("strict", "letter or text", "most similar", "Med-R1", "MedGR-Square", "unique mention")

# Rows: the answer, the options, and the option that each scorer finds, in the order of NAMES.
ODD = [
    ("B", MODALITIES, [None, "CT", None, "CT", None, "CT"]),
    ("b", MODALITIES, [None, "CT", None, None, None, None]),
    ("(B)", MODALITIES, [None, "CT", None, None, None, "CT"]),
    ("B) CT", MODALITIES, [None, "CT", "CT", None, None, "CT"]),
    # The letter of one option, the text of another.
    ("C) CT", MODALITIES, [None, None, "CT", None, None, "Ultrasound"]),
    ("CT.", MODALITIES, ["CT", "CT", "CT", None, "CT", "CT"]),
    # For difflib case matters, and Ultrasound has a t.
    ("ct", MODALITIES, ["CT", "CT", "Ultrasound", None, "CT", "CT"]),
    ("CT", MODALITIES, ["CT"] * 6),
    ("**CT**", MODALITIES, ["CT", "CT", "CT", None, "CT", "CT"]),
    ("The answer is CT", MODALITIES, [None, "CT", "CT", None, None, "CT"]),
    # Two are named: difflib takes the longer.
    ("CT or MRI", MODALITIES, [None, None, "MRI", None, None, None]),
    # None is named: difflib still takes one.
    ("PET", MODALITIES, [None, None, "CT", None, None, None]),
    ("", MODALITIES, [None] * 6),
    ("CT scan", NESTED, ["CT scan", "CT scan", "CT scan", None, "CT scan", None]),
    ("CT", NESTED, ["CT"] * 6),
    # The authors drop the hyphen.
    ("xray", NESTED, [None, None, "X-ray", None, "X-ray", None]),
    (
        "left or right lung",
        WITH_OR,
        ["Left or right lung", "Left or right lung", "Left or right lung", None, "Left or right lung", None],
    ),
    ("Spleen or kidney", WITH_OR, ["Spleen or kidney"] * 3 + [None] + ["Spleen or kidney"] * 2),
    ("left", WITH_OR, ["Left", "Left", "Left", None, "Left", "Left"]),
    # `2` is in `12`.
    ("12", NUMBERS, ["12", "12", "12", "12", "12", None]),
    ("2.", NUMBERS, ["2", "2", "2", None, "2", "2"]),
    ("A", NUMBERS, [None, "2", None, "2", None, "2"]),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text, options, wanted", ODD, ids=[f"{text or 'empty'} of {options[0]}" for text, options, _ in ODD]
)
def test_a_scorer_finds_in_an_odd_answer_what_its_source_finds(name, text, options, wanted):
    before = list(options)
    assert scorers.CLOSED[name](text, options) == wanted[NAMES.index(name)]
    assert options == before


def test_most_similar_is_the_option_with_the_highest_ratio_and_the_first_of_equals():
    options = ["pleural effusion", "pericardial effusion", "pulmonary edema"]
    for text in ("effusion of the pleura", "edema", "a pericardial one", "lung"):
        best = max(difflib.SequenceMatcher(None, o, text).ratio() for o in options)
        got = scorers.most_similar(text, options)
        assert difflib.SequenceMatcher(None, got, text).ratio() == best > 0
    assert scorers.most_similar("ab", ["xb", "ax", "ay"]) == "xb"


def test_a_letter_is_a_mention_only_among_the_last_four_words():
    # B is the fifth word from the end.
    assert scorers.unique_mention("It is option B as far as seen", MODALITIES) is None
    assert scorers.unique_mention("It is option B as I see", MODALITIES) == "CT"
    assert scorers.unique_mention("A or B", MODALITIES) is None


def test_a_text_over_twice_as_long_as_all_options_is_not_searched():
    length = 2 * sum(map(len, MODALITIES))
    assert scorers.unique_mention("CT".rjust(length, "_"), MODALITIES) == "CT"
    assert scorers.unique_mention("CT".rjust(length + 1, "_"), MODALITIES) is None


# Open answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, exact, recall, f1",
    [
        ("The left lung.", "left lung", 0, 1, 2 * 2 / 5),
        ("left lung", "Left Lung.", 1, 1, 1),
        ("lung lung", "left lung", 0, 0.5, 0.5),
        ("3", "3", 1, 1, 1),
        ("", "left", 0, 0, 0),
        ("no", "yes", 0, 0, 0),
        # A number is one word.
        ("5 cm", "5.1 cm", 0, 1 / 2, 1 / 2),
        ("2.5 cm", "5.2 cm", 0, 1 / 2, 1 / 2),
        (".5, not 5", "5", 0, 1, 2 / 4),
        ("T2.5", "2.5 T", 0, 0, 0),
        # Characters, where words have no spaces; words, where they have.
        ("左肺上叶", "左肺。", 0, 1, 2 * 2 / 6),
        ("右肺", "左肺", 0, 0.5, 0.5),
        ("CT显示肺炎", "肺炎", 0, 1, 2 * 2 / 7),
        ("ปอด", "ปอดซ้าย", 0, 3 / 7, 2 * 3 / 10),
        ("왼쪽 폐", "오른쪽 폐", 0, 0.5, 0.5),
        # Yes and no: they differ by the vowel's mark alone.
        ("हूँ", "हाँ", 0, 0, 0),
    ],
)
def test_open_answers_equal_a_count_by_hand(text, answer, exact, recall, f1):
    got = [scorer(text, answer) for scorer in scorers.OPEN.values()]
    assert list(scorers.OPEN) == ["exact match", "token F1", "token recall"] and got == pytest.approx(
        [exact, f1, recall]
    )


# A file -------------------------------------------------------------------------------------------------


def row(prediction, answer="CT", options=MODALITIES, **fields):
    return {"prediction": prediction, "answer": answer} | ({"options": options} if options else {}) | fields


def test_the_text_that_is_scored_is_that_of_the_one_answer_tag_or_else_the_whole_response():
    assert scorers.answer_text(row("CT", response="<think>MRI?</think><answer> B) CT </answer>")) == "B) CT"
    assert scorers.answer_text(row(None, response="It is CT")) == "It is CT"
    assert (
        scorers.answer_text(row(None, response="<answer>CT</answer><answer>MRI</answer>")).count("<answer>")
        == 2
    )
    assert scorers.answer_text(row("CT")) == "CT" and scorers.answer_text(row(None)) == ""


def test_every_scorer_has_the_same_denominator_and_counts_what_it_could_not_read():
    rows = [
        row("CT", response="CT"),
        row("CT", response="B"),
        row(None, response="It is CT"),
        row("MRI", response="MRI"),
        row("lung", "left lung", None),
        row("left lung", "left lung", None),
    ]
    found = scorers.summarize_scores(rows, [scorers.apply_scorers(r) for r in rows])
    assert found["closed"]["questions"] == 4 and found["open"]["questions"] == 2

    def figures(name):
        return [found["closed"][name][field] for field in ("accuracy", "unread", "of_read")]

    assert figures("strict") == [1 / 4, 2, 1 / 2] and figures("letter or text") == [2 / 4, 1, 2 / 3]
    assert figures("most similar") == [2 / 4, 1, 2 / 3] and figures("Med-R1") == [2 / 4, 1, 2 / 3]
    assert figures("MedGR-Square") == [1 / 4, 2, 1 / 2] and figures("unique mention") == [3 / 4, 0, 3 / 4]
    authors = found["closed"]["MedGR-Square"]
    assert (authors["left_out"], authors["published"]) == (1, 1 / 3)
    assert found["open"]["exact match"] == 0.5 and found["open"]["token recall"] == 0.75
    assert "open" not in scorers.summarize_scores(rows[:4], [scorers.apply_scorers(r) for r in rows[:4]])


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 1])
@pytest.mark.parametrize("unread", [0, 1, 2, 19, 100])
def test_left_out_is_what_the_authors_loop_leaves_out(unread, share):
    skipped, force = 0, False
    # The loop as they wrote it, on as many rows.
    for invalid in [False] * 100 + [True] * unread + [False] * 60:
        if invalid and not force:
            skipped += 1
            force = skipped >= int((160 + unread) * share)
    assert scorers.count_left_out(unread, 160 + unread, share) == skipped


@pytest.mark.skipif(not AUTHORS.exists(), reason=f"no {AUTHORS}")
def test_on_the_authors_file_the_authors_scorer_gives_the_papers_figure():
    rows, unsure, _ = scorers.read_predictions(
        AUTHORS,
        {"id": "question_id", "prediction": "model_answer", "answer": "gt_answer", "image": "image_path"},
    )
    found = scorers.summarize_scores(rows, [scorers.apply_scorers(r) for r in rows])["closed"]["MedGR-Square"]

    def bare(text):
        return "".join(c for c in text.lower() if c not in string.punctuation).strip()

    raw = [json.loads(line) for line in AUTHORS.read_text().splitlines()]
    assert len(rows) == 7851 and unsure == 0
    assert found["right"] == sum(bare(r["model_answer"]) == bare(r["gt_answer"]) for r in raw) == 6865
    assert round(found["published"], 4) == 0.8745 and found["left_out"] == 1 and found["unread"] == 19


# Third-party rows ---------------------------------------------------------------------------------------

ASKED = "Where is it? Please choose one of the following: {}. You must pick only one answer."


@pytest.mark.parametrize(
    "inside, known, options, sure",
    [
        ("CT or MRI", (), ["CT", "MRI"], True),
        ("Yes. or No.", (), ["Yes.", "No."], True),
        (
            "Left or right lung or Liver or Spleen or Heart",
            ("Left or right lung",),
            ["Left or right lung", "Liver", "Spleen", "Heart"],
            True,
        ),
        (
            "Liver or Left or right lung",
            ("liver", "left or right lung."),
            ["Liver", "Left or right lung"],
            True,
        ),
        (
            "Left or right lung or Liver or Spleen or Heart",
            ("Liver",),
            ["Left", "right lung", "Liver", "Spleen", "Heart"],
            False,
        ),
        ("CT or MRI or CT or PET", (), ["CT", "MRI", "PET"], True),
    ],
)
def test_options_in_the_question_are_found_and_known_ones_with_an_or_inside_are_joined(
    inside, known, options, sure
):
    assert scorers.split_choices(ASKED.format(inside), *known) == ("Where is it?", options, sure)


def test_a_question_without_options_in_it_is_open():
    assert scorers.split_choices("Where is it, left or right?") == ("Where is it, left or right?", None, True)


def test_rows_of_four_shapes_become_the_same_row():
    common = {"question_id": "MHSMA_0001", "model_answer": "B", "gt_answer": "CT"}
    fields = {"id": "question_id", "prediction": "model_answer", "answer": "gt_answer"}
    shapes = [
        {"question": "Where is it?", "options": ["MRI", "CT"]},
        {"question": "Where is it?", "options": {"A": "MRI", "B": "CT"}},
        {"question": "Where is it?", "option_A": "MRI", "option_B": "CT", "option_C": None},
        {"question": ASKED.format("MRI or CT")},
    ]
    got = [scorers.convert_row(common | shape, 1, fields)[0] for shape in shapes]
    assert all(r == got[0] for r in got)
    wanted = {
        "id": "MHSMA_0001",
        "question": "Where is it?",
        "options": ["MRI", "CT"],
        "answer": "CT",
        "response": "B",
        "prediction": "CT",
        "reason": None,
        "correct": True,
        "dataset": "MHSMA",
        "modality": "Microscopy",
        "image_hash": "MHSMA_0001",
    }
    assert got[0] == wanted


def test_a_response_with_tags_number_options_and_a_letter_as_the_right_answer_are_understood():
    got, _ = scorers.convert_row(
        {"prediction": "<think>2?</think><answer>C</answer>", "answer": "C", "options": [1, 2, 3]}, 7, {}
    )
    assert (got["id"], got["options"]) == ("row7", ["1", "2", "3"])
    assert (got["answer"], got["prediction"], got["correct"]) == ("3", "3", True)
    got, _ = scorers.convert_row({"prediction": 3, "answer": 3}, 1, {})
    assert "options" not in got and got["prediction"] == "3" and got["correct"]


@pytest.mark.parametrize(
    "options",
    [
        {"C": "PET", "B": "MRI", "A": "CT"},
        {"b": "MRI", "a": "CT", "c": "PET", "d": None, "e": ""},
        ["CT", "MRI", "PET", None],
        {"first": "CT", "second": "MRI", "third": "PET"},
    ],
)
def test_a_letter_names_the_same_option_in_every_form_of_the_options(options):
    row = {"prediction": ["B"], "answer": ["MRI"], "question": ["Which?"], "options": options}
    got, sure = scorers.convert_row(row, 1, {})
    assert (got["options"], sure, got["question"]) == (["CT", "MRI", "PET"], True, "Which?")
    assert (got["prediction"], got["response"], got["correct"]) == ("MRI", "B", True)


@pytest.mark.parametrize("empty", [None, "", []])
def test_a_prediction_that_is_empty_is_wrong_and_not_refused(empty):
    got, _ = scorers.convert_row({"prediction": empty, "answer": "CT", "options": ["CT", "MRI"]}, 1, {})
    assert (got["prediction"], got["correct"]) == (None, False)


@pytest.mark.parametrize(
    "line, words",
    [
        (
            {"prediction": "B", "answer": "C", "options": {"A": "CT", "B": None, "C": "MRI"}},
            "row 2: option B is",
        ),
        (
            {"prediction": "B", "answer": "B", "options": "A) CT, B) MRI"},
            "row 2: `options` is neither a list",
        ),
        ({"prediction": ["CT", "MRI"], "answer": "CT"}, "row 2: `prediction` holds 2 texts"),
        ({"prediction": "CT", "answer": ""}, "row 2: the right answer is empty"),
        # null is absent.
        ({"prediction": "CT", "answer": None}, "row 2: no field `answer`"),
        ({"answer": "CT"}, "row 2: no field `prediction`"),
        (
            {"prediction": "CT", "answer": "PET", "options": ["CT", "MRI"]},
            "row 2: the right answer `PET` is not one of the options .CT, MRI.",
        ),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused_by_its_number(tmp_path, line, words):
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in ({"prediction": "CT", "answer": "CT"}, line))
    )
    with pytest.raises(RecordError, match=words):
        scorers.read_predictions(tmp_path / "p.jsonl", {})


# The shapes of well-known harnesses: a right answer B of MRI and CT, of which the model says CT.
HARNESSES = {
    "MedGR-Square": {
        "question_id": "Q_1",
        "model_answer": "CT",
        "gt_answer": "CT",
        "option_A": "MRI",
        "option_B": "CT",
    },
    "LLaVA-Med": {"question_id": 0, "answer_pred": "CT", "answer_gt": "B", "options": ["MRI", "CT"]},
    "lmms-eval": {
        "doc_id": 0,
        "doc": {"question": "Which?", "options": "['MRI', 'CT']", "answer": "B", "note": None},
        "target": "B",
        "resps": [["It is CT"]],
        "filtered_resps": ["CT"],
    },
    "VLMEvalKit": {
        "index": 1,
        "question": "Which?",
        "A": "MRI",
        "B": "CT",
        "C": None,
        "answer": "B",
        "prediction": "CT",
    },
}


@pytest.mark.parametrize("name", HARNESSES)
def test_the_fields_of_well_known_harnesses_need_no_names(tmp_path, name):
    (tmp_path / "p.jsonl").write_text(json.dumps([HARNESSES[name]], indent=1))
    [got], _, _ = scorers.read_predictions(str(tmp_path / "p.jsonl"), {})
    assert (got["prediction"], got["answer"], got["options"]) == ("CT", "CT", ["MRI", "CT"])
    assert got["correct"] and got["id"] in ("Q_1", "0", "1")


def test_the_table_of_vlmevalkit_is_read(tmp_path):
    text = "index\tquestion\tA\tB\tC\tanswer\tprediction\n1\tWhich?\tMRI\tCT\t\tB\tB. CT\n"
    (tmp_path / "p.tsv").write_text(text)
    [got], _, _ = scorers.read_predictions(str(tmp_path / "p.tsv"), {})
    assert (got["prediction"], got["answer"], got["options"]) == ("CT", "CT", ["MRI", "CT"])


# Predictions without the truth ----------------------------------------------------------------------------


def put(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


SAID = [{"question_id": n, "question": f"Is it {n}? Answer shortly.", "text": t} for n, t in enumerate("xyz")]
TRUE = [{"id": n, "question": f"Is it {n}?", "answer": t, "prediction": "no"} for n, t in enumerate("xyw")]


def test_answers_are_joined_by_id_in_any_order_and_else_by_order(tmp_path):
    said = put(tmp_path / "p.jsonl", SAID)
    shuffled = put(tmp_path / "a.json", TRUE[::-1])
    rows, _, lines = scorers.read_predictions(said, {}, shuffled)
    assert [(r["id"], r["prediction"], r["answer"], r["correct"]) for r in rows] == [
        ("0", "x", "x", True),
        ("1", "y", "y", True),
        ("2", "z", "w", False),
    ]
    assert rows[0]["question"] == "Is it 0?" and "joined by id" in lines[0]
    renamed = put(tmp_path / "b.json", [row | {"id": f"q{row['id']}"} for row in TRUE])
    rows, _, lines = scorers.read_predictions(said, {}, renamed)
    assert [r["correct"] for r in rows] == [True, True, False] and "joined by order" in lines[0]


def test_a_field_of_the_answers_does_not_replace_a_prediction_of_the_same_name(tmp_path):
    # `answer` is what the model said in one file and what is right in the other.
    said = put(tmp_path / "p.json", [{"id": "1", "answer": "MRI", "response": "PET"}])
    true = put(tmp_path / "a.json", [{"id": "1", "gt": "CT", "answer": "no", "response": "CT", "task": "t"}])
    [got], _, _ = scorers.read_predictions(said, {"prediction": "answer", "answer": "gt"}, true)
    assert (got["prediction"], got["response"], got["answer"], got["task"]) == ("MRI", "MRI", "CT", "t")


@pytest.mark.parametrize(
    "true, words",
    [
        (TRUE[:2], "3 predictions and 2 right answers"),
        ([row | {"question": f"Was it {row['id']}?"} for row in TRUE], "row 1, joined by id: the questions"),
        (
            [{"question": r["question"], "answer": "x"} for r in TRUE[::-1]],
            "row 1, joined by order: the questions",
        ),
        ([{"id": r["id"]} for r in TRUE], "row 1: no field `answer`"),
    ],
)
def test_answers_that_do_not_fit_the_predictions_are_refused(tmp_path, true, words):
    with pytest.raises(RecordError, match=words):
        scorers.read_predictions(put(tmp_path / "p.json", SAID), {}, put(tmp_path / "a.json", true))


def test_a_bad_row_is_left_out_aloud_if_it_may_be(tmp_path):
    rows = [{"prediction": "CT", "answer": a, "options": ["CT", "MRI"]} for a in ("CT", "PET", "MRI")]
    kept, _, lines = scorers.read_predictions(put(tmp_path / "p.json", rows), {}, stop=False)
    assert [r["answer"] for r in kept] == ["CT", "MRI"] and "row 2: the right answer `PET`" in lines[0]


@pytest.mark.skipif(not AUTHORS.exists(), reason=f"no {AUTHORS}")
def test_real_predictions_with_and_without_the_truth_are_read(tmp_path):
    folder = SHARED / "data" / "formats"
    rows, _, _ = scorers.read_predictions(str(folder / "predictions_with_truth.jsonl"), {})
    raw = json.loads((folder / "predictions_with_truth.jsonl").read_text())
    same = [r["answer_pred"].strip().lower() == r["answer_gt"].strip().lower() for r in raw]
    assert len(rows) == len(raw) == 200 and abs(sum(r["correct"] for r in rows) - sum(same)) <= 3
    said = str(folder / "predictions_without_truth.jsonl")
    with pytest.raises(RecordError, match="row 1: no field `answer` among .*--answers"):
        scorers.read_predictions(said, {})
    raw = json.loads((folder / "predictions_without_truth.jsonl").read_text())
    true = [{"question_id": r["question_id"], "question": r["question"], "answer": "yes"} for r in raw]
    assert len(scorers.read_predictions(said, {}, put(tmp_path / "a.json", true))[0]) == 200
