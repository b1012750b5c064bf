"""prompts.py: every parser accepts what its prompt asks for, and never guesses."""

import copy
import json
import time

import pytest
from helpers import DATA, OPTIONS, few, needs_data, question
from hypothesis import given
from hypothesis import strategies as st

from medgr2.prompts import (
    PARADIGMS,
    format_candidate,
    format_response,
    generator_prompt,
    is_match,
    match_option,
    normalise,
    parse_candidate,
    parse_response,
    policy_prompt,
    reference_response,
)

plain = st.text(st.characters(exclude_characters="<>|", exclude_categories=["Cs"]), max_size=40)
filled = plain.filter(normalise)
one_line = filled.map(lambda text: " ".join(text.split())).filter(normalise)
some_options = st.lists(one_line, min_size=2, max_size=6, unique_by=normalise)


@few
@given(plain, filled)
def test_an_open_response_is_parsed_as_it_was_formatted(rationale, answer):
    parsed = parse_response(format_response(rationale, answer))
    assert parsed == (answer.strip(), None, rationale.strip() if rationale else None, True)


@few
@given(plain, some_options, st.data())
def test_each_option_is_parsed_as_it_was_formatted(rationale, options, data):
    answer = data.draw(st.sampled_from(options))
    parsed = parse_response(format_response(rationale, answer), options)
    assert parsed == (answer, None, rationale.strip() if rationale else None, True)


@pytest.mark.parametrize("rationale", [None, ""])
def test_a_response_without_a_rationale_is_the_bare_answer_and_well_formed(rationale):
    assert format_response(rationale, "CT") == "<answer>CT</answer>"
    assert parse_response("<answer>CT</answer>", OPTIONS) == ("CT", None, None, True)
    assert parse_response(" <answer>CT</answer>\n") == ("CT", None, None, True)


def test_an_empty_think_part_is_well_formed_and_its_rationale_is_empty():
    assert parse_response("<think> </think><answer>CT</answer>", OPTIONS) == ("CT", None, "", True)


@pytest.mark.parametrize("rationale", [{}, {"rationale": ""}])
def test_a_candidate_always_has_a_think_part(rationale):
    record = {"question": "Zq?", "options": ["CT", "MRI"], "answer": "CT"} | rationale
    text = format_candidate(record)
    assert text.endswith("<think></think><answer>CT</answer>")
    assert parse_candidate(text) == (record | {"rationale": ""}, None)
    assert parse_candidate(text.replace("<think></think>", "")) == (None, "malformed")


@few
@given(one_line.map("Zq {}".format), plain, some_options, st.data())
def test_a_candidate_is_parsed_as_it_was_formatted(question, rationale, options, data):
    record = {
        "question": question,
        "options": options,
        "rationale": rationale,
        "answer": data.draw(st.sampled_from(options)),
    }
    expected = record | {"rationale": rationale.strip()}
    if normalise(rationale) != "reasoning":
        assert parse_candidate(format_candidate(record)) == (expected, None)
    del record["options"], expected["options"]
    assert parse_candidate(format_candidate(record)) == (expected, None)


def test_each_parser_accepts_the_reply_that_its_prompt_shows():
    shown = policy_prompt(question()).splitlines()[-1].removeprefix("Reply as ")
    assert parse_response(shown) == ("answer", None, "reasoning", True)
    assert "Options: A) X-ray B) MRI C) CT" in policy_prompt(question())
    for paradigm in PARADIGMS:
        shown = generator_prompt(paradigm, "Lesion Grading").splitlines()[-1].removeprefix("Reply as ")
        filled_in = shown.replace("option | option | option", "a mole | a scar").replace(
            "the right option", "a scar"
        )
        filled_in = filled_in.replace(">question<", ">What is shown?<").replace(">reasoning<", ">Pale.<")
        assert parse_candidate(filled_in)[0] == {
            "question": "What is shown?",
            "options": ["a mole", "a scar"],
            "rationale": "Pale.",
            "answer": "a scar",
        }


