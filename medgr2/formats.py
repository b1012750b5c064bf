"""Public data sets as records: OmniMedVQA, Med-R1, VQA-RAD, LLaVA conversations, MedVLThinker.

A converter turns one row of a public file into drafts, one per question. `record_from_draft` makes a draft a
valid record or says why it cannot. Every draft is counted.
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

# ---------------------------------------------------------------------------------------------------------
# Names and texts.


def letters_only(name):
    """What the spellings of one name have in common: `MR (Mag-netic Resonance Imaging)` and the like."""
    return re.sub("[^a-z]", "", name.casefold())


CANONICAL_NAMES = {letters_only(name): name for name in MODALITIES + TASKS} | {
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


def canonical_name(name):
    """This project's name of a modality or task; an unknown name stays as it is."""
    return CANONICAL_NAMES.get(letters_only(name), name)


def clean(value):
    """A public file's value as one line of text; "" if it is neither text nor number."""
    return " ".join(str(value).split()) if isinstance(value, (str, int, float)) else ""


# ---------------------------------------------------------------------------------------------------------
# Converters: a row of a public file to a list of drafts.


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

    An option may hold commas and ` or `: the next one begins at a letter with `)` after a comma or a line
    break. A problem without options is an open question, unless its answer is a letter.
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
    "PRES": "Disease Diagnosis",
    # A misspelling of PRES in the file.
    "PRSE": "Disease Diagnosis",
}


def from_vqarad(row):
    """VQA-RAD. A CLOSED question answered yes or no gets the options yes and no; all others are open.

    The modality is not given (`CHEST` may be X-ray or CT).
    """
    closed = clean(row["answer_type"]).upper() == "CLOSED" and normalise(row["answer"]) in ("yes", "no")
    return [
        {
            "id": row.get("qid"),
            "image": row.get("image_name"),
            "question": row["question"],
            "answer": row["answer"],
            "options": ["yes", "no"] if closed else [],
            "task": vqarad_task(row.get("question_type")),
        }
    ]


def vqarad_task(question_type):
    """The task of the first type in VQARAD_TASKS (there may be several types).

    The others, such as where, how large and which colour, are Other Biological Attributes.
    """
    for name in re.split(r"\W+", clean(question_type).upper()):
        if name in VQARAD_TASKS:
            return VQARAD_TASKS[name]
    return "Other Biological Attributes"


def from_llava(row):
    """LLaVA `conversations`: each question (human) and the reply after it (gpt) is one open question."""
    turns = [turn for turn in row["conversations"] if turn["from"] in ("human", "gpt")]
    drafts = []
    for i, turn in enumerate(turns):
        if turn["from"] == "human":
            is_answered = i + 1 < len(turns) and turns[i + 1]["from"] == "gpt"
            drafts.append(
                {
                    "id": row.get("id"),
                    "image": row.get("image"),
                    "question": turn["value"].replace("<image>", " "),
                    "answer": turns[i + 1]["value"] if is_answered else "",
                }
            )
    return drafts


def from_medvlthinker(row):
    """MedVLThinker: `options` (may be JSON text), `answer_label`, `answer`, `images`, perhaps `reasoning`."""
    options = json.loads(row["options"]) if isinstance(row["options"], str) else row["options"]
    options = options if isinstance(options, dict) else dict(zip(LETTERS, options or []))
    options = {letter: clean(options[letter]) for letter in sorted(options)}
    label, answer = clean(row.get("answer_label")).strip("().: ").upper(), clean(row["answer"])
    if label in options:
        named, _ = match_option(answer, list(options.values()))
        require(named in (None, options[label]), "label and answer disagree")
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


# For each format the keys by which its rows are recognised, and its converter.
FORMATS = {
    "omnimedvqa": ({"question", "gt_answer", "option_A"}, from_omnimedvqa),
    "medr1": ({"problem", "solution"}, from_medr1),
    "vqarad": ({"image_name", "question", "answer", "answer_type"}, from_vqarad),
    "llava": ({"conversations"}, from_llava),
    "medvlthinker": ({"question", "options", "answer"}, from_medvlthinker),
}


# ---------------------------------------------------------------------------------------------------------
# Importing.


def import_records(src, format=None, images=None, root=None):
    """The records of a public file (JSON array or JSON Lines) or of all *.json files below a folder.

    Image paths start from the folder `images`, by default that of `src` or `images/` in it. None may lead
    out of it, except into `root`.
    Returns (records, notes). The notes are `rows`, how many questions were read (records + skipped);
    `skipped`, {reason: count}; and `unknown`, {name: count} of unknown modalities and tasks, whose records
    are kept.
    Raises RecordError, also if there is no record.
    """
    home = src if os.path.isdir(src) else os.path.dirname(src)
    folders = [images] if images else [home, os.path.join(home, "images")]
    roots = [os.path.realpath(folder) for folder in (*folders, root or folders[0])]
    rows, id_counts, skipped = [], Counter(), Counter()
    for draft, fallback_id in read_drafts(src, format):
        try:
            rows.append(record_from_draft(draft, fallback_id, folders, roots, id_counts))
        except RecordError as error:
            skipped[str(error)] += 1
    reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common()) or "no rows"
    require(rows, f"{src}: no row becomes a record: {reasons}: see --format and --images")
    counts = {"rows": len(rows) + skipped.total(), "skipped": dict(skipped), "unknown": count_unknown(rows)}
    return rows, counts


