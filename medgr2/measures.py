"""Marks in, numbers out: intervals, tests, agreement and calibration. Arrays (n,) hold one value a question.

The groups are fields of a record; nothing else here knows what a record is, or a model.
"""

import math
from collections import Counter

import numpy as np

from medgr2 import cli

GROUPS = ("modality", "task", "dataset", "source")
RESAMPLES = 2000


# ---------------------------------------------------------------------------------------------------------
# How far a figure can be trusted.


def interval(values, images, seed, resamples=RESAMPLES):
    """95% interval of the mean of `values` (n,), by drawing images (n,) with replacement, each with all its questions.

    Returns (low, high); (None, None) where there is one image alone. For two runs, `values` is their difference by
    question: both are then drawn together, which makes it the paired interval.
    """
    index = np.unique(images, return_inverse=True)[1]  # (n,) number of the image
    sums, counts = np.bincount(index, values), np.bincount(index)  # (I,)
    if len(sums) < 2:
        return None, None
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(resamples))
    low, high = np.percentile([sums[d].sum() / counts[d].sum() for d in draws], [2.5, 97.5])
    return float(low), float(high)


def mcnemar(corrected, introduced):
    """Exact two-sided p that corrected and introduced errors are equally likely (McNemar 1947, by the binomial); 1 where none.

    It takes questions as independent; where several share an image, read the interval beside it.
    """
    n = corrected + introduced
    tail = sum(math.comb(n, i) for i in range(min(corrected, introduced) + 1))
    return float(min(1, 2 * tail / 2**n))


# ---------------------------------------------------------------------------------------------------------
# Classes: the answers of a task are not equally frequent.


def balanced_accuracy(answers, right):
    """Mean over the right answers' classes of the share that was right: `answers` (n,) are normalised, `right` (n,) bools."""
    index = np.unique(answers, return_inverse=True)[1]
    return float(np.mean(np.bincount(index, right) / np.bincount(index)))


def macro_f1(answers, predictions):
    """Mean F1 over the right answers' classes; a prediction of None is of no class. Both (n,), normalised."""
    gold, said, both = (
        Counter(answers),
        Counter(predictions),
        Counter(a for a, p in zip(answers, predictions) if a == p),
    )
    return sum(2 * both[c] / (gold[c] + said[c]) for c in gold) / len(gold)


def ranks(x):
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def auroc(scores, right):
    """P(a right one scores above a wrong one), ties one half; None if either is missing."""
    right = np.asarray(right, bool)
    n, m = right.sum(), (~right).sum()
    return float((ranks(scores)[right].sum() - n * (n + 1) / 2) / (n * m)) if n and m else None


# ---------------------------------------------------------------------------------------------------------
# Probabilities of options, and several samples of one question.


def probabilities(logps):
    """The options' log-probabilities as shares of their sum: softmax, (options,)."""
    shares = np.exp(np.array(logps) - max(logps))
    return shares / shares.sum()


def calibration(confidence, right, bins=10):
    """(ECE, bins): is what is said with 80% right in 80%? (Guo et al. 2017, with bins of equal width)

    ECE = Σ_b n_b/n |accuracy_b - confidence_b|. Each bin that is not empty: {"n", "confidence", "accuracy"}.
    """
    index = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)  # (n,)
    found = [
        {
            "n": int((index == b).sum()),
            "confidence": float(np.mean(confidence[index == b])),
            "accuracy": float(np.mean(right[index == b])),
        }
        for b in np.unique(index)
    ]
    return sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in found) / len(index), found


def pass_at(k, right, samples):
    """P(at least one of k drawn without replacement is right), `right` of `samples` being so (Chen et al. 2021, unbiased)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(predictions):
    """The most frequent prediction that is one, the first met of equally frequent ones; None where there is none."""
    return next((p for p, _ in Counter(p for p in predictions if p is not None).most_common(1)), None)


# ---------------------------------------------------------------------------------------------------------
# Groups of questions.


def by_group(rows, measure):
    """`measure` of all rows' indices, and beside it {"modality": {name: ...}, "task": {name: ...}, ...}, where known.

    Data set and source make rows of their own only where there are several.
    """
    result = measure(np.arange(len(rows)))
    for field in GROUPS:
        names = np.array([row.get(field, "(none)") for row in rows])
        if any(field in row for row in rows) and (field in GROUPS[:2] or len(set(names)) > 1):
            result[field] = {str(name): measure(np.flatnonzero(names == name)) for name in np.unique(names)}
    return result


def format_groups(result, markdown=False):
    """What `by_group` returned, as aligned text: a line for all, and for each member of each group."""
    lines = [("all", result)] + [
        (f"{field}: {name}", group) for field in GROUPS for name, group in result.get(field, {}).items()
    ]
    columns = [name for name, value in result.items() if not isinstance(value, (dict, list))]
    # a p of 0.000 says nothing
    cells = [[f"{group[c]:.2g}" if c == "p" else group.get(c) for c in columns] for _, group in lines]
    return cli.format_table(
        [[label, *row] for (label, _), row in zip(lines, cells)], ["", *columns], markdown
    )
