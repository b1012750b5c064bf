"""--report-to: TensorBoard's files say what metrics.jsonl says, in every stage that trains."""

import json
import math
import sys

import pytest
from helpers import ROOT

import grpo
import reward
import sft
from medgr2 import trackers

accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="no tensorboard: pip install -r tests/requirements.txt",
)


def read_lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read_scalars(out):
    """{name: [(step, value)]} by TensorBoard's own reader."""
    reader = accumulators.EventAccumulator(str(out / "tensorboard"), {accumulators.SCALARS: 0}).Reload()
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def assert_same(out):
    """Every number of metrics.jsonl, and of metrics.json as `result/...`, is in TensorBoard's files."""
    rows, found = read_lines(out), read_scalars(out)
    result = json.loads((out / "metrics.json").read_text())
    numbers = {name for row in rows for name in row if name != "step" and type(row[name]) in (int, float)}
    assert numbers and set(found) == numbers | {
        f"result/{name}" for name, value in result.items() if type(value) in (int, float)
    }
    for name in numbers:
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in found[name]] == [step for step, _ in expected], name
        # TensorBoard keeps 32 bits.
        assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(found[name], expected)), name


def test_every_training_stage_reports_what_metrics_jsonl_says(data, call, tmp_path):
    policy, common = (ROOT / "toy" / "policy", f"--data {data}/expert.jsonl --report-to tensorboard --out")
    flags = "--steps 3 --batch 2"
    assert call(sft, f"--model {policy} {flags} --val {data}/val.jsonl {common} {tmp_path}/sft")[0] == 0
    flags = "--resamples 1 --steps 60"
    assert call(reward, f"train --model {policy} {flags} {common} {tmp_path}/reward")[0] == 0
    flags = "--steps 2 --prompts 2 --group 2 --min-spread -1 --max-new-tokens 8"
    assert call(grpo, f"--model {policy} --reward {tmp_path}/reward {flags} {common} {tmp_path}/grpo")[0] == 0
    for name, lines in (("sft", 3), ("reward", 2), ("grpo", 2)):
        assert len(read_lines(tmp_path / name)) == lines
        assert_same(tmp_path / name)
    assert "result/val_loss" in read_scalars(tmp_path / "sft")


def test_steps_that_a_resumed_run_does_again_are_reported_once(data, call, tmp_path, monkeypatch):
    out, step = tmp_path / "out", sft.training.step
    words = f"--model {ROOT}/toy/policy --data {data}/expert.jsonl --steps 5 --batch 2 --save-every 2"
    words += f" --report-to tensorboard --out {out}"
    rates = []

    def crash(optimizer, lr, norm):
        rates.append(lr)
        if len(rates) == 4:
            raise RuntimeError("crash")
        step(optimizer, lr, norm)

    with monkeypatch.context() as patch:
        patch.setattr(sft.training, "step", crash)
        with pytest.raises(RuntimeError, match="crash"):
            call(sft, words)
    # Steps 0 to 2 are there, and the last commit is after step 1.
    part = tmp_path / "out.part"
    assert [s for s, _ in read_scalars(part)["loss"]] == [0, 1, 2]
    assert call(sft, words)[0] == 0
    assert_same(out)


def test_a_tracker_that_is_not_installed_is_one_line_and_leaves_nothing(data, tmp_path, monkeypatch, call):
    # What Python does with a package that is not there.
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "out"
    words = f"--model {ROOT}/toy/policy --data {data}/expert.jsonl --report-to wandb --out {out}"
    status, _, err = call(sft, words)
    assert status == 2
    assert err == "sft.py: --report-to wandb: not installed; pip install wandb\n"
    assert list(tmp_path.iterdir()) == []


class Broken:
    """A tracker whose server goes away at the second call."""

    name = "mlflow"

    def __init__(self):
        self.calls = 0

    def log(self, values, step):
        self.calls += 1
        if self.calls == 2:
            raise ConnectionError("no route\nto host")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    found = trackers.Trackers(["tensorboard"], "out", str(tmp_path), {"data": ["a", "b"], "lr": 0.1}, 0)
    broken = Broken()
    found.trackers.insert(0, broken)
    for i in range(4):
        found.log({"step": i, "loss": i / 2, "text": "x", "nothing": None, "flag": True}, i)
    found.finish()
    assert broken.calls == 2
    assert capsys.readouterr().out == "--report-to mlflow: no route to host; continuing without it\n"
    assert read_scalars(tmp_path) == {"loss": [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]}
