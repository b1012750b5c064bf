"""reward.py and levels.py: the four levels, the heads' features, the evaluation, and filtering."""

import argparse
import copy
import itertools
import json
import os
import random
import re
import sys
from dataclasses import replace

import clinic
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, run_in_one_and_two
from PIL import Image
from safetensors.torch import load_file

import reward
from medgr2 import encoding, levels, loading, measures, records, rollouts, selection
from medgr2.errors import ModelError, RecordError, RunError
from medgr2.images import open_image
from medgr2.prompts import format_response, policy_prompt, reference_response

TERMS = (
    re.compile(r"(?<!\w)(?:right|left|mass|cyst|mri|ct)(?!\w)", re.IGNORECASE),
    {"ct": ["MRI"], "mri": ["CT"], "mass": ["cyst"], "cyst": ["mass"], "left": ["right"], "right": ["left"]},
)
REASONED = {
    "id": "a",
    "image": "/1.png",
    "question": "Which finding?",
    "options": ["mass", "cyst"],
    "answer": "mass",
    "rationale": "CT shows a mass on the left side.",
}
PLAIN = {
    "id": "b",
    "image": "/2.png",
    "question": "Which finding?",
    "options": ["mass", "cyst"],
    "answer": "cyst",
}
OPEN = {"id": "c", "image": "/3.png", "question": "Where is it?", "answer": "left lung"}
OPEN2 = {"id": "d", "image": "/4.png", "question": "Where is it?", "answer": "liver"}
REPORT = {"id": "e", "image": "/5.png", "report": "CT of the chest. A mass on the left."}
REPORT2 = {"id": "f", "image": "/6.png", "report": "MRI of the knee. No finding."}
ALL = [REASONED, PLAIN, OPEN, OPEN2, REPORT, REPORT2]


def draws(make, record, n=40):
    return {make(record, ALL, TERMS, random.Random(k)) for k in range(n)}


# The four levels ------------------------------------------------------------------------------------------


def test_original_is_the_record_as_written():
    assert draws(levels.original, REASONED) == {
        "<think>CT shows a mass on the left side.</think><answer>mass</answer>"
    }
    assert draws(levels.original, REPORT) == {REPORT["report"]}


def test_perturbed_changes_one_detail_of_the_rationale_and_keeps_the_answer():
    assert draws(levels.perturbed, REASONED) == {
        "<think>MRI shows a mass on the left side.</think><answer>mass</answer>",
        "<think>CT shows a mass on the right side.</think><answer>mass</answer>",
    }


def test_perturbed_of_a_longer_answer_leaves_the_rest_right_and_of_a_report_one_term():
    assert draws(levels.perturbed, OPEN) == {"<answer>right lung</answer>"}
    assert draws(levels.perturbed, REPORT) == {
        "MRI of the chest. A mass on the left.",
        "CT of the chest. A cyst on the left.",
        "CT of the chest. A mass on the right.",
    }


def test_an_answer_with_nothing_left_right_is_not_perturbed_but_wrong():
    assert draws(levels.perturbed, PLAIN) == {None}
    # Its only term is the answer, and to swap that would be incoherent.
    bare = REASONED | {"rationale": "A mass."}
    assert draws(levels.perturbed, bare) == {None}


@pytest.mark.parametrize(
    "text, options, swapped",
    [
        ("Mass in the lung. The mass is round.", ["Mass", "Cyst"], "Cyst in the lung. The cyst is round."),
        ("a CT image", ["CT", "MRI"], "a MRI image"),
        ("a CT image", ["CT", "Ultrasound"], "a Ultrasound image"),
    ],
)
def test_a_replaced_term_keeps_the_case_of_its_place(text, options, swapped):
    terms = levels.find_terms([{"options": options}])
    assert levels.swap_term(text, terms, random.Random(0)) == swapped


def test_the_longest_of_overlapping_terms_is_swapped():
    options = ["opacity", "nodule"], ["ground-glass opacity", "effusion"]
    terms = levels.find_terms([{"options": list(pair)} for pair in options])
    swapped = {levels.swap_term("A ground-glass opacity.", terms, random.Random(k)) for k in range(9)}
    assert swapped == {"A effusion."}


def test_a_record_in_which_nothing_can_be_perturbed_gives_none():
    assert levels.perturbed(OPEN2, ALL, TERMS, random.Random(0)) is None


def test_a_term_inside_a_word_is_not_a_term():
    assert levels.swap_term("massive leftovers", TERMS, random.Random(0)) is None


