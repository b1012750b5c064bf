"""Prompts and the parsers of their replies.

A prompt asks for a form, and its parser reads that form. The two make one contract, so they are side by side
here. A test holds that each parser accepts what its prompt asks for.
"""

import re
import unicodedata
from typing import NamedTuple

# The eight modalities and five question types of OmniMedVQA.
MODALITIES = ("CT", "MRI", "X-Ray", "Ultrasound", "Dermoscopy", "Fundus Photography", "Microscopy", "OCT")
TASKS = (
    "Modality Recognition",
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Other Biological Attributes",
)

# The texts of a record and the parts of a reply must not contain these.
TAG = re.compile(r"</?(?:question|options|think|answer)>")

# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)

# Options have letters, so there are no more of them than letters.
MAX_OPTIONS = 26


# ---------------------------------------------------------------------------------------------------------
# What the policy is asked, and how its reply is parsed.


def policy_prompt(record):
    """The text that goes with the image when the policy is asked `record["question"]`."""
    lines = [record["question"]]
    if "options" in record:
        lines.append("Options: " + " ".join(f"{chr(65 + i)}) {o}" for i, o in enumerate(record["options"])))
    lines.append("Reason first, then give " + ("one option." if "options" in record else "a short answer."))
    lines.append("Reply as <think>reasoning</think><answer>answer</answer>")
    return "\n".join(lines)


def report_prompt():
    """The text that goes with the image when a report is asked for."""
    return "Describe this image."


def prompt_of(record):
    """The prompt to which the record has a reference response."""
    return report_prompt() if "report" in record else policy_prompt(record)


def format_response(rationale, answer):
    """A perfect reply to `policy_prompt`: the bare answer if `rationale` is empty or None.

    An empty <think></think> would teach the policy that its reasoning may be empty.
    """
    reasoning = f"<think>{rationale}</think>" if rationale else ""
    return f"{reasoning}<answer>{answer}</answer>"


def reference_response(record):
    """The reference response to a question or report record: SFT trains on it, the reward model scores it."""
    if "report" in record:
        return record["report"]
    return format_response(record.get("rationale"), record["answer"])


class ParsedResponse(NamedTuple):
    """What was parsed from a response."""

    # The text of an option, or free text if there are no options. None if there is no answer, for `reason`.
    prediction: str | None
    reason: str | None
    rationale: str | None
    # There is a prediction, in exactly the form that the prompt asks for; the <think> part may be missing.
    well_formed: bool


RESPONSE = re.compile(
    r"\s*(?:<think>(?P<rationale>.*?)</think>\s*)?<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL
)
# Invisible characters.
INVISIBLE = "\u200b\u200e\u200f\u2060\ufeff"
# What may be around an answer: brackets, quotes, Markdown, stops.
OUTER = " .,:;!?\"'`*()[]{}“”‘’«»「」『』【】《》〈〉、。" + INVISIBLE
# The same and more, as a character class.
MARK = r"[\s\\()\[\]{}<>\"'“”‘’«»「」『』【】《》〈〉*_`$.,:;!、。]"
# A letter alone; or with the option's text after it, and between them a mark, a dash, a line break, or a
# change of script. A space alone is too little, as in the blood group "B negative".
LETTERED = re.compile(
    rf"{MARK}*(?P<letter>[A-Za-z])"
    rf"(?:{MARK}*|(?:[^\S\n]*(?:[^\w\s+&/]|\n)\s*|\s*(?=[\u2e80-\uffef]))(?P<text>\S.*))",
    re.DOTALL,
)
# "Normal (B)".
TRAILING = re.compile(rf"(?P<text>.+?)\s*[(\[{{【]\s*(?P<letter>[A-Za-z])\s*[)\]}}】]{MARK}*", re.DOTALL)
# The words that announce an answer: before a noun, the nouns, after a noun. No negation is among them.
BEFORE = (
    "the my so therefore thus hence correct right best final die der richtige korrekte la le bonne "
    "правильный верный doğru सही"
)
NOUNS = (
    "answer option choice letter antwort lösung réponse choix respuesta opción resposta opção alternativa "
    "risposta opzione ответ вариант cevap yanıt seçenek الإجابة الجواب उत्तर विकल्प"
)
AFTER = (
    "is would be the ist lautet die est la le correcte correcta es correta é corretta giusta è это "
    "الصحيحة هي هو"
)
# The same in scripts that write words together.
BEFORE_TOGETHER = "因此 所以 正确 正確 最终 最終 最佳"
NOUNS_TOGETHER = "答案 选项 選項 选择 選擇 应选 选 選 正解 正答 答え 回答 解答 選択肢 정답 선택지 답"
AFTER_TOGETHER = "应为 是 为 為 は 은 는"


