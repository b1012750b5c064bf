"""measures.py against counts over all cases, sums by hand and simulation."""

import itertools

import numpy as np
import pytest

from medgr2 import measures


@pytest.mark.parametrize("corrected, introduced", [(0, 0), (1, 0), (5, 0), (3, 3), (2, 7), (9, 4)])
def test_mcnemar_is_the_share_of_all_coin_flips_at_least_as_uneven(corrected, introduced):
    n = corrected + introduced
    uneven = [
        abs(2 * sum(flips) - n) >= abs(corrected - introduced)
        for flips in itertools.product((0, 1), repeat=n)
    ]
    assert measures.mcnemar(corrected, introduced) == pytest.approx(np.mean(uneven))


def test_balanced_accuracy_and_macro_f1_equal_a_count_by_hand():
    answers, said = ["a", "a", "a", "b", "c"], ["a", "a", "b", "b", None]
    right = np.array([x == y for x, y in zip(answers, said)])
    assert measures.balanced_accuracy(np.array(answers), right) == pytest.approx((2 / 3 + 1 + 0) / 3)
    # a: precision 2/2, recall 2/3; b: precision 1/2, recall 1; c: nothing
    assert measures.macro_f1(answers, said) == pytest.approx(
        (2 * 1 * (2 / 3) / (5 / 3) + 2 * 0.5 * 1 / 1.5 + 0) / 3
    )


def test_balanced_accuracy_of_a_constant_answer_is_one_of_the_classes():
    answers = np.array(["no"] * 90 + ["yes"] * 10)
    # accuracy would be 0.9
    assert measures.balanced_accuracy(answers, answers == "no") == 0.5


@pytest.mark.parametrize(
    "right, samples, k", [(0, 4, 2), (1, 4, 1), (1, 4, 2), (3, 4, 2), (2, 6, 4), (6, 6, 3)]
)
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(right, samples, k):
    draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert measures.pass_at(k, right, samples) == pytest.approx(np.mean([any(d) for d in draws]))


def test_a_vote_takes_the_most_frequent_prediction_the_first_of_equals_and_never_the_unread():
    assert measures.majority(["a", "b", "b"]) == "b" and measures.majority(["a", "b"]) == "a"
    assert measures.majority([None, None, "a"]) == "a" and measures.majority([None, None]) is None


def test_ece_of_a_calibrated_answerer_goes_to_zero_and_of_a_boaster_is_its_excess():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.25, 1, 40000)
    right = rng.random(40000) < confidence
    assert measures.calibration(confidence, right)[0] < 0.01
    assert measures.calibration(np.full(1000, 0.9), np.arange(1000) < 600)[0] == pytest.approx(0.3)


def test_ece_equals_a_sum_by_hand_and_a_confidence_of_one_is_in_the_last_bin():
    ece, bins = measures.calibration(np.array([0.61, 0.69, 1.0, 0.35]), np.array([True, False, True, True]))
    assert [b["n"] for b in bins] == [1, 2, 1] and bins[-1] == {"n": 1, "confidence": 1.0, "accuracy": 1.0}
    assert ece == pytest.approx(1 / 4 * 0.65 + 2 / 4 * 0.15 + 0)


def test_probabilities_are_the_shares_of_the_likelihoods_however_small():
    assert measures.probabilities([-2000 + np.log(1), -2000 + np.log(3)]) == pytest.approx([0.25, 0.75])


def test_groups_of_data_set_and_source_are_shown_only_where_there_are_several():
    rows = [
        {"modality": "CT", "dataset": "a", "source": "expert"},
        {"modality": "CT", "dataset": "b", "source": "expert"},
    ]
    assert set(measures.by_group(rows, lambda i: {"n": len(i)})) == {"n", "modality", "dataset"}
    assert measures.by_group(rows, lambda i: {"n": len(i)})["dataset"] == {"a": {"n": 1}, "b": {"n": 1}}
