"""Four levels of responses to an expert record, which the reward model learns to tell apart.

    original    10   as the expert wrote it
    perturbed    6   one finding, site, side or degree replaced by another that occurs in the data
    incoherent   0   contradicts itself: the answer against the rationale, or a clause of another report
    irrelevant  -6   belongs to another image, and its answer is wrong for this one

One short function makes each level, for each kind of record: a question with or without rationale, open or
with options, or a report. Without a rationale a response is the bare answer. No text has two levels: if a
replaced detail happens to be another image's answer, the text is irrelevant.

The policy's own responses to expert questions (rollouts) are a second source. Their truth is known from the
expert's answer: right and well-formed 10, wrong 0, malformed -6.
"""

import collections
import functools
import itertools
import random
import re

import numpy as np

from medgr2 import cli, records, runs, training
from medgr2.errors import require
from medgr2.images import hash_image
from medgr2.measures import auroc
from medgr2.prompts import (
    UNSPACED,
    format_response,
    is_match,
    normalise,
    parse_response,
    policy_prompt,
    prompt_of,
    reference_response,
)

UNKNOWN = float("nan")
# (R, relevant, coherent, faithful): the score, and the probabilities that say why.
LEVELS = {
    "original": (10, 1, 1, 1),
    "perturbed": (6, 1, 1, 0),
    "incoherent": (0, 1, 0, 0),
    "irrelevant": (-6, 0, 1, 0),
    # Outcomes of rollouts.
    "right": (10, 1, UNKNOWN, UNKNOWN),
    "wrong": (0, UNKNOWN, UNKNOWN, 0),
    "malformed": (-6, UNKNOWN, UNKNOWN, UNKNOWN),
}
# Terms that replace each other, besides those that are options of one question.
ALTERNATIVES = (
    ("left", "right"),
    ("mild", "moderate", "severe"),
    ("upper", "lower"),
    ("small", "large"),
    ("acute", "chronic"),
    ("anterior", "posterior"),
    ("present", "absent"),
    ("yes", "no"),
    # A term alone is in the pattern and is never replaced: 左右 is "about".
    ("左", "右"),
    ("左右",),
    ("轻度", "中度", "重度"),
    ("上叶", "下叶"),
    ("急性", "慢性"),
    ("良性", "恶性"),
    ("增大", "缩小"),
    ("links", "rechts"),
    ("linke", "rechte"),
    ("linken", "rechten"),
    ("gauche", "droite"),
    ("izquierdo", "derecho"),
    ("izquierda", "derecha"),
    ("esquerdo", "direito"),
    ("esquerda", "direita"),
    ("sinistro", "destro"),
    ("sinistra", "destra"),
)
# Where a clause of a report ends: at a stop with a space after it, or at a full-width one.
CLAUSE_END = re.compile(r"(?<=[.;])\s+|(?<=[。；！？])\s*")
# The levels of a record draw from at most this many others.
MOST_OTHERS = 200


# ---------------------------------------------------------------------------------------------------------
# Terms.


def find_terms(rows):
    """(pattern, {term: alternatives}) of the options of each question, and of ALTERNATIVES.

    The pattern finds terms in any case, the longest first. Keys are lower-case, alternatives as written.
    """
    found = {}
    for group in [row["options"] for row in rows if "options" in row] + list(ALTERNATIVES):
        for term in group:
            others = {other for other in group if other.lower() != term.lower()}
            found.setdefault(term.lower(), set()).update(others)
    longest_first = sorted(found, key=lambda term: (-len(term), term))
    pattern = re.compile("|".join(map(whole_words, longest_first)), re.IGNORECASE)
    return pattern, {term: sorted(others) for term, others in found.items() if others}


def whole_words(term):
    """A pattern that finds the term as whole words. Scripts without spaces show no end of a word."""
    letter = rf"[^\W{UNSPACED}]"
    before = rf"(?<!{letter})" if re.match(letter, term) else ""
    after = rf"(?!{letter})" if re.match(letter, term[-1]) else ""
    return before + re.escape(term) + after


def match_case(word, like):
    """`word` with its first letter in the case of `like`'s, so that a swap does not show. Keeps acronyms."""
    if any(w[1:] != w[1:].lower() for w in (word, like)):
        return word
    return (word[:1].upper() if like[:1].isupper() else word[:1].lower()) + word[1:]


