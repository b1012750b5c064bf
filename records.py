"""A line of JSONL: the record that the five stages exchange, and the contract between prompt and parser.

One JSON object a line, UTF-8, `\\n`. A stage adds fields; it never renames or overwrites one. README.md has
the table of fields. Three kinds of record share it: an *image* (`id`, `image`), a *report* (and `report`), a
*question* (and `question`, `answer`, perhaps `options`, `rationale`).

The prompt asks for a form and the parser reads that form; they are two halves of one contract, so they stand
side by side here, and a test holds that the parser accepts what the prompt asks for.

    python records.py check FILE
    python records.py import SRC --out FILE [--format omnimedvqa] [--images FOLDER]
    python records.py split FILE --out FOLDER --train 0.8 --val 0.1 --test 0.1 --seed 0
"""
import argparse
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import unicodedata
import warnings
from collections import Counter
from string import ascii_uppercase as LETTERS
from typing import NamedTuple

MODALITIES = ("CT", "MRI", "X-Ray", "Ultrasound", "Dermoscopy", "Fundus Photography", "Microscopy", "OCT")
TASKS = ("Modality Recognition", "Anatomy Identification", "Disease Diagnosis", "Lesion Grading",
         "Other Biological Attributes")  # the eight modalities and five question types of OmniMedVQA


class RecordError(ValueError):
    """A record, or a file of records, that cannot be used. The message is one line: where, what, what to do."""
    exit_status = 2  # runs.cli prints the message alone and leaves with this status


# ---------------------------------------------------------------------------------------------------------
# The contract of an answer: what the policy is asked, and how its reply is read.

def policy_prompt(record):
    """The text that goes with the image, when the policy is asked `record["question"]`."""
    lines = [record["question"]]
    if "options" in record:
        lines.append("Options: " + " ".join(f"{chr(65 + i)}) {o}" for i, o in enumerate(record["options"])))
    lines.append("Reason first, then give " + ("one option." if "options" in record else "a short answer."))
    lines.append("Reply as <think>reasoning</think><answer>answer</answer>")
    return "\n".join(lines)


def report_prompt():
    """The text that goes with the image, when a report is asked for."""
    return "Describe this image."


def format_response(rationale, answer):
    """What a perfect reply to `policy_prompt` looks like; `rationale` may be empty or None."""
    return f"<think>{rationale or ''}</think><answer>{answer}</answer>"


def response_of(record):
    """The reference response of a question or report record: what SFT trains on and the reward model scores."""
    return record["report"] if "report" in record else format_response(record.get("rationale"), record["answer"])


class Parsed(NamedTuple):
    """A response, read. `prediction` is an option's own text (or free text), or None with a `reason`."""
    prediction: str | None
    reason: str | None
    rationale: str | None
    well_formed: bool  # exactly the form that the prompt asks for, and a prediction in it


FORM = re.compile(r"\s*<think>(?P<rationale>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:question|options|think|answer)>")  # none of them may stand inside a part of a reply
LETTER = re.compile(r"\(?([A-Za-z])(?:[).:]+|\s*$)\s*(.*)", re.DOTALL)


def normalise(text):
    """Case, width, spacing and the punctuation around a text do not make it another answer."""
    text = unicodedata.normalize("NFKC", str(text)).casefold()
    return " ".join(text.split()).strip(" .,:;!?\"'`*()[]{}")


def match_option(answer, options):
    """The one option that `answer` names by its text, its letter, or both; (None, reason) where it names none.

    Never a guess: a letter beside another option's text, or a text that two options share, is no answer.
    """
    same = [o for o in options if normalise(o) == normalise(answer)]
    if len(same) == 1:
        return same[0], None
    if len(same) > 1:
        return None, "several options match"
    letter = LETTER.fullmatch(answer.strip(" \t\n.,;*\"'"))
    if letter:
        index, rest = ord(letter[1].upper()) - 65, normalise(letter[2])
        if index < len(options) and rest in ("", normalise(options[index])):
            return options[index], None
    return None, "answer not among the options"


