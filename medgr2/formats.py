"""Public data sets as records: OmniMedVQA, Med-R1, VQA-RAD, LLaVA conversations, MedVLThinker.

A converter turns one row of a public file into drafts, one per question. `finish` makes a draft a valid record or says why it
cannot be one, and every draft is counted.
"""

import json
import os
import pathlib
import re
from collections import Counter
from string import ascii_uppercase as LETTERS

from medgr2.errors import RecordError, require
from medgr2.images import is_under, require_file
from medgr2.prompts import MODALITIES, TAG, TASKS, match_option, normalise, parse_response
from medgr2.records import validate


def squash(name):
    """A name's letters alone: what `MR (Mag-netic Resonance Imaging)` and its kin have in common."""
    return re.sub("[^a-z]", "", name.casefold())


NAMES = {squash(name): name for name in MODALITIES + TASKS} | {
    "ctcomputedtomography": "CT",
    "computedtomography": "CT",
    "mr": "MRI",
    "mrmagneticresonanceimaging": "MRI",
    "magneticresonanceimaging": "MRI",
    "microscopyimages": "Microscopy",
    "fundus": "Fundus Photography",
    "octopticalcoherencetomography": "OCT",
    "opticalcoherencetomography": "OCT",
}


def clean(value):
    """A public file's value as one line of text; "" for None (and NaN, which pandas writes) and for no text."""
    return " ".join(str(value).split()) if isinstance(value, (str, int, float)) else ""


def from_omnimedvqa(row):
    """OmniMedVQA, QA_information: the answer's text in `gt_answer`, options in `option_A` to `option_D`."""
    return [
        {
            "dataset": row.get("dataset"),
            "id": row.get("question_id"),
            "image": row.get("image_path"),
            "question": row["question"],
            "answer": row["gt_answer"],
            "options": [row.get(f"option_{letter}") for letter in LETTERS],
            "modality": row.get("modality_type", row.get("modality")),
            "task": row.get("question_type"),
        }
    ]


def from_medr1(row):
    """Med-R1 and R1-V: `What is it? A)x, B)y` in `problem`, `<answer> B </answer>` in `solution`.

    An option may hold commas and ` or `: the next begins at a letter with `)` behind a comma or a line's end.
    A problem without options is an open question, unless a letter answers it.
    """
    answer, image = parse_response(row["solution"]).prediction, row.get("image")
    head, *others = re.split(r"(?:,\s*|\n\s*)[B-Z]\)", row["problem"])
    first = list(re.finditer(r"(?:^|\s)A\)(?=\s*[^\s,])", head))
    if not others or not first:
        require(answer not in list(LETTERS), "a letter for an answer, but no options A)..., B)...")
        return [{"image": image, "question": row["problem"], "answer": answer}]
    options = [head[first[-1].end() :], *others]
    return [
        {
            "image": image,
            "question": head[: first[-1].start()],
            "options": options,
            "answer": dict(zip(LETTERS, options)).get(answer, answer),
        }
    ]


VQARAD_TASKS = {
    "MODALITY": "Modality Recognition",
    "ORGAN": "Anatomy Identification",
    "ABN": "Disease Diagnosis",
    # PRSE is a slip in the file
    "PRES": "Disease Diagnosis",
    "PRSE": "Disease Diagnosis",
}


def from_vqarad(row):
    """VQA-RAD. A CLOSED question answered yes or no gets the options yes and no; all others are open.

    The task is that of the first `question_type` (there may be several) in VQARAD_TASKS, else Other Biological
    Attributes: where, how large, which colour. The modality is not given (`CHEST` may be X-ray or CT).
    """
    types = re.split(r"\W+", clean(row.get("question_type")).upper())
    closed = clean(row["answer_type"]).upper() == "CLOSED" and normalise(row["answer"]) in ("yes", "no")
    return [
        {
            "id": row.get("qid"),
            "image": row.get("image_name"),
            "question": row["question"],
            "answer": row["answer"],
            "options": ["yes", "no"] if closed else [],
            "task": next(
                (VQARAD_TASKS[t] for t in types if t in VQARAD_TASKS), "Other Biological Attributes"
            ),
        }
    ]


def from_llava(row):
    """LLaVA `conversations`: each question (human) and the reply after it (gpt) is one open question."""
    turns = [turn for turn in row["conversations"] if turn["from"] in ("human", "gpt")]
    return [
        {
            "id": row.get("id"),
            "image": row.get("image"),
            "question": turn["value"].replace("<image>", " "),
            "answer": reply["value"] if reply["from"] == "gpt" else "",
        }
        for turn, reply in zip(turns, [*turns[1:], {"from": None}])
        if turn["from"] == "human"
    ]


def from_medvlthinker(row):
    """MedVLThinker: `options` as JSON text {"A": ...}, `answer_label`, `answer`, `images`, perhaps `reasoning`."""
    options = json.loads(row["options"]) if isinstance(row["options"], str) else row["options"]
    options = options if isinstance(options, dict) else dict(zip(LETTERS, options or []))
    options = {letter: clean(options[letter]) for letter in sorted(options)}
    label, answer = clean(row.get("answer_label")).strip("().: ").upper(), clean(row["answer"])
    if label in options:
        require(
            match_option(answer, list(options.values()))[0] in (None, options[label]),
            "label and answer disagree",
        )
        answer = options[label]
    return [
        {
            "dataset": row.get("dataset_name"),
            "id": row.get("dataset_index"),
            "image": next((row[key] for key in ("images", "image", "image_path") if key in row), None),
            "question": row["question"],
            "answer": answer,
            "options": list(options.values()),
            "rationale": TAG.sub(" ", clean(row.get("reasoning"))),
        }
    ]


