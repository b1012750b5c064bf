"""sft.py: the loss and its denominator; micro-batches, processes and interruptions change nothing."""

import json
import sys

import clinic
import pytest
import torch
from helpers import ROOT, run_in_one_and_two
from PIL import Image

import sft
from medgr2 import encoding, loading, records, training
from medgr2.errors import ModelError, RecordError, RunError
from medgr2.images import open_image
from medgr2.prompts import parse_candidate, report_prompt


@pytest.fixture(scope="module")
def policy():
    return loading.load(str(ROOT / "toy" / "policy"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    clinic.write_clinic(str(folder), (6, 4, 1, 1, 1), seed=7)
    return folder


class OneProcess:
    """An Accelerator of one of several processes, as far as `compute_gradient` uses it. A test sums them."""

    def __init__(self, index=0, of=1):
        self.process_index, self.num_processes = index, of

    def reduce(self, tensor, how):
        return tensor


def load(paths, weights, role="policy"):
    data = [(str(path), list(records.read_records(path, ("image",)))) for path in paths]
    return sft.load_examples(data, weights, role)


def gradient(policy, examples, micro_batch, accelerator=None, by_image=False):
    policy.model.zero_grad()
    parameters, accelerator = list(policy.model.parameters()), accelerator or OneProcess()
    batches, tokens = sft.prepare_batch(policy, examples, micro_batch, by_image, accelerator)
    loss = sft.compute_gradient(policy, parameters, batches, tokens, accelerator)
    grads = torch.cat([p.grad.flatten() for p in parameters])
    policy.model.zero_grad()
    return grads, loss, tokens


def test_the_loss_is_cross_entropy_over_the_response_and_its_end_of_turn_only(policy, data):
    examples = load([data / "expert.jsonl"], [1.0])[:5]
    total, count = 0.0, 0
    # One at a time, without padding, through the model's own logits.
    for path, prompt, response in examples:
        inputs = encoding.encode_prompts(policy, [open_image(path)], [prompt])
        ids = torch.tensor([policy.tokenizer(response)["input_ids"] + [policy.tokenizer.eos_token_id]])
        full = torch.cat([inputs["input_ids"], ids], 1)
        with torch.no_grad():
            out = policy.model(
                input_ids=full, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(full)
            )
        logits = out.logits[0, -ids.shape[1] - 1 : -1]
        # What is never sampled has no probability.
        logits[:, policy.banned_ids] = -torch.inf
        total += torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum").item()
        count += ids.shape[1]
    _, loss, tokens = gradient(policy, examples, 5)
    assert tokens == count and loss == pytest.approx(total / count, rel=1e-5)


def test_the_gradient_does_not_depend_on_micro_batches(policy, data):
    examples = load([data / "expert.jsonl", data / "reports.jsonl"], [1.0, 1.0])[:13]
    whole, loss, _ = gradient(policy, examples, 13)
    parts, again, _ = gradient(policy, examples, 3)
    assert (whole - parts).norm() <= 1e-5 * whole.norm() and again == pytest.approx(loss, rel=1e-5)


def test_the_gradient_by_image_is_that_of_single_examples_and_each_image_is_encoded_once(policy, data):
    examples = load([data / "expert.jsonl"], [1.0])[:7]
    images, tower = [], policy.model.base_model.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: images.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    try:
        whole, loss, _ = gradient(policy, examples, 7)
        by_image, again, _ = gradient(policy, examples, 7, by_image=True)
        parts = gradient(policy, examples, 3, by_image=True)[0]
    finally:
        hook.remove()
    assert len({example.image for example in examples}) < 5 and again == pytest.approx(loss, rel=1e-5)
    assert images[0] == 7 and images[1] == len({example.image for example in examples})
    for found in (by_image, parts):
        assert (whole - found).norm() <= 1e-5 * whole.norm()


def test_the_gradient_is_the_sum_over_processes_even_if_one_has_no_example(policy, data):
    examples = load([data / "expert.jsonl"], [1.0])[:3]
    whole, loss, _ = gradient(policy, examples, 4)
    # Three examples, four processes.
    parts = [gradient(policy, examples, 4, OneProcess(i, 4)) for i in range(4)]
    assert (whole - sum(grads for grads, _, _ in parts)).norm() <= 1e-5 * whole.norm()
    assert sum(part for _, part, _ in parts) == pytest.approx(loss, rel=1e-5)
    assert sum(part == 0 for _, part, _ in parts) == 1


def test_weights_say_how_often_each_file_is_repeated(data):
    expert, reports = data / "expert.jsonl", data / "reports.jsonl"
    one, weighted = load([expert], [1.0]), load([expert, reports], [2.5, 0.5])
    assert len(one) == 18 and len(weighted) == 45 + 2
    assert [weighted.count(e) for e in one[:9]] == [3] * 9 and [weighted.count(e) for e in one[9:]] == [2] * 9


def test_the_generator_learns_what_its_parser_accepts(data):
    examples = load([data / "expert.jsonl"], [1.0], "generator")
    for record, (_, prompt, response) in zip(records.read_records(data / "expert.jsonl"), examples):
        candidate, reason = parse_candidate(response)
        assert reason is None and {k: record[k] for k in candidate} == candidate and record["task"] in prompt


def test_without_a_rationale_the_policy_learns_the_bare_answer_and_the_generator_an_empty_think_part(data):
    record = next(records.read_records(data / "expert.jsonl"))
    del record["rationale"]
    policy, generator = (sft.make_example(record, r, "e.jsonl").response for r in ("policy", "generator"))
    assert policy == f"<answer>{record['answer']}</answer>"
    assert generator.endswith(f"</options><think></think>{policy}")


def test_both_roles_learn_a_report(data):
    record = next(records.read_records(data / "reports.jsonl"))
    expected = record["image"], report_prompt(), record["report"]
    assert all(sft.make_example(record, role, "r.jsonl") == expected for role in ("policy", "generator"))


def test_records_are_not_mutated(data):
    record = next(records.read_records(data / "expert.jsonl"))
    before = json.dumps(record)
    for role in ("policy", "generator"):
        sft.make_example(record, role, "r.jsonl")
    assert json.dumps(record) == before


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [training.learning_rate(s, 100, 1.0, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[99] < 1e-3
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and rates[55] == pytest.approx(0.5)


def run_sft(monkeypatch, data, out, flags=""):
    command = f"sft.py --model {ROOT / 'toy/policy'} --data {data / 'expert.jsonl'} --out {out}"
    monkeypatch.setattr(sys, "argv", f"{command} --epochs 2 --batch 6 --save-every 2 {flags}".split())
    sft.main(sft.parse_args())


def test_a_resumed_run_gives_the_same_weights_bit_for_bit(monkeypatch, data, tmp_path):
    run_sft(monkeypatch, data, tmp_path / "whole")
    compute_gradient, calls = sft.compute_gradient, []

    def crash_at_the_fourth(*args):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return compute_gradient(*args)

    monkeypatch.setattr(sft, "compute_gradient", crash_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_sft(monkeypatch, data, tmp_path / "cut")
    monkeypatch.setattr(sft, "compute_gradient", compute_gradient)
    assert not (tmp_path / "cut").exists()
    # As after the memory ran out; fewer at a time than there are would change the rounding.
    run_sft(monkeypatch, data, tmp_path / "cut", "--micro-batch 16")
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_loss_that_is_not_finite_is_one_line_and_the_last_commit_is_kept(monkeypatch, data, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunError, match=r"^step \d: loss nan, gradient norm nan: the loss is not finite"):
        run_sft(monkeypatch, data, out, "--lr 1e30 --save-every 1")
    assert not out.exists() and list((tmp_path / "run.part" / "state").glob("*.pt"))


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the gradients of these steps, counted by computing them, hold an infinity."""
    real, calls = sft.compute_gradient, []

    def start(steps):
        def compute_gradient(policy, parameters, *args):
            result = real(policy, parameters, *args)
            if len(calls) in steps:
                list(parameters)[0].grad.view(-1)[0] = torch.inf
            calls.append(1)
            return result

        calls.clear()
        monkeypatch.setattr(sft, "compute_gradient", compute_gradient)

    return start


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(monkeypatch, data, tmp_path, poison):
    poison({1, 3})
    run_sft(monkeypatch, data, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True, False, False]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped"] == 2
    loading.load(str(tmp_path / "run"))


def test_too_many_skipped_steps_in_a_row_stop_and_keep_the_last_commit(monkeypatch, data, tmp_path, poison):
    poison(range(1, 99))
    with pytest.raises(RunError, match="^step 5: .* the gradient is not finite in 5 steps in a row"):
        run_sft(monkeypatch, data, tmp_path / "run")
    assert list((tmp_path / "run.part" / "state").glob("*.pt"))


def test_training_on_test_images_is_refused_unless_allowed(monkeypatch, data, tmp_path):
    test = f"--test {data / 'expert.jsonl'}"
    with pytest.raises(RunError, match="leak from the training files.*--allow-leakage"):
        run_sft(monkeypatch, data, tmp_path / "run", test)
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.part").exists()
    assert (tmp_path / "run.leaks.jsonl").exists()
    run_sft(monkeypatch, data, tmp_path / "run", f"{test} --allow-leakage --epochs 0")
    assert (tmp_path / "run").exists()


def test_freezing_vision_keeps_the_tower_and_changes_the_rest(monkeypatch, data, tmp_path):
    run_sft(monkeypatch, data, tmp_path / "frozen", "--freeze vision")
    old, new = (loading.load(str(f)).model.state_dict() for f in (ROOT / "toy/policy", tmp_path / "frozen"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)


def test_training_lowers_the_loss_on_its_own_data(monkeypatch, data, tmp_path):
    run_sft(monkeypatch, data, tmp_path / "run", f"--val {data / 'expert.jsonl'}")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val_loss"] < 0.8 * first


def test_two_processes_take_the_same_steps_as_one(data, tmp_path):
    run_in_one_and_two(
        tmp_path, f"sft.py --model toy/policy --data {data}/expert.jsonl --epochs 1 --batch 6 --lr 1e-4"
    )
    files = [tmp_path / name / "metrics.jsonl" for name in ("one", "two")]
    one, two = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"] and b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_weights_that_do_not_fit_the_files_are_one_line(monkeypatch, data, tmp_path):
    with pytest.raises(RunError, match="--weights"):
        run_sft(monkeypatch, data, tmp_path / "x", "--weights 1 2")


def test_a_folder_without_a_model_is_one_line(monkeypatch, data, tmp_path):
    with pytest.raises(ModelError, match="config.json"):
        run_sft(monkeypatch, data, tmp_path / "x", f"--model {data}")


def test_a_record_that_teaches_nothing_is_one_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "r.jsonl").write_text('{"id": "7", "image": "a.png"}\n')
    with pytest.raises(RecordError, match="r.jsonl: record 7 has neither"):
        load([tmp_path / "r.jsonl"], [1.0])


def test_no_examples_at_all_are_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": "7", "image": "a.png", "question": "q", "answer": "a"}\n')
    with pytest.raises(RecordError, match="nothing to learn"):
        load([tmp_path / "r.jsonl"], [0.0])


def test_a_bad_record_of_val_ends_a_run_before_its_first_step(data, tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) for line in (data / "expert.jsonl").read_text().splitlines()[:2]]
    del rows[1]["answer"], rows[1]["options"]
    val = data / "bad_val.jsonl"
    val.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecordError, match="bad_val.jsonl: record .* has neither question and answer"):
        run_sft(monkeypatch, data, tmp_path / "run", f"--val {val}")
    assert not (tmp_path / "run.part" / "metrics.jsonl").exists()


def test_an_example_longer_than_the_context_is_refused_or_left_out(policy, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    # The toy's context is 1,024 tokens: too long with its reply, too long by itself, and neither.
    texts = ("Which?", "a cyst " * 600), ("Which? " * 600, "CT"), ("Which?", "CT")
    examples = [sft.Example(str(tmp_path / "a.png"), *text) for text in texts]
    assert sft.leave_out_too_long(policy, examples, "skip") == examples[2:]
    assert "2 of 3 records are too long" in capsys.readouterr().out
    with pytest.raises(RecordError, match="2 of 3 .*--on-error skip"):
        sft.leave_out_too_long(policy, examples, "stop")