@pytest.mark.parametrize(
    "answer",
    [
        "CT",
        "ct",
        " CT. ",
        "C",
        "c",
        "(C)",
        "C)",
        "C.",
        "C:",
        "C) CT",
        "(c) ct.",
        "C. CT",
        "**CT**",
        '"CT"',
        "C) **CT**",
        "ＣＴ",
    ],
)
def test_the_answer_may_be_the_text_the_letter_or_both(answer):
    assert parse_response(f"<think>t</think> <answer>{answer}</answer>", OPTIONS) == ("CT", None, "t", True)


@pytest.mark.parametrize(
    "answer", ["A) CT", "(C) MRI", "D", "D) CT", "CT or MRI", "PET", "CT scan", "C CT", "é"]
)
def test_a_contradiction_or_a_text_that_is_no_option_is_no_answer(answer):
    parsed = parse_response(f"<think>t</think><answer>{answer}</answer>", OPTIONS)
    assert parsed == (None, "answer not among the options", "t", False)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no answer"),
        ("CT", "no answer"),
        ("<answer>CT", "no answer"),
        ("<think>CT</think>", "no answer"),
        ("<answer>CT</answer><answer>MRI</answer>", "several answers"),
        ("<answer>CT</answer><answer>CT</answer>", "several answers"),
        ("<answer>CT<answer>MRI</answer>", "several answers"),
        ("<answer> </answer>", "empty answer"),
        ("<answer>...</answer>", "empty answer"),
    ],
)
def test_a_response_without_a_prediction_has_a_reason(text, reason):
    for options in (OPTIONS, None):
        assert parse_response(text, options)[:2] == (None, reason)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! <answer>CT</answer>",
        "<answer>CT</answer> Bye",
        "<think>t<answer>CT</answer>",
        "t</think><answer>CT</answer>",
        "<think>s</think><think>t</think><answer>CT</answer>",
        "Sure! <think>t</think><answer>CT</answer>",
        "<think>t</think><answer>CT</answer> Bye",
        "<think>a<think>b</think><answer>CT</answer>",
        "<think>a</think>b</think><answer>CT</answer>",
        "<think>t</think>so<answer>CT</answer>",
        "<think><question></think><answer>CT</answer>",
        "<answer>CT</answer><think>t</think>",
    ],
)
def test_an_answer_in_another_form_counts_but_is_not_well_formed(text):
    parsed = parse_response(text, OPTIONS)
    assert parsed.prediction == "CT" and not parsed.well_formed and parsed.rationale is None


SCAN = ["肺炎", "正常", "胸腔积液"]


@pytest.mark.parametrize(
    "answer",
    [
        "[B]",
        "`B`",
        "“B”",
        "{B}",
        "B\u200b",
        r"\boxed{B}",
        r"$\boxed{\text{B}}$",
        r"\(B\)",
        "B - Normal",
        "B\nNormal",
        "**B** Normal",
        "Normal (B)",
        "Normal [b].",
        "B (Normal)",
        "Option B",
        "Answer: B",
        "**Answer:** B",
        "The answer is B.",
        "Therefore, the correct answer is option (B).",
        "The answer is normal",
        "B is correct.",
        "B is the right answer",
        "Die richtige Antwort ist B",
        "La bonne réponse est la B.",
        "La respuesta correcta es la B",
        "Resposta: B",
        "Risposta: B",
        "Правильный ответ: B",
        "Cevap: B",
        "Ⓑ",
        "𝐁",
    ],
)
def test_an_answer_as_models_write_it_is_read(answer):
    cases = (["Pneumonia", "Normal", "Effusion"], "Normal"), (["e. coli", "NORMAL"], "NORMAL")
    for options, normal in cases:
        assert match_option(answer, options) == (normal, None)


@pytest.mark.parametrize(
    "answer",
    [
        "Ｂ",
        "（B）",
        "(B)正常",
        "B：正常",
        "B、正常",
        "B．正常",
        "B正常",
        "正常（B）",
        "正常。",
        "「正常」",
        "【B】正常",
        "答案：B",
        "答案是B。",
        "正确答案为（B）",
        "所以，答案是正常。",
        "选B",
        "选项B",
        "B项",
        "B是正确的",
        "正解はBです。",
        "答えは正常です",
        "정답은 B입니다.",
        "정답: B",
    ],
)
def test_an_answer_in_a_script_of_full_width_or_without_spaces_is_read(answer):
    assert match_option(answer, SCAN) == ("正常", None)


