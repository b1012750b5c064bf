"""records.py: the contract between prompt and parser, the file of records, images, public formats, the commands."""

import copy
import json
import pathlib
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgr2 import formats, records
from medgr2.errors import RecordError
from medgr2.images import hash_image, open_image
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

ROOT = pathlib.Path(__file__).resolve().parent.parent

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} is missing")
OPTIONS = ["X-ray", "MRI", "CT"]
few = settings(max_examples=100, deadline=None)


def put_image(path, colour=(10, 20, 30), size=(4, 3), **options):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return str(path)


def put_json(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return str(path)


def question(image="/data/a.png", **fields):
    return {
        "id": "q1",
        "image": image,
        "question": "Which modality?",
        "options": list(OPTIONS),
        "answer": "CT",
        "rationale": "Bone is bright.",
        "source": "expert",
    } | fields


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "medgr2.records", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# The contract of an answer -------------------------------------------------------------------------------

plain = st.text(st.characters(exclude_characters="<>|", exclude_categories=["Cs"]), max_size=40)
filled = plain.filter(normalise)
one_line = filled.map(lambda text: " ".join(text.split())).filter(normalise)
some_options = st.lists(one_line, min_size=2, max_size=6, unique_by=normalise)


@few
@given(plain, filled)
def test_an_open_response_is_read_as_it_was_formatted(rationale, answer):
    parsed = parse_response(format_response(rationale, answer))
    assert parsed == (answer.strip(), None, rationale.strip(), True)


@few
@given(plain, some_options, st.data())
def test_each_option_is_read_as_it_was_formatted(rationale, options, data):
    answer = data.draw(st.sampled_from(options))
    parsed = parse_response(format_response(rationale, answer), options)
    assert parsed == (answer, None, rationale.strip(), True)


@few
@given(one_line.map("Zq {}".format), plain, some_options, st.data())
def test_a_candidate_is_read_as_it_was_formatted(question, rationale, options, data):
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


def test_the_reply_that_the_prompts_show_has_the_form_that_the_parser_reads():
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
def test_the_answer_may_be_text_or_letter_or_both(answer):
    assert parse_response(f"<think>t</think> <answer>{answer}</answer>", OPTIONS) == ("CT", None, "t", True)


@pytest.mark.parametrize(
    "answer", ["A) CT", "(C) MRI", "D", "D) CT", "CT or MRI", "PET", "CT scan", "C CT", "é"]
)
def test_a_contradiction_or_another_text_is_no_answer(answer):
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
def test_what_cannot_be_read_has_a_reason(text, reason):
    for options in (OPTIONS, None):
        assert parse_response(text, options)[:2] == (None, reason)


@pytest.mark.parametrize(
    "text",
    [
        "<answer>CT</answer>",
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


def test_an_option_that_contains_another_is_told_from_it():
    options = ["CT", "CT angiography", "No CT"]
    for option in options:
        assert match_option(option.upper() + ".", options) == (option, None)
    assert match_option("a CT", options)[0] is None


def test_options_that_are_letters_are_taken_as_texts_first():
    options = ["B", "A", "E"]
    assert match_option("A", options) == ("A", None)
    # no fifth option, but a text
    assert match_option("E", options) == ("E", None)
    # no text C: the letter
    assert match_option("C", options) == ("E", None)
    assert match_option("A) B", options) == ("B", None)
    assert match_option("A) A", options)[0] is None


def test_options_that_look_alike_are_never_guessed_between():
    assert match_option("ct", ["CT", "CT.", "MRI"]) == (None, "several options match")


def test_is_match_ignores_case_and_punctuation_but_none_matches_nothing():
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
        (reply(options="a scar | A scar."), "repeated options"),
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
    # and only for what was changed
    assert parse_candidate(reply())[0]["answer"] == "a scar"


def test_a_report_is_its_own_response():
    assert reference_response({"report": "No mass."}) == "No mass."
    assert reference_response(question()) == "<think>Bone is bright.</think><answer>CT</answer>"


# The file of records -------------------------------------------------------------------------------------


def broken(tmp_path, line):
    """The message of the error that `line`, third of a file (the second is blank), gives: it names file and line."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"id": "first"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    )
    with pytest.raises(RecordError) as error:
        list(records.read_records(path))
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "line, what",
    [
        (b'{"id": "\xff"}', "not UTF-8"),
        ('{"id": ', "not JSON"),
        ("[1]", "not an object"),
        ("7", "not an object"),
        ('{"id": "a", "x": NaN}', "NaN"),
        ('{"id": "a", "x": -Infinity}', "-Infinity"),
        ("[" * 100_000, "not JSON"),
        ('{"id": "first"}', "already on line 1"),
        ("{}", "no field `id`"),
        ('{"id": " "}', "`id` is empty"),
        ('{"id": 7}', "`id` is not of type str"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path, line, what):
    assert what in broken(tmp_path, line)


@pytest.mark.parametrize(
    "change, what",
    [
        ({"answer": "ct"}, "not one of `options`"),
        ({"options": ["CT"]}, "not 2 to 26"),
        ({"options": [f"{n} mm" for n in range(27)], "answer": "3 mm"}, "not 2 to 26"),
        ({"options": ["CT", "ct."]}, "two options are the same"),
        ({"options": ["CT", " ? "]}, "an option is empty"),
        ({"options": ["CT", 4]}, "an option is empty or not a string"),
        ({"options": "CT"}, "`options` is not of type"),
        ({"question": ""}, "`question` is empty"),
        ({"answer": None}, "`answer` is not of type"),
        ({"report": ["a"]}, "`report` is not of type"),
        ({"cycle": True}, "`cycle` is not of type"),
        ({"source": "web"}, "`source`"),
        ({"reward": {"relevant": 0.5}}, "`reward`"),
        ({"reward": {"overall": 10.5}}, "`reward`"),
        ({"reward": {"overall": 5, "relevant": "high"}}, "`reward`"),
        ({"rationale": "so <answer>CT</answer>"}, "a tag"),
    ],
)
def test_an_invalid_record_is_refused_and_its_valid_sister_is_not(tmp_path, change, what):
    assert what in broken(tmp_path, json.dumps(question(**change)))
    good = question(
        cycle=1, parent="p", paradigm="direct", reward={"overall": -6, "relevant": 0.5}, extra=[1, None]
    )
    records.validate(good, records.QUESTION)


def test_required_fields_are_demanded(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": "a", "image": "a.png"}')
    assert len(list(records.read_records(tmp_path / "r.jsonl", ("image",)))) == 1
    with pytest.raises(RecordError, match="r.jsonl:1: no field `question`"):
        list(records.read_records(tmp_path / "r.jsonl", records.QUESTION))


def test_a_missing_an_empty_file_and_a_folder_are_record_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for name, what in (("none.jsonl", "No such file"), ("empty.jsonl", "no records"), (".", "directory")):
        with pytest.raises(RecordError, match=what) as error:
            list(records.read_records(tmp_path / name))
        assert str(error.value).startswith(str(tmp_path))


def test_reading_is_streamed(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": "a"}\nbroken')
    stream = records.read_records(tmp_path / "r.jsonl")
    # before the broken line is met
    assert next(stream) == {"id": "a"}
    with pytest.raises(RecordError, match="r.jsonl:2: not JSON"):
        next(stream)


def test_images_are_absolute_in_memory_and_relative_on_disk(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "r.jsonl").write_text(
        json.dumps(question(image="img/a b.png", weird={"ü": [1]})) + "\n"
    )
    monkeypatch.chdir(tmp_path / "in")
    held = list(records.read_records("r.jsonl"))
    assert held[0]["image"] == str(tmp_path / "in" / "img" / "a b.png")
    before = copy.deepcopy(held)
    assert records.write_records(str(tmp_path / "new" / "out" / "r.jsonl"), held) == 1
    assert held == before
    text = (tmp_path / "new" / "out" / "r.jsonl").read_bytes()
    assert (
        json.loads(text)["image"] == "../../in/img/a b.png" and "ü".encode() in text and text.endswith(b"}\n")
    )
    # the unknown field too
    assert list(records.read_records(tmp_path / "new" / "out" / "r.jsonl", root=tmp_path)) == before
    assert records.with_relative_image(held[0], tmp_path / "in")["image"] == "img/a b.png" and held == before
    assert records.with_relative_image({"id": "a"}, tmp_path) == {"id": "a"}
    with pytest.raises(RecordError, match="relative path"):
        records.with_relative_image({"id": "a", "image": "a.png"}, tmp_path)


@pytest.mark.parametrize(
    "fault",
    [
        KeyboardInterrupt(),
        ValueError("own"),
        {"id": "b", "score": float("nan")},
        {"id": "b", "image": "relative.png"},
        {"id": "\ud800"},
    ],
)
def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path, fault):
    def midway():
        yield {"id": "a"}
        if isinstance(fault, BaseException):
            raise fault
        yield fault

    (tmp_path / "r.jsonl").write_text("old")
    with pytest.raises((KeyboardInterrupt, ValueError)) as error:
        records.write_records(tmp_path / "r.jsonl", midway())
    assert not isinstance(fault, BaseException) or error.value is fault
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"] and (
        tmp_path / "r.jsonl"
    ).read_text() == "old"


def test_a_file_can_be_rewritten_from_itself_and_bad_places_are_record_errors(tmp_path):
    path = tmp_path / "r.jsonl"
    records.write_records(path, [{"id": "a"}, {"id": "b"}])
    with open(path) as opened_before:
        assert (
            records.write_records(path, (record | {"cycle": 1} for record in records.read_records(path))) == 2
        )
        # replaced as a whole, never overwritten in place
        assert "cycle" not in opened_before.read()
    assert [record["cycle"] for record in records.read_records(path)] == [1, 1]
    for place in (tmp_path, path / "below.jsonl"):
        with pytest.raises(RecordError, match=str(place)):
            records.write_records(place, [])
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


# Images --------------------------------------------------------------------------------------------------


def pixels(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def grey(*rows):
    return [[(value,) * 3 for value in row] for row in rows]


def test_sixteen_bit_images_are_scaled_by_their_range_not_clipped(tmp_path):
    import numpy
    from PIL import Image

    for values, name in (
        (numpy.array([[1000, 1255], [1510, 2020]], "uint16"), "u16.png"),
        (numpy.array([[-1000, -500], [0, 1000]], "int32"), "i32.tif"),
        (numpy.array([[0, 0.25], [0.5, 1]], "float32"), "f32.tif"),
    ):
        Image.fromarray(values).save(tmp_path / name)
        assert pixels(tmp_path / name) == grey((0, 64), (128, 255)), name
    Image.fromarray(numpy.full((1, 2), 700, "uint16")).save(tmp_path / "flat.png")
    with warnings.catch_warnings():
        # a division by the range of nothing
        warnings.simplefilter("error")
        assert pixels(tmp_path / "flat.png") == grey((0, 0))


def test_cmyk_grey_and_bilevel_become_rgb(tmp_path):
    from PIL import Image

    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red, green, blue = pixels(tmp_path / "red.jpg")[4][4]
    assert red > 240 and green < 15 and blue < 15
    Image.new("L", (1, 1), 77).save(tmp_path / "l.png")
    Image.new("1", (1, 1), 1).save(tmp_path / "1.png")
    assert pixels(tmp_path / "l.png") == grey((77,)) and pixels(tmp_path / "1.png") == grey((255,))


def test_transparent_parts_show_white_whatever_colour_hides_below(tmp_path):
    from PIL import Image

    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixels(tmp_path / "p.png") == [[(255, 255, 255), (0, 0, 200)]]
    Image.new("RGBA", (1, 1), (100, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (1, 1), (100, 255)).save(tmp_path / "la.png")
    assert pixels(tmp_path / "rgba.png") == grey((255,)) and pixels(tmp_path / "la.png") == grey((100,))


def test_an_image_is_turned_upright_by_its_exif_tag(tmp_path):
    from PIL import Image

    image = Image.new("L", (3, 2))
    image.putdata([1, 2, 3, 4, 5, 6])
    exif = Image.Exif()
    # to be shown turned by 90 degrees clockwise
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert pixels(tmp_path / "turned.png") == grey((4, 1), (5, 2), (6, 3))


def test_an_animation_gives_its_first_frame(tmp_path):
    from PIL import Image

    Image.new("L", (1, 1), 10).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (1, 1), 200)]
    )
    assert pixels(tmp_path / "a.gif") == grey((10,))


def test_what_is_no_image_is_a_record_error_that_names_the_path(tmp_path):
    import numpy
    from PIL import Image

    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8")
    for name in ("cut.png", "cut.jpg", "cut.bmp"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
    (tmp_path / "text.png").write_text("a chest X-ray, honestly")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "zero.gif").write_bytes(b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x00;")
    (tmp_path / "zero.ppm").write_bytes(b"P6 0 0 255\n")
    names = [
        "cut.png",
        "cut.jpg",
        "cut.bmp",
        "text.png",
        "empty.png",
        "zero.gif",
        "zero.ppm",
        "missing.png",
        ".",
    ]
    for name in names:
        with pytest.raises(RecordError) as error:
            open_image(tmp_path / name)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name}: ") and "\n" not in message
        assert ("no such image" if name == "missing.png" else "not a readable image") in message, message
    with pytest.raises(RecordError, match="missing.png"):
        hash_image(tmp_path / "missing.png")


def test_image_hash_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_image(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Split ---------------------------------------------------------------------------------------------------


def many(tmp_path, count=20):
    """`count` images, each under two names with equal bytes, and two questions to each name."""
    made = []
    for n in range(count):
        for name in ("a", "b"):
            image = put_image(tmp_path / name / f"{n}.png", colour=(n, 0, 0))
            made += [question(image=image, id=f"{name}{n}{q}") for q in "xy"]
    return made


def test_split_never_puts_equal_bytes_into_two_parts(tmp_path):
    made = many(tmp_path)
    before = copy.deepcopy(made)
    parts = records.split_records(made, (0.5, 0.3, 0.2), seed=1)
    assert made == before
    hashes = [{hash_image(record["image"]) for record in part} for part in parts.values()]
    assert [len(h) for h in hashes] == [10, 6, 4] and len(set().union(*hashes)) == 20
    assert [len(part) for part in parts.values()] == [40, 24, 16]
    assert list(parts) == ["train", "val", "test"]


def test_split_depends_on_the_seed_and_not_on_the_order(tmp_path):
    made = many(tmp_path)
    parts = records.split_records(made, (0.5, 0.25, 0.25), seed=1)
    turned = records.split_records(made[::-1], (0.5, 0.25, 0.25), seed=1)
    assert {name: part[::-1] for name, part in turned.items()} == parts
    assert records.split_records(made, (0.5, 0.25, 0.25), seed=2)["train"] != parts["train"]


def test_split_refuses_what_it_cannot_do(tmp_path):
    made = many(tmp_path, 3)
    assert records.split_records(made, (1, 0, 0), 0) == {"train": made, "val": [], "test": []}
    for fractions in ((0.5, 0.3, 0.3), (1.5, -0.5, 0), (float("nan"), 0, 1), (0.5, 0.5)):
        with pytest.raises(RecordError, match="sum to 1"):
            records.split_records(made, fractions, 0)
    with pytest.raises(RecordError, match="test: 0.1 of 3 images is none"):
        records.split_records(made, (0.8, 0.1, 0.1), 0)
    with pytest.raises(RecordError, match="--by question"):
        records.split_records(made, (0.8, 0.1, 0.1), 0, by="question")


# Public formats ------------------------------------------------------------------------------------------


def omni(**change):
    row = {
        "dataset": "Chest",
        "question_id": "Chest_0",
        "question_type": "Modality Recognition",
        "question": "Which?",
        "gt_answer": "CT.",
        "image_path": "Images/a.png",
        "option_A": "MRI",
        "option_B": "CT.",
        "modality_type": "CT(Computed Tomography)",
    } | change
    return {key: value for key, value in row.items() if value is not ...}


def test_omnimedvqa_odd_names_and_missing_options_are_normalised(tmp_path):
    put_image(tmp_path / "Images" / "a.png")
    names = {
        "MR (Mag-netic Resonance Imaging)": "MRI",
        "OCT (Optical Coherence Tomography": "OCT",
        "X-Ray": "X-Ray",
        "ultrasound": "Ultrasound",
        "CT(Computed Tomography)": "CT",
        "Microscopy Images": "Microscopy",
        "Fundus Photography": "Fundus Photography",
        "Dermoscopy": "Dermoscopy",
        "Endoscopy": "Endoscopy",
        "MR": "MRI",
    }
    rows = [omni(modality_type=name, question_id=f"Chest_{n}") for n, name in enumerate(names)]
    rows.append(
        omni(modality_type=..., modality="CT(Computed Tomography)", option_C="PET", option_D=float("nan"))
    )
    rows.append(omni(question_id="7", question_type="lesion grading ", gt_answer=" ct"))
    got, notes = formats.import_records(put_json(tmp_path / "x.json", rows))
    assert [record["modality"] for record in got] == [*names.values(), "CT", "CT"]
    assert notes == {"rows": 12, "skipped": {}, "unknown": {"modality Endoscopy": 1}}
    assert got[0] == {
        "id": "Chest_0",
        "image": str(tmp_path / "Images" / "a.png"),
        "question": "Which?",
        "options": ["MRI", "CT."],
        "answer": "CT.",
        "modality": "MRI",
        "task": "Modality Recognition",
        "source": "expert",
    }
    # an id that is repeated
    assert got[-2]["options"] == ["MRI", "CT.", "PET"] and got[-2]["id"] == "Chest_0-2"
    assert (got[-1]["id"], got[-1]["answer"], got[-1]["task"]) == ("Chest-7", "CT.", "Lesion Grading")


def test_rows_that_cannot_become_records_are_counted_by_reason(tmp_path):
    put_image(tmp_path / "Images" / "a.png")
    rows = [
        omni(),
        omni(gt_answer="PET"),
        omni(gt_answer=""),
        omni(gt_answer=None),
        omni(image_path=None),
        omni(image_path=""),
        omni(image_path="Images/b.png"),
        omni(question=" "),
        omni(option_B="ct", option_C="CT"),
        omni(option_A=..., gt_answer="CT."),
        omni(question="Is it <answer>?"),
        omni(gt_answer=...),
        ["no object"],
    ]
    got, notes = formats.import_records(put_json(tmp_path / "x.json", rows))
    assert len(got) == 1 and notes["rows"] == len(rows)
    reasons = {reason.split(":")[0]: count for reason, count in notes["skipped"].items()}
    assert reasons == {
        "answer not among the options": 1,
        "answer is empty": 2,
        "no image": 2,
        "image file not found": 1,
        "question is empty": 1,
        "several options match": 1,
        "`options` are not 2 to 26": 1,
        "a text holds a tag of the reply's form, like <answer>": 1,
        "row not of the format": 2,
    }
    records.write_records(tmp_path / "out.jsonl", got)
    assert len(list(records.read_records(tmp_path / "out.jsonl", records.QUESTION))) == 1


def test_a_folder_is_searched_for_json_files_and_images_names_their_root(tmp_path):
    put_image(tmp_path / "root" / "Images" / "a.png")
    for place in ("Open-access", "Restricted/deep"):
        (tmp_path / "QA" / place).mkdir(parents=True)
        put_json(tmp_path / "QA" / place / "x.json", [omni()])
    got, _ = formats.import_records(str(tmp_path / "QA"), images=str(tmp_path / "root"))
    assert [record["id"] for record in got] == ["Chest_0", "Chest_0-2"]
    with pytest.raises(RecordError, match=r"image file not found \(2\).*--images"):
        formats.import_records(str(tmp_path / "QA"))


def test_medr1_options_with_commas_and_or_are_split_at_their_letters(tmp_path):
    put_image(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "problem": problem, "solution": solution}
        for problem, solution in [
            (
                "What is it? A)No, it is enlarged, or absent., B)Yes or no, C)CT (plain), D)none",
                "<answer> A </answer>",
            ),
            ("Is (vitamin A) low? A)Yes, B)No", "<answer>b</answer>"),
            ("Which? A)Influenza (type A), B)Cold", "<answer>A</answer>"),
            ("Which?\nA) B\nB) A", "<answer> A </answer>"),
            ("How many?", "<answer> 3 </answer>"),
            ("Which? A)Yes, B)No", "<answer> C </answer>"),
            ("Which? A)Yes, B)No", "B"),
            ("Which? A. Yes B. No", "<answer> B </answer>"),
        ]
    ]
    got, notes = formats.import_records(put_json(tmp_path / "x.jsonl", rows, lines=True))
    assert [(record["question"], record.get("options"), record["answer"]) for record in got] == [
        (
            "What is it?",
            ["No, it is enlarged, or absent.", "Yes or no", "CT (plain)", "none"],
            "No, it is enlarged, or absent.",
        ),
        ("Is (vitamin A) low?", ["Yes", "No"], "No"),
        ("Which?", ["Influenza (type A)", "Cold"], "Influenza (type A)"),
        ("Which?", ["B", "A"], "B"),
        ("How many?", None, "3"),
    ]
    assert notes["skipped"] == {
        "answer not among the options": 1,
        "answer is empty": 1,
        "a letter for an answer, but no options A)..., B)...": 1,
    }
    assert [record["id"] for record in got] == [f"medr1-{n}" for n in range(5)]


def test_vqarad_yes_and_no_are_options_and_the_rest_is_open(tmp_path):
    put_image(tmp_path / "images" / "a.jpg")
    rows = [
        {
            "qid": qid,
            "image_name": "a.jpg",
            "image_organ": "CHEST",
            "question": "Is it?",
            "answer": answer,
            "answer_type": closed,
            "question_type": types,
        }
        for qid, (answer, closed, types) in enumerate(
            [
                ("Yes", "CLOSED ", "PRES"),
                ("no ", "CLOSED", "POS, ABN"),
                ("left", "CLOSED", "POS"),
                (12, "OPEN", "COUNT"),
                ("Yes", "OPEN", "MODALITY"),
                ("liver", "OPEN", "ORGAN"),
            ]
        )
    ]
    got, _ = formats.import_records(put_json(tmp_path / "x.json", rows))
    assert [(record["answer"], record.get("options"), record["task"]) for record in got] == [
        ("yes", ["yes", "no"], "Disease Diagnosis"),
        ("no", ["yes", "no"], "Disease Diagnosis"),
        ("left", None, "Other Biological Attributes"),
        ("12", None, "Other Biological Attributes"),
        ("Yes", None, "Modality Recognition"),
        ("liver", None, "Anatomy Identification"),
    ]
    assert got[0]["id"] == "vqarad-0" and got[0]["image"] == str(tmp_path / "images" / "a.jpg")
    assert not any("modality" in record for record in got)
    # nearer than the one in images/
    put_image(tmp_path / "a.jpg")
    # with a byte order mark
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    assert formats.import_records(str(tmp_path / "x.json"))[0][0]["image"] == str(tmp_path / "a.jpg")


def test_llava_turns_become_one_record_each(tmp_path):
    put_image(tmp_path / "a.png")

    def turns(*texts):
        return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]

    rows = [
        {"id": "5", "image": "a.png", "conversations": turns("<image>\nWhat?", "A scar.", "Where?", "Left.")},
        {"id": "5", "image": ["a.png"], "conversations": turns("Old?\n<image>", "Yes.")},
        {"image": "a.png", "conversations": [{"from": "system", "value": "Be kind."}, *turns("Who?", "Me.")]},
        {"id": "6", "image": "a.png", "conversations": turns("What?", "A scar.", "And?")},
        {"id": "7", "image": ["a.png", "a.png"], "conversations": turns("What?", "A scar.")},
        {"id": "8", "conversations": turns("What?", "A scar.")},
        {"id": "9", "image": "a.png", "conversations": []},
        {"id": "10", "image": "a.png", "conversations": 3},
    ]
    got, notes = formats.import_records(put_json(tmp_path / "x.json", rows))
    assert [(record["id"], record["question"], record["answer"]) for record in got] == [
        ("llava-5", "What?", "A scar."),
        ("llava-5-2", "Where?", "Left."),
        ("llava-5-3", "Old?", "Yes."),
        ("llava-2", "Who?", "Me."),
        ("llava-6", "What?", "A scar."),
    ]
    assert notes["skipped"] == {
        "answer is empty": 1,
        "several images": 1,
        "no image": 1,
        "row not of the format": 2,
    }
    assert notes["rows"] == 10 and not any("options" in record for record in got)


def test_medvlthinker_options_are_read_from_their_json_text(tmp_path):
    put_image(tmp_path / "a.png")

    def row(**change):
        return {
            "images": ["a.png"],
            "question": "Which?",
            "options": '{"B": "MRI", "A": "CT"}',
            "answer_label": "A",
            "answer": "CT",
            "dataset_name": "pmc_vqa",
            "dataset_index": 4,
        } | change

    rows = [
        row(reasoning="<think>Bone is bright.</think>"),
        row(answer="A"),
        row(options=["CT", "MRI"], answer_label="b", answer="MRI"),
        row(options={"A": "B", "B": "A"}, answer="B"),
        row(images=[{"path": "a.png", "bytes": None}], dataset_name=None, dataset_index=None),
        row(answer="MRI"),
        row(options="CT or MRI"),
        row(images=None),
    ]
    got, notes = formats.import_records(put_json(tmp_path / "x.json", rows))
    assert [(record["id"], record["options"], record["answer"]) for record in got] == [
        ("pmc_vqa-4", ["CT", "MRI"], "CT"),
        ("pmc_vqa-4-2", ["CT", "MRI"], "CT"),
        ("pmc_vqa-4-3", ["CT", "MRI"], "MRI"),
        ("pmc_vqa-4-4", ["B", "A"], "B"),
        ("medvlthinker-4", ["CT", "MRI"], "CT"),
    ]
    assert got[0]["rationale"] == "Bone is bright." and "rationale" not in got[1]
    assert notes["skipped"] == {"label and answer disagree": 1, "row not of the format": 1, "no image": 1}


def test_the_format_can_be_named_and_an_unknown_one_is_an_error(tmp_path):
    put_image(tmp_path / "a.png")
    row = {"question": "Which?", "options": ["CT", "MRI"], "answer": "CT", "image": "a.png"}
    row |= omni(option_A="CT", option_B="MRI", gt_answer="MRI", image_path="a.png")
    path = put_json(tmp_path / "x.json", [row])
    # OmniMedVQA, by its keys
    assert formats.import_records(path)[0][0]["answer"] == "MRI"
    assert formats.import_records(path, "medvlthinker")[0][0]["answer"] == "CT"
    with pytest.raises(RecordError, match="parquet"):
        formats.import_records(path, "parquet")
    for rows in ([{"text": "hello"}], [], ["text"]):
        with pytest.raises(RecordError, match="not recognised"):
            formats.import_records(put_json(tmp_path / "y.json", rows))
    for text, line in (("[1,\n2,\n", 3), ('{"a": 1}\n\n{"b": \n', 3)):
        (tmp_path / "z.json").write_text(text)
        with pytest.raises(RecordError, match=f"z.json:{line}: "):
            formats.import_records(str(tmp_path / "z.json"))
    with pytest.raises(RecordError, match="none.json"):
        formats.import_records(str(tmp_path / "none.json"))


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["a.png", "CT"])
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "path", "A", "B"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@few
@given(st.sampled_from(list(formats.FORMATS)), st.data())
def test_a_row_of_whatever_json_is_kept_or_counted(tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / "whatever"
    put_image(folder / "a.png")
    fields = sorted(
        formats.FORMATS[name][0] | {"image", "images", "image_path", "image_name", "id", "reasoning"}
    )
    row = data.draw(st.fixed_dictionaries({}, optional={field: anything for field in fields}))
    try:
        got, notes = formats.import_records(put_json(folder / "x.json", [row]), name)
    except RecordError:
        return
    assert notes["rows"] == len(got) + sum(notes["skipped"].values())
    for record in got:
        records.validate(record, records.QUESTION)


@needs_data
def test_real_mhsma_rows_agree_in_both_formats():
    folder = DATA / "omnimedvqa_mhsma"
    official, notes = formats.import_records(str(folder / "MHSMA.json"))
    medr1, _ = formats.import_records(str(folder / "medr1_format.json"))
    assert (
        len(official) == len(medr1) == notes["rows"] == 816 and not notes["skipped"] and not notes["unknown"]
    )
    fields = ("image", "question", "options", "answer")
    assert [[record[f] for f in fields] for record in official] == [
        [record[f] for f in fields] for record in medr1
    ]
    rows = json.loads((folder / "MHSMA.json").read_text())
    assert [record["answer"] for record in official] == [row["gt_answer"].strip() for row in rows]
    assert {record["modality"] for record in official} == {"Microscopy"}


@needs_data
def test_real_vqarad_rows_are_all_accounted_for(tmp_path):
    got, notes = formats.import_records(str(DATA / "vqa_rad" / "vqa_rad.json"))
    assert notes["rows"] == 2327 == len(got) + sum(notes["skipped"].values())
    rows = {
        f"vqarad-{row['qid']}": row for row in json.loads((DATA / "vqa_rad" / "vqa_rad.json").read_text())
    }
    for record in got:
        assert is_match(record["answer"], rows[record["id"]]["answer"])
        assert ("options" in record) == (record["answer"] in ("yes", "no"))
    assert records.write_records(tmp_path / "r.jsonl", got) == len(got)
    assert list(records.read_records(tmp_path / "r.jsonl", records.QUESTION, DATA)) == got
    parts = records.split_records(got, (0.8, 0.1, 0.1), seed=0)
    images = [{hash_image(record["image"]) for record in part} for part in parts.values()]
    assert len(set().union(*images)) == sum(map(len, images)) and sum(map(len, parts.values())) == len(got)


@needs_data
def test_real_predictions_of_the_paper_match_as_often_as_the_paper_says():
    """The headline 87.45 is 6,865 of 7,850 (one row is left out there): is_match counts as the authors did."""
    lines = [
        json.loads(line) for line in open(DATA / "medgr_square" / "checkpoint_30.jsonl", encoding="utf-8")
    ]
    right = sum(is_match(line["model_answer"], line["gt_answer"]) for line in lines)
    assert (len(lines), right) == (7851, 6865)


# The commands --------------------------------------------------------------------------------------------


def test_help_imports_only_the_standard_library():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "medgr2.records", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "split" in shown.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "PIL", "numpy", "transformers"}


def test_import_check_and_split_work_together(tmp_path):
    put_image(tmp_path / "Images" / "a.png")
    rows = [omni(question_id=str(n), image_path=f"Images/{n % 10}.png") for n in range(20)] + [
        omni(gt_answer="PET")
    ]
    for n in range(10):
        put_image(tmp_path / "Images" / f"{n}.png", colour=(n, n, n))
    put_json(tmp_path / "x.json", rows)
    done = command("import", tmp_path / "x.json", "--out", tmp_path / "r.jsonl")
    assert done.returncode == 0 and not done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["count"],
        ["-" * 37, "-----"],
        ["rows", "21"],
        ["records", "20"],
        "skipped: answer not among the options 1".split(),
    ]
    done = command("check", tmp_path / "r.jsonl")
    assert done.returncode == 0 and [line.split() for line in done.stdout.splitlines()] == [
        ["count"],
        ["-" * 16, "-----"],
        ["records", "20"],
        ["question", "records", "20"],
        ["images", "10"],
        ["problems", "0"],
        ["Modality", "Recognition"],
        ["--", "-" * 20],
        ["CT", "20"],
    ]
    arguments = (
        "split",
        tmp_path / "r.jsonl",
        "--out",
        tmp_path / "parts",
        "--train",
        0.6,
        "--val",
        0.4,
        "--test",
        0,
    )
    done = command(*arguments, "--seed", 3)
    assert done.returncode == 0 and [line.split() for line in done.stdout.splitlines()] == [
        ["records", "images"],
        ["-----", "-------", "------"],
        ["train", "12", "6"],
        ["val", "8", "4"],
        ["test", "0", "0"],
    ]
    first = (tmp_path / "parts" / "train.jsonl").read_text()
    assert len(first.splitlines()) == 12 and (tmp_path / "parts" / "test.jsonl").read_text() == ""
    assert command(*arguments, "--seed", 3).returncode == 0
    assert (tmp_path / "parts" / "train.jsonl").read_text() == first


def test_a_mistake_is_one_line_and_status_2_and_leaves_nothing(tmp_path):
    image = put_image(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    records.write_records(tmp_path / "good.jsonl", [question(image=image)])
    records.write_records(
        tmp_path / "bad image.jsonl", [question(image=image), question(str(tmp_path / "text.png"), id="q2")]
    )
    records.write_records(tmp_path / "bad answer.jsonl", [question(image=image, answer="PET")])
    put_json(tmp_path / "x.json", [omni()])
    before = sorted(tmp_path.rglob("*"))
    out = ("--out", tmp_path / "out")
    for arguments, what in [
        (("check", tmp_path / "bad image.jsonl"), "record q2"),
        (("check", tmp_path / "bad answer.jsonl"), "bad answer.jsonl:1: `answer` is not one of"),
        (("check", tmp_path / "none.jsonl"), "none.jsonl: No such file"),
        (("check", tmp_path), "directory"),
        (("import", tmp_path / "x.json", *out), "image file not found"),
        (("import", tmp_path / "x.json", "--out", tmp_path / "x.json"), "--out is SRC"),
        (("import", tmp_path / "good.jsonl", *out, "--format", "csv"), "invalid choice"),
        (("import", tmp_path / "x.json", "--ou", tmp_path / "out"), "--out"),
        (("split", tmp_path / "good.jsonl", *out, "--train", 0.5), "sum to 1"),
        (("split", tmp_path / "good.jsonl", *out), "is none"),
        (("split", tmp_path / "good.jsonl"), "--out"),
        ((), "command"),
    ]:
        done = command(*arguments)
        assert done.returncode == 2 and what in done.stderr, (arguments, done.stderr)
        assert done.stderr.startswith("records.py") and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "train.jsonl").write_bytes((tmp_path / "good.jsonl").read_bytes())
    done = command(
        "split", tmp_path / "train.jsonl", "--out", tmp_path, "--train", 1, "--val", 0, "--test", 0
    )
    assert (
        done.returncode == 2 and "--out holds FILE" in done.stderr and not (tmp_path / "val.jsonl").exists()
    )


def test_no_function_changes_its_arguments(tmp_path):
    image = put_image(tmp_path / "a.png")
    record, report = question(image=image), {"id": "r", "image": image, "report": "No mass."}
    before = copy.deepcopy((record, report))
    for one in (record, report):
        (
            records.validate(one),
            reference_response(one),
            records.record_kind(one),
            records.with_relative_image(one, tmp_path),
        )
    policy_prompt(record), format_candidate(record)
    match_option("C", record["options"]), parse_response("<answer>C</answer>", record["options"])
    records.write_records(tmp_path / "r.jsonl", [record, report])
    records.split_records([record, report], (1, 0, 0), 0)
    assert (record, report) == before
    row = omni(
        options='{"A": "CT", "B": "MRI"}',
        answer="CT",
        conversations=[],
        problem="A)a, B)b",
        solution="<answer>A</answer>",
        answer_type="OPEN",
    )
    kept = copy.deepcopy(row)
    for _, convert in formats.FORMATS.values():
        convert(row)
    assert row == kept