def test_incoherent_sets_the_answer_against_the_rationale():
    assert draws(levels.incoherent, REASONED) == {
        "<think>CT shows a mass on the left side.</think><answer>cyst</answer>"
    }
    assert draws(levels.incoherent, PLAIN) == {"<answer>cyst, mass</answer>"}
    assert draws(levels.incoherent, REPORT) == {
        text
        for strange in ("MRI of the knee.", "No finding.")
        for text in (
            f"{strange} CT of the chest. A mass on the left.",
            f"CT of the chest. {strange} A mass on the left.",
            f"CT of the chest. A mass on the left. {strange}",
        )
    }


def test_irrelevant_is_of_another_image_and_its_answer_wrong_here():
    assert draws(levels.irrelevant, REASONED) == {reference_response(PLAIN)}
    assert draws(levels.irrelevant, OPEN) == {reference_response(OPEN2)}
    assert draws(levels.irrelevant, REPORT) == {REPORT2["report"]}
    # Another image with the same answer is no donor.
    same = REASONED | {"id": "z", "image": "/9.png"}
    assert levels.irrelevant(REASONED, [same, REASONED], TERMS, random.Random(0)) is None
    # The same image is no donor either.
    twin = PLAIN | {"image": REASONED["image"]}
    assert levels.irrelevant(REASONED, [twin], TERMS, random.Random(0)) is None


def other_language(kind):
    """Two records of two images, the first with a text about a side and a finding that can be replaced."""
    if kind == "report":
        texts = {"report": "左肺见结节。心影不大；约5mm左右。"}, {"report": "肝脏增大。脾脏正常。"}
    else:
        asked = {"question": "诊断是什么？", "options": ["肺炎", "结核"]}
        told = ("左肺见斑片影，约5mm左右", "肺炎"), ("右肺见空洞", "结核")
        texts = [asked | {"rationale": rationale, "answer": answer} for rationale, answer in told]
    return [{"id": str(i), "image": f"/{i}.png"} | text for i, text in enumerate(texts)]


@pytest.mark.parametrize("kind", ["report", "question"])
def test_a_record_in_a_script_without_spaces_has_all_four_levels(kind):
    rows = other_language(kind)
    made = dict(levels.build_levels(rows, 1, 0)[0][1])
    assert set(made) == {"original", "perturbed", "incoherent", "irrelevant"}
    # The side is replaced, "about" is not.
    assert made["perturbed"] == made["original"].replace("左肺", "右肺")
    if kind == "report":
        clauses = ["肝脏增大。", "脾脏正常。"]
        assert any(made["incoherent"].replace(c, "") == made["original"] for c in clauses)


@pytest.mark.parametrize(
    "text, swapped",
    [
        ("Läsion links oben", "Läsion rechts oben"),
        ("Pulmón izquierdo", "Pulmón derecho"),
        ("CT示左侧", "CT示右侧"),
        ("约5mm左右", None),
        ("upperleft", None),
    ],
)
def test_a_term_is_replaced_where_it_is_a_word(text, swapped):
    assert levels.swap_term(text, levels.find_terms([]), random.Random(0)) == swapped


def test_levels_are_drawn_anew_and_no_response_of_a_record_occurs_twice():
    one, many = (levels.build_levels(ALL, k, 0) for k in (1, 8))
    assert all(len(drawn) == len(set(drawn)) for _, drawn in many)
    assert sum(len(d) for _, d in many) > sum(len(d) for _, d in one)
    assert [sorted(d) for _, d in one] == [sorted(d) for _, d in levels.build_levels(ALL, 1, 0)]


def test_levels_do_not_mutate_records():
    before = copy.deepcopy(ALL)
    levels.build_levels(ALL, 3, 0)
    assert before == ALL


def test_no_text_has_two_levels_and_the_original_keeps_its_own():
    # Open questions: `perturbed` swaps the side, which is also the answer that `irrelevant` finds.
    lobes = ["left lobe", "right lobe"]
    rows = [
        {"id": str(k), "image": f"/{k}.png", "question": "Where?", "answer": lobes[k % 2]} for k in range(4)
    ]
    for row, drawn in levels.build_levels(rows, 4, 0):
        texts = [text for _, text in drawn]
        assert len(texts) == len(set(texts)) and ("original", reference_response(row)) in drawn
        wrong = format_response(None, next(o for o in lobes if o != row["answer"]))
        assert levels.perturbed(row, rows, levels.find_terms(rows), random.Random(0)) == wrong
        assert ("irrelevant", wrong) in drawn


def test_terms_are_the_options_of_one_question():
    pattern, found = levels.find_terms([{"options": ["CT", "MRI", "OCT"]}])
    assert found["ct"] == ["MRI", "OCT"] and found["left"] == ["right"]
    assert pattern.findall("OCT, ct; mri2") == ["OCT", "ct"]


