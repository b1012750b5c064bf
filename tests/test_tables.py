"""tables.py and formats.py on files that users have: Parquet, CSV, pickle, nulls, paths of Windows."""

import base64
import csv
import hashlib
import io
import json
import os
import pickle
import re
import sys

import pytest
from helpers import DATA, ROOT, needs_data, omni, put_image, put_json, question
from PIL import Image

import generate
from medgr2 import cli, formats, records, tables
from medgr2.errors import RecordError
from medgr2.images import open_image


def picture(colour, format="PNG"):
    """The bytes of an image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, format)
    return file.getvalue()


RED, BLUE = picture("red"), picture("blue", "JPEG")


def put_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def hub_row(content, **fields):
    return {"image": {"bytes": content, "path": "x.jpg"}, "question": "Which?", "answer": "CT"} | fields


# Parquet -------------------------------------------------------------------------------------------------


def test_a_folder_of_shards_is_one_data_set_and_each_image_is_written_once_under_its_hash(tmp_path, call):
    data = tmp_path / "hub" / "data"
    put_parquet(data / "train-00000-of-00002.parquet", [hub_row(RED), hub_row(BLUE, answer="Yes")])
    put_parquet(data / "train-00001-of-00002.parquet", [hub_row(RED, question="Where?", answer="left")])
    put_parquet(data / "validation-00000-of-00001.parquet", [hub_row(BLUE)])
    # A folder of Parquet also holds descriptions, which are no rows.
    (tmp_path / "hub" / "dataset_infos.json").write_text('{"default": {}}')
    out = tmp_path / "out" / "r.jsonl"
    assert call(records, "import", tmp_path / "hub", "--out", out)[0] == 0
    got = list(records.read_records(out, records.QUESTION))
    assert [r["id"] for r in got] == ["vqa-0", "vqa-1", "vqa-2", "vqa-3"]
    assert [r["split"] for r in got] == ["train", "train", "train", "validation"]
    assert (got[1]["answer"], got[1]["options"], "options" in got[0]) == ("yes", ["yes", "no"], False)
    names = {content: hashlib.sha256(content).hexdigest() for content in (RED, BLUE)}
    assert sorted(os.listdir(out.parent / "images")) == sorted([names[RED] + ".png", names[BLUE] + ".jpg"])
    assert [os.path.basename(r["image"]).split(".")[0] for r in got] == [
        names[RED],
        names[BLUE],
        names[RED],
        names[BLUE],
    ]
    assert open_image(got[0]["image"]).getpixel((0, 0)) == (255, 0, 0)
    status, _, _ = call(records, "import", tmp_path / "hub", "--out", out, "--split", "validation")
    assert status == 0 and [r["id"] for r in records.read_records(out)] == ["vqa-3"]


def test_options_and_images_are_read_however_parquet_holds_them(tmp_path):
    image = {"bytes": RED, "path": None}
    rows = [
        {"images": [image], "options": ["MRI", "CT"]},
        {"images": [image], "options": '["MRI", "CT"]'},
        {"images": [image], "options": "['MRI', 'CT']"},
        {"images": [image], "option_A": "MRI", "option_B": "CT"},
        {"images": [image], "options": ["A: MRI", "B: CT"]},
        {"image": image, "options": ["MRI", "CT"]},
        {"image": RED, "options": ["MRI", "CT"]},
        {"image": base64.b64encode(RED).decode(), "options": ["MRI", "CT"]},
        {"image": "data:image/png;base64," + base64.b64encode(RED).decode(), "options": ["MRI", "CT"]},
    ]
    for n, row in enumerate(rows):
        path = put_parquet(tmp_path / f"{n}.parquet", [row | {"question": "<image>Which?", "answer": "B"}])
        [got], _ = formats.import_records(path, out=str(tmp_path / "images"))
        assert (got["question"], got["options"], got["answer"]) == ("Which?", ["MRI", "CT"], "CT"), row
        with open(got["image"], "rb") as file:
            assert file.read() == RED


def test_a_row_of_several_images_is_counted_and_its_images_are_not_written(tmp_path):
    image = {"bytes": RED, "path": None}
    other = {"bytes": BLUE, "path": None}
    rows = [
        {"id": "validation_1", "image_1": image, "image_2": None, "options": "['MRI', 'CT']", "answer": "B"},
        {"id": "validation_2", "image_1": image, "image_2": other, "options": "['a', 'b']", "answer": "A"},
        {"id": "validation_3", "image_1": image, "image_2": None, "options": "[]", "answer": "24 cm"},
        {"id": "validation_4", "image_1": None, "image_2": image, "options": "[]", "answer": "['1', '2']"},
    ]
    rows = [row | {"question": "<image 1> Which?", "explanation": ""} for row in rows]
    path = put_parquet(tmp_path / "validation-00000-of-00001.parquet", rows)
    got, notes = formats.import_records(path, out=str(tmp_path / "images"))
    assert [(r["id"], r.get("options"), r["answer"]) for r in got] == [
        ("validation_1", ["MRI", "CT"], "CT"),
        ("validation_3", None, "24 cm"),
    ]
    assert notes["skipped"] == {"several images": 1, "`answer` is a list of several": 1}
    assert len(os.listdir(tmp_path / "images")) == 1


def test_an_import_that_fails_leaves_no_images(tmp_path, call):
    put_parquet(tmp_path / "a.parquet", [hub_row(RED)] * 2)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut")
    status, _, error = call(records, "import", tmp_path, "--out", tmp_path / "out" / "r.jsonl")
    assert status == 2 and "b.parquet: not readable as Parquet" in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_easyr1_rows_have_their_options_in_the_problem(tmp_path):
    rows = [
        {"images": [{"bytes": RED, "path": "a"}], "problem": "<image>Which? A)MRI, B)CT", "answer": "B"},
        {"images": [{"bytes": RED, "path": "a"}], "problem": "<image>How many?", "answer": "3"},
    ]
    got, _ = formats.import_records(put_parquet(tmp_path / "t.parquet", rows), out=str(tmp_path / "i"))
    assert [(r["question"], r.get("options"), r["answer"]) for r in got] == [
        ("Which?", ["MRI", "CT"], "CT"),
        ("How many?", None, "3"),
    ]


def test_rows_saved_by_save_to_disk_are_read(tmp_path):
    import pyarrow

    table = pyarrow.Table.from_pylist([hub_row(RED)] * 3)
    with pyarrow.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as file:
        file.write_table(table)
    (tmp_path / "state.json").write_text("{}")
    assert len(formats.import_records(str(tmp_path), out=str(tmp_path / "images"))[0]) == 3


@pytest.mark.parametrize("name, package", [("x.parquet", "pyarrow"), ("x.arrow", "pyarrow")])
def test_a_missing_package_is_one_line_that_names_it(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(RecordError, match=f"{name}: .*pip install {package}"):
        formats.import_records(str(tmp_path / name))


@needs_data
@pytest.mark.parametrize("name", ["easyr1", "mmmu", "vqa_rad"])
def test_every_row_of_the_real_shapes_becomes_a_record_with_the_answer_of_the_file(tmp_path, name):
    import pyarrow.parquet

    [path] = (DATA / "formats").glob(f"{name}_shape*")
    got, notes = formats.import_records(str(path), out=str(tmp_path))
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len(got) == notes["rows"] == len(rows) == 60 and not notes["skipped"]
    for record, row in zip(got, rows):
        image = row.get("image") or row.get("image_1") or row["images"][0]
        with open(record["image"], "rb") as file:
            assert file.read() == image["bytes"]
        options, answer = record.get("options"), record["answer"]
        named = "ABCD"[options.index(answer)] if options else answer
        assert row["answer"].casefold().strip(".") in (named.casefold(), answer.casefold().strip("."))


def test_every_command_of_the_document_is_one_and_every_format_is_in_its_table(monkeypatch):
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    commands = re.findall(r"`python -m medgr2\.records (import .*?)`", text)
    assert len(commands) >= 15
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["records.py", *command.split()])
        args = records.parse_args()
        assert set(cli.parse_pairs("--map", args.map)) <= set(formats.USUAL_COLUMNS)
    for name, (known, _) in formats.FORMATS.items():
        [line] = [line for line in text.splitlines() if re.match(rf"\|[^|]*`{name}`[^|]*\|", line)]
        assert all(f"`{column}`" in line for column in known), name


# CSV and other text ---------------------------------------------------------------------------------------

PMC = ["index", "Figure_path", "Question", "Choice A", "Choice B", "Choice C", "Answer", "split"]


@pytest.mark.parametrize("name, delimiter", [("x.csv", ","), ("x.csv", ";"), ("x.tsv", "\t")])
def test_pmcvqa_choices_are_columns_that_repeat_their_letter(tmp_path, name, delimiter):
    put_image(tmp_path / "images" / "PMC1_F1.jpg")
    rows = [
        ["0", "PMC1_F1.jpg", 'Which "sign", if any?', " A:Uterus", " B:Liver, left", " C:None", "B", "train"],
        ["1", "PMC1_F1.jpg", "Two\nlines?", "Uterus", "", "None", "C", "test"],
        ["2", "PMC1_F1.jpg", "Which?", "Uterus", "Liver", "", "C", "test"],
        ["3", "PMC1_F1.jpg", "Which?", "Uterus", "Liver", "", "A", "test", "one cell too many"],
    ]
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([PMC, *rows])
    got, notes = formats.import_records(str(tmp_path / name))
    assert [(r["id"], r["question"], r["options"], r["answer"], r["split"]) for r in got] == [
        ("pmcvqa-0", 'Which "sign", if any?', ["Uterus", "Liver, left", "None"], "Liver, left", "train"),
        # C is the letter of the third choice, though the second is missing.
        ("pmcvqa-1", "Two lines?", ["Uterus", "None"], "None", "test"),
    ]
    assert notes["skipped"] == {"answer not among the options": 1, "the row does not fit the format": 1}


def test_slake_is_read_in_the_language_that_is_asked_for(tmp_path, call):
    put_image(tmp_path / "imgs" / "xmlab0" / "source.jpg")
    row = {"img_name": "xmlab0/source.jpg", "answer_type": "OPEN", "modality": "MRI", "qid": 7}
    rows = [
        row | {"question": "Which organ?", "answer": "Liver", "q_lang": "en", "content_type": "Organ"},
        row | {"question": "哪个器官?", "answer": "肝", "q_lang": "zh", "content_type": "Organ"},
        row | {"question": "Ill?", "answer": "Yes", "q_lang": "en", "content_type": "KG"},
        row
        | {"question": "Well?", "answer": "No", "q_lang": "en", "content_type": "Abnormality"}
        | {"answer_type": "CLOSED"},
    ]
    path, out = put_json(tmp_path / "train.json", rows), tmp_path / "r.jsonl"
    got, _ = formats.import_records(path)
    fields = ("question", "answer", "options", "task", "language", "split")
    assert [[r.get(f) for f in fields] for r in got] == [
        ["Which organ?", "Liver", None, "Anatomy Identification", "en", "train"],
        ["哪个器官?", "肝", None, "Anatomy Identification", "zh", "train"],
        ["Ill?", "Yes", None, "Other Biological Attributes", "en", "train"],
        ["Well?", "no", ["yes", "no"], "Disease Diagnosis", "en", "train"],
    ]
    status, said, _ = call(records, "import", path, "--out", out, "--language", "zh")
    assert status == 0 and [r["answer"] for r in records.read_records(out)] == ["肝"]
    assert "language is not zh" in said and "3" in said


def test_vqamed_lines_have_no_line_of_names_and_images_no_ending(tmp_path):
    put_image(tmp_path / "Train_images" / "synpic1.jpg")
    text = (
        'synpic1|what is "this"?|mr - flair\nsynpic1|is it, or not?|yes\nsynpic2|what?|ct\nsynpic1|a|b|c|d\n'
    )
    (tmp_path / "All_QA_Pairs_train.txt").write_text(text)
    (tmp_path / "test.txt").write_text("synpic1|modality|is it t1?|t2\n")
    (tmp_path / "readme.txt").write_text("Please cite us.\n")
    images = str(tmp_path / "Train_images")
    got, notes = formats.import_records(str(tmp_path / "All_QA_Pairs_train.txt"), images=images)
    assert [(r["question"], r["answer"], r.get("options")) for r in got] == [
        ('what is "this"?', "mr - flair", None),
        ("is it, or not?", "yes", ["yes", "no"]),
    ]
    assert notes["skipped"] == {"image file not found": 1, "the row does not fit the format": 1}
    [got], _ = formats.import_records(str(tmp_path / "test.txt"), images=images)
    assert (got["task"], got["answer"], got["split"]) == ("Modality Recognition", "t2", "test")
    with pytest.raises(RecordError, match="image . question . answer"):
        formats.import_records(str(tmp_path / "readme.txt"))


@pytest.mark.parametrize(
    "header, row",
    [
        ("id,name,caption", "ROCO_1,a.jpg,A scan."),
        ("ID,Caption", "a,A scan."),
        ("image,caption", "a.jpg,A scan."),
    ],
)
def test_captions_become_reports(tmp_path, header, row):
    put_image(tmp_path / "a.jpg")
    (tmp_path / "x.csv").write_text(f"{header}\n{row}\n")
    [got], _ = formats.import_records(str(tmp_path / "x.csv"))
    assert got["report"] == "A scan." and "question" not in got
    assert records.record_kind(got) == "report"


def test_a_pickle_of_plain_values_is_read_and_one_that_names_code_is_refused_unrun(tmp_path):
    put_image(tmp_path / "train_0001.jpg")
    rows = [{"image": "train_0001", "question": "Which?", "answer": "cell"}]
    (tmp_path / "train_qa.pkl").write_bytes(pickle.dumps(rows))
    [got], _ = formats.import_records(str(tmp_path / "train_qa.pkl"))
    assert got["answer"] == "cell" and got["image"] == str(tmp_path / "train_0001.jpg")

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in (pickle.dumps([Payload()]), b"\x80\x04broken", pickle.dumps({"a": 1})):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(RecordError, match="x.pkl: .*convert it to JSON"):
            formats.import_records(str(tmp_path / "x.pkl"))
    assert not (tmp_path / "ran").exists()


def test_any_columns_can_be_mapped_and_an_error_lists_those_that_are_there_and_wanted(tmp_path, call):
    put_image(tmp_path / "a.png")
    (tmp_path / "x.csv").write_text("Bild,Frage,Antwort,w_1,w_2,Art\na.png,Was?,2,MRI,CT,X-Ray\n")
    out = tmp_path / "r.jsonl"
    mapped = ["image=Bild", "question=Frage", "answer=Antwort", "options=w_*", "modality=Art"]
    status, _, error = call(records, "import", tmp_path / "x.csv", "--out", out, "--map", *mapped)
    assert status == 0, error
    [got] = records.read_records(out)
    assert (got["question"], got["options"], got["answer"], got["modality"]) == (
        "Was?",
        ["MRI", "CT"],
        "CT",
        "X-Ray",
    )
    for flags, words in [
        ([], ["no column for image, question, answer", "Bild, Frage, Antwort", "--map image=COLUMN"]),
        (["--map", "image=Bild"], ["no column for question, answer", "Bild, Frage, Antwort"]),
        (["--map", "image=Foto"], ["--map image=Foto: no such column", "Bild, Frage, Antwort"]),
        (["--map", "foto=Bild"], ["--map foto=Bild: no field `foto`", "image, question, answer"]),
        (["--map", "foto"], ["--map foto: give OURS=THEIRS"]),
        (["--format", "slake", "--map", "image=Bild"], ["leave --format out"]),
    ]:
        status, _, error = call(records, "import", tmp_path / "x.csv", "--out", out, *flags)
        assert status == 2 and error.count("\n") == 1 and all(word in error for word in words), error


def test_a_column_that_is_null_in_the_first_rows_is_still_recognised(tmp_path):
    put_image(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "Which?", "answer": None}] * 3
    rows.append({"image": "a.png", "question": "Which?", "answer": "CT"})
    got, notes = formats.import_records(put_json(tmp_path / "x.json", rows))
    assert len(got) == 1 and notes["skipped"] == {"answer is empty": 3}
    assert notes["where"] == {"answer is empty": ["x.json row 1", "x.json row 2", "x.json row 3"]}


@pytest.mark.parametrize(
    "text", ['{"info": 1, "data": [{"a": 1}, {"a": 2}]}', '{"a": 1}\n\n{"a": 2}', '[{"a": 1}, {"a": 2}]']
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_json_rows_may_be_an_array_lines_or_a_field_under_any_name_of_file(tmp_path, name, text):
    for form in (text, json.dumps(json.loads(text), indent=1) if "\n" not in text else text):
        (tmp_path / name).write_text(form)
        assert list(tables.read_rows(str(tmp_path / name))) == [{"a": 1}, {"a": 2}]


# What is missing, and paths of Windows --------------------------------------------------------------------


@pytest.mark.parametrize("field", sorted(set(records.FIELDS) - {"id", "image"}))
def test_a_field_that_is_null_is_absent(tmp_path, field):
    put_image(tmp_path / "a.png")
    row = {"id": "q", "image": "a.png", "question": "Which?", "answer": "CT"}
    put_json(tmp_path / "r.jsonl", [row | {field: None, "note": None}], lines=True)
    [got] = records.read_records(tmp_path / "r.jsonl")
    assert got == {k: v for k, v in row.items() if k != field} | {
        "image": str(tmp_path / "a.png"),
        "note": None,
    }


def test_a_head_of_the_reward_that_is_null_is_absent(tmp_path):
    put_image(tmp_path / "a.png")
    row = {"id": "q", "image": "a.png", "reward": {"overall": 5, "relevant": None}}
    put_json(tmp_path / "r.jsonl", [row], lines=True)
    assert [r["reward"] for r in records.read_records(tmp_path / "r.jsonl")] == [{"overall": 5}]


@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_null_in_any_column_of_any_format_is_as_good_as_no_column(tmp_path, name):
    put_image(tmp_path / "a.png")
    known = formats.FORMATS[name][0] | {"id", "image", "question", "answer", "options", "modality", "task"}
    row = dict.fromkeys(known, "a.png") | {"conversations": [], "problem": "Which?"}
    for column in known:
        there = row | {column: None}
        gone = {k: v for k, v in row.items() if k != column}
        drafts = [
            formats.convert_row(formats.FORMATS[name][1], next(tables.read_rows(path)))
            for path in (
                put_json(tmp_path / f"{n}.jsonl", [r], lines=True) for n, r in enumerate((there, gone))
            )
        ]
        assert repr(drafts[0]) == repr(drafts[1])


def test_an_image_is_found_by_a_path_with_backslashes_and_not_outside_of_its_folder(tmp_path):
    put_image(tmp_path / "own" / "images" / "a.png")
    put_image(tmp_path / "b.png")
    rows = [omni(image_path="images\\a.png"), omni(image_path="..\\b.png")]
    got, notes = formats.import_records(put_json(tmp_path / "own" / "x.json", rows))
    assert [r["image"] for r in got] == [str(tmp_path / "own" / "images" / "a.png")]
    assert list(notes["skipped"]) == ["image outside the folder of images, see --image-root"]
    put_json(tmp_path / "own" / "r.jsonl", [question("images\\a.png")], lines=True)
    [got] = records.read_records(tmp_path / "own" / "r.jsonl")
    assert got["image"] == str(tmp_path / "own" / "images" / "a.png")
    put_json(tmp_path / "own" / "r.jsonl", [question("..\\b.png")], lines=True)
    with pytest.raises(RecordError, match="b.png is not under"):
        list(records.read_records(tmp_path / "own" / "r.jsonl"))


def test_a_repeated_option_names_its_row_and_the_rest_is_kept_unless_told_to_stop(tmp_path, call):
    put_image(tmp_path / "Images" / "a.png")
    rows = [omni(), omni(option_C="MRI"), omni(), omni(option_C="mri.")]
    path, out = put_json(tmp_path / "x.json", rows), tmp_path / "r.jsonl"
    status, said, _ = call(records, "import", path, "--out", out)
    assert status == 0 and len(list(records.read_records(out))) == 2
    assert "two options are the same" in said and "x.json row 2, x.json row 4" in said
    status, _, error = call(records, "import", path, "--out", tmp_path / "s", "--on-error", "stop")
    assert status == 2 and "x.json row 2: two options are the same" in error and not (tmp_path / "s").exists()


def test_check_and_split_name_a_bad_line_or_leave_it_out_aloud(tmp_path, call):
    put_image(tmp_path / "a.png")
    bad = question("a.png", id="q2", options=["CT", "MRI", "ct"])
    rows = [question("a.png"), bad, question("a.png", id="q3"), question("a.png")]
    path = put_json(tmp_path / "r.jsonl", rows, lines=True)
    split = ("split", path, "--out", tmp_path / "parts", "--train", 1, "--val", 0, "--test", 0)
    for command in (("check", path), split):
        status, _, error = call(records, *command)
        assert status == 2 and "r.jsonl:2: two options are the same" in error
        status, said, error = call(records, *command, "--on-error", "skip")
        assert status == 0, error
        assert "left out: " in said and "r.jsonl:2: two options" in said and "r.jsonl:4: `id`" in said
    kept = records.read_records(tmp_path / "parts" / "train.jsonl", root=tmp_path)
    assert [r["id"] for r in kept] == ["q1", "q3"]


def test_no_more_lines_are_left_out_than_is_allowed(tmp_path, capsys):
    put_image(tmp_path / "a.png")
    rows = [question("a.png", id=f"q{n}", options=["CT", "MRI"] + ["ct"] * (n > 2)) for n in range(4)]
    path = put_json(tmp_path / "r.jsonl", rows, lines=True)
    assert [r["id"] for r in records.read_kept(path, limit=0.25)] == ["q0", "q1", "q2"]
    assert "left out: " in capsys.readouterr().out
    with pytest.raises(RecordError, match="r.jsonl:4: two options .* above --max-rejected 0.2"):
        records.read_kept(path, limit=0.2)
    with pytest.raises(RecordError, match="r.jsonl:4: two options"):
        records.read_kept(path, limit=0)
    read = generate.read_images(path, 0.25)
    assert [r["id"] for r in read] == ["q0"]


@needs_data
def test_real_slake_rows_are_all_read(tmp_path):
    rows = json.loads((DATA / "formats" / "slake_validate.json").read_text(encoding="utf-8"))
    for name in {row["img_name"] for row in rows}:
        put_image(tmp_path / name)
    path = str(DATA / "formats" / "slake_validate.json")
    got, notes = formats.import_records(path, images=str(tmp_path))
    assert len(got) == notes["rows"] == len(rows) == 100 and not notes["skipped"] and not notes["unknown"]
    assert [r["answer"].casefold() for r in got] == [row["answer"].casefold() for row in rows]
    kept = [formats.import_records(path, images=str(tmp_path), keep={"language": x})[0] for x in ("en", "zh")]
    assert list(map(len, kept)) == [80, 20]
