"""Bad input to every reader and stage: it is read right, or one line says what is wrong and what to do.

python tests/test_bad_input.py    writes docs/bad_input.md from the cases below and what the scripts say
"""

import datetime
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import eval as evaluation
import generate
import grpo
import reward
import sft
from analysis import report
from medgr2 import cli, leakage, loading, records
from medgr2.images import open_image

DOC = ROOT / "docs" / "bad_input.md"
# The first word of a command: a stage's script, or a module for `python -m`.
SCRIPTS = {
    "generate.py": generate,
    "reward.py": reward,
    "sft.py": sft,
    "grpo.py": grpo,
    "eval.py": evaluation,
    "medgr2.records": records,
    "medgr2.leakage": leakage,
    "analysis.report": report,
}
SUBCOMMANDS = ("check", "split", "import", "train", "score")
CHECK = "medgr2.records check {d}/r.jsonl"
IMPORT = "medgr2.records import {d}/r.jsonl --out {o}"
TABLES = "medgr2.records import {d}/t --out {o}"
REPORT = "analysis.report --metrics {d}/r.jsonl --out {o}"
# Every command that reads records. {d} is the folder of a case, {o} its output, {t} the folder of the toy.
READERS = {
    "medgr2.records check": CHECK,
    "medgr2.records split": "medgr2.records split {d}/r.jsonl --out {o}",
    "generate.py": "generate.py --images {d}/r.jsonl --model {t}/generator --out {o}",
    "reward.py train": "reward.py train --model {t}/policy --data {d}/r.jsonl --holdout 0.5 --steps 1"
    " --out {o}",
    "reward.py score": "reward.py score --model {d}/rm --data {d}/r.jsonl --keep 0.5 --out {o}",
    "sft.py": "sft.py --model {t}/policy --data {d}/r.jsonl --epochs 1 --out {o}",
    "grpo.py": "grpo.py --model {t}/policy --reward {d}/rm --data {d}/r.jsonl --steps 1 --prompts 2 --group 2"
    " --kl 0 --out {o}",
    "eval.py": "eval.py --model {t}/policy --data {d}/r.jsonl --max-new-tokens 4 --out {o}",
    "medgr2.leakage": "medgr2.leakage --train {d}/r.jsonl --test {d}/r.jsonl --out {o}",
}


def always(folder):
    return True


class Case(NamedTuple):
    kind: str
    name: str
    # A part of the error message; "read" if the input is accepted.
    says: str
    # make(folder) writes the files.
    make: Callable
    command: str = CHECK
    # holds(folder): was an accepted input read right?
    holds: Callable = always


# ---------------------------------------------------------------------------------------------------------
# Files of records.


def question(**change):
    row = {
        "id": "q1",
        "image": "a.png",
        "question": "Which?",
        "options": ["CT", "MRI"],
        "answer": "CT",
        "source": "expert",
    } | change
    return {k: v for k, v in row.items() if v is not ...}


def jsonl(*rows):
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n"


def file(data):
    """A record file of these bytes, and the good image a.png beside it."""

    def make(folder):
        Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "a.png")
        (folder / "r.jsonl").write_bytes(data)

    return make


def third(line):
    """The line is the third of a file, after a good one and a blank one."""
    return file(jsonl(question(id="q0"), b"", line))


def text(name, says, line):
    return Case("text file", name, says, third(line))


def record(name, says, **change):
    return Case("record", name, says, third(question(**change)))


def options(name, says, options, answer="CT"):
    return Case("options", name, says, third(question(options=options, answer=answer)))


def read_as(*ids):
    return lambda folder: [r["id"] for r in records.read_records(folder / "r.jsonl")] == list(ids)


def table(name, data):
    """A file of a public data set in the folder t, and the good image a.png beside it."""

    def make(folder):
        (folder / "t").mkdir()
        file(b"")(folder / "t")
        (folder / "t" / "r.jsonl").unlink()
        (folder / "t" / name).write_bytes(data)

    return make


def special(make_file):
    """In place of the record file, what `make_file(path)` makes."""
    return lambda folder: make_file(folder / "r.jsonl")