def parse_response(text, options=None):
    """Read a reply to `policy_prompt`. Returns a Parsed.

    Accepted: the option's text, its letter, `C) CT`, `(C)`, in any case, with stray punctuation. The
    reasoning may be missing (a prediction all the same, but not `well_formed`).
    """
    opened, closed = text.count("<answer>"), "</answer>" in text.partition("<answer>")[2]
    if opened != 1 or not closed:
        return Parsed(None, "several answers" if closed else "no answer", None, False)
    form = FORM.fullmatch(text)
    form = form if form and len(TAG.findall(text)) == 4 else None
    rationale = form["rationale"].strip() if form else None
    answer = text.partition("<answer>")[2].partition("</answer>")[0].strip()
    if not normalise(answer):
        return Parsed(None, "empty answer", rationale, False)
    if options is None:
        return Parsed(answer, None, rationale, form is not None)
    prediction, reason = match_option(answer, options)
    return Parsed(prediction, reason, rationale, form is not None and prediction is not None)


def is_match(prediction, answer):
    """1[extract(a') = extract(a)] of the paper: same text once both are normalised; None matches nothing."""
    return prediction is not None and normalise(prediction) == normalise(answer)


# ---------------------------------------------------------------------------------------------------------
# The contract of a candidate: what the generator is asked, by paradigm, and how its reply is read.

PARADIGMS = {  # the paper's three prompting paradigms; the last worked best there
    "direct": "Give the answer with a short reason.",
    "stepwise": "Describe what you see step by step, then answer.",
    "metacognitive": "Say what is uncertain, check it against the image, then commit to an answer.",
}


def generator_prompt(paradigm, task=None):
    """The text that goes with the image, when the generator is asked for a question about it."""
    return (f"Write one exam question about this image. Kind: {task or 'any'}.\n{PARADIGMS[paradigm]}\n"
            "Reply as <question>question</question><options>option | option | option</options>"
            "<think>reasoning</think><answer>the right option</answer>")


def format_candidate(record):
    """What a perfect reply to `generator_prompt` looks like for a question record."""
    options = f"<options>{' | '.join(record['options'])}</options>" if "options" in record else ""
    return f"<question>{record['question']}</question>{options}{response_of(record)}"


CANDIDATE = re.compile(r"\s*<question>(?P<question>.*?)</question>\s*(?:<options>(?P<options>.*?)</options>\s*)?"
                       r"(?P<response><think>.*)", re.DOTALL)


def parse_candidate(text):
    """Read a reply to `generator_prompt`: ({question, options?, rationale, answer}, None) or (None, reason)."""
    tags = re.sub("[</>]", "", " ".join(TAG.findall(text)))  # each part once; a regular expression alone takes hours to say no
    form = CANDIDATE.fullmatch(text) if tags in ("question question think think answer answer",
                                                 "question question options options think think answer answer") else None
    if not form or TAG.search(form["question"]) or TAG.search(form["options"] or ""):
        return None, "malformed"
    question = " ".join(form["question"].split())
    options = form["options"] and [" ".join(o.split()) for o in form["options"].split("|")]
    if not normalise(question):
        return None, "empty question"
    if options is not None and not (2 <= len(options) <= 26 and all(map(normalise, options))):
        return None, "too few or empty options"
    if options is not None and len({normalise(o) for o in options}) < len(options):
        return None, "repeated options"
    parsed = parse_response(form["response"], options)
    if not parsed.well_formed:
        return None, "malformed" if parsed.reason in (None, "no answer", "several answers") else parsed.reason
    prompts = [normalise(generator_prompt(paradigm)) for paradigm in PARADIGMS]
    if any(normalise(question) in prompt for prompt in prompts) or normalise(parsed.rationale) == "reasoning":
        return None, "prompt echo"
    candidate = {"question": question, "rationale": parsed.rationale, "answer": parsed.prediction}
    return candidate | ({"options": options} if options is not None else {}), None


# ---------------------------------------------------------------------------------------------------------
# A file of records: validate, read, write, and the images that they name.

FIELDS = {"id": str, "image": str, "question": str, "answer": str, "options": list, "rationale": str,
          "report": str, "modality": str, "task": str, "source": str, "paradigm": str, "cycle": int,
          "parent": str, "reward": dict}
FILLED = ("id", "image", "question", "answer", "report")  # never empty where they are
MOST_LINE = 16 << 20  # bytes of a line
MOST_BYTES, MOST_PIXELS, MOST_OBLONG = 256 << 20, 64 << 20, 200  # of an image: its file, width x height, longer / shorter side
QUESTION = ("id", "image", "question", "answer")  # what a question record must have: read(path, QUESTION)
ANYWHERE = os.sep  # read(path, root=ANYWHERE): for a reader that opens no image


