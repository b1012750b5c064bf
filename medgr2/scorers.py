"""How a text is read as an answer: every scorer in use, so that one file of predictions is marked by all of them.

In this field one model's accuracy on one file differs by many points from scorer to scorer, so a figure says nothing until
its scorer and its denominator are named. A scorer of closed questions takes the text of an answer and the options and returns
the option that it reads there, or None. A scorer of open questions takes two texts and returns a number in [0, 1].
"""

import difflib
import os
import re
import string
from collections import Counter

from medgr2 import formats
from medgr2.errors import RecordError, require
from medgr2.prompts import is_match, match_option, normalise, parse_response

# ---------------------------------------------------------------------------------------------------------
# Closed questions: (text, options) → the option that was read, or None.


def strict(text, options):
    """The option whose text this is, but for case, spacing and the punctuation around it. Ours, without letters."""
    return next((o for o in options if normalise(o) == normalise(text)), None)


def letter_or_text(text, options):
    """The option named by its text, its letter or both; a letter beside another option's text is none. Ours: `accuracy`."""
    return match_option(text, options)[0]


def most_similar(text, options):
    """The option most like the text by difflib's ratio, the first of equals; none only where nothing is alike at all.

    OmniMedVQA's question-answering score (Hu et al., CVPR 2024; OpenGVLab/Multi-Modality-Arena, MedicalEval). It never says
    that it cannot read an answer, and it minds the case: of MRI, CT and Ultrasound, `ct` is most like Ultrasound.
    """
    ratios = [difflib.SequenceMatcher(None, o, text).ratio() for o in options]
    return options[ratios.index(max(ratios))] if max(ratios) > 0 else None


def med_r1(text, options):
    """The option whose letter, or whose text of one word, is the one word in <answer>; case matters, more words are none.

    Med-R1 (Lai et al. 2025; Yuxiang-Lai117/Med-R1), which asks for letters and matches `<answer> word </answer>` alone.
    """
    word = re.fullmatch(r"\s*(\w+)\s*", text)
    names = dict(zip(formats.LETTERS, options)) | {o: o for o in options}
    return names.get(word[1]) if word else None


def bare(text):
    """Lower case without ASCII punctuation, as the authors normalise."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()


def medgr_square(text, options):
    """The option with the same text in lower case and without punctuation: the authors' (HelmarZhi/MedGR-Square).

    An answer outside the options may leave the denominator: see `left_out`.
    """
    return next((o for o in options if bare(o) == bare(text)), None)


def unique_mention(text, options):
    """The one option that is mentioned: its capital letter among the last four words, else its text anywhere within.

    VLMEvalKit's `can_infer` (Duan et al. 2024; open-compass/VLMEvalKit), without the judge that it falls back to. An option
    within another one, as `CT` in `CT scan`, makes two mentions; a text over twice as long as all options is not searched.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter, _ in zip(formats.LETTERS, options) if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return options[formats.LETTERS.index(letters[0])]
    named = [o for o in options if o.lower() in text.lower()]
    return named[0] if len(named) == 1 and len(text) <= 2 * sum(map(len, options)) else None


CLOSED = {
    "strict": strict,
    "letter or text": letter_or_text,
    "most similar": most_similar,
    "Med-R1": med_r1,
    "MedGR-Square": medgr_square,
    "unique mention": unique_mention,
}


def left_out(unread, questions, share=0.0):
    """How many answers outside the options the authors' scorer leaves out of its denominator, of `unread` ones.

    It leaves them out until `share` of all questions is reached, and looks at that only after each: with the published
    share of 0 the first one is left out and all others count as wrong. That is how 6,865 of 7,850 become their 87.45.
    """
    return min(unread, max(1, int(share * questions)))


# ---------------------------------------------------------------------------------------------------------
# Open questions: (text, answer) → [0, 1].


def words(text):
    """The words of a normalised text, each with its number of occurrences."""
    return Counter(re.findall(r"\w+", normalise(text)))