@pytest.mark.parametrize(
    "answer, options",
    [
        ("not B", OPTIONS),
        ("The answer is not B", OPTIONS),
        ("B is not correct", OPTIONS),
        ("B or C", OPTIONS),
        ("A, B", OPTIONS),
        ("Answer: A, B", OPTIONS),
        ("A and B", OPTIONS),
        ("B/C", OPTIONS),
        ("The answer is a", OPTIONS),
        ("The answer is", OPTIONS),
        ("MRI (A)", OPTIONS),
        ("B (CT)", OPTIONS),
        # A word of the text is no word that announces it.
        ("right lung", ["left lung", "lung"]),
        ("the best lung", ["left lung", "lung"]),
        # Blood groups, a staging, a number.
        ("B negative", ["A positive", "negative"]),
        ("A+", ["B", "A"]),
        ("A-", ["B", "A"]),
        ("The answer is -5", ["5", "7"]),
        ("不是B", SCAN),
        ("不选B", SCAN),
        ("B不正确", SCAN),
        ("B超", SCAN),
        ("A或B", SCAN),
        ("B：肺炎", SCAN),
        ("不正常", SCAN),
        # The third letter of another alphabet.
        ("Ответ: В", OPTIONS),
    ],
)
def test_an_answer_that_names_no_option_or_several_is_not_guessed(answer, options):
    assert match_option(answer, options) == (None, "answer not among the options")


@pytest.mark.parametrize("part", [" ", "\n", "the ", "answer ", "答案", "项", "(", "\\boxed{", "is ", "a"])
def test_a_long_answer_takes_no_long_time(part):
    for length in (200, 200_000):
        text, started = (part * length)[:length], time.perf_counter()
        assert match_option(text + "x", OPTIONS)[0] is None and match_option("x" + text, OPTIONS)[0] is None
        assert time.perf_counter() - started < 2


def test_the_whole_text_counts_before_what_is_left_of_it():
    assert match_option("The answer is right.", ["left", "right"]) == ("right", None)
    assert match_option("Option B", ["Option B", "Option A"]) == ("Option B", None)
    assert match_option("E. coli (B)", ["S. aureus", "E. coli"]) == ("E. coli", None)


def test_an_option_that_contains_another_is_not_confused_with_it():
    options = ["CT", "CT angiography", "No CT"]
    for option in options:
        assert match_option(option.upper() + ".", options) == (option, None)
    assert match_option("a CT", options)[0] is None


def test_an_option_that_is_a_letter_is_matched_as_text_before_it_is_matched_as_a_letter():
    options = ["B", "A", "E"]
    assert match_option("A", options) == ("A", None)
    # There is no fifth option, but an option with this text.
    assert match_option("E", options) == ("E", None)
    # There is no option with this text, so it is the letter.
    assert match_option("C", options) == ("E", None)
    assert match_option("A) B", options) == ("B", None)
    assert match_option("A) A", options)[0] is None


def test_two_options_of_one_text_are_not_guessed_between():
    assert match_option("ct", ["CT", "CT.", "MRI"]) == (None, "several options match")


def test_is_match_ignores_case_and_punctuation_and_none_matches_nothing():
    assert is_match("  microscopy. ", "Microscopy")
    assert not is_match("CT", "MRI")
    assert not is_match(None, "None")