def demand(holds, message):
    """Raise RecordError(message) unless `holds`. A message is `what is wrong: what to do`."""
    if not holds:
        raise RecordError(message)


def demand_file(path):
    """Raise RecordError where `path` is a FIFO, a socket or a device: to open it could wait for ever."""
    demand(os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path), f"{path}: not a regular file: give one")


def finite(text):
    """JSON's number as a float. Raises RecordError for 1e999, which Python would take for infinity."""
    demand(math.isfinite(float(text)), f"{text[:20]} is too large a number: write another, or leave the field out")
    return float(text)


def kind(record):
    """`report`, `question` or `image`: what the record holds beside its image (as in `response_of`)."""
    return next((field for field in ("report", "question") if field in record), "image")


def validate(record, require=("id",)):
    """Raise RecordError unless `record` has `id`, the fields in `require`, and the types and values of the table.

    Fields that the table does not name are free.
    """
    for field in ("id", *require):
        demand(field in record, f"no field `{field}`: add it")
    for field in [field for field in FIELDS if field in record]:
        demand(type(record[field]) is FIELDS[field],  # `is`: True is no cycle number
               f"`{field}` is not of type {FIELDS[field].__name__}: correct it or leave it out")
        demand(field not in FILLED or normalise(record[field]), f"`{field}` is empty: fill it or leave it out")
    demand("\0" not in record.get("image", ""), "`image` holds a zero byte: correct it")
    if "options" in record:
        validate_options(record["options"], record.get("answer"))
    texts = [record.get(field, "") for field in ("question", "answer", "rationale")] + record.get("options", [])
    demand(not any(map(TAG.search, texts)), "a text holds a tag of the reply's form, like <answer>: remove the tag")
    demand(record.get("source") in (None, "expert", "generated"), "`source` is not expert or generated: correct it")
    reward = record.get("reward", {"overall": 0})
    demand(all(type(value) in (int, float) for value in reward.values()) and -6 <= reward.get("overall", 99) <= 10,
           "`reward` is not {overall: a number in [-6, 10], a head: a number}: score the record again")


def validate_options(options, answer):
    """Raise RecordError unless `options` are 2 to 26 distinct texts and `answer`, if any, is exactly one of them."""
    demand(all(isinstance(option, str) and normalise(option) for option in options),
           "an option is empty or not a string: every option is a text")
    demand(2 <= len(options) <= 26, "`options` are not 2 to 26: leave the field out for an open question")
    demand(len({normalise(option) for option in options}) == len(options),
           "two options are the same but for case, spacing and punctuation: remove one")
    demand(answer is None or answer in options, "`answer` is not one of `options`: copy the option's text exactly")


def is_under(path, folders):
    """Does `path` lead into one of `folders` (real paths), all links followed? A stranger's record may name no other file."""
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, folder]) == folder for folder in folders)


def read(path, require=("id",), root=None):
    """Stream the records of a JSONL file, validated, `image` as an absolute path (on disk: relative to the file).

    Every image must lie under the file's folder, or under `root`, links followed. Raises RecordError, `file:line: what: what
    to do`, at the first line that is not UTF-8, JSON, an object and valid, leads to an image elsewhere, or repeats an `id`;
    and where the file is missing, a folder, or has no record. Blank lines are skipped.
    """
    folder, lines, number = os.path.dirname(os.path.abspath(path)), {}, 0
    roots = [os.path.realpath(place) for place in (folder, root or folder)]
    demand_file(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), 1):
                demand(len(line) <= MOST_LINE, f"a line of more than {MOST_LINE >> 20} MiB: write one record a line")
                if not line.strip():
                    continue
                record = json.loads(line.decode("utf-8-sig"), parse_float=finite, parse_constant=lambda name: demand(
                    False, f"{name} is not JSON: write a number, or leave the field out"))
                demand(isinstance(record, dict), "not an object: write one JSON object a line")
                demand(b"\\ud" not in line.lower() or is_text(record), "half a surrogate pair (\\ud800 to \\udfff): remove it")
                validate(record, require)
                first = lines.setdefault(record["id"], number)
                demand(first == number, f"`id` is already on line {first}: make it unique")
                if "image" in record:
                    record["image"] = os.path.abspath(os.path.join(folder, record["image"]))
                    demand(is_under(record["image"], roots), f"image {os.path.realpath(record['image'])} is not under {roots[1]}: "
                           "correct it, or give the folder of all images as --image-root")
                yield record
        demand(lines, "no records: the file is empty, give another")
        return
    except RecordError as error:
        problem = str(error)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}: give a JSONL file of records") from None
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start}): save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON ({error}): correct or remove the line"
    raise RecordError(f"{path}:{number or 1}: {problem}")


