"""measures.py against counts over all cases, sums by hand and simulation."""

import itertools

import numpy as np
import pytest

from medgr2 import measures


def width(values, images):
    low, high = measures.interval(np.array(values, float), np.array(images), seed=0)
    assert low <= np.mean(values) <= high
    return high - low


def test_an_interval_over_images_is_wider_than_over_questions_if_the_answers_of_an_image_agree():
    rng = np.random.default_rng(1)
    # 100 images of 9 questions each, all right or all wrong.
    right = np.repeat(rng.random(100) < 0.6, 9)
    ratio = width(right, np.repeat(np.arange(100), 9)) / width(right, np.arange(900))
    # The square root of 9: there are 100 independent answers, not 900.
    assert 2.7 < ratio < 3.3


def test_the_interval_of_independent_questions_is_the_textbook_one():
    right = np.arange(400) < 120
    assert width(right, np.arange(400)) == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 400) ** 0.5, rel=0.08)


def test_the_interval_is_that_of_all_draws_of_images_of_unequal_size():
    # Numbers of each image.
    questions, right = [1, 2, 5, 9], [1, 0, 4, 2]
    values = np.concatenate([np.arange(n) < r for n, r in zip(questions, right)]).astype(float)
    draws = [
        (sum(right[i] for i in d) / sum(questions[i] for i in d))
        for d in itertools.product(range(4), repeat=4)
    ]
    got = measures.interval(values, np.repeat(list("dacb"), questions), seed=0, resamples=20000)
    assert got == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.01)


def test_the_interval_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    rng = np.random.default_rng(2)
    values, images, order = (
        (rng.random(60) < 0.5).astype(float),
        rng.integers(20, size=60),
        rng.permutation(60),
    )
    first = measures.interval(values, images, 0)
    assert measures.interval(values[order], images[order], 0) == first
    assert measures.interval(values, images, 1) != first


def test_a_single_image_has_no_interval():
    assert measures.interval(np.array([1.0, 0.0]), np.array(["a", "a"]), 0) == (None, None)


@pytest.mark.parametrize("corrected, introduced", [(0, 0), (1, 0), (5, 0), (3, 3), (2, 7), (9, 4)])
def test_mcnemar_is_the_share_of_all_coin_flips_that_are_at_least_as_uneven(corrected, introduced):
    n = corrected + introduced
    uneven = [
        abs(2 * sum(flips) - n) >= abs(corrected - introduced)
        for flips in itertools.product((0, 1), repeat=n)
    ]
    assert measures.mcnemar(corrected, introduced) == pytest.approx(np.mean(uneven))


def test_balanced_accuracy_and_macro_f1_equal_a_count_by_hand():
    answers, predictions = ["a", "a", "a", "b", "c"], ["a", "a", "b", "b", None]
    correct = np.array([x == y for x, y in zip(answers, predictions)])
    assert measures.balanced_accuracy(np.array(answers), correct) == pytest.approx((2 / 3 + 1 + 0) / 3)
    # a: precision 2/2, recall 2/3; b: precision 1/2, recall 1; c: none found.
    assert measures.macro_f1(answers, predictions) == pytest.approx(
        (2 * 1 * (2 / 3) / (5 / 3) + 2 * 0.5 * 1 / 1.5 + 0) / 3
    )


def test_balanced_accuracy_of_a_constant_answer_is_one_over_the_number_of_classes():
    answers = np.array(["no"] * 90 + ["yes"] * 10)
    # The accuracy would be 0.9.
    assert measures.balanced_accuracy(answers, answers == "no") == 0.5


@pytest.mark.parametrize(
    "right, samples, k", [(0, 4, 2), (1, 4, 1), (1, 4, 2), (3, 4, 2), (2, 6, 4), (6, 6, 3)]
)
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(right, samples, k):
    draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert measures.pass_at(k, right, samples) == pytest.approx(np.mean([any(d) for d in draws]))


def test_a_vote_takes_the_most_frequent_prediction_the_first_of_equals_and_never_none():
    assert measures.majority(["a", "b", "b"]) == "b" and measures.majority(["a", "b"]) == "a"
    assert measures.majority([None, None, "a"]) == "a" and measures.majority([None, None]) is None


def test_ece_of_calibrated_answers_is_near_zero_and_of_overconfident_ones_the_excess():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.25, 1, 40000)
    right = rng.random(40000) < confidence
    assert measures.calibration(confidence, right)[0] < 0.01
    assert measures.calibration(np.full(1000, 0.9), np.arange(1000) < 600)[0] == pytest.approx(0.3)


def test_ece_equals_a_sum_by_hand_and_a_confidence_of_one_is_in_the_last_bin():
    ece, bins = measures.calibration(np.array([0.61, 0.69, 1.0, 0.35]), np.array([True, False, True, True]))
    assert [b["n"] for b in bins] == [1, 2, 1] and bins[-1] == {"n": 1, "confidence": 1.0, "accuracy": 1.0}
    assert ece == pytest.approx(1 / 4 * 0.65 + 2 / 4 * 0.15 + 0)


def test_probabilities_are_right_for_very_small_likelihoods_too():
    assert measures.probabilities([-2000 + np.log(1), -2000 + np.log(3)]) == pytest.approx([0.25, 0.75])


def test_data_set_and_source_are_groups_only_if_there_are_several():
    rows = [
        {"modality": "CT", "dataset": "a", "source": "expert"},
        {"modality": "CT", "dataset": "b", "source": "expert"},
    ]
    assert set(measures.by_group(rows, lambda i: {"n": len(i)})) == {"n", "modality", "dataset"}
    assert measures.by_group(rows, lambda i: {"n": len(i)})["dataset"] == {"a": {"n": 1}, "b": {"n": 1}}
