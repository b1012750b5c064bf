"""The scorers used in this field, applied to one file; third-party files of predictions.

The accuracy of one model on one file differs by many points from scorer to scorer, so a figure means nothing
without its scorer and its denominator. A scorer of closed questions takes the text of an answer and the
options, and returns the option that it finds there, or None. A scorer of open questions takes two texts and
returns a number in [0, 1].
"""

import difflib
import os
import re
import string
import unicodedata
from collections import Counter

from medgr2 import cli, formats, measures, tables
from medgr2.errors import RecordError, require
from medgr2.images import find_file
from medgr2.prompts import UNSPACED, is_match, match_option, normalise, parse_response

# ---------------------------------------------------------------------------------------------------------
# Closed questions: (text, options) → one of the options, or None.

# VLMEvalKit accepts a letter among this many last words of an answer.
LAST_WORDS = 4


def strict(text, options):
    """The option with this text, up to case, spacing and outer punctuation. Ours, without letters."""
    return next((o for o in options if normalise(o) == normalise(text)), None)


def letter_or_text(text, options):
    """The option named by its text, its letter or both, if they agree. Ours: this is `accuracy`."""
    return match_option(text, options)[0]


def most_similar(text, options):
    """The option most similar to the text by difflib's ratio, the first of equals; None if all have ratio 0.

    OmniMedVQA's question-answering score (Hu et al., CVPR 2024; OpenGVLab/Multi-Modality-Arena, MedicalEval).
    It accepts any answer, and case matters: of MRI, CT and Ultrasound, `ct` is most similar to Ultrasound.
    """
    ratios = [difflib.SequenceMatcher(None, o, text).ratio() for o in options]
    return options[ratios.index(max(ratios))] if max(ratios) > 0 else None


def med_r1(text, options):
    """The option whose letter or text is the text, if that is one word. Case matters.

    Med-R1 (Lai et al. 2025; Yuxiang-Lai117/Med-R1), which asks for letters and matches only `<answer> word
    </answer>`.
    """
    word = re.fullmatch(r"\s*(\w+)\s*", text)
    names = dict(zip(formats.LETTERS, options)) | {o: o for o in options}
    return names.get(word[1]) if word else None


