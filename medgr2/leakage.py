"""Leakage: what a test file shares with the files that were trained on.

The *exact* part compares hashes and is certain. The training scripts run it if --test is given, and refuse to
train on what it finds:

    same file                    a test image's file is, byte for byte, a training image's, under any name
    same pixels                  the files differ, the decoded images do not (other format, other metadata)
    same question, same image    the question was trained on too, with that image (same file or same pixels)
    same question, other image   counted apart, and no leak by itself: "Any fracture?" is asked of every X-ray

The *near* part is a suspicion, to be checked by eye: a test image without an exact twin whose perceptual hash
is at most --distance bits of 128 from a training image's. The hash is the difference hash (N. Krawetz, *Kind
of Like That*, 2013) in both directions: the image as 9x8 grey cells, is a cell brighter than its left
neighbour; as 8x9, than its upper one. Brighter means by more than 2 of 255, so that compression noise on
black, which is most of many scans, flips no bit. The usual 64 bits, left to right only, do not tell chest
X-rays apart.

Questions are compared as `normalise` leaves them: case, spacing and outer punctuation do not count.

Reads   record files (JSONL) with images
Writes  OUT/leaks.jsonl, a line per test record and kind, with the first training record that it was found in
        (if near, the closest)
        OUT/metrics.json, the table that is printed; OUT/args.json

    python -m medgr2.leakage --train runs/toy/data/expert.jsonl --test runs/toy/data/test.jsonl --out leaks
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from medgr2 import cli, records, runs
from medgr2.errors import RunError
from medgr2.images import hash_image, open_image
from medgr2.progress import progress
from medgr2.prompts import normalise

SAME_FILE, SAME_PIXELS, SAME_BOTH = "same file", "same pixels", "same question, same image"
NEAR, HARMLESS = "near-duplicate", "same question, other image"
# What `refuse_leakage` refuses, and all kinds in the order of the table.
LEAKS = (SAME_FILE, SAME_PIXELS, SAME_BOTH)
KINDS = (SAME_FILE, SAME_PIXELS, NEAR, SAME_BOTH, HARMLESS)
# The fields of a record that are compared or written.
COMPARED = ("id", "image", "question")
# Bits of the perceptual hash, and the difference in grey levels that counts as none.
BITS, NOISE = 128, 2
# Up to so many different bits two images are near each other.
NEAR_BITS = 4
# Images that wait for a thread.
WAITING = 1024
# Leaks that an error message names.
NAMED_LEAKS = 3


# ---------------------------------------------------------------------------------------------------------
# Fingerprints of images.


class Fingerprint(NamedTuple):
    """What is compared of an image: SHA-256 of its file and of its pixels; perceptual hash, (2,) uint64."""

    file: str
    pixels: str
    bits: np.ndarray


def fingerprint(path):
    """The Fingerprint of the image at `path`. Raises RecordError if it cannot be read."""
    image = open_image(path)
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    return Fingerprint(hash_image(path), pixels, difference_hash(image))


def fingerprint_images(*sides):
    """{path: Fingerprint} of every image that the sides name; each is read once."""
    paths = sorted({record["image"] for side in sides for _, record in side})
    # Threads help: hashing and decoding release Python's lock.
    with ThreadPoolExecutor() as pool:
        # Some at a time, because each waits in memory for its turn.
        waiting = (paths[i : i + WAITING] for i in range(0, len(paths), WAITING))
        found = (one for part in waiting for one in pool.map(fingerprint, part))
        return dict(zip(progress(paths, "images"), found))


def difference_hash(image):
    """128 bits, (2,) uint64: is each of 8x8 grey cells brighter than its left, than its upper neighbour?"""
    from PIL import Image

    grey = image.convert("L")
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)  # (8, 9)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)  # (9, 8)
    brighter = [across[:, 1:] > across[:, :-1] + NOISE, down[1:] > down[:-1] + NOISE]  # 2 · (8, 8)
    return np.packbits(brighter).view(np.uint64)


def closest(test, train, pairs=1 << 21):
    """Index and distance in bits of the closest of `train` (m, 2) to each hash of `test` (n, 2): (n,), (n,).

    Of equally close ones, the first.
    """
    index, distance = np.zeros(len(test), int), np.zeros(len(test), int)
    # So many pairs at a time: 10,000 x 10,000 at once would take 1.6 GB.
    chunk = max(1, pairs // len(train))
    for i in range(0, len(test), chunk):
        # The sum is at most 128, which uint8 holds.
        bits = sum(np.bitwise_count(test[i : i + chunk, None, w] ^ train[None, :, w]) for w in range(2))
        index[i : i + chunk], distance[i : i + chunk] = bits.argmin(1), bits.min(1)
    return index, distance


# ---------------------------------------------------------------------------------------------------------
# Findings. A side, train or test, is a list of (file, record).


def read_side(files, root=None):
    """[(file, what is compared of a record)] of several files. Raises RecordError if one has no image."""
    side = []
    for file in files:
        for record in records.read_records(file, ("id", "image"), root):
            side.append((file, {field: record[field] for field in COMPARED if field in record}))
    return side


def finding(kind, test, train, **more):
    """One line of leaks.jsonl."""
    (test_file, test_record), (train_file, train_record) = test, train
    return {
        "kind": kind,
        "test": test_record["id"],
        "train": train_record["id"],
        "test_file": test_file,
        "train_file": train_file,
        "image": test_record["image"],
        "train_image": train_record["image"],
        **more,
    }


def first_by(side, key):
    """{key(record): the first (file, record) of the side that has it}; a key of None is left out."""
    found = {}
    for file, record in side:
        found.setdefault(key(record), (file, record))
    found.pop(None, None)
    return found


def exact_findings(train, test, fingerprints):
    """Yield what is certain: same file or same pixels; same question on the same or on another image."""

    def file(record):
        return fingerprints[record["image"]].file

    def pixels(record):
        return fingerprints[record["image"]].pixels

    def question(record):
        return normalise(record["question"]) if "question" in record else None

    def question_and_pixels(record):
        return (question(record), pixels(record)) if "question" in record else None

    by_file, by_pixels = first_by(train, file), first_by(train, pixels)
    by_question, by_both = first_by(train, question), first_by(train, question_and_pixels)
    for item in test:
        record = item[1]
        if file(record) in by_file:
            yield finding(SAME_FILE, item, by_file[file(record)])
        elif pixels(record) in by_pixels:
            yield finding(SAME_PIXELS, item, by_pixels[pixels(record)])
        if question_and_pixels(record) in by_both:
            twin = by_both[question_and_pixels(record)]
            yield finding(SAME_BOTH, item, twin, question=record["question"])
        elif question(record) in by_question:
            yield finding(HARMLESS, item, by_question[question(record)], question=record["question"])


def near_findings(train, test, fingerprints, distance):
    """Yield what is suspect: no exact twin, but a training image at most `distance` bits away."""
    known = {fingerprints[record["image"]].pixels for _, record in train}
    test = [item for item in test if fingerprints[item[1]["image"]].pixels not in known]
    if not test:
        return
    test_hashes = np.stack([fingerprints[record["image"]].bits for _, record in test])  # (n, 2)
    train_hashes = np.stack([fingerprints[record["image"]].bits for _, record in train])  # (m, 2)
    for item, index, bits in zip(test, *closest(test_hashes, train_hashes)):
        if bits <= distance:
            yield finding(NEAR, item, train[index], distance=int(bits))


def audit(train, test, distance=None):
    """(findings, {"records": n, "images": n} of the test side); near ones only if a `distance` is given."""
    fingerprints = fingerprint_images(train, test)
    findings = list(exact_findings(train, test, fingerprints))
    if distance is not None:
        findings += near_findings(train, test, fingerprints, distance)
    return findings, {"records": len(test), "images": len({record["image"] for _, record in test})}


def write_leaks(path, findings):
    """Write leaks.jsonl, with image paths relative to it."""
    folder = os.path.dirname(os.path.abspath(path))
    rows = (f | {"train_image": os.path.relpath(f["train_image"], folder)} for f in findings)
    records.write_records(path, rows)


def refuse_leakage(train, test_file, allow, path, root=None, main=True):
    """Raise RunError if test records leak exactly, unless `allow`; return the number of these records.

    For the training scripts. One process (`main`) writes the findings to `path`. Near-duplicates are ignored.
    """
    findings = [f for f in audit(train, read_side([test_file], root))[0] if f["kind"] in LEAKS]
    first_findings = {}
    for f in findings:
        first_findings.setdefault(f["test"], f)
    leaks = list(first_findings.values())
    if not leaks:
        return 0
    if main:
        write_leaks(path, findings)
    pairs = [f"{f['test']} = {f['train']} ({f['kind']})" for f in leaks[:NAMED_LEAKS]]
    named = ", ".join(pairs + ["..."] * (len(leaks) > NAMED_LEAKS))
    message = f"{test_file}: {len(leaks)} of its records leak from the training files: {named}; all in {path}"
    if not allow:
        raise RunError(f"{message}; split by image (python -m medgr2.records split), or give --allow-leakage")
    if main:
        print(f"allowed: {message}")
    return len(leaks)


# ---------------------------------------------------------------------------------------------------------
# The table and the command.


def summarize_findings(findings, totals):
    """{kind: {"images", "images_share", "records", "records_share"}}: how much of the test files is found."""
    result = {}
    for kind in KINDS:
        found = [f for f in findings if f["kind"] == kind]
        images = len({f["image"] for f in found})
        result[kind] = {
            "images": images,
            "images_share": images / totals["images"],
            "records": len(found),
            "records_share": len(found) / totals["records"],
        }
    return result


def format_findings(result, distance):
    """What `summarize_findings` returned, as aligned text."""
    labels = {NEAR: f"{NEAR}, {distance} of {BITS} bits at most", HARMLESS: f"{HARMLESS} (no leak by itself)"}
    rows = [[labels.get(kind, kind), *counts.values()] for kind, counts in result.items()]
    return cli.format_table(rows, ["found in train", "test images", "share", "test records", "share"])


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--train", nargs="+", required=True, help="record files that were trained on")
    p.add_argument("--test", nargs="+", required=True, help="record files that are tested on")
    near = f"bits of {BITS} in which near ones may differ"
    p.add_argument("--distance", type=int, default=NEAR_BITS, help=near)
    p.add_argument("--image-root", help="folder that images may be in, besides the folder of the file")
    p.add_argument("--out", required=True, help="folder for leaks.jsonl, metrics.json and args.json")
    return p.parse_args()


def main(args):
    if not 0 <= args.distance <= BITS:
        raise RunError(f"--distance {args.distance}: give 0 to {BITS} bits")
    sides = [read_side(files, args.image_root) for files in (args.train, args.test)]
    findings, totals = audit(*sides, args.distance)
    result = summarize_findings(findings, totals)
    print(format_findings(result, args.distance))
    path = os.path.join(args.out, "leaks.jsonl")
    write_leaks(path, findings)
    metrics = {**totals, "distance": args.distance, "found": result}
    runs.write_json(os.path.join(args.out, "metrics.json"), metrics)
    inputs = {file: runs.sha256(file) for file in (*args.train, *args.test)}
    meta = {"script": "leakage.py", "args": vars(args), **runs.environment(), "inputs": inputs}
    runs.write_json(os.path.join(args.out, "args.json"), meta)
    counts = f"{totals['records']} test records, {totals['images']} test images"
    print(f"{path}: {len(findings)} findings on {counts}")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