def test_rollouts_on_expert_questions_are_labelled_by_the_truth_and_others_are_left_out(tmp_path):
    responses = [
        ("<think>a</think><answer>mass</answer>", "expert"),
        ("<think>a</think><answer>cyst</answer>", "expert"),
        ("<answer>mass</answer>", "expert"),
        ("mass", "expert"),
        ("<think>a</think><answer>mass</answer>", "generated"),
        # Written twice, it counts once.
        ("mass", "expert"),
    ]
    with open(tmp_path / "rollouts.jsonl", "w") as file:
        for k, (response, source) in enumerate(responses):
            rollout = REASONED | {"id": f"r{k}", "image": "x.png", "source": source, "response": response}
            file.write(json.dumps(rollout) + "\n")
        # Of a question without answer (grpo.py --unlabelled).
        del rollout["answer"]
        rollout |= {"id": "bare", "record": "q", "source": "expert", "response": "<answer>cyst</answer>"}
        file.write(json.dumps(rollout) + "\n")
    ((_, labelled),) = levels.label_rollouts([str(tmp_path / "rollouts.jsonl")], 3, 0)
    assert sorted(labelled) == [
        ("malformed", "mass"),
        ("right", "<answer>mass</answer>"),
        ("right", "<think>a</think><answer>mass</answer>"),
        ("wrong", "<think>a</think><answer>cyst</answer>"),
    ]