FILES = [
    Case("text file", "missing", "No such file", lambda folder: None),
    Case("text file", "a folder", "directory", special(os.mkdir)),
    Case("text file", "a FIFO", "not a regular file", special(os.mkfifo)),
    Case("text file", "a device", "not a regular file", special(lambda path: path.symlink_to("/dev/zero"))),
    Case("text file", "empty", "no records", file(b"")),
    Case("text file", "only blank lines", "no records", file(b"\n \r\n\t\n")),
    text("broken UTF-8", "r.jsonl:3: not UTF-8 (byte 8)", b'{"id": "\xff"}'),
    Case("text file", "UTF-16", "r.jsonl:1: not UTF-8", file(json.dumps(question()).encode("utf-16"))),
    Case(
        "text file", "an image in its place", "r.jsonl:1: not UTF-8", file(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    ),
    Case("text file", "compressed", "r.jsonl:1: not", file(zlib.compress(jsonl(question())))),
    text("a truncated line", "r.jsonl:3: not JSON", json.dumps(question()).encode()[:40]),
    text("CSV", "r.jsonl:3: not JSON", b"id,image,question"),
    text("two objects on a line", "r.jsonl:3: not JSON", json.dumps(question()).encode() * 2),
    text("an array", "r.jsonl:3: not an object", b"[1]"),
    text("a number", "r.jsonl:3: not an object", b"7"),
    text("null", "r.jsonl:3: not an object", b"null"),
    Case(
        "text file",
        "JSON over several lines",
        "r.jsonl:1: not JSON",
        file(json.dumps(question(), indent=1).encode()),
    ),
    text("NaN", "NaN is not JSON", b'{"id": "a", "x": NaN}'),
    text("-Infinity", "-Infinity is not JSON", b'{"id": "a", "x": -Infinity}'),
    text("a number beyond floats", "1e999 is too large", b'{"id": "a", "x": [1e999]}'),
    text("an integer of 5000 digits", "r.jsonl:3: not JSON", b'{"id": "a", "x": ' + b"7" * 5000 + b"}"),
    text("a line without an end", "more than 16 MiB", b'{"id": "' + b"a" * (17 << 20)),
    text("nested 100,000 deep", "r.jsonl:3: not JSON", b'{"id": ' * 100_000),
    text("an id twice", "`id` is already on line 1", question(id="q0")),
    text("half a surrogate pair", "half a surrogate pair", b'{"id": "a", "note": "\\ud83d"}'),
    Case("text file", "BOM", "read", file(b"\xef\xbb\xbf" + jsonl(question())), CHECK, read_as("q1")),
    Case(
        "text file",
        "CRLF and blank lines",
        "read",
        file(jsonl(question(), b"", question(id="q2")).replace(b"\n", b"\r\n")),
        CHECK,
        read_as("q1", "q2"),
    ),
    Case("text file", "no newline at the end", "read", file(jsonl(question())[:-1]), CHECK, read_as("q1")),
    Case(
        "text file",
        "a line of 2 MiB",
        "read",
        file(jsonl(question(note="a" * (2 << 20)))),
        CHECK,
        read_as("q1"),
    ),
    Case(
        "text file",
        "a whole surrogate pair",
        "read",
        file(b'{"id": "\\ud83d\\ude00", "image": "a.png"}'),
        CHECK,
        read_as("\U0001f600"),
    ),
    *(
        Case(
            "text file",
            f"a truncated line, {name}",
            "r.jsonl:3: not JSON",
            third(b'{"id": "q1", "ima'),
            command,
        )
        for name, command in READERS.items()
        if command != CHECK
    ),
    *(
        Case("text file", f"a FIFO, {name}", "not a regular file", special(os.mkfifo), command)
        for name, command in READERS.items()
        if name in ("medgr2.records split", "generate.py", "sft.py", "eval.py")
    ),
    Case("text file", "import: a FIFO", "not a regular file", special(os.mkfifo), IMPORT),
    Case(
        "text file", "import: unknown format", "format not recognised", file(b'[{"text": "hello"}]'), IMPORT
    ),
    Case("text file", "import: broken UTF-8", "not readable", file(b'["\xff"]'), IMPORT),
    Case(
        "text file", "import: no Parquet", "not readable as Parquet", table("x.parquet", b"PAR1 PAR1"), TABLES
    ),
    Case(
        "text file",
        "import: a spreadsheet",
        "save it as CSV",
        table("x.xlsx", b"PK"),
        TABLES.replace("/t", "/t/x.xlsx"),
    ),
    Case(
        "text file",
        "import: unknown columns",
        "no column for image, question, answer among Bild, Frage",
        table("x.csv", b"Bild,Frage\na.png,Was?\n"),
        TABLES,
    ),
    Case(
        "text file",
        "import: a pickled object",
        "convert it to JSON",
        table("x.pkl", pickle.dumps([datetime.date(2026, 1, 1)])),
        TABLES.replace("/t", "/t/x.pkl"),
    ),
    Case(
        "text file",
        "import: a list as answer",
        "`answer` is a list of several",
        table("x.json", b'[{"image": "a.png", "question": "Which?", "answer": ["left", "right"]}]'),
        TABLES,
    ),
    Case(
        "text file",
        "import: paths of Windows",
        "read",
        table("x.csv", b"image,question,answer\n.\\a.png,Which?,CT\n"),
        TABLES,
    ),
    Case("text file", "report: a FIFO", "not a regular file", special(os.mkfifo), REPORT),
    Case("text file", "report: nested 100,000 deep", "r.jsonl", file(b"[" * 100_000), REPORT),
]

RECORDS = [
    record("no id", "no field `id`", id=...),
    record("an empty id", "`id` is empty", id=" "),
    record("a number as id", "`id` is not of type str", id=7),
    record("no image", "no field `image`", image=...),
    record("an image's bytes", "`image` is not of type str", image=[137, 80]),
    record("an image with a zero byte in its name", "`image` holds a zero byte", image="a\0.png"),
    record("an empty question", "`question` is empty", question="?"),
    record("a number as answer", "`answer` is not of type str", answer=7, options=...),
    record("null as rationale and task", "read", rationale=None, task=None),
    record("true as cycle", "`cycle` is not of type int", cycle=True),
    record("an unknown source", "`source` is not expert", source="web"),
    record("a list as report", "`report` is not of type str", report=["a"]),
    record("a question with a report", "a question and a `report` in one record", report="A cyst."),
    record("a tag in a text", "a tag of the reply's form", rationale="so <answer>CT</answer>"),
    text("an infinite reward", "Infinity is not JSON", b'{"id": "a", "reward": {"overall": Infinity}}'),
    text(
        "a reward head beyond floats",
        "1e999 is too large",
        b'{"id": "a", "reward": {"overall": 1, "relevant": 1e999}}',
    ),
    record("a reward above 10", "`reward` is not", reward={"overall": 10.5}),
    record("a reward without overall", "`reward` is not", reward={"relevant": 1}),
    record("a number as reward", "`reward` is not of type dict", reward=5),
    record("a word as a reward's head", "`reward` is not", reward={"overall": 1, "relevant": "high"}),
    record("unknown fields", "read", extra={"ü": [1, None]}),
    options("answer outside the options", "`answer` is not one of `options`", ["CT", "MRI"], "PET"),
    options("answer in another case", "`answer` is not one of `options`", ["CT", "MRI"], "ct"),
    options("none", "not 2 to 26", []),
    options("one", "not 2 to 26", ["CT"]),
    options("27", "not 2 to 26", [f"{i} mm" for i in range(27)], "1 mm"),
    options("repeated", "two options are the same", ["CT", "MRI", "CT"]),
    options("repeated but for case and punctuation", "two options are the same", ["CT", "ct."]),
    options("an empty one", "an option is empty", ["CT", " ? "]),
    options("a number", "an option is empty or not a string", ["CT", 4]),
    options("a text", "`options` is not of type list", "CT, MRI"),
    options("an object", "`options` is not of type list", {"A": "CT"}),
    Case(
        "record",
        "no question, sft.py",
        "neither question and answer nor a report",
        file(jsonl({"id": "q1", "image": "a.png"})),
        READERS["sft.py"],
    ),
    Case(
        "record",
        "no question, eval.py",
        "no field `question`",
        file(jsonl({"id": "q1", "image": "a.png"})),
        READERS["eval.py"],
    ),
    Case(
        "record",
        "answered before, eval.py",
        "has a `prediction` already",
        file(jsonl(question(prediction="CT"))),
        READERS["eval.py"],
    ),
]


# ---------------------------------------------------------------------------------------------------------
# Images.


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *more):
    """A grey PNG of zeros, made by hand."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + b"".join(more)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def picture(make_image):
    """Two records: one with a good image, one with i.png, which `make_image(path)` makes."""

    def make(folder):
        file(jsonl(question(id="q0"), question(image="i.png", answer="MRI")))(folder)
        make_image(folder / "i.png")

    return make


def data(content):
    return lambda path: path.write_bytes(content)


def cut(**options):
    def make(path):
        Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(path, **options)
        path.write_bytes(path.read_bytes()[:1500])

    return make


def huge_file(path):
    path.write_bytes(png(8, 8))
    os.truncate(path, 300 << 20)


def image(name, says, make_image, command=CHECK):
    return Case("image", name, says, picture(make_image), command)


def good(name, make_image, *pixels):
    """An image that is read right. `pixels`: its colours row by row; JPEG may be off by 12."""

    def holds(folder):
        opened = open_image(str(folder / "i.png"))
        found = [opened.getpixel((x, y)) for y in range(opened.height) for x in range(opened.width)]
        if opened.mode != "RGB" or len(found) != len(pixels):
            return False
        return all(abs(a - b) <= 12 for f, p in zip(found, pixels) for a, b in zip(f, p))

    return Case("image", name, "read", picture(make_image), CHECK, holds)


def palette(path):
    made = Image.new("P", (2, 1))
    made.putpalette([200, 0, 0, 0, 0, 200])
    made.putdata([0, 1])
    made.save(path, transparency=0)


def grey_16_bits(path):
    made = Image.new("I;16", (3, 1))
    for x, value in enumerate((1000, 1510, 2020)):
        made.putpixel((x, 0), value)
    made.save(path)


def colour_16_bits(path):
    """Red of 16 bits: 1000, 1510, 2020. Pillow writes no such file."""
    pixels = b"".join(struct.pack(">HHH", value, 0, 0) for value in (1000, 1510, 2020))
    header = struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def turned(path):
    made, exif = Image.new("L", (2, 1)), Image.Exif()
    made.putdata([10, 200])
    exif[0x0112] = 6
    made.save(path, exif=exif)


IMAGES = [
    image("missing", "no such image", lambda path: None),
    image("a dangling link", "no such image", lambda path: path.symlink_to("nowhere.png")),
    image("a link to itself", "not a readable image", lambda path: path.symlink_to("i.png")),
    image("empty", "not a readable image", data(b"")),
    image("text named .png", "not a readable image", data(b"a chest X-ray, honestly")),
    image(
        "SVG", "not a readable image", data(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    ),
    image("truncated PNG", "not a readable image", cut(format="PNG")),
    image("truncated JPEG", "not a readable image", cut(format="JPEG", quality=95)),
    image("a folder", "not a readable image", os.mkdir),
    image("a FIFO", "not a regular file", os.mkfifo),
    image("a link to a device", "zero is not under", lambda path: path.symlink_to("/dev/zero")),
    image(
        "zero-sized GIF", "not a readable image", data(b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x00;")
    ),
    image("zero-sized PPM", "not a readable image", data(b"P6 0 0 255\n")),
    image(
        "20,000 x 20,000",
        "not a readable image",
        data(png(20_000, 1).replace(struct.pack(">II", 20_000, 1), struct.pack(">II", 20_000, 20_000))),
    ),
    image("8,500 x 8,500 in 0.3 MiB", "8500 x 8500 pixels, more than 64 Mi", data(png(8500, 8500))),
    image(
        "a text chunk that unpacks to 80 MiB",
        "not a readable image",
        data(png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20))))),
    ),
    image("a file of 300 MiB", "more than 256 MiB", huge_file),
    image("1 x 300", "too narrow", data(png(1, 300))),
    good("1 x 1", data(png(1, 1)), (0, 0, 0)),
    good("CMYK", lambda path: Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(path, "JPEG"), (255, 0, 0)),
    good("16 bits", grey_16_bits, (0,) * 3, (128,) * 3, (255,) * 3),
    good("colour of 16 bits", colour_16_bits, (126, 0, 0), (191, 0, 0), (255, 0, 0)),
    good("palette with alpha", palette, (255, 255, 255), (0, 0, 200)),
    good(
        "animated",
        lambda path: Image.new("L", (1, 1), 10).save(
            path, "GIF", save_all=True, append_images=[Image.new("L", (1, 1), 200)]
        ),
        (10,) * 3,
    ),
    good("EXIF-rotated", turned, (10,) * 3, (200,) * 3),
    good("one bit", lambda path: Image.new("1", (1, 1), 1).save(path), (255,) * 3),
    good("transparent", lambda path: Image.new("RGBA", (1, 1), (90, 0, 0, 0)).save(path), (255,) * 3),
    good(
        "JPEG named .png", lambda path: Image.new("RGB", (1, 1), (0, 0, 255)).save(path, "JPEG"), (0, 0, 255)
    ),
    *(
        image(f"truncated PNG, {name}", "not a readable image", cut(format="PNG"), command)
        for name, command in READERS.items()
        if command != CHECK and name != "medgr2.records split"
    ),
    *(
        image(f"missing, {name}", "no image", lambda path: None, READERS[name])
        for name in ("generate.py", "reward.py train", "sft.py", "grpo.py", "eval.py")
    ),
]


def place(name, says, path, make_more=lambda folder: None, flags="", command=CHECK):
    """A record file own/r.jsonl that names the image `path`.

    There is an a.png in own/, in own-not/ and in the folder of both, and b.png only in the last.
    """

    def make(folder):
        rows = jsonl(question(image=path.format(d=folder)), question(id="q2", image="a.png", answer="MRI"))
        for inner in ("own", "own-not", "."):
            (folder / inner).mkdir(exist_ok=True)
            file(rows)(folder / inner)
        Image.new("RGB", (8, 8)).save(folder / "b.png")
        make_more(folder)

    command = command.replace("{d}/r.jsonl", "{d}/own/r.jsonl") + flags

    def holds(folder):
        if command.startswith("medgr2.records import"):
            return True
        first = next(records.read_records(folder / "own" / "r.jsonl", root=folder))
        return open_image(first["image"])

    return Case("image path", name, says, make, command, holds)


def link(to, name="i"):
    return lambda folder: (folder / "own" / name).symlink_to(to.format(d=folder))


def import_of(name, says, path, flags=""):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cyst."}]

    def make_more(folder):
        (folder / "own" / "r.jsonl").write_text(json.dumps([{"conversations": turns, "image": path}]))

    return place(f"import: {name}", says, "a.png", make_more, flags, IMPORT + "/r.jsonl")


def scored_outside(folder):
    row = question(image="../a.png", reward={"overall": 1})
    (folder / "own" / "r.jsonl").write_bytes(jsonl(row))


PLACES = [
    place("..", "a.png is not under", "../a.png"),
    place("absolute", "a.png is not under", "{d}/a.png"),
    place("a folder whose name begins alike", "a.png is not under", "../own-not/a.png"),
    place("a link that leads out", "/a.png is not under", "i", link("../a.png")),
    place("a linked folder that leads out", "/b.png is not under", "i/b.png", link("..")),
    place(".. and back", "read", "../own/a.png"),
    place("absolute, inside", "read", "{d}/own/a.png"),
    place("a link inside", "read", "i", link("a.png")),
    place("allowed by --image-root", "read", "../a.png", flags=" --image-root {d}"),
    place("a link, allowed by --image-root", "read", "i", link("../a.png"), flags=" --image-root {d}"),
    place("another --image-root", "a.png is not under", "../a.png", flags=" --image-root {d}/own-not"),
    *(
        place(f".., {name}", "a.png is not under", "../a.png", command=command)
        for name, command in READERS.items()
        if command != CHECK
    ),
    *(
        place(
            f"allowed by --image-root, {name}",
            "read",
            "../a.png",
            flags=" --image-root {d}",
            command=READERS[name],
        )
        for name in ("generate.py", "reward.py score", "sft.py", "eval.py", "medgr2.leakage")
    ),
    place(
        ".., analysis.report",
        "a.png is not under",
        "../a.png",
        scored_outside,
        command="analysis.report --scored {d}/r.jsonl --out {o}/report.html",
    ),
    import_of("..", "outside the folder of images", "../a.png"),
    import_of("allowed by --image-root", "read", "../a.png", " --image-root {d}"),
    import_of("allowed by --images", "read", "own/a.png", " --images {d}"),
]


# ---------------------------------------------------------------------------------------------------------
# Models. {d}/model is a broken copy of the toy's policy, {d}/rm a reward model.


class Payload:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return open, (str(Path(tempfile.gettempdir()) / "unpickled"), "w")


def put_reward_model(folder):
    backbone = loading.load(str(ROOT / "toy" / "policy"))
    torch.manual_seed(0)
    reward.RewardModel(backbone, reward.Heads(reward.LIKELIHOOD_FEATURES, 4), True).save(str(folder))


def change(name, **fields):
    """Change fields of a JSON file of the model; a dict is merged into the field's own."""

    def damage(model):
        values = json.loads((model / name).read_text())
        for key, value in fields.items():
            values[key] = values[key] | value if isinstance(value, dict) and key in values else value
        (model / name).write_text(json.dumps(values))

    return damage


