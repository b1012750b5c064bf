"""The four levels of responses to an expert record that the reward model learns to tell apart, and marks of a policy's own.

    original    10   as the expert wrote it
    perturbed    6   one finding, site, side or degree replaced by another that occurs in the data, the rest right
    incoherent   0   contradicts itself: the answer against the rationale, or a clause of another report
    irrelevant  -6   belongs to another image, and its answer is wrong for this one

One short function a level, for each kind of record: question with or without rationale, open or with options, and report. No text
has two levels: a replaced detail may happen to be another image's answer, and then it is that.

Of the policy's responses to expert questions the truth is known: right and well-formed 10, wrong 0, malformed -6.
"""

import random
import re

from medgr2 import records, runs
from medgr2.prompts import (
    format_response,
    is_match,
    normalise,
    parse_response,
    policy_prompt,
    reference_response,
)

NAN = float("nan")
# (R, relevant, coherent, faithful)
LEVELS = {
    "original": (10, 1, 1, 1),
    "perturbed": (6, 1, 1, 0),
    "incoherent": (0, 1, 0, 0),
    "irrelevant": (-6, 0, 1, 0),
    # the policy's own responses to expert questions; NaN where the mark implies nothing
    "right": (10, 1, NAN, NAN),
    "wrong": (0, NAN, NAN, 0),
    "malformed": (-6, NAN, NAN, NAN),
}
ALTERNATIVES = (
    ("left", "right"),
    ("mild", "moderate", "severe"),
    ("upper", "lower"),
    ("small", "large"),
    ("acute", "chronic"),
    ("anterior", "posterior"),
    ("present", "absent"),
    ("yes", "no"),
)


# Each function: (record, other records, terms, rng) → a response, or None if there is none.


def find_terms(rows):
    """(pattern, {term: alternatives}): terms that stand side by side among options, and a few pairs of our own.

    The pattern finds them in a text in any case, the longest first. Keys are lower-case; alternatives are as written.
    """
    found = {}
    for group in [r["options"] for r in rows if "options" in r] + list(ALTERNATIVES):
        for term in group:
            found.setdefault(term.lower(), set()).update(t for t in group if t.lower() != term.lower())
    any_term = "|".join(map(re.escape, sorted(found, key=lambda t: (-len(t), t))))
    return re.compile(rf"(?<!\w)(?:{any_term})(?!\w)", re.IGNORECASE), {
        t: sorted(others) for t, others in found.items() if others
    }


def in_the_case_of(word, like):
    """`word` with its first letter in the case of `like`'s, so that a swap cannot be told by it; acronyms stay as they are."""
    if any(w[1:] != w[1:].lower() for w in (word, like)):
        return word
    return (word[:1].upper() if like[:1].isupper() else word[:1].lower()) + word[1:]


def swap_term(text, terms, rng, avoid=""):
    """`text` with one of its terms, everywhere that it occurs, replaced by an alternative; None if it has none."""
    pattern, alternatives = terms
    met = sorted({m.lower() for m in pattern.findall(text)} & alternatives.keys() - {avoid.lower()})
    if not met:
        return None
    term = rng.choice(met)
    other = rng.choice(alternatives[term])
    return pattern.sub(lambda m: in_the_case_of(other, m[0]) if m[0].lower() == term else m[0], text)


def original(record, others, terms, rng):
    return reference_response(record)


def perturbed(record, others, terms, rng):
    """A detail replaced and the rest left right: of the report, of the rationale beside the answer, of a longer answer."""
    if "report" in record:
        return swap_term(record["report"], terms, rng)
    if record.get("rationale"):
        rationale = swap_term(record["rationale"], terms, rng, avoid=record["answer"])
        return rationale and format_response(rationale, record["answer"])
    # all of it replaced is wrong, not perturbed
    answer = swap_term(record["answer"], terms, rng, avoid=record["answer"])
    return answer and format_response(None, answer)


def wrong_answer(record, terms, rng):
    """Another option; for an open question the answer with a term replaced."""
    wrong = [o for o in record.get("options", ()) if not is_match(o, record["answer"])]
    return rng.choice(wrong) if wrong else swap_term(record["answer"], terms, rng)


def incoherent(record, others, terms, rng):
    """The answer against the rationale; without a rationale, two answers at once; a clause of another report."""
    if "report" in record:
        clauses = lambda r: re.split(r"(?<=[.;])\s+", r["report"])  # noqa: E731
        own = clauses(record)
        strange = [c for r in others if "report" in r for c in clauses(r) if c not in own]
        place = rng.randint(0, len(own))
        return " ".join([*own[:place], rng.choice(strange), *own[place:]]) if strange else None
    answer = wrong_answer(record, terms, rng)
    if answer is None:
        return None
    both = answer if record.get("rationale") else f"{record['answer']}, {answer}"
    return format_response(record.get("rationale"), both)


def irrelevant(record, others, terms, rng):
    """The response to the same question about another image, where the answer differs: an option here, and a wrong one."""
    if "report" in record:
        donors = [r for r in others if "report" in r and r["report"] != record["report"]]
    else:
        options = {normalise(o) for o in record.get("options", ())} - {normalise(record["answer"])}
        donors = [
            r
            for r in others
            if "answer" in r
            and (
                normalise(r["answer"]) in options
                if options
                else r["question"] == record["question"] and not is_match(r["answer"], record["answer"])
            )
        ]
    donors = [r for r in donors if r["image"] != record["image"]]
    return reference_response(rng.choice(donors)) if donors else None


def build_levels(rows, resamples, seed):
    """[(record, [(level, response)])], for each record its levels `resamples` times over, no response twice."""
    terms, levels = find_terms(rows), []
    for record in rows:
        rng = random.Random(runs.seed_of(seed, record["id"]))
        # enough to find a donor among, and no more
        others = rng.sample(rows, min(len(rows), 200))
        drawn = {}
        # a text that two of them make has one level: the last's
        for make in (perturbed, incoherent, irrelevant, original):
            drawn |= {make(record, others, terms, rng): make.__name__ for _ in range(resamples)}
        levels.append((record, sorted((level, text) for text, level in drawn.items() if text is not None)))
    return levels


def build_rollouts(files, root=None):
    """[(expert record, [(mark, response)])]: the policy's responses, marked by the truth and never by a reward."""
    questions = {}
    for file in files:
        for r in records.read_records(file, ("image", "response"), root):
            if r.get("source", "expert") == "expert":
                parsed = parse_response(r["response"], r.get("options"))
                right = is_match(parsed.prediction, r["answer"])
                mark = "malformed" if not parsed.well_formed else "right" if right else "wrong"
                questions.setdefault((r["image"], policy_prompt(r)), (r, set()))[1].add((mark, r["response"]))
    return [(r, sorted(marked)) for r, marked in questions.values()]