def any_word(words, together):
    """A pattern of one of these words: the first ones end where a word ends."""
    apart, together = "|".join(words.split()), "|".join(together.split())
    return rf"(?:(?:{apart})(?![^\W\d_])|{together})"


# A stop before a digit belongs to the number.
GAP = rf"(?:(?:{MARK}|[=-])(?!\d))*"
NOUN = any_word(NOUNS, NOUNS_TOGETHER)
LEAD = re.compile(rf"{MARK}*(?:{any_word(BEFORE, BEFORE_TOGETHER)}{GAP})*{NOUN}{GAP}", re.IGNORECASE)
MORE_LEAD = re.compile(rf"(?:{any_word(AFTER, AFTER_TOGETHER)}|{NOUN}){GAP}", re.IGNORECASE)
# "B is correct".
TAIL = re.compile(
    r"(?:\s+is(?: the)?(?: correct| right| best)?(?: answer| option| choice| one)?"
    rf"|\s*(?:が正解)?(?:です|である)|\s*(?:번|입니다|이다)+|项|項|(?:是|为)?正确的?(?:答案)?){MARK}*\Z",
    re.IGNORECASE,
)
# An answer with more characters around an option says more than the option, and the patterns would be slow.
MOST_AROUND = 200
# LaTeX around a text, as in \\boxed{\\text{B}}.
LATEX = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


# Outer punctuation before a text, but not the point or comma of `.5`.
LEADING = re.compile(rf"\A(?:(?![.,]\d)[{re.escape(OUTER)}])+")
# NFKC would make 10⁵ and 105 the same, 1½ and 11/2, log₂8 and log28. These places get a ^ or a space first.
POWER = re.compile(r"(?<=\d)(?=[⁺⁻]?[²³¹⁰-⁹ⁿ])")
APART = re.compile(r"(?<=\d)(?=[₀-₉¼-¾⅐-↉①-⒛])|(?<=[²³¹⁰-⁹ⁿ₀-₉¼-¾⅐-↉①-⒛])(?=\d)")


def normalise(text):
    """The text without differences that do not matter in an answer: case, width, spacing, outer punctuation.

    Numbers stay what they are.
    """
    text = APART.sub(" ", POWER.sub("^", str(text)))
    text = unicodedata.normalize("NFKC", text).casefold().replace("⁄", "/")
    return LEADING.sub("", " ".join(text.split())).rstrip(OUTER)


def match_option(answer, options):
    """(the option that `answer` names by its text, its letter or both, None), or (None, the reason).

    Words that announce the answer ("The answer is B.") are left out, in several languages. It never guesses:
    a letter with the text of another option names none, nor does a text with two options or with other
    words.
    """
    same = {option for option in options if normalise(option) == normalise(answer)}
    if len(same) > 1:
        return None, "several options match"
    is_short = len(answer) <= max(map(len, options), default=0) + MOST_AROUND
    readings = [read_option(text, options) for text in announced_texts(answer)] if is_short else []
    found = next((option for option in [*same, *readings] if option is not None), None)
    return found, None if found is not None else "answer not among the options"


def announced_texts(answer):
    """The answer, and what is left of it without the words before and after it that announce it."""
    text = unicodedata.normalize("NFKC", answer)
    text = re.sub(f"[{INVISIBLE}]", "", text)
    while (plain := LATEX.sub(r"\1", text)) != text:
        text = plain
    lead = LEAD
    while True:
        yield text
        if tail := TAIL.search(text):
            yield text[: tail.start()]
        announced = lead.match(text)
        # "The answer is a" may be cut off.
        if not announced or text[announced.end() :].strip() == "a":
            return
        text, lead = text[announced.end() :], MORE_LEAD


def read_option(text, options):
    """The option whose text, letter, or letter and text this is; None if it is none."""
    for option in options:
        if normalise(option) == normalise(text):
            return option
    for form in (LETTERED.fullmatch(text), TRAILING.fullmatch(text)):
        index = ord(form["letter"].upper()) - 65 if form else len(options)
        if index < len(options) and normalise(form["text"] or "") in ("", normalise(options[index])):
            return options[index]
    return None