def only_pickled(model):
    (model / "model.safetensors").unlink()
    torch.save({"weight": Payload()}, model / "pytorch_model.bin")


def no_file(name):
    return lambda model: (model / name).unlink()


def larger_vocabulary(model):
    made = json.loads((model / "tokenizer.json").read_text())
    last = made["added_tokens"][-1]
    made["added_tokens"] += [last | {"id": 727 + i, "content": f"extra{i}"} for i in range(20)]
    (model / "tokenizer.json").write_text(json.dumps(made))


def own_code(model):
    change(
        "config.json",
        model_type="my_own",
        auto_map={"AutoConfig": "own.C", "AutoModelForImageTextToText": "own.M"},
    )(model)
    (model / "own.py").write_text(f"open({str(Path(tempfile.gettempdir()) / 'unpickled')!r}, 'w')\n")


def not_a_number(name):
    """Put a NaN into a file of weights."""

    def damage(folder):
        weights = load_file(folder / name)
        first = next(x for key, x in sorted(weights.items()) if "mlp" in key or "shared" in key)
        first.view(-1)[0] = torch.nan
        save_file(weights, folder / name, metadata={"format": "pt"})

    return damage


def half(name):
    return lambda model: os.truncate(model / name, (model / name).stat().st_size // 2)


def model(name, says, damage, stage="eval.py"):
    def make(folder):
        file(jsonl(question(id="q0"), question(answer="MRI", image="b.png")))(folder)
        Image.new("RGB", (8, 8), (0, 200, 0)).save(folder / "b.png")
        shutil.copytree(ROOT / "toy" / "policy", folder / "model")
        damage(folder / "model")

    command = re.sub(r"{t}/\w+", "{d}/model", READERS[stage])
    return Case("model", f"{name}, {stage}", says, make, command)


def reward_model(name, says, damage, stage="reward.py score"):
    def make(folder):
        file(jsonl(question(id="q0")))(folder)
        # The link is to one that all cases share; this case needs its own.
        if (folder / "rm").is_symlink():
            whole = (folder / "rm").resolve()
            (folder / "rm").unlink()
            shutil.copytree(whole, folder / "rm")
        damage(folder / "rm")

    return Case("model", f"{name}, {stage}", says, make, READERS[stage])


def adapter_alone(model):
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/model"}')


def template_elsewhere(model):
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    change("tokenizer_config.json", chat_template=template)(model)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}

