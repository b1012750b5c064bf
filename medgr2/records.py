"""The record that the five stages exchange, and files of records.

One JSON object per line, UTF-8, `\\n`. A stage adds fields; it never renames or overwrites one. The table of
fields is in docs/formats.md. There are three kinds of record: an *image* (`id` and `image`), a *report*
(`report` too) and a *question* (`question` and `answer` too, perhaps `options` and `rationale`). Only
`grpo.py --unlabelled` takes a question without an answer.

    python -m medgr2.records check FILE
    python -m medgr2.records show FILE [--number 3]
    python -m medgr2.records import SRC --out FILE [--images FOLDER] [--map question=COLUMN answer=COLUMN]
    python -m medgr2.records split FILE --out FOLDER --train 0.8 --val 0.1 --test 0.1 --seed 0
"""

import hashlib
import json
import math
import os
import random
import sys
from collections import Counter

from medgr2 import cli
from medgr2.errors import RecordError, require
from medgr2.images import find_file, hash_image, is_under, open_image, require_file
from medgr2.progress import progress, tell
from medgr2.prompts import MAX_OPTIONS, TAG, normalise

FIELDS = {
    "id": str,
    "image": str,
    "question": str,
    "answer": str,
    "options": list,
    "rationale": str,
    "report": str,
    "modality": str,
    "task": str,
    "source": str,
    "paradigm": str,
    "cycle": int,
    "parent": str,
    "reward": dict,
}
# The fields that must not be empty if they are there.
FILLED = ("id", "image", "question", "answer", "report")
# Fields whose values many records share.
REPEATED = ("options", "answer", "modality", "task", "source", "paradigm", "generator")
# What a question record must have: read_records(path, QUESTION).
QUESTION = ("id", "image", "question", "answer")
# The same without its answer: grpo.py --unlabelled.
UNLABELLED = ("id", "image", "question")
# The range of R, the overall reward.
R_MIN, R_MAX = -6, 10
MAX_LINE_BYTES = 16 << 20
# Characters of a field that `show` prints.
SHOWN = 600
# The root for a reader that opens no image: read_records(path, root=ANYWHERE).
ANYWHERE = os.sep


# ---------------------------------------------------------------------------------------------------------
# A record.


def record_kind(record):
    """What the record holds: `report` (first, as in reference_response), `question` or only `image`."""
    for field in ("report", "question"):
        if field in record:
            return field
    return "image"


def validate(record, fields=("id",)):
    """Raise RecordError unless `record` has `id`, the fields in `fields`, and valid types and values.

    Fields that are not in FIELDS are not checked.
    """
    for field in ("id", *fields):
        require(field in record, f"no field `{field}`: add it")
    for field, kind in FIELDS.items():
        if field in record:
            validate_field(field, record[field], kind)
    require("\0" not in record.get("image", ""), "`image` holds a zero byte: correct it")
    is_one = not ("report" in record and ("question" in record or "answer" in record))
    require(is_one, "a question and a `report` in one record: make them two records")
    options = record.get("options", [])
    if "options" in record:
        validate_options(options, record.get("answer"))
    for text in (*(record.get(field, "") for field in ("question", "answer", "rationale")), *options):
        require(not TAG.search(text), "a text holds a tag of the reply's form, like <answer>: remove the tag")
    is_known = record.get("source") in (None, "expert", "generated")
    require(is_known, "`source` is not expert or generated: correct it")
    if "reward" in record:
        validate_reward(record["reward"])


def validate_field(field, value, kind):
    """Raise RecordError unless the value has the field's type and is not empty where it must not be."""
    # Not isinstance: True is an int, but no cycle number.
    is_kind = type(value) is kind
    require(is_kind, f"`{field}` is not of type {kind.__name__}: correct it or leave it out")
    if field in FILLED:
        require(normalise(value), f"`{field}` is empty: fill it or leave it out")


