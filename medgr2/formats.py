"""Public data sets as records: one row of FORMATS for each.

A converter turns one row of a public file (medgr2/tables.py) into drafts, one per question.
`record_from_draft` makes a draft a valid record or says why it cannot. Every draft is counted.
"""

import ast
import functools
import itertools
import json
import os
import re
from collections import Counter
from string import ascii_uppercase as LETTERS

from medgr2 import tables
from medgr2.errors import RecordError, require
from medgr2.images import ImageFolder, find_file, image_bytes, is_under
from medgr2.prompts import MAX_OPTIONS, MODALITIES, TAG, TASKS, match_option, normalise, parse_response
from medgr2.records import require_encodable, validate

# A format is recognised by the columns of this many rows: a column may be missing in the first.
FIRST_ROWS = 100
# How many skipped rows are named per reason.
NAMED_ROWS = 3
# Endings that the name of an image may lack, as in PathVQA and VQA-Med.
IMAGE_SUFFIXES = ("", ".jpg", ".png", ".jpeg", ".dcm")
# Where images lie beside the file that names them: OmniMedVQA, VQA-RAD, SLAKE.
IMAGE_FOLDERS = ("", "images", "imgs")

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
# The tasks of the kinds of question in VQA-RAD, SLAKE and VQA-Med. All other kinds, such as where, how large
# and which colour, are Other Biological Attributes.
TASKS_OF_TYPES = {
    "MODALITY": "Modality Recognition",
    "ORGAN": "Anatomy Identification",
    "ABN": "Disease Diagnosis",
    "ABNORMALITY": "Disease Diagnosis",
    "PRES": "Disease Diagnosis",
    # A misspelling of PRES in the file.
    "PRSE": "Disease Diagnosis",
}
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"validate": "validation", "dev": "dev", "test": "test"}


def canonical_name(name):
    """This project's name of a modality or task; an unknown name stays as it is."""
    return CANONICAL_NAMES.get(letters_only(name), name)


def clean(value):
    """A public file's value as one line of text; "" if it is neither text nor number."""
    return " ".join(str(value).split()) if isinstance(value, (str, int, float)) else ""


def task_of_types(types):
    """The task of the first known kind of question in a text such as `POS, ABN`; None if there is no text."""
    names = re.split(r"\W+", clean(types).upper())
    known = [TASKS_OF_TYPES[name] for name in names if name in TASKS_OF_TYPES]
    return (known or ["Other Biological Attributes"])[0] if names != [""] else None


def split_of(path):
    """The split in a file's name or folder, such as `train-00000-of-00002.parquet`; None if there is none."""
    words = re.split(r"[^a-z]+", path.lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)


