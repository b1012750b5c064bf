"""measures.py against counts over all cases, sums by hand and simulation."""

import itertools
import random

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


def make_runs(sizes, seed):
    """(values, images, runs) of runs with these numbers of questions per image; the images' names repeat."""
    rng = np.random.default_rng(seed)
    values, images, runs = [], [], []
    for run, questions in enumerate(sizes):
        for image, count in enumerate(questions):
            values += list(run + rng.normal(size=count))
            images += [f"image {image}"] * count
            runs += [f"run {run}"] * count
    return np.array(values), np.array(images), np.array(runs)


def draw_two_levels(values, images, runs, rng):
    """The mean of one draw of runs and of their images, one question at a time."""
    names, means = sorted(set(runs)), []
    for _ in names:
        run, drawn = rng.choice(names), []
        own = [(value, image) for value, image, name in zip(values, images, runs) if name == run]
        distinct = sorted({image for _, image in own})
        for _ in distinct:
            chosen = rng.choice(distinct)
            drawn += [value for value, image in own if image == chosen]
        means.append(sum(drawn) / len(drawn))
    return sum(means) / len(means)


def test_the_two_level_interval_is_that_of_draws_of_runs_then_images_one_at_a_time():
    data = make_runs([[1, 4, 2], [3, 1], [1, 1, 2, 5, 1]], seed=3)
    rng = random.Random(0)
    draws = [draw_two_levels(*data, rng) for _ in range(20000)]
    got = measures.two_level_interval(*data, seed=0, resamples=20000)
    # The width is about 2.6; the error of either side's quantiles about 0.015.
    assert got == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.06)


def test_the_two_level_interval_of_one_run_is_that_over_its_images():
    values, images, runs = make_runs([[1, 4, 2, 1, 3, 1, 2, 2]], seed=4)
    over_images = measures.interval(values, images, seed=1, resamples=20000)
    got = measures.two_level_interval(values, images, runs, seed=2, resamples=20000)
    assert got == pytest.approx(over_images, abs=0.02)


def test_the_two_level_interval_of_runs_whose_images_agree_is_that_of_all_draws_of_runs():
    effects = [0.1, 0.4, 0.2, 0.8]
    runs = np.repeat(range(4), 50)
    values, images = np.array(effects)[runs], np.arange(200)
    draws = [np.mean(drawn) for drawn in itertools.product(effects, repeat=4)]
    got = measures.two_level_interval(values, images, runs, seed=0, resamples=20000)
    assert got == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.011)


def test_the_two_level_interval_covers_the_variation_between_runs_and_one_over_images_does_not():
    rng = np.random.default_rng(5)
    runs, images = np.repeat(range(10), 40), np.arange(400)
    covered = {"two levels": 0, "images": 0}
    for _ in range(200):
        # The mean of all possible runs is 0. A run's effect varies as much as its images do.
        values = rng.normal(size=10)[runs] + rng.normal(size=400)
        low, high = measures.two_level_interval(values, images, runs, seed=0, resamples=500)
        covered["two levels"] += low <= 0 <= high
        low, high = measures.interval(values, images, seed=0, resamples=500)
        covered["images"] += low <= 0 <= high
    assert covered["two levels"] / 200 > 0.85 and covered["images"] / 200 < 0.5


def test_the_two_level_interval_counts_every_run_once_however_many_questions_it_has():
    # The one run whose answers are wrong has most of the questions.
    runs = np.array([*range(9), *[9] * 1000])
    got = measures.two_level_interval(1.0 * (runs < 9), np.arange(1009), runs, seed=0, resamples=20000)
    # Quantiles of a binomial share with n = 10, p = 0.9: P(6 or fewer) = 0.013, P(7 or fewer) = 0.070.
    assert got == pytest.approx((0.7, 1))


def test_the_two_level_interval_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    data = make_runs([[1, 4, 2], [3, 1, 1]], seed=6)
    order = np.random.default_rng(7).permutation(len(data[0]))
    first = measures.two_level_interval(*data, seed=0)
    assert measures.two_level_interval(*(column[order] for column in data), seed=0) == pytest.approx(first)
    assert measures.two_level_interval(*data, seed=1) != first


def test_a_single_image_of_a_single_run_has_no_two_level_interval_and_one_image_per_run_has():
    values, image = np.array([0.0, 1.0]), np.array(["a", "a"])
    assert measures.two_level_interval(values, image, np.array([0, 0]), seed=0) == (None, None)
    assert measures.two_level_interval(values, image, np.array([0, 1]), seed=0) == (0, 1)


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


def test_a_row_whose_group_is_null_is_in_the_group_of_none():
    rows = [{"dataset": "a"}, {"dataset": None}, {}, {"dataset": "a", "task": None}]
    assert measures.by_group(rows, lambda index: {"n": len(index)}) == {
        "n": 4,
        "dataset": {"(none)": {"n": 2}, "a": {"n": 2}},
    }
