"""analysis/walkthrough.py: its numbers are those of the run, its code is that of the functions it names."""

import functools
import json
import re
import statistics
from pathlib import Path

import pytest
from helpers import run_here

from analysis import walkthrough
from medgr2 import prompts
from medgr2.errors import RunError

ROOT = Path(__file__).parent.parent
# A link to a file, then a block of Python.
QUOTE = re.compile(r"\[(\S+): \S+\]\((\S+)\)\n\n```python\n(.*?)\n```", re.DOTALL)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


call = functools.partial(run_here, walkthrough)


def read_table(text, header):
    """The rows of the table that begins with this header, as lists of cells."""
    lines = text[text.index(f"\n| {header} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    """(folder of the page, its text)."""
    folder = tmp_path_factory.mktemp("walkthrough")
    done = call("--run", finished[0], "--out", folder / "page.md")
    assert done.returncode == 0, done.stderr
    return folder, (folder / "page.md").read_text()


def test_the_page_shows_its_images_and_all_prompts(page):
    folder, text = page
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert images == ["figures/page.png", "figures/page_levels.png", "figures/page_test.png"]
    assert all((folder / image).read_bytes().startswith(b"\x89PNG") for image in images)
    assert all(f"*{paradigm}*:" in text for paradigm in prompts.PARADIGMS)
    assert all(instruction in text for instruction in prompts.PARADIGMS.values())


def test_the_record_and_the_scores_are_those_of_the_run(finished, page):
    cycle, text = finished[0] / "cycle1", page[1]
    record = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])
    assert record in read_lines(cycle / "candidates" / "candidates.jsonl")
    scored = [r for r in read_lines(cycle / "scored" / "scored.jsonl") if r["parent"] == record["parent"]]
    accepted = {r["id"] for r in read_lines(cycle / "scored" / "accepted.jsonl")}
    assert record["id"] in accepted
    rows = read_table(text, "paradigm")
    assert [row[0] for row in rows] == [r["paradigm"] for r in scored]
    for row, r in zip(rows, scored, strict=True):
        reward = r["reward"]
        assert list(map(float, row[2:6])) == [
            reward[k] for k in ("overall", "relevant", "coherent", "faithful")
        ]
        assert row[6] == ("accepted" if r["id"] in accepted else "not accepted")


def test_each_reply_is_shown_with_what_became_of_it(finished, page):
    folder, text = finished[0] / "cycle1" / "candidates", page[1]
    image = re.search(r"`(\w+)` is the first", text)[1]
    kept = [r for r in read_lines(folder / "candidates.jsonl") if r["parent"] == image]
    rejected = [r for r in read_lines(folder / "rejected.jsonl") if r["parent"] == image]
    assert kept and len(kept) + len(rejected) == 6
    for r in kept + rejected:
        outcome = f"rejected: {r['reason']}" if "reason" in r else "kept"
        assert f"*{r['paradigm']}*, {r['task']} ({outcome}):" in text
        assert r.get("text", r.get("question")) in text


def test_the_levels_have_the_means_of_the_run(finished, page):
    measured = json.loads((finished[0] / "cycle1" / "reward" / "metrics.json").read_text())["levels"]
    rows = {row[0]: row[2:] for row in read_table(page[1], "level")}
    assert {name: row[0] for name, row in rows.items()} == {
        "original": "10", "perturbed": "6", "incoherent": "0", "irrelevant": "-6",
    }  # fmt: skip
    for name, (_, mean, count) in rows.items():
        assert float(mean) == round(measured[name]["mean"], 2) and int(count) == measured[name]["n"]


def test_rewards_and_advantages_are_those_of_the_run_and_can_be_computed_again(finished, page):
    text, args = page[1], json.loads((finished[0] / "cycle1" / "grpo" / "args.json").read_text())["args"]
    step, record = re.search(r"from step (\d+), for the prompt of\s`(\S+)`", text).groups()
    rollouts = read_lines(finished[0] / "cycle1" / "grpo" / "rollouts.jsonl")
    group = [r for r in rollouts if r["record"] == record and r["step"] == int(step)]
    rows = read_table(text, "response")
    assert len(rows) == args["group"] == len(group)
    rewards = [r["rollout_reward"] for r in group]
    mean = statistics.mean(rewards)
    assert f"The mean of the rewards is {mean:.4f}." in text
    for row, r in zip(rows, group, strict=True):
        R, match, reward, advantage, recomputed = map(float, [row[1], *row[3:]])
        assert R == r["rollout_scores"]["overall"]
        assert match == (r["correct"] if "answer" in r else pytest.approx((R + 6) / 16, abs=1e-4))
        assert (reward, advantage) == (r["rollout_reward"], r["advantage"])
        assert row[2] == "no" or reward == pytest.approx(0.8 * (R + 6) / 16 + 0.2 * match, abs=1e-4)
        assert row[2] == "yes" or reward == 0
        assert recomputed == pytest.approx(reward - mean, abs=1e-3) == advantage


def test_the_answers_before_and_after_are_those_of_the_run(finished, page):
    text, found = page[1], []
    name = re.search(r"A test question, `(\S+)`", text)[1]
    for run in ("eval_base", "cycle1/eval_grpo"):
        rows = read_lines(finished[0] / run / "predictions.jsonl")
        row = next(r for r in rows if r["id"] == name)
        assert row["response"] in text.replace("\\|", "|")
        found.append([r["correct"] for r in rows])
        accuracy = json.loads((finished[0] / run / "metrics.json").read_text())["accuracy"]
        assert f"{accuracy:.3f}" in text.split("One question is an example.")[1]
    corrected = sum(b and not a for a, b in zip(*found))
    introduced = sum(a and not b for a, b in zip(*found))
    assert f"Of all {len(found[0])}, {corrected} were wrong before" in text
    assert f"{introduced} were correct before" in text


def test_the_page_names_the_run(finished, page):
    meta = json.loads((finished[0] / "cycle1" / "candidates" / "args.json").read_text())
    assert f"commit `{meta['git']['commit'][:10]}`" in page[1]
    assert "SEED=0" in page[1] and "GRPO_FLAGS='--steps 1" in page[1] and "bash cycle.sh`" in page[1]


def row(name, parent="i", **more):
    return {"id": name, "parent": parent} | more


def test_the_image_is_chosen_by_the_first_rule_that_any_image_fits():
    candidates = [row("a0", "a"), row("b0", "b"), row("b1", "b"), row("c0", "c"), row("c1", "c")]
    rejected = [row("c2", "c")]
    accepted = {"a0", "b1", "c1"}

    def choose(trained_on, rejected=rejected, accepted=accepted):
        candidate, rule = walkthrough.choose_candidate(candidates, rejected, accepted, trained_on)
        return candidate["id"], walkthrough.RULES.index(rule)

    assert choose({"a0", "b1", "c1"}) == ("c1", 0)
    assert choose({"a0", "b1"}) == ("b1", 1)
    assert choose({"a0", "b1", "c1"}, rejected=[]) == ("b1", 1)
    assert choose({"a0"}) == choose(set()) == ("a0", 2)
    with pytest.raises(RunError, match="no candidate is accepted"):
        choose(set(), accepted=set())


def test_the_test_question_is_one_that_was_corrected_and_is_like_the_candidate():
    def answered(*correct):
        kinds = [("T", "M"), ("T", "M"), ("T", "N"), ("S", "M")]
        return [
            row(str(i), task=t, modality=m, correct=c) for i, ((t, m), c) in enumerate(zip(kinds, correct))
        ]

    def choose(after):
        before = answered(True, False, False, False)
        first, last, rule = walkthrough.choose_test_item(before, after, {"task": "T", "modality": "M"})
        assert first["id"] == last["id"]
        return first["id"], rule

    assert choose(answered(True, True, True, True)) == (
        "1",
        "the first one that was corrected, of the same task and modality",
    )
    assert choose(answered(True, False, True, True)) == (
        "2",
        "the first one that was corrected, of the same task",
    )
    assert choose(answered(True, False, False, True)) == ("3", "the first one that was corrected")
    assert choose(answered(False, False, False, False)) == ("0", "the first one")


def test_a_function_or_line_that_is_gone_is_an_error():
    for source in (
        ("grpo.py", "gone", "x = "),
        ("grpo.py", "grpo_loss", "gone"),
        ("grpo.py", "Group.gone", "x"),
    ):
        with pytest.raises(RunError, match=r"grpo.py: no function .*gone"):
            walkthrough.quote(*source, 1, "docs/walkthrough.md")


def test_any_text_can_be_shown():
    assert walkthrough.code("a | b\n`c`") == "`` a \\| b `c` ``"
    assert walkthrough.fence("```\nx") == "````text\n```\nx\n````"


def test_the_committed_page_quotes_the_code_as_it_is_and_has_its_images():
    page = ROOT / "docs" / "walkthrough.md"
    quotes = QUOTE.findall(page.read_text())
    assert len(quotes) == len(walkthrough.SOURCES)
    for file, link, lines in quotes:
        assert (page.parent / link).resolve() == ROOT / file
        assert lines in (ROOT / file).read_text(), f"{file} has changed; write docs/walkthrough.md again"
    for image in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
        assert (page.parent / image).is_file()


def test_a_folder_that_is_no_finished_cycle_is_one_line_and_status_2(tmp_path):
    done = call("--run", tmp_path, "--out", tmp_path / "page.md")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"walkthrough.py: {tmp_path}: no settings in it; give a finished folder")
    assert list(tmp_path.iterdir()) == []
