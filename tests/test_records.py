"""records.py: validation, files of records, splitting, the command line."""

import copy
import json
import subprocess
import sys

import pytest
from helpers import ROOT, omni, put_image, put_json, question

from medgr2 import records
from medgr2.errors import RecordError
from medgr2.images import hash_image


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "medgr2.records", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------------------------------------------------
# Files of records.


def broken(tmp_path, line):
    """The error message for a file whose third line is `line` (the second is blank). It names both."""
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
        ({"answer": 7}, "`answer` is not of type"),
        ({"report": ["a"]}, "`report` is not of type"),
        ({"cycle": True}, "`cycle` is not of type"),
        ({"source": "web"}, "`source`"),
        ({"reward": {"relevant": 0.5}}, "`reward`"),
        ({"reward": {"overall": 10.5}}, "`reward`"),
        ({"reward": {"overall": 5, "relevant": "high"}}, "`reward`"),
        ({"rationale": "so <answer>CT</answer>"}, "a tag"),
    ],
)
def test_an_invalid_record_is_refused_and_a_valid_one_is_not(tmp_path, change, what):
    assert what in broken(tmp_path, json.dumps(question(**change)))
    good = question(
        cycle=1, parent="p", paradigm="direct", reward={"overall": -6, "relevant": 0.5}, extra=[1, None]
    )
    records.validate(good, records.QUESTION)


def test_a_record_without_a_required_field_is_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": "a", "image": "a.png"}')
    assert len(list(records.read_records(tmp_path / "r.jsonl", ("image",)))) == 1
    with pytest.raises(RecordError, match="r.jsonl:1: no field `question`"):
        list(records.read_records(tmp_path / "r.jsonl", records.QUESTION))


def test_a_file_without_a_good_line_is_refused_with_its_first_problem(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "image": "/elsewhere/a.png"}\n{"id": 7}\n')
    with pytest.raises(RecordError, match="r.jsonl:1: .*a.png is not under"):
        records.read_kept(path, ("image",), limit=1.0)


def test_a_missing_file_an_empty_file_and_a_folder_raise_record_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for name, what in (("none.jsonl", "No such file"), ("empty.jsonl", "no records"), (".", "directory")):
        with pytest.raises(RecordError, match=what) as error:
            list(records.read_records(tmp_path / name))
        assert str(error.value).startswith(str(tmp_path))


def test_what_many_records_share_is_one_object_in_memory(tmp_path):
    path = tmp_path / "r.jsonl"
    put_json(
        path, [question("a.png", id=f"q{n}", modality="an old CT", task="a task") for n in range(2)], True
    )
    one, other = records.read_records(path)
    assert [id(name) for name in one] == [id(name) for name in other]
    for field in ("modality", "task", "answer", "source"):
        assert one[field] is other[field]
    assert all(a is b for a, b in zip(one["options"], other["options"]))