def reply(
    question="What is shown?", options="a mole | a scar", rest="<think>Pale.</think><answer>a scar</answer>"
):
    return f"<question>{question}</question><options>{options}</options>{rest}"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Here you are.", "malformed"),
        (reply(rest=""), "malformed"),
        (reply(rest="<answer>a scar</answer>"), "malformed"),
        (reply(rest="<think>a</think><answer>a mole</answer><answer>a scar</answer>"), "malformed"),
        (reply(rest="<think>a</think><answer>a scar</answer> Good luck!"), "malformed"),
        (reply() + reply(), "malformed"),
        (reply("<question>What is shown?"), "malformed"),
        (reply("What</question> is shown?"), "malformed"),
        (reply("What? <options>a | b</options>"), "malformed"),
        (reply(options="a | b</options><options>c"), "malformed"),
        (reply(" ?"), "empty question"),
        (reply(options=""), "too few or empty options"),
        (reply(options="a scar"), "too few or empty options"),
        (reply(options="a scar | "), "too few or empty options"),
        (reply(options="a scar | A scar."), "too few or empty options"),
        (reply(rest="<think>a</think><answer>a wart</answer>"), "answer not among the options"),
        (reply(rest="<think>a</think><answer>B) a mole</answer>"), "answer not among the options"),
        (reply(rest="<think>a</think><answer> </answer>"), "empty answer"),
        (reply("Write one exam question about this image."), "prompt echo"),
        (reply("Say what is uncertain, check it against the image"), "prompt echo"),
        (reply(rest="<think>Reasoning.</think><answer>a scar</answer>"), "prompt echo"),
    ],
)
def test_a_bad_candidate_is_rejected_with_its_reason(text, reason):
    assert parse_candidate(text) == (None, reason)
    # Without the change the same reply is accepted.
    assert parse_candidate(reply())[0]["answer"] == "a scar"


@pytest.mark.parametrize("answer, right", [("a scar", "a scar"), ("A mole", "a mole"), ("C", "a wart")])
def test_a_repeated_option_of_a_candidate_is_listed_once_but_counts_in_what_a_letter_names(answer, right):
    text = reply(
        options="a mole | A mole. | a wart | a scar", rest=f"<think>Pale.</think><answer>{answer}</answer>"
    )
    candidate, reason = parse_candidate(text)
    assert reason is None
    assert candidate["options"] == ["a mole", "a wart", "a scar"] and candidate["answer"] == right


def test_a_report_is_its_own_response():
    assert reference_response({"report": "No mass."}) == "No mass."
    assert reference_response(question()) == "<think>Bone is bright.</think><answer>CT</answer>"


def test_no_function_changes_its_arguments():
    record, report = question(), {"id": "r", "image": "/data/a.png", "report": "No mass."}
    before = copy.deepcopy((record, report))
    policy_prompt(record)
    format_candidate(record)
    reference_response(record)
    reference_response(report)
    match_option("C", record["options"])
    parse_response("<answer>C</answer>", record["options"])
    assert (record, report) == before


@needs_data
def test_the_papers_own_predictions_match_as_often_as_the_paper_says():
    """The headline 87.45 is 6,865 of 7,850 (the authors left out one row): is_match counts as they did."""
    path = DATA / "medgr_square" / "checkpoint_30.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = sum(is_match(line["model_answer"], line["gt_answer"]) for line in lines)
    assert (len(lines), right) == (7851, 6865)


@pytest.mark.parametrize(
    "one, other",
    [
        (".5 cm", "5 cm"),
        ("(.5 cm)", "5 cm"),
        (",5 cm", "5 cm"),
        ("10⁵/µL", "105/µL"),
        ("10⁻³", "10-3"),
        ("2²", "22"),
        ("2ⁿ", "2n"),
        ("log₂8", "log28"),
        ("1½", "11/2"),
        ("5①", "51"),
    ],
)
def test_normalising_makes_no_two_numbers_the_same(one, other):
    assert not is_match(one, other) and normalise(normalise(one)) == normalise(one)
    assert match_option(one, [other, one]) == (one, None)


@pytest.mark.parametrize(
    "one, other",
    [
        ("5 cm.", "5 cm"),
        ("（５）", "5"),
        ("10⁵", "10^5"),
        ("1½", "1 1/2"),
        ("cm²", "CM2"),
        ("T₂", "T2"),
        ("¹⁸F", "18F"),
    ],
)
def test_another_spelling_of_a_number_or_unit_is_still_the_same(one, other):
    assert is_match(one, other)