def swap_term(text, terms, rng, avoid=""):
    """`text` with one of its terms (not `avoid`) replaced everywhere by an alternative; None without any."""
    pattern, alternatives = terms
    found = {match.lower() for match in pattern.findall(text)}
    candidates = sorted(found & alternatives.keys() - {avoid.lower()})
    if not candidates:
        return None
    term = rng.choice(candidates)
    other = rng.choice(alternatives[term])

    def replace(match):
        return match_case(other, match[0]) if match[0].lower() == term else match[0]

    return pattern.sub(replace, text)


# ---------------------------------------------------------------------------------------------------------
# The levels. Each function: (record, other records, terms, rng) → a response, or None if it cannot make one.


def original(record, others, terms, rng):
    return reference_response(record)


def perturbed(record, others, terms, rng):
    """One detail replaced, the rest right: in the report, in the rationale, or in a longer answer."""
    if "report" in record:
        return swap_term(record["report"], terms, rng)
    if record.get("rationale"):
        rationale = swap_term(record["rationale"], terms, rng, avoid=record["answer"])
        return rationale and format_response(rationale, record["answer"])
    # An answer that is replaced as a whole is wrong, not perturbed.
    answer = swap_term(record["answer"], terms, rng, avoid=record["answer"])
    return answer and format_response(None, answer)


def incoherent(record, others, terms, rng):
    """The answer against the rationale; two answers, without a rationale; a clause of another report."""
    if "report" in record:
        return insert_clause(record["report"], others, rng)
    answer = wrong_answer(record, terms, rng)
    if answer is None:
        return None
    rationale = record.get("rationale")
    return format_response(rationale, answer if rationale else f"{record['answer']}, {answer}")


def irrelevant(record, others, terms, rng):
    """The response to a record of another image, its answer wrong for this one."""
    if "report" in record:
        donors = [other for other in others if "report" in other and other["report"] != record["report"]]
    else:
        donors = wrongly_answered(record, others)
    donors = [other for other in donors if other["image"] != record["image"]]
    return reference_response(rng.choice(donors)) if donors else None


def wrongly_answered(record, others):
    """The others whose answer is another option of this question; if it is open, another answer to it."""
    answered = [other for other in others if "answer" in other]
    wrong = {normalise(option) for option in wrong_options(record)}
    if wrong:
        return [other for other in answered if normalise(other["answer"]) in wrong]
    same_question = [other for other in answered if other["question"] == record["question"]]
    return [other for other in same_question if not is_match(other["answer"], record["answer"])]


def wrong_options(record):
    return [option for option in record.get("options", ()) if not is_match(option, record["answer"])]


def wrong_answer(record, terms, rng):
    """Another option; for an open question the answer with a term replaced, or None."""
    wrong = wrong_options(record)
    return rng.choice(wrong) if wrong else swap_term(record["answer"], terms, rng)


def insert_clause(report, others, rng):
    """The report with a clause of another report at a random place; None if no other has another clause."""
    own = split_clauses(report)
    reports = [other["report"] for other in others if "report" in other]
    strange = [clause for other in reports for clause in split_clauses(other) if clause not in own]
    place = rng.randint(0, len(own))
    if not strange:
        return None
    clauses = [*own[:place], rng.choice(strange), *own[place:]]
    return "".join(clause if clause[-1] in "。；！？" else f"{clause} " for clause in clauses).strip()


def split_clauses(report):
    return [clause for clause in CLAUSE_END.split(report) if clause]


# ---------------------------------------------------------------------------------------------------------
# All levels of all records.


def build_levels(rows, resamples, seed):
    """[(record, [(level, response)])]: each record's levels, drawn `resamples` times, no response twice."""
    terms, groups = find_terms(rows), []
    for record in rows:
        rng = random.Random(runs.seed_of(seed, record["id"]))
        others = rng.sample(rows, min(len(rows), MOST_OTHERS))
        level_of = {}
        # A text that two functions make has the level of the later one, so `original` is the last.
        for make in (perturbed, incoherent, irrelevant, original):
            for _ in range(resamples):
                level_of[make(record, others, terms, rng)] = make.__name__
        level_of.pop(None, None)
        groups.append((record, sorted((level, response) for response, level in level_of.items())))
    return groups