def parse_literal(value):
    """The list or dict in a text, in JSON or as Python prints it; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return value


def as_list(value):
    """The values of a list or of its text, without missing ones; any other value is a list of one."""
    value = parse_literal(value)
    return [item for item in (value if isinstance(value, list) else [value]) if item not in (None, "")]


# ---------------------------------------------------------------------------------------------------------
# Converters: a row of a public file to a list of drafts.


def from_columns(names, row):
    """A row whose columns are our fields. `names`: {our field: its column, or several names for it}.

    A `*` in a column's name stands for a letter or a number: `option_*` is option_A, option_B, ...
    """
    draft = {field: find_column(row, columns) for field, columns in names.items()}
    if "types" in names:
        draft["task"] = task_of_types(draft["types"])
    return [draft]


def find_column(row, columns):
    """The value of the first of `columns` that the row has, or None. A family (`*`) is {mark: value}."""
    for column in (columns,) if isinstance(columns, str) else columns:
        if "*" in column:
            family = {mark: row.get(column.replace("*", mark)) for mark in MARKS}
            family = {mark: value for mark, value in family.items() if value is not None}
            if family:
                return family
        elif column in row:
            return row[column]


MARKS = (*LETTERS, *map(str, range(1, len(LETTERS) + 1)))


def from_medr1(row):
    """Med-R1 and R1-V: the answer is in `solution`, `<answer> B </answer>`."""
    return from_problem(row, parse_response(row["solution"]).prediction)


def from_easyr1(row):
    """EasyR1: the answer is in `answer`, as a letter or text."""
    return from_problem(row, clean(row["answer"]))


def from_problem(row, answer):
    """`What is it? A)x, B)y` in `problem`.

    An option may hold commas and ` or `: the next one begins at a letter with `)` after a comma or a line
    break. A problem without options is an open question, unless its answer is a letter.
    """
    draft = {"id": row.get("id"), "image": find_column(row, ("image", "images")), "answer": answer}
    head, *others = re.split(r"(?:,\s*|\n\s*)[B-Z]\)", row["problem"])
    first = list(re.finditer(r"(?:^|\s)A\)(?=\s*[^\s,])", head))
    if not others or not first:
        require(answer not in list(LETTERS), "the answer is a letter, but there are no options A)..., B)...")
        return [draft | {"question": row["problem"]}]
    options = dict(zip(LETTERS, [head[first[-1].end() :], *others]))
    draft |= {"question": head[: first[-1].start()], "options": options}
    return [draft | {"answer": options.get(answer, answer)}]


def from_llava(row):
    """LLaVA `conversations`: each question (human) and the reply after it (gpt) is one open question."""
    turns = [turn for turn in row["conversations"] if turn["from"] in ("human", "gpt")]
    drafts = []
    for i, turn in enumerate(turns):
        if turn["from"] == "human":
            is_answered = i + 1 < len(turns) and turns[i + 1]["from"] == "gpt"
            answer = turns[i + 1]["value"] if is_answered else ""
            draft = {"id": row.get("id"), "image": row.get("image"), "question": turn["value"]}
            drafts.append(draft | {"answer": answer, "answer_type": "OPEN"})
    return drafts


# The columns of most of the rest. --map replaces some of them.
USUAL_COLUMNS = {
    "id": ("id", "qid", "question_id", "index"),
    "image": (
        "image",
        "images",
        "image_path",
        "image_file",
        "file_name",
        "image_name",
        "img_path",
        "img_name",
    ),
    "question": "question",
    "answer": "answer",
    "options": ("options", "choices", "option_*"),
    "label": "answer_label",
    "answer_type": "answer_type",
    "rationale": ("rationale", "reasoning"),
    "report": ("report", "caption"),
    "modality": "modality",
    "task": "task",
    "language": ("language", "q_lang"),
    "split": "split",
}
MEDVLTHINKER_COLUMNS = USUAL_COLUMNS | {"id": "dataset_index", "dataset": "dataset_name"}


def columns(**names):
    return functools.partial(from_columns, names)


# For each format the columns by which it is recognised, and its converter. The first that fits is taken.
FORMATS = {
    "omnimedvqa": (
        {"question", "gt_answer", "option_A"},
        columns(
            dataset="dataset",
            id="question_id",
            image="image_path",
            question="question",
            answer="gt_answer",
            options="option_*",
            modality=("modality_type", "modality"),
            task="question_type",
        ),
    ),
    "medr1": ({"problem", "solution"}, from_medr1),
    "easyr1": ({"problem", "answer"}, from_easyr1),
    "llava": ({"conversations"}, from_llava),
    # The modality is not given: CHEST may be X-ray or CT.
    "vqarad": (
        {"image_name", "question", "answer", "answer_type"},
        columns(
            id="qid",
            image="image_name",
            question="question",
            answer="answer",
            answer_type="answer_type",
            types="question_type",
        ),
    ),
    "slake": (
        {"img_name", "question", "answer", "q_lang"},
        columns(
            id="qid",
            image="img_name",
            question="question",
            answer="answer",
            answer_type="answer_type",
            modality="modality",
            types="content_type",
            language="q_lang",
        ),
    ),
    "pmcvqa": (
        {"Figure_path", "Question", "Choice A"},
        columns(
            id="index",
            image="Figure_path",
            question="Question",
            answer="Answer",
            label="Answer_label",
            options="Choice *",
            split="split",
        ),
    ),
    "mmmu": (
        {"question", "options", "answer", "image_1"},
        columns(
            id="id",
            image="image_*",
            question="question",
            answer="answer",
            options="options",
            rationale="explanation",
        ),
    ),
    "vqamed": (
        {"image", "category", "question", "answer"},
        columns(image="image", question="question", answer="answer", types="category"),
    ),
    "roco": ({"name", "caption"}, columns(id="id", image="name", report="caption")),
    "rocov2": ({"ID", "Caption"}, columns(id="ID", image="ID", report="Caption")),
    "medvlthinker": (
        {"question", "options", "answer", "dataset_name"},
        functools.partial(from_columns, MEDVLTHINKER_COLUMNS),
    ),
    # No column by which to recognise it: see `require_columns`.
    "vqa": (set(), functools.partial(from_columns, USUAL_COLUMNS)),
}


# ---------------------------------------------------------------------------------------------------------
# Importing.


def import_records(src, format=None, images=None, root=None, fields=None, keep=None, out=None, stop=False):
    """The records of a public file, or of all files of one kind below a folder (medgr2/tables.py).

    Image paths start from the folder `images`, by default that of `src` or one of IMAGE_FOLDERS in it. None
    may lead out of it, except into `root`. Images that are in the rows themselves are written into the folder
    `out`; if no record comes of them all, they are removed.
    `fields`: {our field: its column} in place of a format. `keep`: {field: the only value that is kept}.
    `stop`: the first row that does not become a record is an error.
    Returns (records, notes). The notes are `rows`, how many questions were read (records + skipped);
    `skipped`, {reason: count}; `where`, {reason: the first rows}; and `unknown`, {name: count} of unknown
    modalities and tasks, whose records are kept.
    Raises RecordError, also if there is no record.
    """
    home = src if os.path.isdir(src) else os.path.dirname(src)
    folders = [images] if images else [os.path.join(home, name) for name in IMAGE_FOLDERS]
    roots = [os.path.realpath(folder) for folder in (*folders, root or folders[0])]
    rows, id_counts, skipped, where = [], Counter(), Counter(), {}
    written = ImageFolder(out)
    try:
        for draft, fallback_id, place in read_drafts(src, format, fields):
            try:
                record = record_from_draft(draft, fallback_id, keep or {})
                record["image"] = find_image(draft["image"], folders, roots, written)
                rows.append(record | {"id": unique_id(record["id"], id_counts)})
            except RecordError as error:
                require(not stop, f"{place}: {error}")
                skipped[str(error)] += 1
                where.setdefault(str(error), []).append(place)
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common()) or "no rows"
        require(rows, f"{src}: no row becomes a record: {reasons}: see --format and --images")
    except BaseException:
        written.remove()
        raise
    counts = {"rows": len(rows) + skipped.total(), "skipped": dict(skipped), "unknown": count_unknown(rows)}
    where = {reason: places[:NAMED_ROWS] for reason, places in where.items()}
    return rows, counts | {"where": where}


def read_drafts(src, format=None, fields=None):
    """Yield (draft, an id if it has none, its file and row) per question.

    The draft of a bad row is an exception or None.
    """
    number = 0
    for file in tables.find_tables(src):
        rows = tables.read_rows(file)
        first = list(itertools.islice(rows, FIRST_ROWS))
        name, convert = choose_converter(first, file, format, fields)
        relative = os.path.relpath(file, src) if os.path.isdir(src) else os.path.basename(file)
        split = split_of(relative)
        for row_number, row in enumerate(itertools.chain(first, rows), 1):
            for draft in convert_row(convert, row):
                if isinstance(draft, dict) and split and not draft.get("split"):
                    draft = draft | {"split": split}
                yield draft, f"{name}-{number}", f"{relative} row {row_number}"
            number += 1


def convert_row(convert, row):
    """The drafts of a row; for a bad row, an exception or None instead."""
    try:
        return convert(row) or [None]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [error]


def choose_converter(rows, path, format=None, fields=None):
    """(name, converter) for a file that begins with `rows`. Raises RecordError."""
    seen = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    if fields:
        require(format in (None, "vqa"), "--map goes with the usual columns: leave --format out")
        for ours, theirs in fields.items():
            known = ", ".join(USUAL_COLUMNS)
            require(ours in USUAL_COLUMNS, f"--map {ours}={theirs}: no field `{ours}`: it is one of {known}")
        names = USUAL_COLUMNS | fields
        require_columns(names, seen, path, fields)
        return "vqa", functools.partial(from_columns, names)
    if format is None:
        format = next(name for name, (known, _) in FORMATS.items() if known <= set(seen))
        if format == "vqa":
            require_columns(USUAL_COLUMNS, seen, path)
    require(format in FORMATS, f"format {format} is not known: it is one of {', '.join(FORMATS)}")
    return format, FORMATS[format][1]


def require_columns(names, seen, path, fields=()):
    """Raise RecordError unless there are columns for an image and for question and answer, or a report."""
    row = dict.fromkeys(seen, "")
    missing = [field for field, columns in names.items() if find_column(row, columns) is None]
    shown = ", ".join(seen) or "none"
    for ours in fields:
        problem = f"{path}: --map {ours}={names[ours]}: no such column"
        require(ours not in missing, f"{problem}: the columns are {shown}")
    wanted = [field for field in ("image", "question", "answer") if field in missing]
    if "report" not in missing:
        wanted = [field for field in wanted if field == "image"]
    advice = " ".join(f"{field}=COLUMN" for field in wanted)
    problem = f"format not recognised: no column for {', '.join(wanted)} among {shown}"
    require(not wanted, f"{path}: {problem}: name them, --map {advice} (or image=, report=), or see --format")


def count_unknown(rows):
    """{name: count} of the modalities and tasks that this project has no name for."""
    counts = Counter()
    for row in rows:
        for field in ("modality", "task"):
            if field in row and row[field] not in MODALITIES + TASKS:
                counts[f"{field} {row[field]}"] += 1
    return dict(counts)


# ---------------------------------------------------------------------------------------------------------
# From a draft to a record.


def record_from_draft(draft, fallback_id, keep):
    """The record of a draft, with `image` still None and `answer` as the option's own text.

    Raises RecordError(reason). `keep`: {field: the only value that is kept}.
    """
    if isinstance(draft, RecordError):
        raise draft
    require(isinstance(draft, dict), "the row does not fit the format")
    for field, value in keep.items():
        require(clean(draft.get(field)) == value, f"{field} is not {value}, left out as asked")
    record = {"id": draft_id(draft, fallback_id), "image": None}
    is_report = "question" not in draft or (clean(draft.get("report")) and not draft["question"])
    record |= {"report": clean(draft["report"])} if is_report else answer_of(draft)
    rationale = TAG.sub(" ", clean(draft.get("rationale"))).strip()
    if rationale:
        record["rationale"] = rationale
    for field in ("modality", "task"):
        if clean(draft.get(field)):
            record[field] = canonical_name(clean(draft[field]))
    record["source"] = "expert"
    for field in ("split", "language"):
        if clean(draft.get(field)):
            record[field] = clean(draft[field])
    validate({field: value for field, value in record.items() if value is not None})
    require_encodable(record)
    return record


def answer_of(draft):
    """{question, answer, options if there are any} of a draft."""
    found = {"question": clean(re.sub(r"<image(?: ?\d+)?>", " ", clean(draft["question"])))}
    answers = as_list(draft["answer"])
    require(len(answers) < 2, "`answer` is a list of several")
    found["answer"] = clean(answers[0]) if answers else ""
    for field, text in found.items():
        require(normalise(text), f"{field} is empty")
    options = letter_options(draft.get("options"))
    if options:
        label = clean(draft.get("label")).strip("().: ").upper()
        answer = choose_option(found["answer"], label, options)
        return found | {"options": list(options.values()), "answer": answer}
    is_closed = clean(draft.get("answer_type")).upper() in ("", "CLOSED")
    if is_closed and normalise(found["answer"]) in ("yes", "no"):
        return found | {"options": ["yes", "no"], "answer": normalise(found["answer"])}
    return found


def letter_options(value):
    """{letter: option} of a row's options: a list, {letter: text}, or the text of one; {} if there are none.

    Missing ones keep their letter. A letter that each option repeats (`A: lung`, `B: liver`) is removed.
    """
    value = parse_literal(value)
    if isinstance(value, list):
        require(len(value) <= MAX_OPTIONS, f"`options` are not 2 to {MAX_OPTIONS}")
        value = dict(zip(LETTERS, value))
    require(value is None or isinstance(value, dict), "`options` is neither a list nor one per letter")
    options = {str(letter).upper(): clean(text) for letter, text in sorted((value or {}).items())}
    options = {letter: text for letter, text in options.items() if text}
    texts = {
        letter: re.match(rf"\(?{re.escape(letter)}\s*[:.)]\s*(\S.*)", text)
        for letter, text in options.items()
    }
    return {letter: match[1] for letter, match in texts.items()} if all(texts.values()) else options


def choose_option(answer, label, options):
    """The option that is the right answer, by its text or letter. Raises RecordError(reason)."""
    texts, letter = list(options.values()), answer.strip("(). :").upper()
    if letter in MARKS and normalise(answer) not in map(normalise, texts):
        # Not by position: an option before it may be missing.
        named, reason = options.get(letter), "answer not among the options"
    else:
        named, reason = match_option(answer, texts)
    if label in options:
        require(named in (None, options[label]), "label and answer disagree")
        return options[label]
    require(named, reason)
    return named


def draft_id(draft, fallback_id):
    """The data set's own id, after the name of the data set if the row has one or the id is a number."""
    dataset, own = clean(draft.get("dataset")), clean(draft.get("id"))
    if not own:
        return fallback_id
    if not dataset and own.isdigit():
        dataset = fallback_id.split("-")[0]
    return own if own.startswith(dataset) else f"{dataset}-{own}"