def test_records_are_streamed(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": "a"}\nbroken')
    stream = records.read_records(tmp_path / "r.jsonl")
    # Before the broken line is read.
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
    # Including the unknown field.
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


def test_a_file_can_be_rewritten_from_itself_and_a_bad_place_raises_a_record_error(tmp_path):
    path = tmp_path / "r.jsonl"
    records.write_records(path, [{"id": "a"}, {"id": "b"}])
    with open(path) as opened_before:
        assert (
            records.write_records(path, (record | {"cycle": 1} for record in records.read_records(path))) == 2
        )
        # The file is replaced, not overwritten in place.
        assert "cycle" not in opened_before.read()
    assert [record["cycle"] for record in records.read_records(path)] == [1, 1]
    for place in (tmp_path, path / "below.jsonl"):
        with pytest.raises(RecordError, match=str(place)):
            records.write_records(place, [])
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


# ---------------------------------------------------------------------------------------------------------
# Splitting.


def make_many(tmp_path, count=20):
    """`count` images, each under two names with equal bytes, and two questions to each name."""
    made = []
    for n in range(count):
        for name in ("a", "b"):
            image = put_image(tmp_path / name / f"{n}.png", colour=(n, 0, 0))
            made += [question(image=image, id=f"{name}{n}{q}") for q in "xy"]
    return made


def test_a_split_never_puts_equal_bytes_into_two_parts(tmp_path):
    made = make_many(tmp_path)
    before = copy.deepcopy(made)
    parts = records.split_records(made, (0.5, 0.3, 0.2), seed=1)
    assert made == before
    hashes = [{hash_image(record["image"]) for record in part} for part in parts.values()]
    assert [len(h) for h in hashes] == [10, 6, 4] and len(set().union(*hashes)) == 20
    assert [len(part) for part in parts.values()] == [40, 24, 16]
    assert list(parts) == ["train", "val", "test"]


def test_a_split_depends_on_the_seed_and_not_on_the_order(tmp_path):
    made = make_many(tmp_path)
    parts = records.split_records(made, (0.5, 0.25, 0.25), seed=1)
    turned = records.split_records(made[::-1], (0.5, 0.25, 0.25), seed=1)
    assert {name: part[::-1] for name, part in turned.items()} == parts
    assert records.split_records(made, (0.5, 0.25, 0.25), seed=2)["train"] != parts["train"]


def test_bad_fractions_and_another_criterion_are_refused(tmp_path):
    made = make_many(tmp_path, 3)
    assert records.split_records(made, (1, 0, 0), 0) == {"train": made, "val": [], "test": []}
    for fractions in ((0.5, 0.3, 0.3), (1.5, -0.5, 0), (float("nan"), 0, 1), (0.5, 0.5)):
        with pytest.raises(RecordError, match="sum to 1"):
            records.split_records(made, fractions, 0)
    with pytest.raises(RecordError, match="test: 0.1 of 3 images is none"):
        records.split_records(made, (0.8, 0.1, 0.1), 0)
    with pytest.raises(RecordError, match="--by question"):
        records.split_records(made, (0.8, 0.1, 0.1), 0, by="question")


# ---------------------------------------------------------------------------------------------------------
# The command line.


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
        "answer not among the options: x.json row 21".split(),
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


def test_show_prints_the_fields_of_the_first_records_with_the_paths_and_sizes_of_their_images(tmp_path):
    put_image(tmp_path / "images" / "a.png", size=(40, 30))
    (tmp_path / "images" / "b.png").write_text("no image")
    rows = [question(f"images/{name}.png", id=f"q{name}", rationale=None) for name in "abcd"]
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    put_json(tmp_path / "r.jsonl", rows, lines=True)
    done = command("show", tmp_path / "r.jsonl")
    assert done.returncode == 0, done.stderr
    *shown, total, end = done.stdout.split("\n\n") + [""]
    assert len(shown) == 3 and total == "3 of 4 records\n" and end == ""
    found = [dict(line.split(None, 1) for line in lines.splitlines()) for lines in shown]
    for row, name, image in zip(found, "abc", ("(40 x 30)", "not a readable image", "no such image")):
        assert row["image"].startswith(str(tmp_path / "images" / f"{name}.png")) and image in row["image"]
        options = '["X-ray", "MRI", "CT"]'
        expected = {"id": f"q{name}", "question": "Which modality?", "answer": "CT", "options": options}
        assert expected.items() <= row.items() and set(row) == {*rows[0]}


def test_show_obeys_number_and_seed_and_never_the_record(tmp_path, capsys):
    harm = "\x1b[2J\x1b]0;title\x07 two\nlines \u202e ü 骨"
    rows = [{"id": f"r{i:02}", harm: harm, "report": "x" * 5000} for i in range(50)]
    put_json(tmp_path / "r.jsonl", rows, lines=True)

    def ids(*options):
        records.show(tmp_path / "r.jsonl", *options)
        out = capsys.readouterr().out
        assert not set(out) & set("\x1b\x07\u202e") and "\\x1b[2J" in out and "ü 骨" in out
        assert out.count("two\\nlines") == 2 * out.count("\nreport")
        assert f"{'x' * 600} ... (5000 characters)\n" in out and "x" * 601 not in out
        return [line.split()[1] for line in out.splitlines() if line.startswith("id ")]

    assert ids(2) == ["r00", "r01"] and len(ids(99)) == 50
    assert ids(5, 1) == ids(5, 1) == sorted(ids(5, 1)) and len({*ids(5, 1)}) == 5
    assert ids(5, 1) != ids(5, 2) and ids(5, 1) != ids(5)


def test_a_mistake_is_one_line_and_status_2_and_leaves_no_file(tmp_path):
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
        records.validate(one)
        records.record_kind(one)
        records.with_relative_image(one, tmp_path)
    records.write_records(tmp_path / "r.jsonl", [record, report])
    records.split_records([record, report], (1, 0, 0), 0)
    assert (record, report) == before
