"""What a test file shares with its training files: each kind is found, and nothing else."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here
from PIL import Image

from medgr2 import formats, leakage, records
from medgr2.errors import RunError
from medgr2.images import hash_image, open_image

ROOT = Path(__file__).parent.parent
RAD = ROOT.parent / "shared" / "data" / "vqa_rad" / "vqa_rad.json"


def scan(seed, size=(96, 80)):
    """A smooth grey image: random 6x6 values, enlarged."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def side(folder, name, rows):
    """A record file of (image file, question); an image given as a PIL image is saved as NUMBER.png."""
    (folder / name).mkdir()
    lines = []
    for i, (image, question) in enumerate(rows):
        if isinstance(image, Image.Image):
            image.save(folder / name / f"{i}.png")
            image = folder / name / f"{i}.png"
        lines.append(
            {
                "id": f"{name}{i}",
                "image": str(image),
                **({"question": question, "answer": "yes"} if question else {}),
            }
        )
    records.write_records(folder / f"{name}.jsonl", lines)
    return str(folder / f"{name}.jsonl")


def audit_files(train, test, distance=None, root=None):
    return leakage.audit(leakage.read_side([train], root), leakage.read_side([test], root), distance)


def found(train, test, distance=None):
    return [(f["kind"], f["test"], f["train"]) for f in audit_files(train, test, distance)[0]]


def test_the_same_bytes_under_another_name_are_one_image(tmp_path):
    train = side(tmp_path, "train", [(scan(1), ""), (scan(2), "")])
    (tmp_path / "copy.png").write_bytes((tmp_path / "train" / "1.png").read_bytes())
    test = side(tmp_path, "test", [(scan(3), ""), (tmp_path / "copy.png", "")])
    assert found(train, test, 4) == [("same file", "test1", "train1")]


def test_another_format_with_the_same_pixels_is_found_and_is_not_the_same_file(tmp_path):
    train = side(tmp_path, "train", [(scan(1), ""), (scan(2), "")])
    scan(2).save(tmp_path / "other.bmp")
    test = side(tmp_path, "test", [(tmp_path / "other.bmp", "")])
    assert found(train, test, 4) == [("same pixels", "test0", "train1")]


def test_the_same_bytes_of_pixels_in_another_shape_are_another_image(tmp_path):
    flat = Image.new("L", (40, 90), 7)
    train = side(tmp_path, "train", [(flat, "")])
    assert found(train, side(tmp_path, "test", [(flat.resize((90, 40)), "")])) == []


@pytest.mark.parametrize("altered", ["half the size", "compressed", "brighter"])
def test_an_altered_copy_is_a_near_duplicate_and_nothing_else(tmp_path, altered):
    image, file = scan(5), io.BytesIO()
    image.save(file, "JPEG", quality=60)
    copy = {
        "half the size": image.resize((48, 40)),
        "compressed": Image.open(file),
        "brighter": image.point(lambda v: v * 0.9 + 20),
    }[altered]
    train, test = (
        side(tmp_path, "train", [(scan(1), ""), (image, ""), (scan(2), "")]),
        side(tmp_path, "test", [(copy, ""), (scan(9), "")]),
    )
    assert found(train, test, 4) == [("near-duplicate", "test0", "train1")] and found(train, test) == []


def test_a_near_duplicate_names_the_closest_and_the_distance_is_a_limit(tmp_path):
    image = scan(5)
    close, far = image.copy(), image.copy()
    close.paste(255, (0, 0, 16, 12)), far.paste(255, (0, 0, 40, 40))
    train, test = side(tmp_path, "train", [(far, ""), (close, "")]), side(tmp_path, "test", [(image, "")])
    (near,) = audit_files(train, test, 128)[0]
    assert near["train"] == "train1" and near["distance"] > 0
    assert found(train, test, near["distance"]) and not found(train, test, near["distance"] - 1)


def test_a_question_leaks_with_its_image_and_is_only_counted_with_another(tmp_path):
    train = side(
        tmp_path, "train", [(scan(1), "Is there a fracture?"), (scan(2), "Which organ?"), (scan(4), "")]
    )
    scan(1).save(tmp_path / "one.bmp")
    test = side(
        tmp_path,
        "test",
        [
            (tmp_path / "one.bmp", " is there a  FRACTURE"),
            (scan(3), "Which organ?"),
            (scan(4), "New?"),
            (scan(7), ""),
        ],
    )
    assert found(train, test) == [
        ("same pixels", "test0", "train0"),
        ("same question, same image", "test0", "train0"),
        ("same question, other image", "test1", "train1"),
        ("same file", "test2", "train2"),
    ]


