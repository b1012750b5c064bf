"""Leakage: what a test file shares with the files that were trained on.

Two parts. The *exact* part compares hashes and is certain; the training scripts run it where --test is given, and refuse:

    same file                    a test image's file is, byte for byte, a training image's, under whatever name
    same pixels                  the files differ, the decoded images do not (another format, other metadata)
    same question, same image    the question too was trained on, with that image (same file or same pixels)
    same question, other image   counted apart and no leak by itself: "Is there a fracture?" is asked of every X-ray

The *near* part is a suspicion, to be looked at: a test image without an exact twin whose perceptual hash is at most
--distance bits of 128 from a training image's. The hash is the difference hash (N. Krawetz, *Kind of Like That*, 2013)
in both directions: the image as 9x8 grey cells, is a cell brighter than its left neighbour; as 8x9, than its upper one.
Brighter by more than 2 of 255, so that compression noise on black, which is most of many scans, flips no bit. The usual
64 bits, left to right alone, do not tell chest X-rays apart.

Questions are compared as `normalise` leaves them: case, spacing and outer punctuation make no other question.

Reads   record files (JSONL) with images
Writes  OUT/leaks.jsonl: one line a test record and kind, with the training record it was first found in (of a near one:
        the closest); OUT/metrics.json: the table that is printed; OUT/args.json

    python -m medgr2.leakage --train runs/toy/data/expert.jsonl --test runs/toy/data/test.jsonl --out runs/toy/leakage
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from medgr2 import cli, records, runs
from medgr2.errors import RunError
from medgr2.images import hash_image, open_image
from medgr2.prompts import normalise

# what `refuse` refuses
LEAKS = ("same file", "same pixels", "same question, same image")
NEAR, HARMLESS = "near-duplicate", "same question, other image"
# of the perceptual hash; grey levels that make no difference
BITS, NOISE = 128, 2


class Look(NamedTuple):
    """What is compared of an image: SHA-256 of the file and of its decoded pixels, and the perceptual hash, (2,) uint64."""

    file: str
    pixels: str
    bits: np.ndarray


def look(path):
    """The Look of the image at `path`. Raises RecordError where it cannot be read."""
    image = open_image(path)
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    return Look(hash_image(path), pixels, difference_hash(image))


def difference_hash(image):
    """128 bits, (2,) uint64: the signs of the steps to the right, then of those down, between 8x8 cells of a grey image."""
    from PIL import Image

    grey = image.convert("L")
    across, down = (
        np.asarray(grey.resize(size, Image.Resampling.BOX), np.int16) for size in ((9, 8), (8, 9))
    )
    # two of (8, 8)
    signs = [across[:, 1:] > across[:, :-1] + NOISE, down[1:] > down[:-1] + NOISE]
    return np.packbits(signs).view(np.uint64)


def closest(test, train, chunk=256):
    """For each hash of `test` (n, 2): the index of the closest in `train` (m, 2), the first of ties, and their distance in bits."""
    index, distance = np.zeros(len(test), int), np.zeros(len(test), int)
    # (chunk, m) at a time: 10,000 x 10,000 at once would take 1.6 GB
    for i in range(0, len(test), chunk):
        # uint8 holds 128
        bits = sum(np.bitwise_count(test[i : i + chunk, None, w] ^ train[None, :, w]) for w in range(2))
        index[i : i + chunk], distance[i : i + chunk] = bits.argmin(1), bits.min(1)
    return index, distance


# ---------------------------------------------------------------------------------------------------------
# Findings. A side is a list of (file, record); looks = {image path: Look}.


def read_side(files, root=None):
    """The records of several files as [(file, record)]; each must have an image."""
    return [(file, record) for file in files for record in records.read_records(file, ("id", "image"), root)]


def look_at(*sides):
    """{path: Look} of every image that the sides name, read once each."""
    paths = sorted({record["image"] for side in sides for _, record in side})
    # hashing and decoding leave Python's lock
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(look, paths)))


def finding(kind, test, train, **more):
    """One line of leaks.jsonl."""
    return {
        "kind": kind,
        "test": test[1]["id"],
        "train": train[1]["id"],
        "test_file": test[0],
        "train_file": train[0],
        "image": test[1]["image"],
        "train_image": train[1]["image"],
        **more,
    }


def first_by(side, key):
    """{key(record): the first (file, record) of the side that has it}; a key of None is left out."""
    found = {}
    for file, record in side:
        found.setdefault(key(record), (file, record))
    found.pop(None, None)
    return found


def exact_findings(train, test, looks):
    """What is certain: same file or same pixels, same question on the same or on another image."""

    def pixels(record):
        return looks[record["image"]].pixels

    def question(record):
        return normalise(record["question"]) if "question" in record else None

    def both(record):
        return (question(record), pixels(record)) if "question" in record else None

    twins, same_pixels = first_by(train, lambda r: looks[r["image"]].file), first_by(train, pixels)
    same_both, same_question = first_by(train, both), first_by(train, question)
    for item in test:
        record, twin = item[1], twins.get(looks[item[1]["image"]].file)
        if twin or pixels(record) in same_pixels:
            yield finding("same file" if twin else "same pixels", item, twin or same_pixels[pixels(record)])
        if both(record) in same_both:
            yield finding(
                "same question, same image", item, same_both[both(record)], question=record["question"]
            )
        elif question(record) in same_question:
            yield finding(HARMLESS, item, same_question[question(record)], question=record["question"])


def near_findings(train, test, looks, distance):
    """What is suspect: no exact twin, but a training image at most `distance` bits away."""
    known = {looks[record["image"]].pixels for _, record in train}
    test = [item for item in test if looks[item[1]["image"]].pixels not in known]
    if not test:
        return
    hashes = [
        np.stack([looks[record["image"]].bits for _, record in side]) for side in (test, train)
    ]  # (n, 2), (m, 2)
    for item, index, bits in zip(test, *closest(*hashes)):
        if bits <= distance:
            yield finding(NEAR, item, train[index], distance=int(bits))


def audit(train_files, test_files, distance=None, root=None):
    """(findings, {"records": n, "images": n files} of the test side); the near part only where a `distance` is given."""
    train, test = read_side(train_files, root), read_side(test_files, root)
    looks = look_at(train, test)
    findings = list(exact_findings(train, test, looks))
    if distance is not None:
        findings += near_findings(train, test, looks, distance)
    return findings, {"records": len(test), "images": len({record["image"] for _, record in test})}


def write_leaks(path, findings):
    """Write leaks.jsonl, its images relative to it."""
    folder = os.path.dirname(os.path.abspath(path))
    records.write_records(
        path, (f | {"train_image": os.path.relpath(f["train_image"], folder)} for f in findings)
    )


def refuse(train_files, test_file, allow, path, root=None, main=True):
    """For the training scripts: raise RunError where the test file leaks exactly, unless `allow`. Returns the number of leaks.

    The list goes to `path`, written by one process (`main`). A leak is a test record; near-duplicates are not looked for.
    """
    findings = [f for f in audit(train_files, [test_file], root=root)[0] if f["kind"] in LEAKS]
    # a record's first finding
    leaks = list({f["test"]: f for f in reversed(findings)}.values())[::-1]
    if not leaks:
        return 0
    if main:
        write_leaks(path, findings)
    pairs = ", ".join(f"{f['test']} = {f['train']} ({f['kind']})" for f in leaks[:3])
    message = f"{test_file}: {len(leaks)} of its records leak from the training files: {pairs}{', ...' * (len(leaks) > 3)}; all in {path}"
    if not allow:
        raise RunError(f"{message}; split by image (python -m medgr2.records split), or give --allow-leakage")
    if main:
        print(f"allowed: {message}")
    return len(leaks)


# ---------------------------------------------------------------------------------------------------------
# The table.


def summary(findings, totals):
    """{kind: {"images", "images_share", "records", "records_share"}}: what of the test files is found, kind by kind."""
    result = {}
    for kind in (*LEAKS[:2], NEAR, LEAKS[2], HARMLESS):
        found = [f for f in findings if f["kind"] == kind]
        counts = {"images": len({f["image"] for f in found}), "records": len(found)}
        result[kind] = {
            "images": counts["images"],
            "images_share": counts["images"] / totals["images"],
            "records": counts["records"],
            "records_share": counts["records"] / totals["records"],
        }
    return result


def table(result, distance):
    """`summary` as aligned text."""
    label = {NEAR: f"{NEAR}, {distance} of {BITS} bits at most", HARMLESS: f"{HARMLESS} (no leak by itself)"}
    return cli.format_table(
        [[label.get(kind, kind), *row.values()] for kind, row in result.items()],
        ["found in train", "test images", "share", "test records", "share"],
    )


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--train", nargs="+", required=True, help="record files that were trained on")
    p.add_argument("--test", nargs="+", required=True, help="record files that are tested on")
    p.add_argument(
        "--distance", type=int, default=4, help=f"bits of {BITS} by which near-duplicates differ at most"
    )
    p.add_argument(
        "--image-root", help="folder that images may lie in, beside that of the file that names them"
    )
    p.add_argument("--out", required=True, help="folder for leaks.jsonl, metrics.json and args.json")
    return p.parse_args()


def main(args):
    if not 0 <= args.distance <= BITS:
        raise RunError(f"--distance {args.distance}: give 0 to {BITS} bits")
    findings, totals = audit(args.train, args.test, args.distance, args.image_root)
    result = summary(findings, totals)
    print(table(result, args.distance))
    path = os.path.join(args.out, "leaks.jsonl")
    write_leaks(path, findings)
    runs.write_json(
        os.path.join(args.out, "metrics.json"), {**totals, "distance": args.distance, "found": result}
    )
    runs.write_json(
        os.path.join(args.out, "args.json"),
        {
            "script": "leakage.py",
            "args": vars(args),
            **runs.environment(),
            "inputs": {file: runs.sha256(file) for file in (*args.train, *args.test)},
        },
    )
    print(
        f"{path}: {len(findings)} findings on {totals['records']} test records, {totals['images']} test images"
    )


if __name__ == "__main__":
    cli.run_main(main, parse_args())