def strip_punctuation(text):
    """Lower case without ASCII punctuation, as the authors of MedGR2 normalise."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()


def medgr_square(text, options):
    """The option with the same text, up to case and punctuation.

    The scorer of the paper's authors (HelmarZhi/MedGR-Square). An answer outside the options may leave the
    denominator: see `count_left_out`.
    """
    return next((o for o in options if strip_punctuation(o) == strip_punctuation(text)), None)


def unique_mention(text, options):
    """The one option mentioned: by its capital letter among the last four words, else by its text anywhere.

    VLMEvalKit's `can_infer` (Duan et al. 2024; open-compass/VLMEvalKit), without the language model that it
    falls back on. An option inside another one, as `CT` in `CT scan`, makes two mentions. A text over twice
    as long as all options together is not searched.
    """
    tokens = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter, _ in zip(formats.LETTERS, options) if letter in tokens]
    if len(letters) == 1 and tokens.index(letters[0]) >= len(tokens) - LAST_WORDS:
        return options[formats.LETTERS.index(letters[0])]
    mentioned = [o for o in options if o.lower() in text.lower()]
    is_short = len(text) <= 2 * sum(map(len, options))
    return mentioned[0] if len(mentioned) == 1 and is_short else None


CLOSED = {
    "strict": strict,
    "letter or text": letter_or_text,
    "most similar": most_similar,
    "Med-R1": med_r1,
    "MedGR-Square": medgr_square,
    "unique mention": unique_mention,
}


def count_left_out(unread, questions, share=0.0):
    """How many of `unread` answers outside the options the authors' scorer leaves out of its denominator.

    It leaves them out until `share` of all questions is reached, which it checks only after each. So with the
    published share of 0 the first one is left out and all others count as wrong: 6,865 of 7,850 are 87.45%.
    """
    return min(unread, max(1, int(share * questions)))


# ---------------------------------------------------------------------------------------------------------
# Open questions: (text, answer) → [0, 1].


# The point or comma of a number: 2.5 and 5.2 have no word in common.
POINT = re.compile(r"(?<![^\W\d_])[.,](?=\d)")


def count_words(text):
    """{word: occurrences} of the normalised text; in a script without spaces each character is a word."""
    letters, text = [], normalise(text)
    for i, character in enumerate(text):
        if re.match(f"[{UNSPACED}]", character):
            letters.append(f" {character} ")
        else:
            # Letters, the marks that belong to them, and digits: \\w would split Hindi at its vowels.
            is_word = unicodedata.category(character)[0] in "LMN" or POINT.match(text, i)
            letters.append(character if is_word else " ")
    return Counter("".join(letters).split())


def exact_match(text, answer):
    """1 if the texts are the same up to case, spacing and outer punctuation."""
    return float(is_match(text, answer))


def token_recall(text, answer):
    """Share of the answer's words that the text has: LLaVA-Med's figure for open questions (Li et al. 2023).

    It can only grow with the length of the text: read it beside F1.
    """
    shared = count_words(text) & count_words(answer)
    return shared.total() / max(1, count_words(answer).total())


def token_f1(text, answer):
    """Harmonic mean of the recall and the precision of words (SQuAD, Rajpurkar et al. 2016)."""
    shared = count_words(text) & count_words(answer)
    return 2 * shared.total() / max(1, count_words(text).total() + count_words(answer).total())


OPEN = {"exact match": exact_match, "token F1": token_f1, "token recall": token_recall}


# ---------------------------------------------------------------------------------------------------------
# Rows of predictions.jsonl, scored by every scorer.


def answer_text(row):
    """The text that is scored: what is in the one <answer>, else the response, else the prediction."""
    response = row.get("response") or ""
    answer, closed, _ = response.partition("<answer>")[2].partition("</answer>")
    if closed and response.count("<answer>") == 1:
        return answer.strip()
    return response or row["prediction"] or ""


def apply_scorers(row):
    """{scorer: the option that it finds, or None} for a closed question, None for an open one.

    *letter or text* is the row's `prediction`: it was parsed when the row was made.
    """
    if "options" not in row:
        return None
    found = {name: scorer(answer_text(row), row["options"]) for name, scorer in CLOSED.items()}
    return found | {"letter or text": row["prediction"]}


def summarize_scores(rows, found):
    """{"closed": {"questions", scorer: figures}, "open": {"questions", scorer: mean}}.

    Each is there if there are such rows. `found`: what `apply_scorers` returned for each row.
    """
    closed = [(row["answer"], options) for row, options in zip(rows, found) if options is not None]
    free = [row for row, options in zip(rows, found) if options is None]
    result = {}
    if closed:
        result["closed"] = {"questions": len(closed)}
        for name in CLOSED:
            result["closed"][name] = summarize_closed(name, [(a, options[name]) for a, options in closed])
    if free:
        result["open"] = {"questions": len(free)}
        for name, scorer in OPEN.items():
            result["open"][name] = sum(scorer(answer_text(row), row["answer"]) for row in free) / len(free)
    return result


def summarize_closed(name, pairs):
    """The figures of one scorer; `pairs`: [(right answer, option found or None)].

    accuracy    share of right answers among all questions; `right` is their number
    unread      answers in which the scorer finds no option: wrong in `accuracy`
    of_read     accuracy without the unread ones
    published   accuracy over the scorer's own denominator, which differs only for MedGR-Square
    left_out    unread answers that this denominator leaves out
    """
    n = len(pairs)
    right = sum(is_match(option, answer) for answer, option in pairs)
    unread = sum(option is None for _, option in pairs)
    left_out = count_left_out(unread, n) if name == "MedGR-Square" else 0
    return {
        "accuracy": right / n,
        "right": right,
        "unread": unread,
        "of_read": right / (n - unread) if n > unread else None,
        "published": right / (n - left_out) if n > left_out else None,
        "left_out": left_out,
    }


def score_by_group(rows):
    """`summarize_scores` of all rows, and of each group of them (measures.by_group)."""
    found = [apply_scorers(row) for row in rows]
    return measures.by_group(rows, lambda i: summarize_scores([rows[j] for j in i], [found[j] for j in i]))


def format_scores(result, markdown=False):
    """What `score_by_group` returned as text: every scorer in all, and by modality and data set."""
    tables = []
    if "closed" in result:
        names = list(CLOSED)
        lines = [[name, *result["closed"][name].values()] for name in names]
        headers = [f"{result['closed']['questions']} closed questions", *result["closed"][names[0]]]
        tables.append((lines, headers))
        for field in [field for field in ("modality", "dataset") if field in result]:
            groups = {name: g["closed"] for name, g in result[field].items() if "closed" in g}
            lines = []
            for group, closed in groups.items():
                lines.append([group, closed["questions"], *(closed[name]["accuracy"] for name in names)])
            tables.append((lines, [field, "questions", *names]))
    if "open" in result:
        tables.append(([list(result["open"].values())], ["open questions", *OPEN]))
    return "\n\n".join(cli.format_table(lines, headers, markdown) for lines, headers in tables)


# ---------------------------------------------------------------------------------------------------------
# Third-party files of predictions.

CHOICES = re.compile(
    r"(.*)Please choose one of the following:\s*(.*)\.\s*You must pick only one answer\.?\s*", re.DOTALL
)
# What separates the options in OmniMedVQA's questions, and how many there are at most.
SEPARATOR, MOST_OPTIONS = " or ", 4

# The data sets of OmniMedVQA that have one modality.
DATASET_MODALITIES = {
    "ALL Challenge": "Microscopy",
    "Chest CT Scan": "CT",
    "CoronaHack": "X-Ray",
    "COVIDx CXR-4": "X-Ray",
    "Covid-19 tianchi": "CT",
    "DeepDRiD": "Fundus Photography",
    "ISBI2016": "Dermoscopy",
    "Knee Osteoarthritis": "X-Ray",
    "MHSMA": "Microscopy",
    "Retinal OCT-C8": "OCT",
    "Yangxi": "Fundus Photography",
}


def split_choices(question, *known):
    """OmniMedVQA's question with its options in one text → (question, options or None, sure).

    An option may itself hold the separator: pieces that together are one of the texts in `known` (the answer,
    the prediction) are joined again. `sure` is False if more than four pieces are left. An option that is
    repeated, as in some rows, is kept once.
    """
    form = CHOICES.fullmatch(question)
    if not form:
        return question, None, True
    pieces = form[2].split(SEPARATOR)
    for text in known:
        if SEPARATOR in text:
            pieces = join_pieces(pieces, text)
    return form[1].strip(), list(dict.fromkeys(pieces)), len(pieces) <= MOST_OPTIONS


def join_pieces(pieces, text):
    """The pieces of a text split at SEPARATOR, with those that together are `text` as one."""
    pieces, n = list(pieces), len(text.split(SEPARATOR))
    for i in range(len(pieces) - n + 1):
        joined = SEPARATOR.join(pieces[i : i + n])
        if normalise(joined) == normalise(text):
            pieces[i : i + n] = [joined]
    return pieces


def find_options(row, question, *known):
    """(question, options or None, sure) of a third-party row.

    The options are in `options` (a list, or {letter: text}), in `option_A`, `option_B`, ..., or in the
    question.
    """
    options = list_options(row)
    return (question, options, True) if options else split_choices(question, *known)


# Our fields under the names of the files of MedGR-Square, OmniMedVQA, LLaVA and LLaVA-Med, lmms-eval and
# VLMEvalKit. The first that a row has is taken; `*` stands for the letters of the options.
NAMES = {
    "id": ("id", "question_id", "doc_id", "index", "qid"),
    "prediction": ("prediction", "answer_pred", "model_answer", "filtered_resps", "resps", "text"),
    "answer": ("target", "answer_gt", "gt_answer", "answer"),
    "options": ("options", "choices", "option_*", "*"),
    "image": ("image", "image_path"),
}


def find_field(row, ours, fields):
    """What a third-party row has for one of our fields, or None. Of a list of one, its item."""
    value = formats.find_column(row, fields.get(ours, NAMES.get(ours, ours)))
    if ours == "options":
        return formats.parse_literal(value)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def list_options(row):
    """The options in fields of a row of rename_fields, in the order of their letters; [] if it has none.

    Raises RecordError(reason) for options of another form, and for one that is missing between others: the
    letters after it would not be those of the answers.
    """
    given = row.get("options") or []
    if isinstance(given, dict):
        letters = [letter for letter in formats.LETTERS if {letter, letter.lower()} & given.keys()]
        is_lettered = len(letters) == len(given)
        by_letter = {str(name).upper(): text for name, text in given.items()}
        # A map may be in any order.
        given = [by_letter.get(letter) for letter in formats.LETTERS] if is_lettered else [*given.values()]
    require(isinstance(given, list), "`options` is neither a list nor {letter: text}: give one of these")
    texts = [formats.clean(text) for text in given]
    while texts and not texts[-1]:
        texts.pop()
    missing = [letter for letter, text in zip(formats.LETTERS, texts) if not text]
    require(not missing, f"option {''.join(missing[:1])} is empty, but not those after it: fill it")
    return texts


def only_text(row, field):
    """A third-party field as one line of text; a list of one text is that text.

    Raises RecordError(reason) for a list of several.
    """
    value = row.get(field)
    if isinstance(value, list):
        require(len(value) < 2, f"`{field}` holds {len(value)} texts: give one")
        value = value[0] if value else None
    return formats.clean(value)


def rename_fields(row, fields):
    """The row with our names for its fields. Raises RecordError(reason) if it lacks one of them."""
    for ours, theirs in fields.items():
        require(theirs in row, f"no field `{theirs}`: correct --fields")
    found = {ours: find_field(row, ours, fields) for ours in NAMES | fields}
    for field, more in (("prediction", ""), ("answer", ", or give --answers FILE")):
        advice = f"say which one it is, --fields {field}=THEIRS{more}"
        is_there = found[field] is not None or field in row
        require(is_there, f"no field `{field}` among {', '.join(row)}: {advice}")
    return row | {ours: value for ours, value in found.items() if value is not None}


def find_groups(row, name):
    """What is known of the fields by which results are grouped, of a third-party row with the id `name`."""
    # OmniMedVQA's ids are DATASET_NUMBER.
    numbered = re.fullmatch(r"(.+)_\d+", name)
    dataset = formats.clean(row.get("dataset")) or (numbered[1] if numbered else "")
    modality = formats.clean(row.get("modality") or row.get("modality_type"))
    groups = {
        "modality": formats.canonical_name(modality) or DATASET_MODALITIES.get(dataset),
        "task": formats.clean(row.get("task") or row.get("question_type")),
        "dataset": dataset,
        "source": row.get("source"),
    }
    return {field: value for field, value in groups.items() if value}


def parse_answer(text, options):
    """(prediction, reason) of a third-party text, by *letter or text*; one with tags is parsed."""
    if "<answer>" in text:
        parsed = parse_response(text, options)
        return parsed.prediction, parsed.reason
    return match_option(text, options) if options else (text or None, None)


def convert_row(row, number, fields):
    """A third-party row as a row of predictions.jsonl: (row, whether its options are sure).

    `fields`: {ours: theirs}. `response` is their text unchanged; `prediction` is what *letter or text* finds
    in it. Raises RecordError(reason).
    """
    row = rename_fields(row, fields)
    answer, text = only_text(row, "answer"), only_text(row, "response") or only_text(row, "prediction")
    require(answer, "the right answer is empty: fill `answer`, or leave the row out")
    question, options, sure = find_options(row, only_text(row, "question"), answer, text)
    if options:
        # Of two equal options, the first.
        right = strict(answer, options) or letter_or_text(answer, options)
        problem = f"the right answer `{answer}` is not one of the options ({', '.join(options)[:200]})"
        require(right, f"{problem}: correct `answer` or `options`")
        answer = right
    name, image = formats.clean(row.get("id")) or f"row{number}", formats.clean(row.get("image"))
    prediction, reason = parse_answer(text, options)
    converted = {"id": name, "question": question, "answer": answer, "response": text}
    converted["reason"] = reason if prediction is None else None
    if options:
        converted["options"] = options
    converted |= find_groups(row, name)
    if image:
        converted["image"] = image
    image_hash = formats.clean(row.get("image_hash")) or image or name
    scored = {"prediction": prediction, "correct": is_match(prediction, answer), "image_hash": image_hash}
    return converted | scored, sure


def read_predictions(path, fields, answers=None, stop=True):
    """(rows, number of rows whose options may be cut at ` or `, lines for the user) of a third-party file.

    `answers`: the file with the right answers, if they are not in `path` itself. `image` is an absolute path,
    as in all records in memory. The first row that cannot be scored is a RecordError with its number; if not
    `stop` it is left out, and a line says so.
    """
    rows, unsure, lines, id_counts = [], 0, [], Counter()
    theirs = read_objects(path)
    if answers:
        theirs, how = join_answers(theirs, read_objects(answers), fields, f"{path}, {answers}")
        fields = {}
        lines.append(f"right answers of {answers}, joined by {how}")
    for number, row in enumerate(theirs, 1):
        try:
            converted, sure = convert_row(row, number, fields)
        except RecordError as error:
            problem = f"{path}: row {number}: {error}"
            require(not stop, problem)
            lines.append(f"left out: {problem}")
            continue
        if "image" in converted:
            converted["image"] = find_file(converted["image"], os.path.dirname(path))
        rows.append(converted | {"id": formats.unique_id(converted["id"], id_counts)})
        unsure += not sure
    require(rows, f"{path}: no rows that can be scored: give a file of predictions")
    if unsure:
        lines.append(f"{unsure} rows: options that hold ` or ` may have been cut there")
    return rows, unsure, lines


def read_objects(path):
    """The rows of a file. What lmms-eval keeps of the question in `doc` is taken out of it."""
    rows = []
    for number, row in enumerate(tables.read_rows(path), 1):
        require(isinstance(row, dict), f"{path}: row {number}: not an object: give one JSON object per row")
        inner = row.get("doc")
        rows.append(tables.without_missing(inner) | row if isinstance(inner, dict) else row)
    return rows


def join_answers(rows, answers, fields, where):
    """(rows with our names of fields: a prediction and all of its right answer; how they were joined).

    Both files must have as many rows. They are joined by `id` if the ids are the same, else by `order`.
    Raises RecordError, also if a prediction's question is not that of its answer.
    """
    counts = f"{len(rows)} predictions and {len(answers)} right answers"
    require(len(rows) == len(answers), f"{where}: {counts}: give files of the same questions")
    ids, known = ([formats.clean(find_field(r, "id", fields)) for r in file] for file in (rows, answers))
    by_id = dict(zip(known, answers))
    is_named = all(known) and set(ids) == set(by_id) and len(by_id) == len(answers)
    how = "id" if is_named else "order"
    joined = []
    for number, (row, name, answer) in enumerate(zip(rows, ids, answers), 1):
        try:
            joined.append(join_answer(row, by_id[name] if how == "id" else answer, fields))
        except RecordError as error:
            raise RecordError(f"{where}: row {number}, joined by {how}: {error}") from None
    return joined, how


def join_answer(row, answer, fields):
    """The right answer's row with our names of fields and the prediction of `row`."""
    for theirs in fields.values():
        require(theirs in row or theirs in answer, f"no field `{theirs}`: correct --fields")
    asked, meant = (normalise(find_field(r, "question", fields) or "") for r in (row, answer))
    # A harness may add its instruction to the question.
    is_same = not asked or not meant or meant in asked or asked in meant
    require(is_same, f"the questions `{asked[:60]}` and `{meant[:60]}` differ: give files in the same order")
    said = find_field(row, "prediction", fields)
    require(said is not None, f"no field `prediction` among {', '.join(row)}: say which, --fields")
    # The other names of these may be in the row and mean something else.
    others = {"response", *NAMES["id"], *NAMES["prediction"], *NAMES["answer"]}
    kept = {field: value for field, value in answer.items() if field not in others}
    found = {ours: find_field(answer, ours, fields) for ours in NAMES | fields}
    name = find_field(row, "id", fields)
    found |= {"prediction": said} | ({} if name is None else {"id": name})
    return kept | {ours: value for ours, value in found.items() if value is not None}