def test_the_difference_hash_is_the_sign_of_the_steps_between_cell_means():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9)).repeat(8, 0).repeat(8, 1)  # (72, 72)
    bits = np.unpackbits(
        leakage.difference_hash(Image.fromarray(pixels.astype(np.uint8))).view(np.uint8)
    ).reshape(2, 8, 8)
    for axis, cells in enumerate(
        (pixels.reshape(8, 9, 9, 8).mean((1, 3)).T, pixels.reshape(9, 8, 8, 9).mean((1, 3)))
    ):  # (9, 8)
        steps = (cells[1:] - cells[:-1]).T if axis == 0 else cells[1:] - cells[:-1]  # (8, 8)
        # Cells are rounded to grey levels.
        clear = abs(steps - leakage.NOISE) > 2
        assert clear.sum() > 50 and (bits[axis][clear] == (steps > leakage.NOISE)[clear]).all()


def test_steps_of_two_grey_levels_are_noise_and_steps_of_three_are_not():
    # A chessboard of the cells across.
    checks = np.add.outer(np.arange(72) // 9, np.arange(72) // 8) % 2
    bits = [
        np.unpackbits(
            leakage.difference_hash(Image.fromarray((checks * step).astype(np.uint8))).view(np.uint8)
        )
        for step in (2, 3)
    ]
    assert bits[0].sum() == 0 and bits[1].reshape(2, 64)[0].sum() == 32


def test_images_are_read_in_parts_and_none_is_lost(tmp_path, monkeypatch):
    rows = leakage.read_side([side(tmp_path, "train", [(scan(i), "Which?") for i in range(5)])])
    whole = leakage.fingerprint_images(rows)
    monkeypatch.setattr(leakage, "WAITING", 2)
    parts = leakage.fingerprint_images(rows)
    assert len(whole) == 5 and list(parts) == list(whole)
    assert all(parts[path].pixels == whole[path].pixels == leakage.fingerprint(path).pixels for path in whole)


def test_the_closest_hash_is_that_of_counting_bits_one_by_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 2**64, (9, 2), np.uint64)
    test = np.concatenate([rng.integers(0, 2**64, (6, 2), np.uint64), train[4:5], ~train[4:5]])
    # All twice: of ties, the first.
    train = np.concatenate([train, train])
    index, distance = leakage.closest(test, train, pairs=3 * len(train))
    wide = [[(int(a) << 64) | int(b) for a, b in hashes] for hashes in (test, train)]
    expected = [min((bin(t ^ h).count("1"), k) for k, h in enumerate(wide[1])) for t in wide[0]]
    assert list(zip(distance.tolist(), index.tolist())) == expected and expected[6] == (0, 4)


def test_training_is_refused_with_a_count_the_first_pairs_and_a_list(tmp_path):
    train = side(tmp_path, "train", [(scan(i), "Which organ?") for i in range(5)])
    test = side(tmp_path, "test", [(scan(i), "Which organ?") for i in range(1, 6)])
    with pytest.raises(RunError) as error:
        leakage.refuse_leakage(leakage.read_side([train]), test, False, tmp_path / "out" / "leaks.jsonl")
    message = str(error.value)
    assert "4 of its records" in message and "test0 = train1 (same file)" in message
    assert "test3" not in message and "\n" not in message
    assert str(tmp_path / "out" / "leaks.jsonl") in message and "--allow-leakage" in message
    lines = [json.loads(line) for line in open(tmp_path / "out" / "leaks.jsonl")]
    assert len(lines) == 8 and {line["kind"] for line in lines} == {"same file", "same question, same image"}
    for line in lines:
        assert (tmp_path / "out" / line["image"]).resolve().exists()
        assert (tmp_path / "out" / line["train_image"]).resolve().exists()


def test_allowed_leakage_is_printed_and_counted_and_other_processes_are_silent(tmp_path, capsys):
    train, test = (side(tmp_path, name, [(scan(1), "Which organ?")]) for name in ("train", "test"))
    assert (
        leakage.refuse_leakage(leakage.read_side([train]), test, True, tmp_path / "quiet.jsonl", main=False)
        == 1
    )
    assert not capsys.readouterr().out and not (tmp_path / "quiet.jsonl").exists()
    assert leakage.refuse_leakage(leakage.read_side([train]), test, True, tmp_path / "leaks.jsonl") == 1
    assert "1 of its records" in capsys.readouterr().out