MODELS = [
    model("missing", "no config.json", shutil.rmtree),
    model("missing", "no config.json", shutil.rmtree, "generate.py"),
    model("missing", "no config.json", shutil.rmtree, "grpo.py"),
    model("missing", "no config.json", shutil.rmtree, "reward.py train"),
    model("a file", "no config.json", lambda path: (shutil.rmtree(path), path.write_text("weights"))),
    model("no weights", "cannot load it", no_file("model.safetensors")),
    model("no weights", "cannot load it", no_file("model.safetensors"), "sft.py"),
    model("only pickled weights", "in safetensors", only_pickled),
    model("only pickled weights", "in safetensors", only_pickled, "sft.py"),
    model("only pickled weights", "in safetensors", only_pickled, "generate.py"),
    model("half its weights", "cannot load it", half("model.safetensors")),
    model("broken config.json", "cannot load it", half("config.json")),
    model("no tokenizer", "cannot load it", no_file("tokenizer.json")),
    model("broken tokenizer", "cannot load it", half("tokenizer.json")),
    model("no processor", "cannot load it", no_file("processor_config.json")),
    model("an adapter alone", "an adapter (LORA) of a/model, not a whole model", adapter_alone),
    model("a text-only model", "takes no image", change("config.json", model_type="qwen2")),
    model(
        "AWQ weights",
        "cannot load its quantised weights (awq)",
        change("config.json", quantization_config=AWQ),
    ),
    model("no patch size", "gives no `patch_size`", change("processor_config.json", patch_size=None)),
    model("its chat template in tokenizer_config.json", "read", template_elsewhere),
    model("no chat template", "no chat template", no_file("chat_template.jinja")),
    model(
        "a processor of another patch size",
        "processor does not fit",
        change("processor_config.json", patch_size=8),
    ),
    model(
        "a processor of another image size",
        "processor does not fit",
        change("processor_config.json", image_processor={"size": {"height": 32, "width": 32}}),
    ),
    model("another image token", "processor does not fit", change("config.json", image_token_index=7)),
    model("a larger vocabulary", "vocabulary does not fit: token 754", larger_vocabulary),
    model("a larger vocabulary", "vocabulary does not fit", larger_vocabulary, "generate.py"),
    model(
        "another width",
        "weights do not fit config.json",
        change("config.json", text_config={"intermediate_size": 64}),
    ),
    model("a weight that is not a number", "is not finite", not_a_number("model.safetensors")),
    model("a weight that is not a number", "is not finite", not_a_number("model.safetensors"), "sft.py"),
    model("code of its own", "needs no code of its own", own_code),
    reward_model(
        "a policy in place of a reward model",
        "not a reward model",
        lambda path: (shutil.rmtree(path), shutil.copytree(ROOT / "toy" / "policy", path)),
    ),
    reward_model("a reward model without heads", "not a reward model", no_file("heads.safetensors")),
    reward_model("half its heads", "not a reward model", half("heads.safetensors")),
    reward_model("heads that are not numbers", "not a reward model", not_a_number("heads.safetensors")),
    reward_model("broken heads.json", "not a reward model", half("heads.json")),
    reward_model("heads of another backbone", "not a reward model", change("heads.json", likelihood=False)),
    reward_model("a missing reward model", "not a reward model", shutil.rmtree, "grpo.py"),
]


