"""Intervals, tests, agreement and calibration: numbers from answers that are right or wrong.

An array (n,) holds one value per question. The groups are fields of a record; nothing else here knows what a
record or a model is.
"""

import math
from collections import Counter

import numpy as np

from medgr2 import cli

# Fields by which results are grouped. The last two only if they have several values.
GROUPS = ("modality", "task", "dataset", "source")
ALWAYS_GROUPED = ("modality", "task")
RESAMPLES = 2000


# ---------------------------------------------------------------------------------------------------------
# Intervals and tests.


def interval(values, images, seed, resamples=RESAMPLES):
    """95% bootstrap interval (low, high) of the mean of `values` (n,); (None, None) for a single image.

    Images are drawn with replacement, each with all its questions; `images` (n,) names the image of each.
    For two runs, give their difference per question: both are then drawn together (a paired interval).
    """
    index = np.unique(images, return_inverse=True)[1]  # (n,) number of the image
    sums, counts = np.bincount(index, values), np.bincount(index)  # (I,) per image
    if len(sums) < 2:
        return None, None
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def two_level_interval(values, images, runs, seed, resamples=RESAMPLES):
    """95% bootstrap interval (low, high) of the mean over training runs of each run's mean of `values` (n,).

    Runs are drawn with replacement; then, in every drawn run, its images, each with all its questions
    (Davison & Hinkley 1997, 3.8). `images` and `runs` (n,) name those of each question; equal names in two
    runs are two images. A single run gives the interval over its images; a single image, (None, None).

    With S runs the variance between runs counts (S - 1) / S of its unbiased estimate: three runs are few.
    """
    names, index = np.unique(runs, return_inverse=True)
    if len(names) == 1 and len(np.unique(images)) == 1:
        return None, None
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(names), size=(resamples, len(names)))  # (resamples, S) number of the run
    means = np.empty(drawn.shape)
    for run in range(len(names)):
        image = np.unique(images[index == run], return_inverse=True)[1]
        sums, counts = np.bincount(image, values[index == run]), np.bincount(image)  # (I,) per image
        # Every time the run was drawn, its images are drawn anew.
        again = rng.integers(len(sums), size=(np.count_nonzero(drawn == run), len(sums)))  # (times, I)
        means[drawn == run] = sums[again].sum(axis=1) / counts[again].sum(axis=1)
    low, high = np.percentile(means.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def mcnemar(corrected, introduced):
    """Exact two-sided p that corrected and introduced errors are equally likely (McNemar 1947); 1 for none.

    The test takes questions as independent. If several share an image, read the interval beside it.
    """
    n = corrected + introduced
    tail = sum(math.comb(n, i) for i in range(min(corrected, introduced) + 1))
    return float(min(1, 2 * tail / 2**n))


# ---------------------------------------------------------------------------------------------------------
# Classes: the answers of a task are not equally frequent.


def balanced_accuracy(answers, correct):
    """Accuracy within each class (right answer), averaged. (n,) normalised texts, (n,) bools."""
    index = np.unique(answers, return_inverse=True)[1]
    return float(np.mean(np.bincount(index, correct) / np.bincount(index)))


def macro_f1(answers, predictions):
    """Mean F1 over the classes of right answers; None has no class. Both (n,), normalised texts."""
    correct = Counter(answer for answer, prediction in zip(answers, predictions) if answer == prediction)
    answered, predicted = Counter(answers), Counter(predictions)
    return sum(2 * correct[c] / (answered[c] + predicted[c]) for c in answered) / len(answered)


def ranks(x):
    """Ranks from 1 of x (n,); ties share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x, y):
    """Correlation of the ranks; None if either is constant."""
    x, y = ranks(x), ranks(y)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else None


def auroc(scores, right):
    """P(a right item scores above a wrong one), ties count half; None if one of the kinds is missing."""
    right = np.asarray(right, bool)
    n, m = right.sum(), (~right).sum()
    return float((ranks(scores)[right].sum() - n * (n + 1) / 2) / (n * m)) if n and m else None


# ---------------------------------------------------------------------------------------------------------
# Probabilities of options, and several samples per question.


def probabilities(logps):
    """Softmax of the log-probabilities (nats) of a question's options: (options,)."""
    odds = np.exp(np.array(logps) - max(logps))
    return odds / odds.sum()


def calibration(confidence, correct, bins=10):
    """(ECE, bins): are 80% of the answers with a probability of 80% right? (Guo et al. 2017, equal widths)

    ECE = Σ_b n_b/n |accuracy_b - confidence_b|. `confidence` (n,) in [0, 1], `correct` (n,) bools. Each bin
    that is not empty: {"n", "confidence", "accuracy"}.
    """
    index = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)  # (n,)
    found = []
    for b in np.unique(index):
        own = index == b
        means = {"confidence": float(np.mean(confidence[own])), "accuracy": float(np.mean(correct[own]))}
        found.append({"n": int(own.sum()), **means})
    return sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in found) / len(index), found


def pass_at(k, correct, samples):
    """P(at least one of k samples drawn without replacement is right), if `correct` of `samples` are.

    Unbiased (Chen et al. 2021).
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(values):
    """The most frequent value other than None, the first met if several are; None if there is none."""
    counts = Counter(value for value in values if value is not None)
    return counts.most_common(1)[0][0] if counts else None


# ---------------------------------------------------------------------------------------------------------
# Groups of questions.


def by_group(rows, measure):
    """`measure` of all rows, and of each group: {..., "modality": {name: {...}}, "task": {name: {...}}, ...}.

    `measure` takes row indices (n,) and returns a dict. Rows that lack a known field are the group `(none)`.
    """
    result = measure(np.arange(len(rows)))
    for field in GROUPS:
        # A field that is null is lacking, too.
        names = np.array([row.get(field) or "(none)" for row in rows])
        is_known = any(row.get(field) for row in rows)
        if is_known and (field in ALWAYS_GROUPED or len(set(names)) > 1):
            result[field] = {str(name): measure(np.flatnonzero(names == name)) for name in np.unique(names)}
    return result


def format_groups(result, markdown=False):
    """What `by_group` returned as aligned text: a line for all rows, and one for each group."""
    groups = [("all", result)]
    for field in GROUPS:
        groups += [(f"{field}: {name}", group) for name, group in result.get(field, {}).items()]
    columns = [name for name, value in result.items() if not isinstance(value, (dict, list))]
    lines = []
    for label, group in groups:
        # Two significant digits for p: 0.000 would say nothing.
        lines.append([label, *(f"{group[c]:.2g}" if c == "p" else group.get(c) for c in columns)])
    return cli.format_table(lines, ["", *columns], markdown)