def validate_options(options, answer):
    """Raise RecordError unless `options` are distinct texts and `answer`, if any, is exactly one of them."""
    for option in options:
        is_filled = isinstance(option, str) and normalise(option)
        require(is_filled, "an option is empty or not a string: every option is a text")
    limits = f"2 to {MAX_OPTIONS}"
    is_valid = 2 <= len(options) <= MAX_OPTIONS
    require(is_valid, f"`options` are not {limits}: leave the field out for an open question")
    is_distinct = len({normalise(option) for option in options}) == len(options)
    require(is_distinct, "two options are the same but for case, spacing and punctuation: remove one")
    is_offered = answer is None or answer in options
    require(is_offered, "`answer` is not one of `options`: copy the option's text exactly")


def validate_reward(reward):
    """Raise RecordError unless `reward` holds numbers and an `overall` reward in its range."""
    is_numeric = all(type(value) in (int, float) for value in reward.values())
    is_valid = is_numeric and "overall" in reward and R_MIN <= reward["overall"] <= R_MAX
    form = f"{{overall: a number in [{R_MIN}, {R_MAX}], a head: a number}}"
    require(is_valid, f"`reward` is not {form}: score the record again")


def without_nulls(record):
    """The record without null fields: pandas and `datasets` write null for what is missing.

    Names and REPEATED texts are one object in all records: a million of them must fit into memory.
    """
    kept = {}
    for field, value in record.items():
        if value is not None or field not in FIELDS:
            kept[sys.intern(field)] = share(value) if field in REPEATED else value
    if isinstance(kept.get("reward"), dict):
        heads = kept["reward"].items()
        kept["reward"] = {sys.intern(head): value for head, value in heads if value is not None}
    return kept


def share(value):
    """Equal texts, also in a list, as one object; anything else as it is."""
    if type(value) is list:
        return [sys.intern(text) if type(text) is str else text for text in value]
    return sys.intern(value) if type(value) is str else value


def with_relative_image(record, folder):
    """A copy of `record` for a file in `folder`: `image` is relative to the folder, with forward slashes.

    Raises RecordError if `image` is relative already: its folder is not known.
    """
    if "image" not in record:
        return dict(record)
    image = record["image"]
    is_absolute = os.path.isabs(image)
    require(is_absolute, f"image {image} is a relative path: in memory a record holds an absolute one")
    name = os.fsencode(os.path.relpath(image, os.path.abspath(folder))).decode(errors="surrogateescape")
    return record | {"image": name.replace(os.sep, "/")}


# ---------------------------------------------------------------------------------------------------------
# A file of records.


def read_records(path, fields=("id",), root=None, on_error=None):
    """Yield the validated records of a JSONL file. `image` is relative in the file and absolute here.

    `fields`: the fields that every record must have. `root`: images may be under this folder, links followed,
    and not only under the folder of the file. Blank lines are skipped, and fields that are null are absent.
    A line that is not a valid record, repeats an `id` or has its image elsewhere is a RecordError
    (`file:line: what is wrong: what to do`): raised, or given to `on_error(error)`, and left out.
    Raises RecordError also if there is no such file or no record in it.
    """
    folder = os.path.dirname(os.path.abspath(path))
    roots = [os.path.realpath(folder), os.path.realpath(root or folder)]
    line_of_id, number, first_problem = {}, 0, None
    require_file(path)
    try:
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            try:
                record = read_record(line, fields, folder, roots)
                first = line_of_id.get(record["id"], number)
                require(first == number, f"`id` is already on line {first}: make it unique")
            except (ValueError, RecursionError) as error:
                problem = RecordError(f"{path}:{number}: {explain(error)}")
                if on_error is None:
                    raise problem from None
                first_problem = first_problem or problem
                on_error(problem)
                continue
            line_of_id[record["id"]] = number
            yield record
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}: give a JSONL file of records") from None
    require(line_of_id or not first_problem, f"{first_problem} (and no other line is a record)")
    require(line_of_id, f"{path}:{number or 1}: no records: the file is empty, give another")