def test_no_outcome_of_a_question_is_drawn_more_often_than_asked(tmp_path):
    written = [
        (f"{image}.png", response)
        for image in ("x", "y")
        for k in range(5)
        for response in (f"<think>{k}</think><answer>mass</answer>", f"malformed {k}")
    ] + [("x.png", "<answer>cyst</answer>")]
    rollouts_ = [
        REASONED | {"id": f"r{k}", "image": image, "source": "expert", "response": response}
        for k, (image, response) in enumerate(written)
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts_))
    draws = [levels.label_rollouts([str(tmp_path / "rollouts.jsonl")], 3, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for (record, labelled), wrong in zip(draws[0], (1, 0)):
        outcomes = [outcome for outcome, _ in labelled]
        assert [outcomes.count(name) for name in ("right", "malformed", "wrong")] == [3, 3, wrong]
        assert len({r for _, r in labelled}) == len(labelled)
        assert {(os.path.basename(record["image"]), response) for _, response in labelled} <= set(written)


def test_a_rollout_about_a_copy_of_a_held_out_image_is_held_out(tmp_path):
    rows, rollouts_ = [], []
    for k in range(4):
        for name in (f"{k}.png", f"copy{k}.png"):
            Image.new("L", (8, 8), 50 * k).save(tmp_path / name)
        rows.append({**PLAIN, "id": f"e{k}", "image": f"{k}.png"})
        for name, thought in ((f"e{k}", ""), (f"e{k}-2", "<think>a</think>")):
            told = {"id": name, "image": f"copy{k}.png", "response": f"{thought}<answer>mass</answer>"}
            rollouts_.append(rows[-1] | told)
    for name, written in (("data", rows), ("rollouts", rollouts_)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    files = {"data": [str(tmp_path / "data.jsonl")], "rollouts": [str(tmp_path / "rollouts.jsonl")]}
    options = {"image_root": None, "on_error": "stop", "holdout": 0.5, "seed": 0}
    options |= {"resamples": 2, "per_outcome": 1}
    for part in levels.load_groups(argparse.Namespace(**files, **options)):
        assert len(part) == 4 and len({record["id"] for record, _ in part}) == 2
        # Of each question's two right rollouts, --per-outcome takes one.
        assert [len(labelled) for record, labelled in part if "response" in record] == [1, 1]
    (tmp_path / "copy3.png").unlink()
    with pytest.raises(RecordError, match="copy3.png"):
        levels.load_groups(argparse.Namespace(**files, **options))


def test_targets_are_those_of_the_levels():
    t = reward.targets_of(["original", "perturbed", "incoherent", "irrelevant", "malformed"], "cpu")
    assert t[:, 0].tolist() == [1.0, 0.75, 0.375, 0.0, 0.0]
    assert t[:4, 1:].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0]] and t[4, 1:].isnan().all()


def test_the_loss_by_hand_leaves_unknown_targets_out():
    out, nan = torch.tensor([[0.5, 0.0, 2.0, 1.0], [0.25, 3.0, 1.0, 1.0]]), float("nan")
    targets = torch.tensor([[1.0, 1.0, nan, 0.0], [0.25, nan, nan, nan]])
    # Logit 0 with target 1, and logit 1 with target 0.
    bce = (np.log(2) + np.log(1 + np.e)) / 2
    assert reward.reward_loss(out, targets).item() == pytest.approx(0.25 / 2 + bce, rel=1e-5)


# The heads' features --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone():
    return loading.load(str(ROOT / "toy" / "policy"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    clinic.write_clinic(str(folder), (12, 4, 1, 1, 1), seed=11)
    return list(records.read_records(folder / "expert.jsonl")) + list(
        records.read_records(folder / "reports.jsonl")
    )


def test_token_statistics_by_hand():
    x, part = torch.tensor([[3.0, -1.0, -5.0, 2.0, 9.0]]), torch.tensor([[True, True, True, True, False]])
    assert reward.token_statistics(x, part)[0].tolist() == [-1.0, -0.25, -5.0, -1.0, 2.0]
    assert reward.token_statistics(x, part & (x == 3))[0].tolist() == [3.0, 3.0, 3.0, 0.0, 0.0]
    assert not reward.token_statistics(x, part & False).any()


def test_the_answer_begins_at_its_tag_and_the_end_of_turn_belongs_to_it(backbone):
    texts = ["<think>a mass</think><answer>mass</answer>", "CT of the chest."]
    ids, mask = encoding.encode_continuations(backbone, texts)
    answer = reward.answer_mask(backbone, texts, mask)
    end = backbone.tokenizer.eos_token
    assert backbone.tokenizer.decode(ids[0][answer[0]]) == "<answer>mass</answer>" + end
    assert not answer[1].any()


def test_features_are_what_the_models_own_logits_say(backbone, rows):
    record = rows[0]
    response, image = reference_response(record), open_image(record["image"])
    asked = reward.encode_with_blank(backbone, True, [image], [policy_prompt(record)])
    got = reward.compute_features(backbone, asked, [response])[0]
    inputs = encoding.encode_prompts(backbone, [image], [policy_prompt(record)])
    ids = torch.tensor([backbone.tokenizer(response)["input_ids"] + [backbone.end_id]])
    full = torch.cat([inputs["input_ids"], ids], 1)
    with torch.no_grad():
        out = backbone.model(
            input_ids=full,
            pixel_values=inputs["pixel_values"],
            attention_mask=torch.ones_like(full),
            output_hidden_states=True,
        )
    logits = out.logits[0, -ids.shape[1] - 1 : -1]
    # What is never sampled has no probability.
    logits[:, backbone.banned_ids] = -torch.inf
    logps = logits.log_softmax(-1)
    seen = logps.gather(1, ids[0][:, None])[:, 0]
    start = (ids[0] == backbone.tokenizer.convert_tokens_to_ids("<answer>")).nonzero().item()
    assert got[0].item() == pytest.approx(seen[:start].sum().item(), abs=1e-3)
    assert got[5 + 1].item() == pytest.approx(seen[start:].mean().item(), abs=1e-4)
    assert got[2].item() == pytest.approx(seen[:start].min().item(), abs=1e-3)
    surprise = seen + torch.special.entr(logps.exp()).sum(-1)
    assert got[10].item() == pytest.approx(surprise[:start].sum().item(), abs=1e-3)
    # Without likelihoods: the last hidden state.
    asked = reward.encode_with_blank(backbone, False, [image], [policy_prompt(record)])
    (state,) = reward.compute_features(backbone, asked, [response])
    assert torch.allclose(state, out.hidden_states[-1][0, -1], atol=1e-4)


def test_the_image_difference_is_zero_on_a_blank_image_and_not_on_another(backbone, rows):
    prompt, response = policy_prompt(rows[0]), reference_response(rows[0])

    def image_difference(image):
        features = reward.compute_features(
            backbone, reward.encode_with_blank(backbone, True, [image], [prompt]), [response]
        )
        return features[0, -10:].abs().max()

    blank = Image.new("RGB", (64, 64), (128, 128, 128))
    assert image_difference(blank) < 1e-4 < image_difference(open_image(rows[0]["image"]))


def test_encoding_a_question_once_for_many_responses_changes_no_feature(backbone, rows):
    torch.manual_seed(0)
    model = reward.RewardModel(backbone, reward.Heads(reward.feature_width(backbone, True), 8), True)
    groups = levels.build_levels(rows[:6] + rows[-2:], 2, 0)
    with torch.no_grad():
        args = argparse.Namespace(batch=8, workers=0)
        features, order = reward.collect_features(model, groups, args, Accelerator())
        assert len(features) == len(order) == sum(len(labelled) for _, labelled in groups)
        for record, labelled in groups[:3]:
            image, prompt = open_image(record["image"]), reward.prompt_of(record)
            asked = model.encoder()([image], [prompt])
            alone = torch.cat([model.features(asked, [text]) for _, text in labelled])
            shared = torch.stack([x for x, (r, _) in zip(features, order) if r["id"] == record["id"]])
            assert torch.allclose(alone, shared, atol=2e-3, rtol=1e-3)


def test_equal_responses_to_a_question_are_computed_once_and_have_equal_scores(backbone, rows, monkeypatch):
    torch.manual_seed(0)
    model = reward.RewardModel(backbone, reward.Heads(reward.feature_width(backbone, True), 8), True)
    asked = model.encoder()(*rollouts.open_rows(rows[:2]))
    computed, features = [], reward.compute_features

    def count(backbone, encoded, responses, owner=None):
        computed.append((list(responses), owner))
        return features(backbone, encoded, responses, owner)

    monkeypatch.setattr(reward, "compute_features", count)
    # The first question has two responses three times, the second the same ones and two more.
    texts = ["a", "b", "a", "b", "a", "b", "a", "b", "c", "d", "a", "b"]
    model.heads.standardise(model.features(asked, texts))
    # In the middle of the range, where nothing is clamped.
    model.heads.out.bias.data.fill_(0.5)
    computed.clear()
    scores = model(asked, texts)
    assert len(set(scores["overall"])) == 6
    assert computed == [(["a", "b", "a", "b", "c", "d"], [0, 0, 1, 1, 1, 1])]
    for n, text in enumerate(texts):
        alone = model(model.encoder()(*rollouts.open_rows([rows[n // 6]])), [text])
        assert {head: values[n] for head, values in scores.items()} == pytest.approx(
            {head: value for head, (value,) in alone.items()}, abs=1e-3
        )
    computed.clear()
    assert len(set(model(asked, ["a"] * 12)["overall"])) == 2 and computed == [(["a", "a"], None)]


def test_a_saved_reward_model_scores_the_same(backbone, rows, tmp_path):
    model = reward.RewardModel(backbone, reward.Heads(reward.feature_width(backbone, False), 8), False)
    model.save(str(tmp_path))
    asked = model.encoder()([open_image(rows[0]["image"])], [reward.prompt_of(rows[0])])
    responses = ["<think>x</think><answer>y</answer>", "nonsense"]
    first = model(asked, responses)
    again = reward.RewardModel.load(str(tmp_path))(asked, responses)
    assert set(first) == set(reward.HEADS) and all(len(scores) == 2 for scores in first.values())
    assert all(first[head] == pytest.approx(again[head], abs=1e-5) for head in first)
    assert all(reward.R_MIN <= R <= reward.R_MAX for R in first["overall"])
    with pytest.raises(ModelError, match="not a reward model"):
        reward.RewardModel.load(str(ROOT / "toy" / "policy"))


# The evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_ordered_pairs(seed):
    rng = np.random.default_rng(seed)
    # With many ties.
    scores, right = rng.integers(0, 6, 30), rng.random(30) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[right], scores[~right])]
    assert measures.auroc(scores, right) == pytest.approx(np.mean(pairs))


def test_auroc_and_spearman_are_none_where_they_mean_nothing():
    assert measures.auroc([1, 2], [True, True]) is None and measures.spearman([1, 1, 1], [1, 2, 3]) is None


def test_spearman_by_hand_with_a_tie():
    # The ranks are 1 2.5 2.5 4 and 1 3 2 4.
    x, y = [1, 2, 2, 4], [10, 30, 20, 40]
    assert measures.spearman(x, y) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


# Filtering ------------------------------------------------------------------------------------------------


def candidates(scores, cells):
    rows = enumerate(zip(scores, cells))
    return [{"id": str(i), "task": cell, "reward": {"overall": R}} for i, (R, cell) in rows]


def test_the_best_of_each_cell_are_kept_and_as_many_drawn_at_random_from_it():
    rows = candidates([9, 8, 7, 6, 1, 2, 3, 4], "aaaabbbb")
    accepted, drawn, tied = reward.select_candidates(rows, 0, ["task"], keep=0.5)
    assert tied == 0 and accepted == [0, 1, 6, 7] and [rows[i]["task"] for i in drawn] == ["a", "a", "b", "b"]
    assert reward.select_candidates(rows, 0, [], keep=0.5)[0] == [0, 1, 2, 3]
    assert reward.select_candidates(rows, 0, [], threshold=4)[0] == [0, 1, 2, 3, 7]
    assert reward.select_candidates(rows, 0, [], top_k=3)[0] == [0, 1, 2]
    assert reward.select_candidates(rows, 0, ["task"], top_k=99)[0] == list(range(8))


@pytest.mark.parametrize("how", [{"keep": 0.5}, {"top_k": 50}, {"threshold": 8, "cap": 50}])
def test_a_seeded_draw_and_not_the_order_of_the_file_decides_among_equals(how):
    rows = candidates([10] * 100, "a" * 100)
    accepted, _, tied = reward.select_candidates(rows, 0, [], **how)
    assert len(accepted) == 50 and tied == 100
    # Of the first half of the file about half is accepted: 25 ± 4 standard deviations of 2.5.
    assert 15 <= sum(i < 50 for i in accepted) <= 35
    assert reward.select_candidates(rows, 0, [], **how)[0] == accepted
    assert reward.select_candidates(rows, 1, [], **how)[0] != accepted


def test_only_those_are_counted_as_tied_that_a_draw_parted():
    rows = candidates([9, 8, 8, 8, 1, 5, 5], "aaaaabb")
    accepted, _, tied = reward.select_candidates(rows, 0, ["task"], top_k=3)
    # Two places for a, one for b: three are equal at a's limit, two at b's.
    assert tied == 3 + 2 and 0 in accepted and 4 not in accepted
    assert reward.select_candidates(rows, 0, ["task"], top_k=7)[2] == 0
    assert reward.select_candidates(rows, 0, [], threshold=8)[2] == 0


def test_places_are_allocated_in_proportion_and_the_total_is_exact():
    assert selection.allocate([1, 1, 1, 1], 2).count(1) == 2 and selection.allocate([3, 3, 3], 5) == [2, 2, 1]
    for total in range(12):
        places = selection.allocate([5, 1, 6], total)
        assert sum(places) == total and all(p <= n for p, n in zip(places, [5, 1, 6]))


def run(monkeypatch, flags, data, out):
    argv = ["reward.py", *flags.split(), "--data", str(data), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, "--image-root", records.ANYWHERE])
    reward.main(reward.parse_args())


TRAIN = f"train --model {ROOT / 'toy/policy'} --resamples 1"


def test_train_then_score_on_the_toy_adds_one_field_and_changes_no_other(monkeypatch, rows, tmp_path):
    questions = [r for r in rows if "answer" in r]
    records.write_records(tmp_path / "expert.jsonl", rows)
    records.write_records(tmp_path / "candidates.jsonl", questions)
    run(monkeypatch, f"{TRAIN} --steps 100", tmp_path / "expert.jsonl", tmp_path / "rm")
    with open(tmp_path / "rm" / "metrics.json") as file:
        metrics = json.load(file)
    assert set(metrics["levels"]) == {"original", "perturbed", "incoherent", "irrelevant"}
    assert 0 <= metrics["auroc"] <= 1
    flags = f"score --model {tmp_path / 'rm'} --keep 0.5 --batch 5"
    run(monkeypatch, flags, tmp_path / "candidates.jsonl", tmp_path / "scored")
    files = [tmp_path / "scored" / f"{name}.jsonl" for name in ("scored", "accepted", "random")]
    scored, accepted, drawn = (list(records.read_records(path, root=records.ANYWHERE)) for path in files)
    assert [{k: v for k, v in r.items() if k != "reward"} for r in scored] == questions
    assert len(accepted) == len(drawn) == round(len(scored) / 2)
    assert all(r in scored for r in accepted + drawn)


@pytest.fixture(scope="module")
def saturated(rows, backbone, tmp_path_factory):
    """(reward model that gives every response 10, candidates)."""
    folder = tmp_path_factory.mktemp("saturated")
    model = reward.RewardModel(backbone, reward.Heads(reward.feature_width(backbone, True), 4), True)
    torch.nn.init.zeros_(model.heads.out.weight)
    torch.nn.init.constant_(model.heads.out.bias, 1.2)
    model.save(str(folder))
    records.write_records(folder / "c.jsonl", [r for r in rows if "answer" in r])
    return folder


def test_scores_at_the_end_of_their_range_are_reported(monkeypatch, saturated, tmp_path, capsys):
    flags = f"score --model {saturated} --keep 0.5 --per"
    run(monkeypatch, flags, saturated / "c.jsonl", tmp_path / "out")
    n = len((saturated / "c.jsonl").read_text().splitlines())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["saturated"] == metrics["tied"] == n
    shown = capsys.readouterr().out
    assert f"{n} of {n} have the least or greatest R" in shown and f"{n} are equal at the limit" in shown


def test_a_filter_that_accepts_nothing_is_one_line(monkeypatch, saturated, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text((saturated / "c.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(RecordError, match="one.jsonl: none of 1 is accepted: --keep rounds to 0; raise it"):
        run(monkeypatch, f"score --model {saturated} --keep 0.5", one, tmp_path / "a")
    model = reward.RewardModel.load(str(saturated))
    torch.nn.init.constant_(model.heads.out.bias, 0.5)
    model.save(str(tmp_path / "low"))
    with pytest.raises(RecordError, match="R is from 2.0 to 2.0, below --threshold 8; lower it"):
        run(monkeypatch, f"score --model {tmp_path / 'low'} --threshold 8", one, tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_loss_of_the_heads_that_is_not_finite_is_one_line(monkeypatch, rows, tmp_path):
    records.write_records(tmp_path / "expert.jsonl", rows)
    with pytest.raises(RunError, match=r"^step \d: loss .*the loss is not finite; lower --lr"):
        run(monkeypatch, f"{TRAIN} --lr 1e30", tmp_path / "expert.jsonl", tmp_path / "rm")


def test_features_and_scores_that_are_not_finite_are_one_line_that_names_the_response(backbone, rows):
    record = next(r for r in rows if "answer" in r)
    asked = reward.encode_with_blank(backbone, True, [open_image(record["image"])], [policy_prompt(record)])
    heads = reward.Heads(reward.feature_width(backbone, True), 4)
    # A token that can never be sampled has no probability.
    banned = backbone.tokenizer("odd", add_special_tokens=False)["input_ids"]
    strict = replace(backbone, banned_ids=sorted({*backbone.banned_ids, *banned}))
    with pytest.raises(ModelError, match="features are not finite for the response '<answer>odd</answer>'"):
        reward.RewardModel(strict, heads, True)(asked, ["<answer>odd</answer>"])
    torch.nn.init.constant_(heads.out.bias, torch.inf)
    with pytest.raises(ModelError, match="a reward is not finite"):
        reward.RewardModel(backbone, heads, True)(asked, ["<answer>odd</answer>"])


def test_with_freeze_nothing_the_backbone_learns(monkeypatch, rows, tmp_path):
    records.write_records(tmp_path / "expert.jsonl", rows)
    flags = f"{TRAIN} --steps 2 --lr 1e-4 --freeze nothing --batch 4"
    run(monkeypatch, flags, tmp_path / "expert.jsonl", tmp_path / "rm")
    old = loading.load(str(ROOT / "toy/policy")).model.state_dict()
    new = loading.load(str(tmp_path / "rm" / "backbone")).model.state_dict()
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_a_file_without_questions_or_reports_is_one_line(monkeypatch, rows, tmp_path):
    records.write_records(tmp_path / "images.jsonl", [{"id": r["id"], "image": r["image"]} for r in rows[:4]])
    with pytest.raises(RecordError, match="neither questions with answers nor reports"):
        run(monkeypatch, TRAIN, tmp_path / "images.jsonl", tmp_path / "rm")


def test_a_cap_takes_of_the_good_ones_those_nearest_to_half_and_at_most_so_many_per_cell():
    def row(task, overall, pass_rate):
        return {"task": task, "reward": {"overall": overall}, "pass_rate": pass_rate}

    rows = [row("a", 9, 1.0), row("a", 8, 0.5), row("a", 10, 0.25), row("a", 5, 0.5), row("b", 9, 1.0)]
    accepted, drawn, _ = reward.select_candidates(rows, 0, ["task"], threshold=8, cap=2)
    # The fourth is nearest to half, and not good enough.
    assert accepted == [1, 2, 4]
    assert sorted(rows[i]["task"] for i in drawn) == ["a", "a", "b"]
    assert reward.select_candidates(rows, 0, ["task"], threshold=8)[0] == [0, 1, 2, 4]


def test_the_pass_rate_is_the_share_of_samples_with_the_candidates_answer(tmp_path):
    image = str(tmp_path / "x.png")
    candidate = {"id": "x", "image": image, "question": "q", "answer": "cyst", "options": ["cyst", "mass"]}
    answered = candidate | {"samples": ["cyst", "mass", None, "Cyst."]}
    records.write_records(tmp_path / "predictions.jsonl", [answered])
    (row,) = selection.with_pass_rates([candidate], tmp_path / "predictions.jsonl")
    assert row == candidate | {"pass_rate": 0.5}
    with pytest.raises(RecordError, match="no answers to y: run eval.py on the candidates"):
        selection.with_pass_rates([candidate | {"id": "y"}], tmp_path / "predictions.jsonl")


def test_a_cap_without_a_threshold_is_refused(monkeypatch, capsys):
    flags = "reward.py score --model m --data d --out o --keep 0.5 --cap 3"
    monkeypatch.setattr(sys, "argv", flags.split())
    with pytest.raises(SystemExit):
        reward.parse_args()
    assert "--cap goes with --threshold" in capsys.readouterr().err


def test_a_candidate_longer_than_the_context_is_refused_or_set_aside(backbone, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"image": str(tmp_path / "a.png"), "question": "Which?", "answer": "CT"}
    rows = [row, row | {"rationale": "a cyst " * 600}, row | {"question": "Which? " * 600}]
    fitting, rejected = selection.split_too_long(backbone, rows, "skip")
    assert fitting == rows[:1] and [r | rejected[i] for i, r in enumerate(rows[1:])] == rejected
    assert {r["reason"] for r in rejected} == {"longer than the model's context"}
    for some, on_error, said in ((rows, "stop", "2 of 3"), (rows[1:], "skip", "2 of 2")):
        with pytest.raises(RecordError, match=f"context of 1024 .*{said} candidates.*--on-error skip"):
            selection.split_too_long(backbone, some, on_error)


def test_a_group_with_a_response_longer_than_the_context_is_refused_or_left_out(backbone, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    record = {"image": str(tmp_path / "a.png"), "question": "Which?", "answer": "CT"}
    short, long = ("original", "CT"), ("perturbed", "a cyst " * 600)
    groups = [(record, [short, long]), (record, [short]), (record | {"question": "Which? " * 600}, [short])]
    assert levels.leave_out_too_long(backbone, groups, "skip") == groups[1:2]
    assert "2 of 3 records are too long" in capsys.readouterr().out
    with pytest.raises(RecordError, match="2 of 3 .*--on-error skip"):
        levels.leave_out_too_long(backbone, groups, "stop")


def test_two_processes_train_the_reward_model_of_one_whether_the_backbone_learns_or_is_sharded(tmp_path):
    clinic.write_clinic(str(tmp_path / "data"), (4, 2, 1, 1, 1), seed=3)
    train = f"reward.py train --model toy/backbone --data {tmp_path}/data/expert.jsonl"
    train += f" {tmp_path}/data/reports.jsonl --resamples 1"
    learn = f"{train} --steps 3 --lr 1e-4 --freeze nothing"
    run_in_one_and_two(
        tmp_path,
        f"{train} --batch 3 --steps 20 --out OUT/frozen",
        f"{learn} --batch 3 --out OUT/whole",
        f"{learn} --batch 3 --shard --out OUT/shard",
        # A step's only group is that of the first process.
        f"{learn} --batch 1 --shard --out OUT/few",
    )

    def weights(folder, name="backbone/model.safetensors"):
        return load_file(tmp_path / folder / name)

    before = load_file(f"{ROOT}/toy/backbone/model.safetensors")
    for stage in ("frozen", "whole", "shard", "few"):
        for name in ("heads.safetensors", "backbone/model.safetensors"):
            one, two = weights(f"one/{stage}", name), weights(f"two/{stage}", name)
            assert one.keys() == two.keys()
            within = 0 if stage == "frozen" else 1e-3
            assert all((one[k] - two[k]).norm() <= within * one[k].norm() for k in one)
        one, two = (
            json.loads((tmp_path / run / stage / "metrics.json").read_text()) for run in ("one", "two")
        )
        assert two["auroc"] == pytest.approx(one["auroc"], abs=1e-3)
        assert two["image_swap_drop"] == pytest.approx(one["image_swap_drop"], abs=1e-2)
        lines = [
            (tmp_path / run / stage / "metrics.jsonl").read_text().splitlines() for run in ("one", "two")
        ]
        one, two = (json.loads(rows[0]) for rows in lines)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    # Sharded or not, the backbone has learned the same; frozen, nothing.
    whole, sharded = weights("one/whole"), weights("two/shard")
    moved = torch.cat([(whole[k] - before[k]).flatten() for k in before])
    again = torch.cat([(sharded[k] - before[k]).flatten() for k in before])
    assert torch.nn.functional.cosine_similarity(moved, again, 0) > 0.9999 and moved.norm() > 0
    assert all(torch.equal(weights("two/frozen")[k], before[k]) for k in before)


def test_a_frozen_backbone_is_not_sharded(call, tmp_path):
    status, _, error = call(
        reward, "train", "--model", "m", "--data", "d", "--shard", "--out", tmp_path / "x"
    )
    assert status == 2 and "--shard goes with --freeze nothing" in error


def test_groups_of_one_response_and_of_several_are_shared_by_two_processes_of_a_sharded_backbone(tmp_path):
    clinic.write_clinic(str(tmp_path / "data"), (3, 1, 1, 1, 1), seed=3)
    data = tmp_path / "data" / "expert.jsonl"
    record = next(records.read_records(data))
    # A question of its own: its group has one response.
    record |= {"id": "alone", "question": "What else?", "response": "x"}
    records.write_records(tmp_path / "data" / "alone.jsonl", [record])
    flags = f"--data {data} --rollouts {tmp_path}/data/alone.jsonl --resamples 1 --holdout 0.4"
    flags += " --freeze nothing --shard --lr 1e-4 --steps 4 --batch 2"
    run_in_one_and_two(tmp_path, f"reward.py train --model toy/backbone {flags}")
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[0] for run in ("one", "two")]
    one, two = map(json.loads, lines)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
