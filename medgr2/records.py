"""A line of JSONL: the record that the five stages exchange, and files of them.

One JSON object per line, UTF-8, `\\n`. A stage adds fields; it never renames or overwrites one. docs/formats.md has the table of
fields. Three kinds of record share it: an *image* (`id`, `image`), a *report* (and `report`), a *question* (and `question`,
`answer`, perhaps `options`, `rationale`).

    python -m medgr2.records check FILE
    python -m medgr2.records import SRC --out FILE [--format omnimedvqa] [--images FOLDER]
    python -m medgr2.records split FILE --out FOLDER --train 0.8 --val 0.1 --test 0.1 --seed 0
"""

import hashlib
import json
import math
import os
from collections import Counter

from medgr2 import cli
from medgr2.errors import RecordError, require
from medgr2.images import hash_image, is_under, open_image, require_file
from medgr2.prompts import TAG, normalise

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

# never empty where they are
FILLED = ("id", "image", "question", "answer", "report")

# bytes of a line
MOST_LINE = 16 << 20

# what a question record must have: read(path, QUESTION)
QUESTION = ("id", "image", "question", "answer")

# read(path, root=ANYWHERE): for a reader that opens no image
ANYWHERE = os.sep


def finite(text):
    """JSON's number as a float. Raises RecordError for 1e999, which Python would take for infinity."""
    require(
        math.isfinite(float(text)),
        f"{text[:20]} is too large a number: write another, or leave the field out",
    )
    return float(text)


def record_kind(record):
    """`report`, `question` or `image`: what the record holds beside its image (as in `response_of`)."""
    return next((field for field in ("report", "question") if field in record), "image")


def validate(record, fields=("id",)):
    """Raise RecordError unless `record` has `id`, the fields in `fields`, and the types and values of the table.

    Fields that the table does not name are free.
    """
    for field in ("id", *fields):
        require(field in record, f"no field `{field}`: add it")
    for field in [field for field in FIELDS if field in record]:
        # `is`: True is no cycle number
        require(
            type(record[field]) is FIELDS[field],
            f"`{field}` is not of type {FIELDS[field].__name__}: correct it or leave it out",
        )
        require(
            field not in FILLED or normalise(record[field]), f"`{field}` is empty: fill it or leave it out"
        )
    require("\0" not in record.get("image", ""), "`image` holds a zero byte: correct it")
    if "options" in record:
        validate_options(record["options"], record.get("answer"))
    texts = [record.get(field, "") for field in ("question", "answer", "rationale")] + record.get(
        "options", []
    )
    require(
        not any(map(TAG.search, texts)),
        "a text holds a tag of the reply's form, like <answer>: remove the tag",
    )
    require(
        record.get("source") in (None, "expert", "generated"),
        "`source` is not expert or generated: correct it",
    )
    reward = record.get("reward", {"overall": 0})
    require(
        all(type(value) in (int, float) for value in reward.values())
        and -6 <= reward.get("overall", 99) <= 10,
        "`reward` is not {overall: a number in [-6, 10], a head: a number}: score the record again",
    )


def validate_options(options, answer):
    """Raise RecordError unless `options` are 2 to 26 distinct texts and `answer`, if any, is exactly one of them."""
    require(
        all(isinstance(option, str) and normalise(option) for option in options),
        "an option is empty or not a string: every option is a text",
    )
    require(2 <= len(options) <= 26, "`options` are not 2 to 26: leave the field out for an open question")
    require(
        len({normalise(option) for option in options}) == len(options),
        "two options are the same but for case, spacing and punctuation: remove one",
    )
    require(
        answer is None or answer in options,
        "`answer` is not one of `options`: copy the option's text exactly",
    )