def is_text(record):
    """Can the record be written as UTF-8? Not with half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        return bool(json.dumps(record, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def relative(record, folder):
    """A copy of `record` as it stands on disk in `folder`: `image` relative to it, with forward slashes.

    Raises RecordError where `image` is not absolute: nobody could say what it is relative to.
    """
    image = record.get("image", os.sep)
    demand(os.path.isabs(image), f"image {image} is a relative path: in memory a record holds an absolute one")
    image = os.path.relpath(image, os.path.abspath(folder)).replace(os.sep, "/")
    return record | {"image": image} if "image" in record else dict(record)


def write(path, records):
    """Write records as JSONL and return their number. All or nothing: a file beside, then `os.replace`.

    Raises RecordError where the file cannot be written, TypeError or ValueError for what JSON cannot hold (NaN).
    After these, and after any error of the iterator `records`, the old file stays and nothing new is left.
    Records are not validated here: a stage may keep rejected ones.
    """
    folder, beside, count = os.path.dirname(os.path.abspath(path)), f"{path}.tmp", 0
    demand(not os.path.isdir(path), f"{path}: is a folder: give the name of a file")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(beside, "wb")
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error.strerror}): choose another place") from None
    try:
        with file:
            for count, record in enumerate(records, 1):
                line = json.dumps(relative(record, folder), ensure_ascii=False, allow_nan=False)
                file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)
    return count


def open_image(path):
    """The image at `path` as a PIL image in mode RGB, as a viewer shows it. Raises RecordError.

    Turned upright by its EXIF tag. 16- and 32-bit grey values are scaled from the image's own range to 0..255:
    CT and MRI use 12 of 16 bits; clipped they would be white, divided by 256 black. Transparent parts show
    white. Of an animation, the first frame. Pixels alone: no metadata of the file goes along. One that is larger than
    MOST_BYTES or MOST_PIXELS, or narrower than 1 : MOST_OBLONG (more than a processor takes), is refused before it is decoded.
    """
    from PIL import Image, ImageOps
    try:
        demand_file(path)
        demand(os.path.getsize(path) <= MOST_BYTES, f"{path}: more than {MOST_BYTES >> 20} MiB: make it smaller")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # the library's own limit: more than ours
        with Image.open(path) as file:
            demand(file.width * file.height <= MOST_PIXELS,
                   f"{path}: {file.width} x {file.height} pixels, more than {MOST_PIXELS >> 20} Mi: make it smaller")
            demand(max(file.size) <= MOST_OBLONG * min(file.size),
                   f"{path}: {file.width} x {file.height} pixels, a strip: no model reads it, replace it")
            image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # I;16, I, F
            import numpy
            values = numpy.asarray(image, dtype=numpy.float64)  # (H, W)
            values = numpy.nan_to_num(values, posinf=0, neginf=0)
            values = (values - values.min()) * (255 / (numpy.ptp(values) or 1))
            image = Image.fromarray(values.round().astype(numpy.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image.info = {}  # a colour profile would go on into every PNG made of the image
        return image
    except RecordError:
        raise
    except FileNotFoundError:
        raise RecordError(f"{path}: no such image: correct the record's `image`, or --images at import") from None
    except Exception as error:  # a decoder raises whatever it likes at a broken file
        what = " ".join(str(error).replace(repr(str(path)), "").split()) or type(error).__name__
        raise RecordError(f"{path}: not a readable image ({what}): replace it or remove its records") from None


def unreadable(records, limit):
    """{image: why} of the records whose image cannot be read. Raises RecordError where these are more than `limit`, or all.

    `limit` is a share of the records. What --on-error skip sets aside, found before the first hour is spent.
    """
    whys = {}
    for path in {record["image"]: None for record in records}:
        try:
            open_image(path)
        except RecordError as error:
            whys[path] = str(error)
    bad = [whys[record["image"]] for record in records if record["image"] in whys]
    demand(len(bad) <= limit * len(records) and len(bad) < max(len(records), 1), bad and
           f"{bad[0]} (and {len(bad) - 1} more of {len(records)}: above --max-rejected {limit})")
    return whys


def image_hash(path):
    """SHA-256 of the file's bytes, in hex: two names of one image are one image. Raises RecordError."""
    demand_file(path)
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}: correct the record's `image`") from None