def exact(text, answer):
    """1 where the texts are the same but for case, spacing and the punctuation around them."""
    return float(is_match(text, answer))


def token_recall(text, answer):
    """Share of the answer's words that the text has: the figure of LLaVA-Med for VQA-RAD's open questions (Li et al. 2023).

    It only grows with the length of the text; read it beside F1.
    """
    return (words(text) & words(answer)).total() / max(1, words(answer).total())


def token_f1(text, answer):
    """Harmonic mean of the recall and precision of words (Rajpurkar et al. 2016, SQuAD)."""
    return 2 * (words(text) & words(answer)).total() / max(1, words(text).total() + words(answer).total())


OPEN = {"exact match": exact, "token F1": token_f1, "token recall": token_recall}


# ---------------------------------------------------------------------------------------------------------
# A file of predictions.


def said(row):
    """The text that is scored: what stands in <answer>, where it stands once; else the whole response; else the prediction."""
    text = row.get("response") or ""
    answer, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return answer.strip() if closed and text.count("<answer>") == 1 else text or row["prediction"] or ""


def readings(row):
    """{scorer: the option that it reads}, None for an open question. Ours is `prediction`, read where the row was made."""
    if "options" not in row:
        return None
    return {
        name: row["prediction"] if scorer is letter_or_text else scorer(said(row), row["options"])
        for name, scorer in CLOSED.items()
    }


def scores(rows, read):
    """{"closed": {"questions", scorer: figures}, "open": {"questions", scorer: mean}}, each where there are such questions.

    `read`: of each row its `readings`, None for an open one. Figures of a scorer: `accuracy` over all closed questions, `unread`
    answers (wrong there), accuracy `of_read` alone, and `published`, over all but the `left_out` answers: the scorer's own
    denominator, which is another one for MedGR-Square alone.
    """
    result, closed, free = (
        {},
        [(o, r["answer"]) for o, r in zip(read, rows) if o],
        [r for o, r in zip(read, rows) if not o],
    )
    n = len(closed)
    if closed:
        result["closed"] = {"questions": n}
    for name in CLOSED if closed else ():
        right = sum(is_match(o[name], answer) for o, answer in closed)
        unread = sum(o[name] is None for o, _ in closed)
        out = left_out(unread, n) if name == "MedGR-Square" else 0
        result["closed"][name] = {
            "accuracy": right / n,
            "right": right,
            "unread": unread,
            "of_read": right / (n - unread) if n > unread else None,
            "published": right / (n - out) if n > out else None,
            "left_out": out,
        }
    if free:
        result["open"] = {"questions": len(free)} | {
            name: sum(scorer(said(r), r["answer"]) for r in free) / len(free) for name, scorer in OPEN.items()
        }
    return result


# ---------------------------------------------------------------------------------------------------------
# Anybody's predictions as ours.

CHOICES = re.compile(
    r"(.*)Please choose one of the following:\s*(.*)\.\s*You must pick only one answer\.?\s*", re.DOTALL
)

DATASETS = {
    "ALL Challenge": "Microscopy",
    "Chest CT Scan": "CT",
    "CoronaHack": "X-Ray",
    "COVIDx CXR-4": "X-Ray",
    "Covid-19 tianchi": "CT",
    "DeepDRiD": "Fundus Photography",
    "ISBI2016": "Dermoscopy",
    "Knee Osteoarthritis": "X-Ray",
    "MHSMA": "Microscopy",
    # data sets of OmniMedVQA that have one modality
    "Retinal OCT-C8": "OCT",
    "Yangxi": "Fundus Photography",
}