def parse_response(text, options=None):
    """Parse a reply to `policy_prompt`. Returns a ParsedResponse.

    The answer may be the option's text, its letter, `C) CT` or `(C)`, in any case, with stray punctuation. A
    bare answer is well formed; its rationale is None. An answer with other text around it, or in another
    order, is still a prediction, but the response is not `well_formed`.
    """
    behind_tag = text.partition("<answer>")[2]
    is_closed = "</answer>" in behind_tag
    if text.count("<answer>") != 1 or not is_closed:
        return ParsedResponse(None, "several answers" if is_closed else "no answer", None, False)
    form = RESPONSE.fullmatch(text)
    # More tags than two per part of the form: a part holds another part.
    has_reasoning = form is not None and form["rationale"] is not None
    is_formed = form is not None and len(TAG.findall(text)) == (4 if has_reasoning else 2)
    rationale = form["rationale"].strip() if is_formed and has_reasoning else None
    answer = behind_tag.partition("</answer>")[0].strip()
    if not normalise(answer):
        return ParsedResponse(None, "empty answer", rationale, False)
    if options is None:
        return ParsedResponse(answer, None, rationale, is_formed)
    prediction, reason = match_option(answer, options)
    return ParsedResponse(prediction, reason, rationale, is_formed and prediction is not None)


def is_match(prediction, answer):
    """1[extract(a') = extract(a)] of the paper: the same text once normalised. None matches nothing."""
    return prediction is not None and normalise(prediction) == normalise(answer)


# ---------------------------------------------------------------------------------------------------------
# What the generator is asked, by paradigm, and how its reply is parsed.


# The paper's three prompting paradigms; the last worked best there.
PARADIGMS = {
    "direct": "Give the answer with a short reason.",
    "stepwise": "Describe what you see step by step, then answer.",
    "metacognitive": "Say what is uncertain, check it against the image, then commit to an answer.",
}


def generator_prompt(paradigm, task=None):
    """The text that goes with the image when the generator is asked for a question about it."""
    return (
        f"Write one exam question about this image. Kind: {task or 'any'}.\n{PARADIGMS[paradigm]}\n"
        "Reply as <question>question</question><options>option | option | option</options>"
        "<think>reasoning</think><answer>the right option</answer>"
    )


def format_candidate(record):
    """A perfect reply to `generator_prompt`, made of a question record. It always has a <think> part."""
    options = f"<options>{' | '.join(record['options'])}</options>" if "options" in record else ""
    response = f"<think>{record.get('rationale') or ''}</think><answer>{record['answer']}</answer>"
    return f"<question>{record['question']}</question>{options}{response}"


CANDIDATE = re.compile(
    r"\s*<question>(?P<question>.*?)</question>\s*(?:<options>(?P<options>.*?)</options>\s*)?"
    r"(?P<response><think>.*)",
    re.DOTALL,
)
# The names of the tags of a candidate, opening and closing, without and with options.
CANDIDATE_TAGS = (
    "question question think think answer answer",
    "question question options options think think answer answer",
)


def parse_candidate(text):
    """Parse a reply to `generator_prompt`, which must have a <think> part.

    Returns ({question, rationale, answer, options if there are any}, None), or (None, the reason). An option
    that is repeated, but for case and punctuation, is listed once.
    """
    form = match_candidate(text)
    if not form:
        return None, "malformed"
    question = " ".join(form["question"].split())
    if not normalise(question):
        return None, "empty question"
    options = distinct = None
    if form["options"] is not None:
        written = [" ".join(option.split()) for option in form["options"].split("|")]
        first = {normalise(option): option for option in reversed(written)}
        # With repetitions, because a letter counts the options as they were written.
        options = [first[normalise(option)] for option in written]
        distinct = list(dict.fromkeys(options))
        if not 2 <= len(distinct) <= MAX_OPTIONS or "" in first:
            return None, "too few or empty options"
    parsed = parse_response(form["response"], options)
    if not parsed.well_formed:
        return None, "malformed" if parsed.reason in (None, "no answer", "several answers") else parsed.reason
    if is_prompt_echo(question, parsed.rationale):
        return None, "prompt echo"
    candidate = {"question": question, "rationale": parsed.rationale, "answer": parsed.prediction}
    return candidate if distinct is None else candidate | {"options": distinct}, None


def match_candidate(text):
    """The match of CANDIDATE with a whole reply, or None."""
    # The tags are checked first: the regular expression by itself can take hours to find no match.
    tags = re.sub("[</>]", "", " ".join(TAG.findall(text)))
    form = CANDIDATE.fullmatch(text) if tags in CANDIDATE_TAGS else None
    if form and not TAG.search(form["question"]) and not TAG.search(form["options"] or ""):
        return form


def is_prompt_echo(question, rationale):
    """Does the reply only repeat words of the prompt?"""
    prompts = [normalise(generator_prompt(paradigm)) for paradigm in PARADIGMS]
    return any(normalise(question) in prompt for prompt in prompts) or normalise(rationale) == "reasoning"