def split(records, fractions, seed, by="image"):
    """{"train": [...], "val": [...], "test": [...]} by image: no image, under whatever name, is in two of them.

    `fractions` are those of train, val and test in images, and sum to 1. The images, ordered by a hash of seed
    and content, are cut at the fractions: the order of the records does not matter, and is kept. Raises
    RecordError, also where a fraction above 0 is too small to get an image.
    """
    demand(by == "image", f"--by {by}: only `image` is known: split by question, train would see test's images")
    demand(len(fractions) == 3 and all(0 <= f <= 1 for f in fractions) and math.isclose(sum(fractions), 1),
           f"fractions {' + '.join(map(str, fractions))} of train, val and test: make them sum to 1")
    hashes = {path: image_hash(path) for path in {record["image"] for record in records}}
    order = sorted(set(hashes.values()), key=lambda h: hashlib.sha256(f"{seed}:{h}".encode()).digest())
    parts, start = {}, 0
    for i, name in enumerate(("train", "val", "test")):
        end = round(sum(fractions[:i + 1]) * len(order))
        demand(end > start or not fractions[i], f"{name}: {fractions[i]} of {len(order)} images is none: raise it")
        chosen, start = set(order[start:end]), end
        parts[name] = [record for record in records if hashes[record["image"]] in chosen]
    return parts


# ---------------------------------------------------------------------------------------------------------
# Public formats into records. A converter turns one row into drafts, one a question; `finish` makes a draft a
# valid record or says why it cannot be one, and every draft is counted.

def squash(name):
    """A name's letters alone: what `MR (Mag-netic Resonance Imaging)` and its kin have in common."""
    return re.sub("[^a-z]", "", name.casefold())


NAMES = {squash(name): name for name in MODALITIES + TASKS} | {
    "ctcomputedtomography": "CT", "computedtomography": "CT", "mr": "MRI", "mrmagneticresonanceimaging": "MRI",
    "magneticresonanceimaging": "MRI", "microscopyimages": "Microscopy", "fundus": "Fundus Photography",
    "octopticalcoherencetomography": "OCT", "opticalcoherencetomography": "OCT"}


def clean(value):
    """A public file's value as one line of text; "" for None (and NaN, which pandas writes) and for no text."""
    return " ".join(str(value).split()) if isinstance(value, (str, int, float)) else ""


def from_omnimedvqa(row):
    """OmniMedVQA, QA_information: the answer's text in `gt_answer`, options in `option_A` to `option_D`."""
    return [{"dataset": row.get("dataset"), "id": row.get("question_id"), "image": row.get("image_path"),
             "question": row["question"], "answer": row["gt_answer"],
             "options": [row.get(f"option_{letter}") for letter in LETTERS],
             "modality": row.get("modality_type", row.get("modality")), "task": row.get("question_type")}]


def from_medr1(row):
    """Med-R1 and R1-V: `What is it? A)x, B)y` in `problem`, `<answer> B </answer>` in `solution`.

    An option may hold commas and ` or `: the next begins at a letter with `)` behind a comma or a line's end.
    A problem without options is an open question, unless a letter answers it.
    """
    answer, image = parse_response(row["solution"]).prediction, row.get("image")
    head, *others = re.split(r"(?:,\s*|\n\s*)[B-Z]\)", row["problem"])
    first = list(re.finditer(r"(?:^|\s)A\)(?=\s*[^\s,])", head))
    if not others or not first:
        demand(answer not in list(LETTERS), "a letter for an answer, but no options A)..., B)...")
        return [{"image": image, "question": row["problem"], "answer": answer}]
    options = [head[first[-1].end():], *others]
    return [{"image": image, "question": head[:first[-1].start()], "options": options,
             "answer": dict(zip(LETTERS, options)).get(answer, answer)}]


VQARAD_TASKS = {"MODALITY": "Modality Recognition", "ORGAN": "Anatomy Identification", "ABN": "Disease Diagnosis",
                "PRES": "Disease Diagnosis", "PRSE": "Disease Diagnosis"}  # PRSE is a slip in the file