# ---------------------------------------------------------------------------------------------------------
# Texts that are longer than the model's context: the toy's is 1,024 tokens.


def too_long(stage, says="context of 1024"):
    def make(folder):
        rows = [question(id=f"q{i}", image=f"{i}.png", answer="CT MRI".split()[i % 2]) for i in range(4)]
        for i, row in enumerate(rows):
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / row["image"])
        rows[-1]["question"] = "Which? " * 600
        (folder / "r.jsonl").write_bytes(jsonl(*rows))

    more = " --max-new-tokens 1024" if stage == "generate.py" else ""
    return Case("context", f"a prompt and reply of more tokens, {stage}", says, make, READERS[stage] + more)


LONG = [
    too_long("generate.py"),
    too_long("reward.py train"),
    too_long("reward.py score"),
    too_long("sft.py"),
    too_long("grpo.py"),
    too_long("eval.py", "read"),
]

# ---------------------------------------------------------------------------------------------------------
# Predictions of others.


def predictions(name, says, rows, answers=None):
    def make(folder):
        (folder / "r.jsonl").write_bytes(jsonl(*rows))
        if answers:
            (folder / "answers.jsonl").write_bytes(jsonl(*answers))

    joined = " --answers {d}/answers.jsonl" if answers else ""
    command = "eval.py --predictions {d}/r.jsonl" + joined + " --out {o}"
    return Case("predictions", name, says, make, command)


