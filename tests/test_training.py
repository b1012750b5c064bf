"""training.py: the batches of a step, and prefetching."""

import threading

import pytest

from medgr2 import training


def test_every_epoch_is_a_permutation_and_a_step_needs_no_history():
    n, size = 10, 4
    flat = [i for step in range(5) for i in training.batch_indices(step, size, n, seed=1)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert training.batch_indices(3, size, n, 1) == flat[12:16]


def test_the_next_item_is_made_in_another_thread_while_the_caller_uses_this_one():
    made, working = [threading.Event() for _ in range(4)], []

    def items():
        for k, event in enumerate(made):
            working.append(threading.current_thread())
            event.set()
            yield k

    coming = training.prefetch(items())
    for k in range(3):
        assert next(coming) == k
        assert made[k + 1].wait(10), "made while the caller uses the one before"
        assert not any(event.is_set() for event in made[k + 2 :]), "only one is made ahead"
    assert len(set(working)) == 1 and threading.current_thread() not in working


def test_an_error_in_an_item_comes_when_the_caller_asks_for_that_item():
    def items():
        yield 0
        yield 1
        raise ValueError("item 2")

    coming = training.prefetch(items())
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(coming)