# name: the keys that tell it, its converter
FORMATS = {
    "omnimedvqa": ({"question", "gt_answer", "option_A"}, from_omnimedvqa),
    "medr1": ({"problem", "solution"}, from_medr1),
    "vqarad": ({"image_name", "question", "answer", "answer_type"}, from_vqarad),
    "llava": ({"conversations"}, from_llava),
    "medvlthinker": ({"question", "options", "answer"}, from_medvlthinker),
}


def import_records(src, format=None, images=None, root=None):
    """Records of a public file (JSON array or JSON Lines), or of all *.json below a folder: (records, notes).

    `images` is the folder that image paths start from; without it the folder of `src`, then `images/` in it. None may lead
    out of it, but into `root`.
    notes = {"rows": questions met, "skipped": {reason: count}, "unknown": {name: count}}: rows = records + skipped;
    unknown modalities and tasks are kept as they are. Raises RecordError, also where not one record is left.
    """
    home = src if os.path.isdir(src) else os.path.dirname(src)
    folders = [images] if images else [home, os.path.join(home, "images")]
    roots = [os.path.realpath(place) for place in (*folders, root or folders[0])]
    files = sorted(map(str, pathlib.Path(src).rglob("*.json"))) if os.path.isdir(src) else [src]
    records, taken, skipped = [], Counter(), Counter()
    for file in files:
        rows = load_rows(file)
        name = format or recognise(rows, file)
        require(name in FORMATS, f"format {name} is not known: it is one of {', '.join(FORMATS)}")
        convert = FORMATS[name][1]
        for number, row in enumerate(rows):
            try:
                drafts = convert(row) or [None]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                drafts = [error]
            for draft in drafts:
                try:
                    records.append(finish(draft, f"{name}-{number}", folders, roots, taken))
                except RecordError as error:
                    skipped[str(error)] += 1
    reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common()) or "no rows"
    require(records, f"{src}: no row becomes a record: {reasons}: see --format and --images")
    unknown = Counter(
        f"{field} {record[field]}"
        for record in records
        for field in ("modality", "task")
        if field in record and record[field] not in MODALITIES + TASKS
    )
    return records, {
        "rows": len(records) + skipped.total(),
        "skipped": dict(skipped),
        "unknown": dict(unknown),
    }


def load_rows(path):
    """The rows of a JSON array or JSON Lines file. Raises RecordError (`file:line: what: what to do`)."""
    require_file(path)
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: not readable ({error}): give a JSON or JSONL file in UTF-8") from None
    rows = []
    for number, chunk in enumerate([text] if text.lstrip().startswith("[") else text.split("\n")):
        try:
            value = json.loads(chunk, parse_constant=lambda name: None) if chunk.strip() else []
        except (ValueError, RecursionError) as error:
            where = f"{path}:{number + getattr(error, 'lineno', 1)}"
            raise RecordError(f"{where}: {error}: give a JSON array, or one JSON object a line") from None
        rows += value if isinstance(value, list) else [value]
    return rows


def recognise(rows, path):
    """The name of the first format whose keys the first row has. Raises RecordError."""
    keys = rows[0].keys() if rows and isinstance(rows[0], dict) else set()
    name = next((name for name, (known, _) in FORMATS.items() if known <= keys), None)
    require(name, f"{path}: format not recognised by its keys ({', '.join(keys) or 'none'}): see --format")
    return name


def finish(draft, fallback, folders, roots, taken):
    """The record of a draft, `answer` as the option's own text. Raises RecordError(reason) where there is none.

    The id is the data set's own, behind the data set's name; a repeated one gets -2, -3, ... (`taken` counts).
    """
    require(
        isinstance(draft, dict), str(draft) if isinstance(draft, RecordError) else "row not of the format"
    )
    dataset, own = clean(draft.get("dataset")) or fallback.split("-")[0], clean(draft.get("id"))
    record = {
        "id": own if own.startswith(dataset) else f"{dataset}-{own}" if own else fallback,
        "image": find_image(draft["image"], folders, roots),
    }
    for field in ("question", "answer"):
        record[field] = clean(draft[field])
        require(normalise(record[field]), f"{field} is empty")
    options = [clean(option) for option in draft.get("options", []) if clean(option)]
    if options:
        answer, reason = match_option(record["answer"], options)
        require(answer, reason)
        record |= {"options": options, "answer": answer}
    rest = {field: clean(draft.get(field)) for field in ("rationale", "modality", "task")}
    rest |= {field: NAMES.get(squash(rest[field]), rest[field]) for field in ("modality", "task")}
    record |= {field: text for field, text in rest.items() if text} | {"source": "expert"}
    validate(record)
    name = record["id"]
    while record["id"] in taken:
        taken[name] += 1
        record["id"] = f"{name}-{taken[name]}"
    taken[record["id"]] += 1
    return record


def find_image(value, folders, roots):
    """The absolute path of a row's image: a path, or a list of one. Raises RecordError(reason)."""
    values = value if isinstance(value, list) else [value]
    require(len(values) < 2, "several images")
    path = values[0].get("path") if values and isinstance(values[0], dict) else values and values[0]
    require(path and isinstance(path, str), "no image")
    found = [
        p for p in (os.path.abspath(os.path.join(folder, path)) for folder in folders) if os.path.isfile(p)
    ]
    require(found, "image file not found")
    require(is_under(found[0], roots), "image outside of the folder of images, see --image-root")
    return found[0]