SAID = [{"question_id": "1", "prediction": "CT"}, {"question_id": "2", "prediction": "MRI"}]
RIGHT = [{"question_id": "2", "gt_answer": "MRI"}, {"question_id": "1", "gt_answer": "CT"}]
PREDICTIONS = [
    predictions("without the right answers", "or give --answers FILE", SAID),
    predictions("with the right answers in another order", "read", SAID, RIGHT),
    predictions("with too few right answers", "2 predictions and 1 right answers", SAID, RIGHT[:1]),
    predictions(
        "with the right answers to other questions",
        "joined by order: the questions `left` and `right` differ",
        [{"question": "left?", "prediction": "yes"}],
        [{"question": "right?", "answer": "no"}],
    ),
    predictions(
        "several texts", "`prediction` holds 2 texts", [{"answer": "CT", "prediction": ["CT", "MRI"]}]
    ),
    predictions(
        "no prediction", "no field `prediction` among answer, said", [{"answer": "CT", "said": "CT"}]
    ),
]
KINDS = FILES + RECORDS + IMAGES + PLACES + MODELS + LONG + PREDICTIONS
CASES = {f"{case.kind}: {case.name}": case for case in KINDS}


# ---------------------------------------------------------------------------------------------------------
# Running them.


def call(command, folder):
    """Run a command in this process as from the command line. Returns its exit status.

    It has two minutes: opening a FIFO must not block.
    """
    words = [w.format(d=folder, o=folder / "out", t=ROOT / "toy") for w in shlex.split(command)]
    script = SCRIPTS[words[0]]
    before, sys.argv = sys.argv, [script_name(words[0]), *words[1:]]
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it blocks"))
    signal.alarm(120)
    try:
        cli.run_main(script.main, script.parse_args())
    except SystemExit as leaving:
        return leaving.code
    finally:
        sys.argv = before
        signal.alarm(0)
    return 0