def from_vqarad(row):
    """VQA-RAD. A CLOSED question answered yes or no gets the options yes and no; all others are open.

    The task is that of the first `question_type` (there may be several) in VQARAD_TASKS, else Other Biological
    Attributes: where, how large, which colour. The modality is not given (`CHEST` may be X-ray or CT).
    """
    types = re.split(r"\W+", clean(row.get("question_type")).upper())
    closed = clean(row["answer_type"]).upper() == "CLOSED" and normalise(row["answer"]) in ("yes", "no")
    return [{"id": row.get("qid"), "image": row.get("image_name"), "question": row["question"],
             "answer": row["answer"], "options": ["yes", "no"] if closed else [],
             "task": next((VQARAD_TASKS[t] for t in types if t in VQARAD_TASKS), "Other Biological Attributes")}]


def from_llava(row):
    """LLaVA `conversations`: each question (human) and the reply after it (gpt) is one open question."""
    turns = [turn for turn in row["conversations"] if turn["from"] in ("human", "gpt")]
    return [{"id": row.get("id"), "image": row.get("image"), "question": turn["value"].replace("<image>", " "),
             "answer": reply["value"] if reply["from"] == "gpt" else ""}
            for turn, reply in zip(turns, [*turns[1:], {"from": None}]) if turn["from"] == "human"]


def from_medvlthinker(row):
    """MedVLThinker: `options` as JSON text {"A": ...}, `answer_label`, `answer`, `images`, perhaps `reasoning`."""
    options = json.loads(row["options"]) if isinstance(row["options"], str) else row["options"]
    options = options if isinstance(options, dict) else dict(zip(LETTERS, options or []))
    options = {letter: clean(options[letter]) for letter in sorted(options)}
    label, answer = clean(row.get("answer_label")).strip("().: ").upper(), clean(row["answer"])
    if label in options:
        demand(match_option(answer, list(options.values()))[0] in (None, options[label]), "label and answer disagree")
        answer = options[label]
    return [{"dataset": row.get("dataset_name"), "id": row.get("dataset_index"),
             "image": next((row[key] for key in ("images", "image", "image_path") if key in row), None),
             "question": row["question"], "answer": answer, "options": list(options.values()),
             "rationale": TAG.sub(" ", clean(row.get("reasoning")))}]


FORMATS = {  # name: the keys that tell it, its converter
    "omnimedvqa": ({"question", "gt_answer", "option_A"}, from_omnimedvqa),
    "medr1": ({"problem", "solution"}, from_medr1),
    "vqarad": ({"image_name", "question", "answer", "answer_type"}, from_vqarad),
    "llava": ({"conversations"}, from_llava),
    "medvlthinker": ({"question", "options", "answer"}, from_medvlthinker)}


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
        demand(name in FORMATS, f"format {name} is not known: it is one of {', '.join(FORMATS)}")
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
    demand(records, f"{src}: no row becomes a record: {reasons}: see --format and --images")
    unknown = Counter(f"{field} {record[field]}" for record in records for field in ("modality", "task")
                      if field in record and record[field] not in MODALITIES + TASKS)
    return records, {"rows": len(records) + skipped.total(), "skipped": dict(skipped), "unknown": dict(unknown)}


def load_rows(path):
    """The rows of a JSON array or JSON Lines file. Raises RecordError (`file:line: what: what to do`)."""
    demand_file(path)
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
    demand(name, f"{path}: format not recognised by its keys ({', '.join(keys) or 'none'}): see --format")
    return name


def finish(draft, fallback, folders, roots, taken):
    """The record of a draft, `answer` as the option's own text. Raises RecordError(reason) where there is none.

    The id is the data set's own, behind the data set's name; a repeated one gets -2, -3, ... (`taken` counts).
    """
    demand(isinstance(draft, dict), str(draft) if isinstance(draft, RecordError) else "row not of the format")
    dataset, own = clean(draft.get("dataset")) or fallback.split("-")[0], clean(draft.get("id"))
    record = {"id": own if own.startswith(dataset) else f"{dataset}-{own}" if own else fallback,
              "image": find_image(draft["image"], folders, roots)}
    for field in ("question", "answer"):
        record[field] = clean(draft[field])
        demand(normalise(record[field]), f"{field} is empty")
    options = [clean(option) for option in draft.get("options", []) if clean(option)]
    if options:
        answer, reason = match_option(record["answer"], options)
        demand(answer, reason)
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
    demand(len(values) < 2, "several images")
    path = values[0].get("path") if values and isinstance(values[0], dict) else values and values[0]
    demand(path and isinstance(path, str), "no image")
    found = [p for p in (os.path.abspath(os.path.join(folder, path)) for folder in folders) if os.path.isfile(p)]
    demand(found, "image file not found")
    demand(is_under(found[0], roots), "image outside of the folder of images, see --image-root")
    return found[0]


