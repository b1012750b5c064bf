"""training.py: the batches of a step; steps that are skipped."""

import pytest
import torch

from medgr2 import training
from medgr2.errors import RunError


def test_every_epoch_is_a_permutation_and_a_step_needs_no_history():
    groups, size = [[i] for i in range(10)], 4
    batch_of = training.shuffle(groups, size, seed=1)
    flat = [i for step in range(5) for i in batch_of(step)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert training.shuffle(groups, size, 1)(3) == flat[12:16]


def test_a_group_stays_together_and_in_its_order_in_every_epoch():
    groups = [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9]]
    flat = [i for step in range(5) for i in training.shuffle(groups, 4, seed=1)(step)]
    orders = set()
    for epoch in (flat[:10], flat[10:]):
        starts = [epoch.index(group[0]) for group in groups]
        assert all(epoch[start : start + len(group)] == group for start, group in zip(starts, groups))
        orders.add(tuple(starts))
    assert len(orders) == 2


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("norm, moved", [(1.0, True), (NAN, False), (INF, False)])
def test_a_step_whose_gradient_is_not_finite_changes_neither_weights_nor_moments(norm, moved):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.full((2,), norm)
    training.step(optimizer, 0.1, norm)
    assert weight.grad is None and (not torch.equal(weight, torch.ones(2))) == moved == bool(optimizer.state)


def test_skipped_steps_are_counted_and_too_many_in_a_row_stop_the_run():
    skipped = training.Skipped(total=3)
    for step, norm in enumerate([NAN, INF, 1.0, NAN, NAN, NAN, NAN]):
        skipped.count(step, 0.5, norm)
    assert skipped.total == 9
    with pytest.raises(
        RunError, match="^step 7: loss 0.5, gradient norm inf: .* in 5 steps in a row; lower --lr"
    ):
        skipped.count(7, 0.5, INF)


def test_a_loss_that_is_not_finite_stops_the_run_at_once():
    with pytest.raises(
        RunError, match="^step 2: loss nan, gradient norm 3: the loss is not finite; lower --lr"
    ):
        training.Skipped().count(2, NAN, 3.0)


def test_weights_that_are_not_finite_are_not_committed():
    weight = torch.nn.Parameter(torch.tensor([1.0, INF]))
    optimizer = torch.optim.AdamW([weight])
    with pytest.raises(RunError, match="^head.weight is not finite; lower --lr.*the last commit is kept"):
        training.state({"head.weight": weight}, optimizer)