def load_groups(args):
    """(training groups, held-out groups), split by image: levels of expert records, and labelled rollouts."""
    skip = args.on_error == "skip"
    rows = [r for f in args.data for r in training.read_usable(f, ("image",), args.image_root, skip)]
    rows = [r for r in rows if "report" in r or ("question" in r and "answer" in r)]
    require(rows, f"{args.data[0]}: neither questions with answers nor reports; give expert records")
    parts = records.split_records(rows, (1 - args.holdout, 0, args.holdout), args.seed)
    # By content, as split_records splits: a rollout may name a copy of an image.
    hash_of = functools.cache(hash_image)
    held_out_images = {hash_of(r["image"]) for r in parts["test"]}
    learned = build_levels(parts["train"], args.resamples, args.seed)
    held_out = build_levels(parts["test"], 1, args.seed)
    for record, labelled in label_rollouts(args.rollouts, args.per_outcome, args.seed, args.image_root):
        part = held_out if hash_of(record["image"]) in held_out_images else learned
        part.append((record, labelled))
    few = f"{args.data[0]}: too few records to train on and hold out; give more data, or another --holdout"
    require(learned and held_out, few)
    return learned, held_out


def leave_out_too_long(backbone, groups, on_error):
    """The groups that fit into the backbone's context with each of their responses."""
    from medgr2 import context, encoding

    def count_longest(group):
        responses = [response for _, response in group[1]]
        return encoding.encode_continuations(backbone, responses)[0].shape[1]

    def prompt(group):
        return prompt_of(group[0])

    def image(group):
        return group[0]["image"]

    return context.leave_out_too_long(backbone, groups, image, prompt, count_longest, on_error == "skip")


def label_rollouts(files, per_outcome, seed, root=None):
    """[(expert record, [(outcome, response)])]: the policy's responses to expert questions, none twice.

    At most `per_outcome` of each question and outcome, drawn at random. With all of them R ranked the same
    candidates worse in later cycles (docs/results.md).
    """
    questions = {}
    for file in files:
        for rollout in records.read_answered(file, (*records.UNLABELLED, "response"), root):
            if rollout.get("source", "expert") == "expert":
                key = rollout["image"], policy_prompt(rollout)
                _, found = questions.setdefault(key, (rollout, collections.defaultdict(set)))
                found[outcome(rollout)].add(rollout["response"])
    rng = random.Random(runs.seed_of(seed, "rollouts"))

    def draw(found):
        return [
            (name, response)
            for name, responses in sorted(found.items())
            for response in rng.sample(sorted(responses), min(per_outcome, len(responses)))
        ]

    return [(record, draw(found)) for record, found in questions.values()]


def outcome(rollout):
    """`right`, `wrong` or `malformed`, by the expert's answer and never by a reward."""
    parsed = parse_response(rollout["response"], rollout.get("options"))
    if not parsed.well_formed:
        return "malformed"
    return "right" if is_match(parsed.prediction, rollout["answer"]) else "wrong"


# ---------------------------------------------------------------------------------------------------------
# How far R tells the levels apart.


def evaluate_levels(scores, targets, levels):
    """{level: {n, mean, mae}}: the number of responses, their mean R and its mean absolute error."""
    found, errors = {}, np.abs(scores - targets)
    for level in LEVELS:
        own = levels == level
        if own.any():
            mean, mae = float(scores[own].mean()), float(errors[own].mean())
            found[level] = {"n": int(own.sum()), "mean": mean, "mae": mae}
    return found


def evaluate_pairs(scores, levels):
    """{"high > low": probability that a response of the high level scores above one of the low level}."""
    found = {}
    for high, low in itertools.combinations([level for level in LEVELS if level in levels], 2):
        if LEVELS[high][0] > LEVELS[low][0]:
            pair = np.isin(levels, (high, low))
            found[f"{high} > {low}"] = auroc(scores[pair], levels[pair] == high)
    return found


def print_evaluation(metrics):
    rows = [(name, m["n"], LEVELS[name][0], m["mean"], m["mae"]) for name, m in metrics["levels"].items()]
    print(cli.format_table(rows, ("level", "n", "target", "mean", "MAE")))
    print(cli.format_table(list(metrics["ordered"].items()), ("pair", "in order")))