def script_name(word):
    """What `python -m` puts into sys.argv[0] for a module, without its folder."""
    return word if word.endswith(".py") else word.split(".")[-1] + ".py"


def message(error, folder):
    """The line as docs/bad_input.md shows it: without the machine's paths and the libraries' own words."""
    line = error.strip().replace(f"{folder}/", "").replace(str(folder), ".").replace(f"{ROOT}/", "")
    line = re.sub(r"maximum recursion.*?;", "...;", line)
    line = re.sub(r"(not JSON|not a readable image|not readable|as Parquet) \(.*\)", r"\1 (...)", line)
    line = re.sub(r"(train makes one\)): .*", r"\1: ...", line)
    line = re.sub(r"(quantised weights \(\w+\)): .*; install", r"\1: ...; install", line)
    line = re.sub(r"(image-text-to-text model|does not fit the model): .*; give", r"\1: ...; give", line)
    return line.replace("|", "\\|")


def row(name, said):
    """The line of a case in docs/bad_input.md."""
    case = CASES[name]
    words = case.command.split()[:2]
    command = " ".join(words[: 2 if words[1] in SUBCOMMANDS else 1])
    return f"| {case.kind} | {case.name.removesuffix(', ' + command)} | `{command}` | {said} |"


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    put_reward_model(tmp_path_factory.mktemp("reward") / "rm")
    return tmp_path_factory.getbasetemp() / "reward0" / "rm"


