"""provenance.py: a sample's trace is what the cycle's own files say, and every changed input is found."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import run_here

from analysis import provenance
from medgr2.errors import RunError

ROOT = Path(__file__).parent.parent


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*words):
    done = run_here(provenance, *words)
    return done.returncode, done.stdout, done.stderr


def texts(lines, what):
    return [text for name, text in lines if name == what]


def test_an_accepted_sample_is_traced_to_its_image_generator_score_and_every_run_that_read_it(finished):
    out, d = finished[0], finished[0] / "cycle1"
    random = {r["id"] for r in read_lines(d / "scored" / "random.jsonl")}
    sample = next(r for r in read_lines(d / "scored" / "accepted.jsonl") if r["id"] not in random)
    lines = provenance.trace(sample["id"], str(out))
    (image,) = texts(lines, "image")
    assert image == f"{out}/data/unlabelled/images/{sample['parent']}.png (record {sample['parent']})"
    (generated,) = texts(lines, "generated")
    assert generated == (
        f"by toy/generator, paradigm {sample['paradigm']}, seed {sample['seed']}, cycle 1; "
        "cycle1/candidates/candidates.jsonl"
    )
    (scored,) = texts(lines, "scored")
    assert scored == f"{sample['reward']['overall']} by {d}/reward; cycle1/scored/scored.jsonl"
    assert texts(lines, "accepted") == ["cycle1/scored/accepted.jsonl"] and not texts(lines, "random")
    rollouts = sum(r["record"] == sample["id"] for r in read_lines(d / "grpo" / "rollouts.jsonl"))
    source = "from cycle1/scored/accepted.jsonl"
    assert sorted(texts(lines, "read by")) == [
        f"cycle1/grpo (grpo.py), {source}, {rollouts} rollouts on it",
        f"cycle1/sft (sft.py), {source}",
    ]
    evaluated = ("sft", "grpo")
    assert set(texts(lines, "then by")) == {f"cycle1/eval_{name} (eval.py)" for name in evaluated}


def test_the_trace_says_that_a_sample_was_not_accepted_or_why_it_was_rejected(finished):
    out, d = finished[0], finished[0] / "cycle1"
    scored, accepted, drawn = (
        [r["id"] for r in read_lines(d / "scored" / f"{name}.jsonl")]
        for name in ("scored", "accepted", "random")
    )
    left = next(name for name in scored if name not in accepted + drawn)
    lines = provenance.trace(left, str(out))
    rollouts = sum(r["record"] == left for r in read_lines(d / "grpo" / "rollouts.jsonl"))
    reader = f"cycle1/grpo (grpo.py), from cycle1/scored/scored.jsonl, {rollouts} rollouts on it"
    assert texts(lines, "accepted") == ["no"] and texts(lines, "read by") == [reader]
    bad = read_lines(d / "candidates" / "rejected.jsonl")[0]
    lines = provenance.trace(bad["id"], str(out))
    assert texts(lines, "rejected") == [f"cycle1/candidates/rejected.jsonl ({bad['reason']})"]
    assert not texts(lines, "accepted")
    status, shown, _ = command("trace", left, "--in", out)
    assert status == 0 and f"sample     {left}\n" in shown and "accepted   no\n" in shown


@pytest.fixture
def moved(finished, tmp_path):
    """A copy of the cycle, as if it was moved: the paths in its args.json lead elsewhere."""
    return Path(shutil.copytree(finished[0], tmp_path / "moved"))


def test_all_inputs_of_a_cycle_hold_after_a_move_too_and_each_that_changed_is_named(finished, moved):
    metas = [json.loads(p.read_text()) for p in finished[0].rglob("args.json")]
    total = sum(len(meta["inputs"]) for meta in metas)
    same = {"same": total, "changed": 0, "gone": 0, "never on this disk": 0}
    assert total > 15 and provenance.verify(str(finished[0])) == ([], same)
    assert command("verify", moved) == (0, f"{moved}: inputs {total} same\n", "")
    with open(moved / "cycle1" / "scored" / "accepted.jsonl", "a") as f:
        f.write("\n")
    with open(moved / "cycle1" / "reward" / "heads.json", "a") as f:
        f.write(" ")
    changes, counts = provenance.verify(str(moved))
    assert {(run, Path(path).name) for run, path, _ in changes} == {
        ("cycle1/sft", "accepted.jsonl"),
        ("cycle1/grpo", "accepted.jsonl"),
        ("cycle1/grpo", "reward"),
        ("cycle1/scored", "reward"),
    }
    assert (counts["changed"], counts["same"]) == (4, total - 4)
    assert all(what.startswith("changed: ") for _, _, what in changes)
    status, shown, _ = command("verify", moved)
    assert status == 1 and f"{len(changes)} changed" in shown and shown.count("\n") == 2 + len(changes) + 1


def a_run(folder, **inputs):
    folder.mkdir(parents=True)
    args = {"out": str(folder), "model": "m"}
    meta = {"script": "sft.py", "started": "2026", "args": args, "inputs": inputs}
    (folder / "args.json").write_text(json.dumps(meta))


def test_an_input_that_is_gone_is_a_change_and_a_hub_name_is_not(tmp_path):
    a_run(tmp_path / "a", **{"owner/model": None, str(tmp_path / "gone.jsonl"): "0" * 64})
    changes, counts = provenance.verify(str(tmp_path))
    assert changes == [("a", str(tmp_path / "gone.jsonl"), "gone")] and counts["never on this disk"] == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"script": "x"}', '{"script": "x", "started": "", "args": {"out": ""}, "inputs": 3}']
)
def test_a_folder_that_holds_no_run_is_refused(tmp_path, text):
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(RunError, match="not what a run writes"):
        provenance.verify(str(tmp_path))
    (tmp_path / "args.json").unlink()
    with pytest.raises(RunError, match="no runs in it"):
        provenance.verify(str(tmp_path))


def test_a_sample_in_no_run_is_one_line_and_status_2(finished):
    status, shown, error = command("trace", "nobody", "--in", finished[0])
    assert (status, shown, error.count("\n")) == (2, "", 1)
    assert error.startswith("provenance.py: nobody: in no run of ")
