"""provenance.py: what it tells of a sample is what the cycle's own files say, and it sees every input that changed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import provenance
from medgr2.errors import RunError

ROOT = Path(__file__).parent.parent


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*words):
    done = subprocess.run(
        [sys.executable, "-m", "analysis.provenance", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def told(story, what):
    return [text for name, text in story if name == what]


def test_an_accepted_sample_is_followed_to_its_image_generator_score_and_every_run_that_read_it(finished):
    out, d = finished[0], finished[0] / "cycle1"
    random = {r["id"] for r in lines(d / "scored" / "random.jsonl")}
    sample = next(r for r in lines(d / "scored" / "accepted.jsonl") if r["id"] not in random)
    story = provenance.trace(sample["id"], str(out))
    (image,) = told(story, "image")
    assert image == f"{out}/data/unlabelled/images/{sample['parent']}.png (record {sample['parent']})"
    (generated,) = told(story, "generated")
    assert generated == (
        f"by toy/generator, paradigm {sample['paradigm']}, seed {sample['seed']}, cycle 1; "
        "cycle1/candidates/candidates.jsonl"
    )
    assert told(story, "scored") == [
        f"{sample['reward']['overall']} by {d}/reward; cycle1/scored/scored.jsonl"
    ]
    assert told(story, "accepted") == ["cycle1/scored/accepted.jsonl"] and not told(story, "random")
    practised = sum(r["record"] == sample["id"] for r in lines(d / "grpo" / "rollouts.jsonl"))
    read = "from cycle1/scored/accepted.jsonl"
    assert told(story, "read by") == [
        f"cycle1/sft (sft.py), {read}",
        f"cycle1/sft_both (sft.py), {read}",
        f"cycle1/grpo (grpo.py), {read}, {practised} rollouts on it",
    ]
    assert set(told(story, "then by")) == {
        f"cycle1/eval_{name} (eval.py)" for name in ("sft", "sft_both", "grpo")
    }


def test_a_sample_that_was_practised_on_a_rejected_one_and_one_that_was_not_accepted_say_so(finished):
    out, d = finished[0], finished[0] / "cycle1"
    accepted, drawn = (
        {r["id"] for r in lines(d / "scored" / f"{name}.jsonl")} for name in ("accepted", "random")
    )
    left = next(r["id"] for r in lines(d / "scored" / "scored.jsonl") if r["id"] not in accepted | drawn)
    assert told(provenance.trace(left, str(out)), "accepted") == ["no"] and not told(
        provenance.trace(left, str(out)), "read by"
    )
    bad = lines(d / "candidates" / "rejected.jsonl")[0]
    story = provenance.trace(bad["id"], str(out))
    assert told(story, "rejected") == [f"cycle1/candidates/rejected.jsonl ({bad['reason']})"] and not told(
        story, "accepted"
    )
    status, shown, _ = command("trace", left, "--in", out)
    assert status == 0 and f"sample     {left}\n" in shown and shown.endswith("accepted   no\n")


@pytest.fixture
def moved(finished, tmp_path):
    """A copy of the cycle, as if moved as a whole: what its args.json name stands elsewhere."""
    return Path(shutil.copytree(finished[0], tmp_path / "moved"))


def test_all_inputs_of_a_cycle_hold_also_where_it_was_moved_and_each_that_changed_or_is_gone_is_named(
    finished, moved
):
    metas = [json.loads(p.read_text()) for p in finished[0].rglob("args.json")]
    total = sum(len(meta["inputs"]) for meta in metas)
    assert total > 20 and provenance.verify(str(finished[0])) == (
        [],
        {"same": total, "changed": 0, "gone": 0, "never on this disk": 0},
    )
    assert command("verify", moved) == (0, f"{moved}: inputs {total} same\n", "")
    with open(moved / "cycle1" / "scored" / "accepted.jsonl", "a") as f:
        # one byte
        f.write("\n")
    with open(moved / "cycle1" / "reward" / "heads.json", "a") as f:
        f.write(" ")
    changes, counts = provenance.verify(str(moved))
    assert {(run, Path(path).name) for run, path, _ in changes} == {
        ("cycle1/sft", "accepted.jsonl"),
        ("cycle1/sft_both", "accepted.jsonl"),
        ("cycle1/grpo", "accepted.jsonl"),
        ("cycle1/grpo", "reward"),
        ("cycle1/scored", "reward"),
    }
    assert (
        counts["changed"] == 5
        and counts["same"] == total - 5
        and all(what.startswith("changed: ") for _, _, what in changes)
    )
    status, shown, _ = command("verify", moved)
    assert status == 1 and "5 changed" in shown and shown.count("\n") == 2 + 5 + 1


def a_run(folder, **inputs):
    folder.mkdir(parents=True)
    meta = {
        "script": "sft.py",
        "started": "2026",
        "args": {"out": str(folder), "model": "m"},
        "inputs": inputs,
    }
    (folder / "args.json").write_text(json.dumps(meta))


def test_an_input_that_is_gone_is_a_change_and_a_hub_name_is_none(tmp_path):
    a_run(tmp_path / "a", **{"owner/model": None, str(tmp_path / "gone.jsonl"): "0" * 64})
    changes, counts = provenance.verify(str(tmp_path))
    assert changes == [("a", str(tmp_path / "gone.jsonl"), "gone")] and counts["never on this disk"] == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"script": "x"}', '{"script": "x", "started": "", "args": {"out": ""}, "inputs": 3}']
)
def test_what_is_no_run_is_one_line_and_status_2(tmp_path, text):
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(RunError, match="not what a run writes"):
        provenance.verify(str(tmp_path))
    (tmp_path / "args.json").unlink()
    with pytest.raises(RunError, match="no runs in it"):
        provenance.verify(str(tmp_path))


def test_a_sample_that_is_nowhere_is_one_line_and_status_2(finished):
    status, shown, error = command("trace", "nobody", "--in", finished[0])
    assert (
        (status, shown) == (2, "")
        and error.startswith("provenance.py: nobody: in no run of ")
        and error.count("\n") == 1
    )