def group_by(rows, key):
    """{key(row): the rows that have it}, in the order in which they are met."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def read_kept(path, fields=("id",), root=None, limit=0):
    """The records of a file. Bad lines are printed and left out, up to this share of all lines.

    Raises RecordError as `read_records`, and if there are more bad lines.
    """
    problems = []
    rows = list(read_records(path, fields, root, problems.append if limit else None))
    if problems:
        lines = len(rows) + len(problems)
        more = f"(and {len(problems) - 1} more of {lines}: above --max-rejected {limit})"
        require(len(problems) <= limit * lines, f"{problems[0]} {more}")
    for problem in problems:
        tell(f"left out: {problem}")
    return rows


def read_answered(path, fields, root=None):
    """read_records, without GRPO's rollouts to questions that have no answer (grpo.py --unlabelled).

    Raises RecordError for any other record without an answer.
    """
    for row in read_records(path, fields, root):
        is_known = "answer" in row or "record" in row
        require(is_known, f"{path}: record {row['id']}: no field `answer`: add it")
        if "answer" in row:
            yield row


def require_images(path, rows):
    """Raise RecordError if the image of one of these records of a file is missing.

    Stages call it before they compute anything.
    """
    seen = set()
    for row in rows:
        if row["image"] not in seen:
            missing = f"{path}: record {row['id']}: no image {row['image']}: correct the record's `image`"
            require(os.path.isfile(row["image"]), missing)
            seen.add(row["image"])


def read_record(line, fields, folder, roots):
    """The validated record on a line of a file in `folder`. Raises what `explain` explains."""
    is_short = len(line) <= MAX_LINE_BYTES
    require(is_short, f"a line of more than {MAX_LINE_BYTES >> 20} MiB: write one record per line")
    record = without_nulls(parse_line(line))
    validate(record, fields)
    if "image" in record:
        # In a file a name is UTF-8, whatever the locale's encoding of names is.
        record["image"] = find_file(os.fsdecode(record["image"].encode()), folder)
        require_under(record["image"], roots)
    return record


def read_lines(path):
    """Yield the lines of a file, as bytes. One that is too long comes in pieces of MAX_LINE_BYTES + 1."""
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            yield line


def parse_line(line):
    """The JSON object on a line. Raises ValueError or RecursionError (see `explain`)."""
    record = json.loads(line.decode("utf-8-sig"), parse_float=parse_finite, parse_constant=refuse_constant)
    require(isinstance(record, dict), "not an object: write one JSON object per line")
    if b"\\ud" in line.lower():
        require_encodable(record)
    return record


def parse_finite(text):
    """A JSON number as a float. Raises RecordError for 1e999, which Python would take for infinity."""
    is_finite = math.isfinite(float(text))
    require(is_finite, f"{text[:20]} is too large a number: write another, or leave the field out")
    return float(text)


def refuse_constant(name):
    raise RecordError(f"{name} is not JSON: write a number, or leave the field out")


def require_encodable(record):
    """Raise RecordError if a text holds half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecordError("half a surrogate pair (\\ud800 to \\udfff): remove it") from None


def require_under(image, roots):
    """Raise RecordError unless the image is under one of `roots`; the user can set the second one."""
    advice = "correct it, or give the folder of all images as --image-root"
    place = os.path.realpath(image)
    require(is_under(image, roots), f"image {place} is not under {roots[1]}: {advice}")


def explain(error):
    """What is wrong with a line that could not be read, and what to do."""
    if isinstance(error, RecordError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start}): save the file as UTF-8"
    return f"not JSON ({error}): correct or remove the line"


def write_records(path, rows):
    """Write records as JSONL and return their number. The file is complete or not written at all.

    Raises RecordError if the file cannot be written, TypeError or ValueError for what JSON cannot hold (NaN).
    After these, and after an error of the iterator `rows`, an old file is still there and nothing new is.
    The records are not validated: a stage may write rejected ones.
    """
    folder, temporary, count = os.path.dirname(os.path.abspath(path)), f"{path}.tmp", 0
    require(not os.path.isdir(path), f"{path}: is a folder: give the name of a file")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(temporary, "wb")
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error.strerror}): choose another place") from None
    try:
        with file:
            for count, record in enumerate(rows, 1):
                line = json.dumps(with_relative_image(record, folder), ensure_ascii=False, allow_nan=False)
                file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return count