# ---------------------------------------------------------------------------------------------------------
# The command line.

def check(path, root=None):
    """Print what a file of records holds. Raises RecordError, after the tables, for images that do not open."""
    records, problems = list(read(path, ("id", "image"), root)), []
    images = {record["image"]: record["id"] for record in reversed(records)}
    for image, name in images.items():
        try:
            open_image(image)
        except RecordError as error:
            problems.append(f"{path}: record {name}: {error}")
    kinds = Counter(f"of kind {kind(record)}" for record in records)
    print_table([("records", len(records)), *kinds.items(), ("images", len(images)), ("problems", len(problems))])
    cells = Counter((record.get("modality", "(none)"), record.get("task", "(none)")) for record in records)
    modalities, tasks = (sorted(set(names)) for names in zip(*cells))
    print_table([("", *tasks), *((m, *(cells[m, task] for task in tasks)) for m in modalities)])
    demand(not problems, "".join(problems[:1]) + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))


def print_table(rows):
    """Print rows of cells as aligned columns, the first to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for row in rows:
        print("  ".join([str(row[0]).ljust(widths[0]), *(str(c).rjust(w) for c, w in zip(row[1:], widths[1:]))]))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are RecordErrors: one line, like every other mistake of a user."""
    def error(self, message):
        raise RecordError(f"{message}: see records.py --help")


def parse_args():
    style = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = Parser(description="Check, import or split files of records (JSONL).", **style)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="validate a file, open its images, count", **style)
    command.add_argument("file", help="records (JSONL)")
    command = commands.add_parser("import", help="make records of a public data set's file", **style)
    command.add_argument("src", help="JSON or JSONL file, or a folder whose *.json files are all read")
    command.add_argument("--out", required=True, help="records to write (JSONL)")
    command.add_argument("--format", choices=FORMATS, help="format of SRC; without it, told by the keys of its rows")
    command.add_argument("--images", help="folder that image paths start from; without it, that of SRC")
    command = commands.add_parser("split", help="split a file into train, val and test", **style)
    command.add_argument("file", help="records (JSONL)")
    command.add_argument("--out", required=True, help="folder for train.jsonl, val.jsonl and test.jsonl")
    command.add_argument("--by", choices=["image"], default="image", help="what must never be in two parts")
    command.add_argument("--train", type=float, default=0.8, help="fraction of the images for train.jsonl")
    command.add_argument("--val", type=float, default=0.1, help="fraction of the images for val.jsonl")
    command.add_argument("--test", type=float, default=0.1, help="fraction of the images for test.jsonl")
    command.add_argument("--seed", type=int, default=0, help="another seed gives another split")
    for command in commands.choices.values():
        command.add_argument("--image-root", help="folder that images may lie in, beside that of the file")
    return parser.parse_args()


def main():
    """Run one command; return the exit status: 0, or 2 after one line on stderr for a user's mistake."""
    try:
        args = parse_args()
        if args.command == "check":
            check(args.file, args.image_root)
        elif args.command == "import":
            demand(os.path.abspath(args.out) != os.path.abspath(args.src), "--out is SRC: give it another name")
            records, notes = import_records(args.src, args.format, args.images, args.image_root)
            write(args.out, records)
            skipped = [(f"skipped: {reason}", count) for reason, count in notes["skipped"].items()]
            unknown = [(f"kept, though unknown: {name}", count) for name, count in notes["unknown"].items()]
            print_table([("rows", notes["rows"]), ("records", len(records)), *skipped, *unknown])
        else:
            records = list(read(args.file, ("id", "image"), args.image_root))
            parts = split(records, (args.train, args.val, args.test), args.seed, args.by)
            paths = {name: os.path.abspath(os.path.join(args.out, f"{name}.jsonl")) for name in parts}
            demand(os.path.abspath(args.file) not in paths.values(), "--out holds FILE: give another folder")
            counts = [(name, write(paths[name], parts[name])) for name in parts]
            print_table([("", "records", "images"),
                         *((name, count, len({r["image"] for r in parts[name]})) for name, count in counts)])
    except RecordError as error:
        print(f"records.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
