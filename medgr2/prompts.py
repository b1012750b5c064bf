"""Prompts and the parsers of their replies.

A prompt asks for a form and its parser reads that form. They are two halves of one contract, so they are side by side here,
and a test holds that each parser accepts what its prompt asks for.
"""

import re
import unicodedata
from typing import NamedTuple

MODALITIES = ("CT", "MRI", "X-Ray", "Ultrasound", "Dermoscopy", "Fundus Photography", "Microscopy", "OCT")

TASKS = (
    "Modality Recognition",
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    # the eight modalities and five question types of OmniMedVQA
    "Other Biological Attributes",
)


# ---------------------------------------------------------------------------------------------------------
# What the policy is asked, and how its reply is parsed.


def policy_prompt(record):
    """The text that goes with the image, when the policy is asked `record["question"]`."""
    lines = [record["question"]]
    if "options" in record:
        lines.append("Options: " + " ".join(f"{chr(65 + i)}) {o}" for i, o in enumerate(record["options"])))
    lines.append("Reason first, then give " + ("one option." if "options" in record else "a short answer."))
    lines.append("Reply as <think>reasoning</think><answer>answer</answer>")
    return "\n".join(lines)


def report_prompt():
    """The text that goes with the image, when a report is asked for."""
    return "Describe this image."


def format_response(rationale, answer):
    """What a perfect reply to `policy_prompt` looks like; `rationale` may be empty or None."""
    return f"<think>{rationale or ''}</think><answer>{answer}</answer>"


def reference_response(record):
    """The reference response of a question or report record: what SFT trains on and the reward model scores."""
    return (
        record["report"] if "report" in record else format_response(record.get("rationale"), record["answer"])
    )


class Parsed(NamedTuple):
    """A response, read. `prediction` is an option's own text (or free text), or None with a `reason`."""

    prediction: str | None
    reason: str | None
    rationale: str | None
    # exactly the form that the prompt asks for, and a prediction in it
    well_formed: bool


FORM = re.compile(r"\s*<think>(?P<rationale>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)

# none of them may stand inside a part of a reply
TAG = re.compile(r"</?(?:question|options|think|answer)>")

LETTER = re.compile(r"\(?([A-Za-z])(?:[).:]+|\s*$)\s*(.*)", re.DOTALL)


def normalise(text):
    """Case, width, spacing and the punctuation around a text do not make it another answer."""
    text = unicodedata.normalize("NFKC", str(text)).casefold()
    return " ".join(text.split()).strip(" .,:;!?\"'`*()[]{}")


def match_option(answer, options):
    """The one option that `answer` names by its text, its letter, or both; (None, reason) where it names none.

    Never a guess: a letter beside another option's text, or a text that two options share, is no answer.
    """
    same = [o for o in options if normalise(o) == normalise(answer)]
    if len(same) == 1:
        return same[0], None
    if len(same) > 1:
        return None, "several options match"
    letter = LETTER.fullmatch(answer.strip(" \t\n.,;*\"'"))
    if letter:
        index, rest = ord(letter[1].upper()) - 65, normalise(letter[2])
        if index < len(options) and rest in ("", normalise(options[index])):
            return options[index], None
    return None, "answer not among the options"


def parse_response(text, options=None):
    """Read a reply to `policy_prompt`. Returns a Parsed.

    Accepted: the option's text, its letter, `C) CT`, `(C)`, in any case, with stray punctuation. The
    reasoning may be missing (a prediction all the same, but not `well_formed`).
    """
    opened, closed = text.count("<answer>"), "</answer>" in text.partition("<answer>")[2]
    if opened != 1 or not closed:
        return Parsed(None, "several answers" if closed else "no answer", None, False)
    form = FORM.fullmatch(text)
    form = form if form and len(TAG.findall(text)) == 4 else None
    rationale = form["rationale"].strip() if form else None
    answer = text.partition("<answer>")[2].partition("</answer>")[0].strip()
    if not normalise(answer):
        return Parsed(None, "empty answer", rationale, False)
    if options is None:
        return Parsed(answer, None, rationale, form is not None)
    prediction, reason = match_option(answer, options)
    return Parsed(prediction, reason, rationale, form is not None and prediction is not None)


def is_match(prediction, answer):
    """1[extract(a') = extract(a)] of the paper: same text once both are normalised; None matches nothing."""
    return prediction is not None and normalise(prediction) == normalise(answer)


# ---------------------------------------------------------------------------------------------------------
# What the generator is asked, by paradigm, and how its reply is parsed.


# the paper's three prompting paradigms; the last worked best there
PARADIGMS = {
    "direct": "Give the answer with a short reason.",
    "stepwise": "Describe what you see step by step, then answer.",
    "metacognitive": "Say what is uncertain, check it against the image, then commit to an answer.",
}


def generator_prompt(paradigm, task=None):
    """The text that goes with the image, when the generator is asked for a question about it."""
    return (
        f"Write one exam question about this image. Kind: {task or 'any'}.\n{PARADIGMS[paradigm]}\n"
        "Reply as <question>question</question><options>option | option | option</options>"
        "<think>reasoning</think><answer>the right option</answer>"
    )


def format_candidate(record):
    """What a perfect reply to `generator_prompt` looks like for a question record."""
    options = f"<options>{' | '.join(record['options'])}</options>" if "options" in record else ""
    return f"<question>{record['question']}</question>{options}{reference_response(record)}"


CANDIDATE = re.compile(
    r"\s*<question>(?P<question>.*?)</question>\s*(?:<options>(?P<options>.*?)</options>\s*)?"
    r"(?P<response><think>.*)",
    re.DOTALL,
)


def parse_candidate(text):
    """Read a reply to `generator_prompt`: ({question, options?, rationale, answer}, None) or (None, reason)."""
    # each part once; a regular expression alone takes hours to say no
    tags = re.sub("[</>]", "", " ".join(TAG.findall(text)))
    form = (
        CANDIDATE.fullmatch(text)
        if tags
        in (
            "question question think think answer answer",
            "question question options options think think answer answer",
        )
        else None
    )
    if not form or TAG.search(form["question"]) or TAG.search(form["options"] or ""):
        return None, "malformed"
    question = " ".join(form["question"].split())
    options = form["options"] and [" ".join(o.split()) for o in form["options"].split("|")]
    if not normalise(question):
        return None, "empty question"
    if options is not None and not (2 <= len(options) <= 26 and all(map(normalise, options))):
        return None, "too few or empty options"
    if options is not None and len({normalise(o) for o in options}) < len(options):
        return None, "repeated options"
    parsed = parse_response(form["response"], options)
    if not parsed.well_formed:
        return None, "malformed" if parsed.reason in (None, "no answer", "several answers") else parsed.reason
    prompts = [normalise(generator_prompt(paradigm)) for paradigm in PARADIGMS]
    if any(normalise(question) in prompt for prompt in prompts) or normalise(parsed.rationale) == "reasoning":
        return None, "prompt echo"
    candidate = {"question": question, "rationale": parsed.rationale, "answer": parsed.prediction}
    return candidate | ({"options": options} if options is not None else {}), None