def read_records(path, fields=("id",), root=None):
    """Stream the records of a JSONL file, validated, `image` as an absolute path (on disk: relative to the file).

    Every image must lie under the file's folder, or under `root`, links followed. Raises RecordError, `file:line: what: what
    to do`, at the first line that is not UTF-8, JSON, an object and valid, leads to an image elsewhere, or repeats an `id`;
    and where the file is missing, a folder, or has no record. Blank lines are skipped.
    """
    folder, lines, number = os.path.dirname(os.path.abspath(path)), {}, 0
    roots = [os.path.realpath(place) for place in (folder, root or folder)]
    require_file(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), 1):
                require(
                    len(line) <= MOST_LINE,
                    f"a line of more than {MOST_LINE >> 20} MiB: write one record a line",
                )
                if not line.strip():
                    continue
                record = json.loads(
                    line.decode("utf-8-sig"),
                    parse_float=finite,
                    parse_constant=lambda name: require(
                        False, f"{name} is not JSON: write a number, or leave the field out"
                    ),
                )
                require(isinstance(record, dict), "not an object: write one JSON object a line")
                require(
                    b"\\ud" not in line.lower() or is_text(record),
                    "half a surrogate pair (\\ud800 to \\udfff): remove it",
                )
                validate(record, fields)
                first = lines.setdefault(record["id"], number)
                require(first == number, f"`id` is already on line {first}: make it unique")
                if "image" in record:
                    record["image"] = os.path.abspath(os.path.join(folder, record["image"]))
                    require(
                        is_under(record["image"], roots),
                        f"image {os.path.realpath(record['image'])} is not under {roots[1]}: "
                        "correct it, or give the folder of all images as --image-root",
                    )
                yield record
        require(lines, "no records: the file is empty, give another")
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


def with_relative_image(record, folder):
    """A copy of `record` as it stands on disk in `folder`: `image` relative to it, with forward slashes.

    Raises RecordError where `image` is not absolute: nobody could say what it is relative to.
    """
    image = record.get("image", os.sep)
    require(
        os.path.isabs(image), f"image {image} is a relative path: in memory a record holds an absolute one"
    )
    image = os.path.relpath(image, os.path.abspath(folder)).replace(os.sep, "/")
    return record | {"image": image} if "image" in record else dict(record)


def write_records(path, records):
    """Write records as JSONL and return their number. All or nothing: a file beside, then `os.replace`.

    Raises RecordError where the file cannot be written, TypeError or ValueError for what JSON cannot hold (NaN).
    After these, and after any error of the iterator `records`, the old file stays and nothing new is left.
    Records are not validated here: a stage may keep rejected ones.
    """
    folder, beside, count = os.path.dirname(os.path.abspath(path)), f"{path}.tmp", 0
    require(not os.path.isdir(path), f"{path}: is a folder: give the name of a file")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(beside, "wb")
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error.strerror}): choose another place") from None
    try:
        with file:
            for count, record in enumerate(records, 1):
                line = json.dumps(with_relative_image(record, folder), ensure_ascii=False, allow_nan=False)
                file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)
    return count


def split_records(records, fractions, seed, by="image"):
    """{"train": [...], "val": [...], "test": [...]} by image: no image, under whatever name, is in two of them.

    `fractions` are those of train, val and test in images, and sum to 1. The images, ordered by a hash of seed
    and content, are cut at the fractions: the order of the records does not matter, and is kept. Raises
    RecordError, also where a fraction above 0 is too small to get an image.
    """
    require(
        by == "image", f"--by {by}: only `image` is known: split by question, train would see test's images"
    )
    require(
        len(fractions) == 3 and all(0 <= f <= 1 for f in fractions) and math.isclose(sum(fractions), 1),
        f"fractions {' + '.join(map(str, fractions))} of train, val and test: make them sum to 1",
    )
    hashes = {path: hash_image(path) for path in {record["image"] for record in records}}
    order = sorted(set(hashes.values()), key=lambda h: hashlib.sha256(f"{seed}:{h}".encode()).digest())
    parts, start = {}, 0
    for i, name in enumerate(("train", "val", "test")):
        end = round(sum(fractions[: i + 1]) * len(order))
        require(
            end > start or not fractions[i],
            f"{name}: {fractions[i]} of {len(order)} images is none: raise it",
        )
        chosen, start = set(order[start:end]), end
        parts[name] = [record for record in records if hashes[record["image"]] in chosen]
    return parts


# ---------------------------------------------------------------------------------------------------------
# The command line.