def split_records(rows, fractions, seed, by="image"):
    """{"train": [...], "val": [...], "test": [...]}: no image, under whatever name, is in two of them.

    `fractions` of train, val and test count images and sum to 1. The images are ordered by a hash of seed and
    content and cut at the fractions, so the order of the records does not matter; it is kept.
    Raises RecordError, also if a fraction above 0 is too small to get an image.
    """
    problem = "only `image` is known: split by question, train would see the images of test"
    require(by == "image", f"--by {by}: {problem}")
    is_valid = len(fractions) == 3 and all(0 <= f <= 1 for f in fractions) and math.isclose(sum(fractions), 1)
    shown = " + ".join(map(str, fractions))
    require(is_valid, f"fractions {shown} of train, val and test: make them sum to 1")
    hashes = {path: hash_image(path) for path in {row["image"] for row in rows}}
    order = sorted(set(hashes.values()), key=lambda h: hashlib.sha256(f"{seed}:{h}".encode()).digest())
    parts, start = {}, 0
    for i, name in enumerate(("train", "val", "test")):
        end = round(sum(fractions[: i + 1]) * len(order))
        is_enough = end > start or not fractions[i]
        require(is_enough, f"{name}: {fractions[i]} of {len(order)} images is none: raise it")
        chosen, start = set(order[start:end]), end
        parts[name] = [row for row in rows if hashes[row["image"]] in chosen]
    return parts


# ---------------------------------------------------------------------------------------------------------
# The command line.


def check(path, root=None, limit=0):
    """Print what a file of records holds. Raises RecordError, after the tables, if an image does not open."""
    rows = read_kept(path, ("id", "image"), root, limit)
    # The first record of each image.
    id_of_image = {row["image"]: row["id"] for row in reversed(rows)}
    problems = []
    for image, name in progress(id_of_image.items(), "images"):
        try:
            open_image(image)
        except RecordError as error:
            problems.append(f"{path}: record {name}: {error}")
    print_counts(rows, len(id_of_image), len(problems))
    print_cells(rows)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RecordError(problems[0] + more)


def print_counts(rows, images, problems):
    """Print how many records of each kind, images and problems there are."""
    kinds = Counter(f"{record_kind(row)} records" for row in rows)
    counts = [("records", len(rows)), *kinds.items(), ("images", images), ("problems", problems)]
    print(cli.format_table(counts, ["", "count"]))


def print_cells(rows):
    """Print the number of records by modality and task."""
    cells = Counter((row.get("modality", "(none)"), row.get("task", "(none)")) for row in rows)
    modalities = sorted({modality for modality, _ in cells})
    tasks = sorted({task for _, task in cells})
    lines = [(modality, *(cells[modality, task] for task in tasks)) for modality in modalities]
    print(cli.format_table(lines, ["", *tasks]))


def show(path, number, seed=None, root=None):
    """Print `number` records, with their images' paths: the first or, with a seed, some drawn at random."""
    rows = list(read_records(path, root=root))
    chosen = range(min(number, len(rows)))
    if seed is not None:
        chosen = sorted(random.Random(seed).sample(range(len(rows)), len(chosen)))
    for i in chosen:
        fields = rows[i] | ({"image": describe_image(rows[i]["image"])} if "image" in rows[i] else {})
        for name, value in fields.items():
            print(f"{show_value(name):10}  {show_value(value)}")
        print()
    print(f"{len(chosen)} of {len(rows)} records")


def describe_image(path):
    """The path, and the image's size in pixels or why it cannot be opened."""
    try:
        return f"{path} ({' x '.join(map(str, open_image(path).size))})"
    except RecordError as error:
        # It begins with the path.
        return str(error)


