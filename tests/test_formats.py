"""formats.py: rows of public data sets become records or are counted by the reason why not."""

import copy
import json

import pytest
from helpers import DATA, few, needs_data, omni, put_image, put_json
from hypothesis import given
from hypothesis import strategies as st

from medgr2 import formats, records
from medgr2.errors import RecordError
from medgr2.images import hash_image
from medgr2.prompts import is_match


def test_omnimedvqa_names_are_made_canonical_and_missing_options_left_out(tmp_path):
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
    assert notes == {"rows": 12, "skipped": {}, "unknown": {"modality Endoscopy": 1}, "where": {}}
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
    # A repeated id gets a number.
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
        "answer is empty": 3,
        "no image": 2,
        "image file not found": 1,
        "question is empty": 1,
        "several options match": 1,
        "`options` are not 2 to 26": 1,
        "a text holds a tag of the reply's form, like <answer>": 1,
        "the row does not fit the format": 1,
    }
    records.write_records(tmp_path / "out.jsonl", got)
    assert len(list(records.read_records(tmp_path / "out.jsonl", records.QUESTION))) == 1


def test_a_folder_is_searched_for_json_files_and_images_may_start_from_another(tmp_path):
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
        "the answer is a letter, but there are no options A)..., B)...": 1,
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
    # This file comes before the one in images/.
    put_image(tmp_path / "a.jpg")
    # With a byte order mark.
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    assert formats.import_records(str(tmp_path / "x.json"))[0][0]["image"] == str(tmp_path / "a.jpg")


def test_each_llava_question_becomes_one_record(tmp_path):
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
        "the row does not fit the format": 2,
    }
    assert notes["rows"] == 10 and not any("options" in record for record in got)


def test_medvlthinker_options_are_parsed_from_json_text(tmp_path):
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
    assert notes["skipped"] == {
        "label and answer disagree": 1,
        "`options` is neither a list nor one per letter": 1,
        "no image": 1,
    }


def test_the_format_can_be_named_and_an_unknown_one_is_an_error(tmp_path):
    put_image(tmp_path / "a.png")
    row = {"question": "Which?", "options": ["CT", "MRI"], "answer": "CT", "image": "a.png"}
    row |= omni(option_A="CT", option_B="MRI", gt_answer="MRI", image_path="a.png")
    path = put_json(tmp_path / "x.json", [row])
    # OmniMedVQA, recognised by its keys.
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
def test_a_row_of_any_json_is_kept_or_counted(tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / "any"
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


def test_no_converter_changes_its_row():
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
