"""benchmarks/memory.py: what it counts on tensors without data is what real tensors take."""

import os
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(os.path.join(ROOT, "benchmarks"))
import memory

from medgr2 import loading


def test_a_storage_counts_once_while_it_is_alive():
    outside = torch.zeros(100)
    meter = memory.live_bytes()
    with meter:
        # Views and what is written in place were there before.
        outside.view(10, 10).add_(1)
        assert meter.now == 0
        a = torch.ones(1000)
        b = a.view(10, 100).t() + 1
        assert meter.now == meter.peak == 8000
        del a
        assert (meter.now, meter.peak) == (4000, 8000)
        c = b.sum()
    assert meter.now == 4004 and c == 2000


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "grpo", "micro_batch": 2, "micro_group": 1},
        {"stage": "grpo", "micro_batch": 2, "micro_group": 2, "checkpointing": True},
        {"stage": "sft", "micro_batch": 4, "checkpointing": True},
    ],
)
def test_the_estimate_from_two_and_four_layers_is_what_the_whole_model_takes(change, tmp_path):
    (tmp_path / "model").symlink_to(os.path.join(ROOT, "toy", "policy"))
    sizes = {"prompts": 2, "group": 4, "prompt_tokens": 100, "response_tokens": 30, "reward": None}
    plan = memory.Plan("toy", **change, **sizes)

    def build(name, dtype, layers=None):
        return memory.build_llava(tmp_path, name, dtype, layers)

    estimated = memory.estimate(plan, build, bf16=False)
    loaded = loading.load(str(tmp_path / "model"))
    loading.freeze_images(loaded)
    policy = memory.as_vlm(loaded.model)
    weights, learning = (
        sum(p.numel() for p in loaded.model.parameters() if p.requires_grad or whole)
        for whole in (True, False)
    )
    # Gradients and moments of what learns.
    taken = 4 * weights + 12 * learning + memory.learning_growth(policy, plan)
    assert estimated["learn"] == pytest.approx(taken, rel=0.01)