def split_choices(question, *known):
    """OmniMedVQA's question and options in one text → (question, options, sure); options is None where there are none.

    They are separated by ` or `, which an option may itself hold: pieces that together are one of the texts in `known` (the
    answer, the prediction) are joined again. Not `sure` where more than OmniMedVQA's four are left. An option that is there
    twice, as in some of its rows, is one.
    """
    form = CHOICES.fullmatch(question)
    if not form:
        return question, None, True
    pieces = form[2].split(" or ")
    for text in [t for t in known if " or " in t]:
        n = len(text.split(" or "))
        for i in range(len(pieces) - n + 1):
            if normalise(" or ".join(pieces[i : i + n])) == normalise(text):
                pieces[i : i + n] = [" or ".join(pieces[i : i + n])]
    return form[1].strip(), list(dict.fromkeys(pieces)), len(pieces) <= 4


def options_of(row, question, *known):
    """(question, options or None, sure) of anybody's row: `options` as a list or {letter: text}, `option_A`..., or in the question."""
    options = row.get("options") or [row.get(f"option_{letter}") for letter in formats.LETTERS]
    options = [
        formats.clean(o)
        for o in (options.values() if isinstance(options, dict) else options)
        if formats.clean(o)
    ]
    return (question, options, True) if options else split_choices(question, *known)


def adopt(row, number, fields):
    """Anybody's row of predictions as a row of ours: (row, whether its options are sure). `fields`: {our name: theirs}.

    `response` is their text as it stands, `prediction` what *letter or text* reads in it. Raises RecordError (reason).
    """
    for theirs in fields.values():
        require(theirs in row, f"no field `{theirs}`: correct --fields")
    row = row | {ours: row[theirs] for ours, theirs in fields.items()}
    for field in ("prediction", "answer"):
        require(field in row, f"no field `{field}`: say which one it is, --fields {field}=THEIRS")
    answer, text = formats.clean(row["answer"]), formats.clean(row.get("response") or row["prediction"])
    question, options, sure = options_of(row, formats.clean(row.get("question")), answer, text)
    name = formats.clean(row.get("id")) or f"row{number}"
    ours = {"id": name, "question": question, "answer": answer, "response": text, "reason": None}
    if options:
        # of two equal options, the first
        right = strict(answer, options) or letter_or_text(answer, options)
        require(
            right, f"the right answer `{answer}` is not one of the options: correct `answer` or `options`"
        )
        ours |= {"options": options, "answer": right}
    tagged = parse_response(text, options) if "<answer>" in text else None
    prediction, reason = (
        tagged[:2] if tagged else match_option(text, options) if options else (text or None, None)
    )
    dataset = formats.clean(row.get("dataset")) or (
        name.rsplit("_", 1)[0] if re.fullmatch(r".+_\d+", name) else ""
    )
    modality = formats.clean(row.get("modality") or row.get("modality_type"))
    known = {
        "modality": formats.canonical_name(modality) or DATASETS.get(dataset),
        "task": formats.clean(row.get("task") or row.get("question_type")),
        "dataset": dataset,
        "source": row.get("source"),
    }
    image = formats.clean(row.get("image"))
    return ours | {k: v for k, v in known.items() if v} | ({"image": image} if image else {}) | {
        "prediction": prediction,
        "reason": reason if prediction is None else None,
        "correct": is_match(prediction, ours["answer"]),
        "image_hash": formats.clean(row.get("image_hash")) or image or name,
    }, sure


def read_predictions(path, fields):
    """(rows, how many have options that may be cut at ` or `) of anybody's JSON or JSONL file. Raises RecordError."""
    rows, unsure = [], 0
    for number, row in enumerate(formats.load_rows(path), 1):
        try:
            require(isinstance(row, dict), "not an object: give one JSON object a row")
            ours, sure = adopt(row, number, fields)
            # like every record in memory
            if "image" in ours:
                ours["image"] = os.path.abspath(os.path.join(os.path.dirname(path), ours["image"]))
        except RecordError as error:
            raise RecordError(f"{path}: row {number}: {error}") from None
        rows.append(ours)
        unsure += not sure
    require(rows, f"{path}: no rows: give a file of predictions")
    return rows, unsure