def unique_id(name, id_counts):
    """The name, or name-2, name-3, ... if it is taken."""
    unique = name
    while unique in id_counts:
        id_counts[name] += 1
        unique = f"{name}-{id_counts[name]}"
    id_counts[unique] += 1
    return unique


def find_image(value, folders, roots, written):
    """The absolute path of a row's image. Raises RecordError(reason).

    `value`: a path, {path, bytes}, bytes, base64 text, or a list of one of these. Bytes become a file of
    `written`.
    """
    values = as_list(list(value.values()) if is_family(value) else value)
    require(len(values) < 2, "several images")
    value = values[0] if values else None
    content = image_bytes(value)
    if content:
        require(written.path, "image in the row itself, but no folder to write it to")
        return written.add(content)
    path = value.get("path") if isinstance(value, dict) else value
    require(path and isinstance(path, str), "no image")
    places = [find_file(path + suffix, folder) for folder in folders for suffix in IMAGE_SUFFIXES]
    found = next((place for place in places if os.path.isfile(place)), None)
    require(found, "image file not found")
    require(is_under(found, roots), "image outside the folder of images, see --image-root")
    return found


def is_family(value):
    """Are these the columns image_1, image_2, ..., rather than one {path, bytes}?"""
    return isinstance(value, dict) and set(value) <= set(MARKS)