def read_drafts(src, format):
    """Yield (draft, an id if it has none) per question; for a bad row an exception or None is the draft."""
    files = sorted(map(str, pathlib.Path(src).rglob("*.json"))) if os.path.isdir(src) else [src]
    for file in files:
        rows = load_rows(file)
        name = format or recognise_format(rows, file)
        require(name in FORMATS, f"format {name} is not known: it is one of {', '.join(FORMATS)}")
        _, convert = FORMATS[name]
        for number, row in enumerate(rows):
            try:
                drafts = convert(row) or [None]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                drafts = [error]
            for draft in drafts:
                yield draft, f"{name}-{number}"


def count_unknown(rows):
    """{name: count} of the modalities and tasks that this project has no name for."""
    counts = Counter()
    for row in rows:
        for field in ("modality", "task"):
            if field in row and row[field] not in MODALITIES + TASKS:
                counts[f"{field} {row[field]}"] += 1
    return dict(counts)


def load_rows(path):
    """The rows of a JSON array or JSON Lines file. Raises RecordError."""
    require_file(path)
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: not readable ({error}): give a JSON or JSONL file in UTF-8") from None
    is_array = text.lstrip().startswith("[")
    rows = []
    for number, chunk in enumerate([text] if is_array else text.split("\n")):
        try:
            # pandas writes NaN for a missing value: it becomes None.
            value = json.loads(chunk, parse_constant=lambda name: None) if chunk.strip() else []
        except (ValueError, RecursionError) as error:
            line = number + getattr(error, "lineno", 1)
            advice = "give a JSON array, or one JSON object per line"
            raise RecordError(f"{path}:{line}: {error}: {advice}") from None
        rows += value if isinstance(value, list) else [value]
    return rows


def recognise_format(rows, path):
    """The name of the first format whose keys the first row has. Raises RecordError."""
    keys = rows[0].keys() if rows and isinstance(rows[0], dict) else set()
    for name, (known, _) in FORMATS.items():
        if known <= keys:
            return name
    shown = ", ".join(keys) or "none"
    raise RecordError(f"{path}: format not recognised by its keys ({shown}): see --format")


def record_from_draft(draft, fallback_id, folders, roots, id_counts):
    """The record of a draft, with `answer` as the option's own text. Raises RecordError(reason).

    The id is the data set's own, after the name of the data set. `id_counts` is updated: it makes ids unique.
    """
    if isinstance(draft, RecordError):
        raise draft
    require(isinstance(draft, dict), "row not of the format")
    record = {"id": draft_id(draft, fallback_id), "image": find_image(draft["image"], folders, roots)}
    for field in ("question", "answer"):
        record[field] = clean(draft[field])
        require(normalise(record[field]), f"{field} is empty")
    options = [clean(option) for option in draft.get("options", []) if clean(option)]
    if options:
        answer, reason = match_option(record["answer"], options)
        require(answer, reason)
        record |= {"options": options, "answer": answer}
    for field in ("rationale", "modality", "task"):
        text = clean(draft.get(field))
        if text:
            record[field] = text if field == "rationale" else canonical_name(text)
    record["source"] = "expert"
    validate(record)
    return record | {"id": unique_id(record["id"], id_counts)}


def draft_id(draft, fallback_id):
    dataset, own = clean(draft.get("dataset")) or fallback_id.split("-")[0], clean(draft.get("id"))
    if not own:
        return fallback_id
    return own if own.startswith(dataset) else f"{dataset}-{own}"


def unique_id(name, id_counts):
    """The name, or name-2, name-3, ... if it is taken."""
    unique = name
    while unique in id_counts:
        id_counts[name] += 1
        unique = f"{name}-{id_counts[name]}"
    id_counts[unique] += 1
    return unique


def find_image(value, folders, roots):
    """The absolute path of a row's image: `value` is a path or a list of one. Raises RecordError(reason)."""
    values = value if isinstance(value, list) else [value]
    require(len(values) < 2, "several images")
    path = values[0] if values else None
    if isinstance(path, dict):
        path = path.get("path")
    require(path and isinstance(path, str), "no image")
    places = [os.path.abspath(os.path.join(folder, path)) for folder in folders]
    found = next((place for place in places if os.path.isfile(place)), None)
    require(found, "image file not found")
    require(is_under(found, roots), "image outside of the folder of images, see --image-root")
    return found