def check(path, root=None):
    """Print what a file of records holds. Raises RecordError, after the tables, for images that do not open."""
    rows, problems = list(read_records(path, ("id", "image"), root)), []
    images = {record["image"]: record["id"] for record in reversed(rows)}
    for image, name in images.items():
        try:
            open_image(image)
        except RecordError as error:
            problems.append(f"{path}: record {name}: {error}")
    kinds = Counter(f"{record_kind(record)} records" for record in rows)
    counts = [("records", len(rows)), *kinds.items(), ("images", len(images)), ("problems", len(problems))]
    print(cli.format_table(counts, ["", "count"]))
    cells = Counter((record.get("modality", "(none)"), record.get("task", "(none)")) for record in rows)
    modalities, tasks = (sorted(set(names)) for names in zip(*cells))
    print(cli.format_table([(m, *(cells[m, task] for task in tasks)) for m in modalities], ["", *tasks]))
    more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    require(not problems, "".join(problems[:1]) + more)


def import_file(src, out, format=None, images=None, root=None):
    """Make records of a public data set's file or folder, write them to `out` and print what was kept and skipped."""
    from medgr2 import formats

    require(os.path.abspath(out) != os.path.abspath(src), "--out is SRC: give it another name")
    rows, notes = formats.import_records(src, format, images, root)
    write_records(out, rows)
    skipped = [(f"skipped: {reason}", count) for reason, count in notes["skipped"].items()]
    unknown = [(f"kept, though unknown: {name}", count) for name, count in notes["unknown"].items()]
    print(
        cli.format_table([("rows", notes["rows"]), ("records", len(rows)), *skipped, *unknown], ["", "count"])
    )


def split_file(path, out, fractions, seed, by, root=None):
    """Split a file of records into train.jsonl, val.jsonl and test.jsonl in the folder `out` and print their sizes."""
    parts = split_records(list(read_records(path, ("id", "image"), root)), fractions, seed, by)
    paths = {name: os.path.abspath(os.path.join(out, f"{name}.jsonl")) for name in parts}
    require(os.path.abspath(path) not in paths.values(), "--out holds FILE: give another folder")
    sizes = [
        (name, write_records(paths[name], rows), len({r["image"] for r in rows}))
        for name, rows in parts.items()
    ]
    print(cli.format_table(sizes, ["", "records", "images"]))


def parse_args():
    from medgr2.formats import FORMATS

    p = cli.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="validate a file, open its images, count")
    c.add_argument("file", help="records (JSONL)")
    c = commands.add_parser("import", help="make records of a public data set's file")
    c.add_argument("src", help="JSON or JSONL file, or a folder whose *.json files are all read")
    c.add_argument("--out", required=True, help="records to write (JSONL)")
    c.add_argument(
        "--format", choices=FORMATS, help="format of SRC; without it, told by the keys of its rows"
    )
    c.add_argument("--images", help="folder that image paths start from; without it, that of SRC")
    c = commands.add_parser("split", help="split a file into train, val and test")
    c.add_argument("file", help="records (JSONL)")
    c.add_argument("--out", required=True, help="folder for train.jsonl, val.jsonl and test.jsonl")
    c.add_argument("--by", choices=["image"], default="image", help="what must never be in two parts")
    c.add_argument("--train", type=float, default=0.8, help="fraction of the images for train.jsonl")
    c.add_argument("--val", type=float, default=0.1, help="fraction of the images for val.jsonl")
    c.add_argument("--test", type=float, default=0.1, help="fraction of the images for test.jsonl")
    c.add_argument("--seed", type=int, default=0, help="another seed gives another split")
    for c in commands.choices.values():
        c.add_argument("--image-root", help="folder that images may lie in, beside that of the file")
    return p.parse_args()


def main(args):
    if args.command == "check":
        check(args.file, args.image_root)
    elif args.command == "import":
        import_file(args.src, args.out, args.format, args.images, args.image_root)
    else:
        split_file(
            args.file, args.out, (args.train, args.val, args.test), args.seed, args.by, args.image_root
        )


if __name__ == "__main__":
    cli.run_main(main, parse_args())