@pytest.fixture(scope="module")
def documented():
    return DOC.read_text(encoding="utf-8").splitlines() if DOC.exists() else []


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line_or_read_right(name, tmp_path, capsys, reward_folder, documented):
    case, unpickled = CASES[name], Path(tempfile.gettempdir()) / "unpickled"
    (tmp_path / "rm").symlink_to(reward_folder)
    case.make(tmp_path)
    status = call(case.command, tmp_path)
    error = capsys.readouterr().err
    if case.says == "read":
        said = "read"
        assert status == 0 and not error and case.holds(tmp_path)
    else:
        said = message(error, tmp_path)
        assert status == 2 and case.says in error and error.count("\n") == 1 and len(error) < 1200, error
        assert not (tmp_path / "out").exists() and not unpickled.exists()
    assert row(name, said) in documented, "python tests/test_bad_input.py writes docs/bad_input.md anew"


def test_the_document_has_exactly_these_cases(documented):
    assert len(CASES) >= 60 and sum(line.startswith("| ") for line in documented) == len(CASES) + 1


HEAD = """# What bad input does

Each row below was run. `python tests/test_bad_input.py` writes this file, and a test checks that it is up to
date. Most rows are mistakes: the command exits with status 2, prints this one line on stderr and leaves no
output folder. A row that says *read* is no mistake: the input is accepted, and the test checks what was read.
`...` stands for the words of a library.

A module such as `medgr2.records` is run with `python -m`. With `--on-error skip` the stages
that train, `generate.py` and `reward.py score` leave out bad lines and unreadable images instead of stopping,
and name each; the last two do so up to the fraction `--max-rejected`.

| what | case | command | says |
|---|---|---|---|
"""


def write_document():
    import contextlib
    import io

    lines = []
    with tempfile.TemporaryDirectory() as top:
        put_reward_model(Path(top) / "rm")
        for i, name in enumerate(CASES):
            folder, error = Path(top) / f"case{i}", io.StringIO()
            folder.mkdir()
            (folder / "rm").symlink_to(Path(top) / "rm")
            CASES[name].make(folder)
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
                call(CASES[name].command, folder)
            lines.append(row(name, message(error.getvalue(), folder) or "read"))
            shutil.rmtree(folder)
    DOC.parent.mkdir(exist_ok=True)
    DOC.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_document()