def test_shared_questions_and_near_duplicates_refuse_nothing(tmp_path):
    train = side(tmp_path, "train", [(scan(1), "Which organ?")])
    test = side(tmp_path, "test", [(scan(1).resize((48, 40)), "Which organ?")])
    assert leakage.refuse_leakage(leakage.read_side([train]), test, False, tmp_path / "leaks.jsonl") == 0
    assert not (tmp_path / "leaks.jsonl").exists()


audit = functools.partial(run_here, leakage)


def test_the_command_prints_the_table_that_it_writes(tmp_path):
    train = side(tmp_path, "train", [(scan(1), "A?"), (scan(2), "B?")])
    test = side(
        tmp_path,
        "test",
        [
            (scan(1), "A?"),
            (tmp_path / "test" / "0.png", "B?"),
            (scan(3), "C?"),
            (scan(2).resize((50, 40)), "D?"),
        ],
    )
    done = audit("--train", train, "--test", test, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    cells = {
        line.rsplit(maxsplit=4)[0].strip(): line.split()[-4:]
        for line in done.stdout.splitlines()
        if line[-1].isdigit()
    }
    assert cells["same file"] == ["1", "0.333", "2", "0.500"]
    assert cells["same question, same image"] == ["1", "0.333", "1", "0.250"]
    assert cells["near-duplicate, 4 of 128 bits at most"] == ["1", "0.333", "1", "0.250"]
    written = json.load(open(tmp_path / "out" / "metrics.json"))
    assert json.load(open(tmp_path / "out" / "args.json"))["inputs"] == {
        p: hash_image(p) for p in (train, test)
    }
    assert written["found"]["same file"]["records"] == 2 and (written["records"], written["images"]) == (4, 3)
    # The last is B?, which was asked of another image.
    assert len(open(tmp_path / "out" / "leaks.jsonl").readlines()) == 2 + 1 + 1 + 1


def test_a_mistake_is_one_line(tmp_path):
    train = side(tmp_path, "train", [(scan(1), "A?")])
    (tmp_path / "test.jsonl").write_text('{"id": "a", "image": "nowhere.png"}\n')
    for flags in (
        ["--test", tmp_path / "test.jsonl"],
        ["--test", train, "--distance", "200"],
        ["--test", tmp_path / "no.jsonl"],
    ):
        done = audit("--train", train, "--out", tmp_path / "out", *flags)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def vqa_rad():
    """VQA-RAD's records, and the ids of the official test split.

    The rows of the test split follow those of train, and their numbers begin again.
    """
    if not RAD.exists():
        pytest.skip(f"no {RAD}")
    numbers = [row["qid"] for row in json.loads(RAD.read_text())]
    start = next(i for i in range(1, len(numbers)) if numbers[i] < numbers[i - 1])
    return formats.import_records(str(RAD))[0], {f"vqarad-{number}" for number in numbers[start:]}


def test_every_test_image_of_the_official_split_of_vqa_rad_is_in_train(vqa_rad, tmp_path):
    rows, official = vqa_rad
    for name in ("train", "test"):
        records.write_records(
            tmp_path / f"{name}.jsonl", [r for r in rows if (r["id"] in official) == (name == "test")]
        )
    root = rows[0]["image"].rpartition("/")[0]
    findings, totals = audit_files(tmp_path / "train.jsonl", tmp_path / "test.jsonl", 4, root)
    result = leakage.summarize_findings(findings, totals)
    assert result["same file"]["records_share"] == result["same file"]["images_share"] == 1
    same_image, other_image = (
        result[f"same question, {image} image"]["records"] for image in ("same", "other")
    )
    assert 0 < same_image < other_image < totals["records"] == len(official)


def test_on_real_scans_the_default_distance_finds_most_altered_copies_and_no_two_different_scans(vqa_rad):
    paths = sorted({r["image"] for r in vqa_rad[0]})[::2]
    images = [open_image(path) for path in paths]
    hashes = np.stack(list(map(leakage.difference_hash, images)))
    halves = np.stack(
        [leakage.difference_hash(image.resize((image.width // 2, image.height // 2))) for image in images]
    )
    index, distance = leakage.closest(halves, hashes)
    assert (index == np.arange(len(images))).mean() > 0.98 and (distance <= 4).mean() > 0.95
    others = [leakage.closest(hashes[i : i + 1], np.delete(hashes, i, 0))[1][0] for i in range(len(hashes))]
    assert min(others) > 4