def show_value(value):
    """A field's value on one line. Control characters, such as escape sequences, are spelled out."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text)} characters)"


def import_file(args):
    """Import a public data set's file or folder into --out and print what was kept and skipped."""
    from medgr2 import formats

    require(os.path.abspath(args.out) != os.path.abspath(args.src), "--out is SRC: give it another name")
    keep = {field: getattr(args, field) for field in ("language", "split") if getattr(args, field)}
    rows, notes = formats.import_records(
        args.src,
        args.format,
        args.images,
        args.image_root,
        fields=cli.parse_pairs("--map", args.map),
        keep=keep,
        out=os.path.join(os.path.dirname(os.path.abspath(args.out)), "images"),
        stop=args.on_error == "stop",
    )
    write_records(args.out, rows)
    counts = [("rows", notes["rows"]), ("records", len(rows))]
    counts += [(f"skipped: {reason}", count) for reason, count in notes["skipped"].items()]
    counts += [(f"kept, though unknown: {name}", count) for name, count in notes["unknown"].items()]
    print(cli.format_table(counts, ["", "count"]))
    for reason, places in notes["where"].items():
        more = ", ..." if notes["skipped"][reason] > len(places) else ""
        print(f"{reason}: {', '.join(places)}{more}")


def split_file(path, out, fractions, seed, by, root=None, limit=0):
    """Split a file of records into train.jsonl, val.jsonl and test.jsonl in `out` and print their sizes."""
    parts = split_records(read_kept(path, ("id", "image"), root, limit), fractions, seed, by)
    paths = {name: os.path.abspath(os.path.join(out, f"{name}.jsonl")) for name in parts}
    require(os.path.abspath(path) not in paths.values(), "--out holds FILE: give another folder")
    sizes = []
    for name, rows in parts.items():
        sizes.append((name, write_records(paths[name], rows), len({row["image"] for row in rows})))
    print(cli.format_table(sizes, ["", "records", "images"]))


def parse_args():
    from medgr2.formats import FORMATS

    p = cli.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="validate a file, open its images, count")
    c.add_argument("file", help="records (JSONL)")
    c = commands.add_parser("show", help="print a few records, with their images' paths")
    c.add_argument("file", help="records (JSONL)")
    c.add_argument("--number", type=cli.number(int, 1), default=3, help="records to print")
    c.add_argument("--seed", type=int, help="draw them at random, instead of the first")
    c = commands.add_parser("import", help="make records of a public data set's file")
    c.add_argument(
        "src", help="file (JSON, JSONL, CSV, TSV, Parquet, Arrow, pickle) or a folder of such files"
    )
    c.add_argument("--out", required=True, help="records to write (JSONL)")
    c.add_argument("--format", choices=FORMATS, help="format of SRC, if not recognised by its columns")
    c.add_argument("--map", nargs="+", default=[], metavar="OURS=COLUMN", help="columns of any other format")
    c.add_argument("--images", help="folder that image paths start from, if not that of SRC")
    c.add_argument("--language", help="keep only the rows in this language, as SRC names it")
    c.add_argument("--split", help="keep only the rows of this split, by their column or the file's name")
    c = commands.add_parser("split", help="split a file into train, val and test")
    c.add_argument("file", help="records (JSONL)")
    c.add_argument("--out", required=True, help="folder for train.jsonl, val.jsonl and test.jsonl")
    c.add_argument("--by", choices=["image"], default="image", help="what must never be in two parts")
    c.add_argument("--train", type=float, default=0.8, help="fraction of the images for train.jsonl")
    c.add_argument("--val", type=float, default=0.1, help="fraction of the images for val.jsonl")
    c.add_argument("--test", type=float, default=0.1, help="fraction of the images for test.jsonl")
    c.add_argument("--seed", type=int, default=0, help="another seed gives another split")
    for c in commands.choices.values():
        c.add_argument("--image-root", help="folder that images may be in, besides the folder of the file")
        c.add_argument(
            "--on-error", choices=("stop", "skip"), default="stop", help="at a row that is not a record"
        )
    commands.choices["import"].set_defaults(on_error="skip")
    return p.parse_args()


def main(args):
    # With skip any number of lines may be left out.
    limit = float(args.on_error == "skip")
    if args.command == "check":
        check(args.file, args.image_root, limit)
    elif args.command == "show":
        show(args.file, args.number, args.seed, args.image_root)
    elif args.command == "import":
        import_file(args)
    else:
        fractions = (args.train, args.val, args.test)
        split_file(args.file, args.out, fractions, args.seed, args.by, args.image_root, limit)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
