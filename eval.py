"""Stage 5: what a policy answers to a test file, how accurate that is, and how far to trust the figures.

    accuracy = Σ_i 1[prediction_i = answer_i] / number of questions

Every question is in the denominator. An answer that cannot be parsed counts as wrong. So does a question
that is longer than the model's context: it is not asked. Answers are greedy. A second table scores the same
answers with every scorer of medgr2/scorers.py, over the same denominator and over the scorer's own.

Reads   question records (JSONL) and a model, on this machine or behind an OpenAI-compatible server
        (--endpoint); or a third-party file of predictions
Writes  OUT/predictions.jsonl, the questions about one image together: the record with `response`,
        `prediction` (None if it cannot be parsed, and then a `reason`), `correct` and `image_hash`
        OUT/metrics.json, which holds what is printed; docs/metrics.md explains every name

Intervals are 95% percentile bootstraps over images, and images are told apart by content: questions about one
image are not independent, so resampling questions would make the interval too narrow. If all answers of a
group are right, or all wrong, the interval has no width and says nothing. A group of one image has none.

Two baselines never see the image. `majority` gives the most frequent answer of the question's task (the prior
per question type of Antol et al. 2015, VQA), `position` the option at the position where most right options
are. Both know how frequent the answers of the whole test file are, which the model does not: no constant
answer does better. `majority` ignores the question's own options: a rare answer would be given away by being
offered at all. `blind` (--blind) is the model itself on a grey image of the same size.

--scores makes each option a continuation of image, question and empty reasoning. `prefix` takes the option
with the highest mean token log-probability (OmniMedVQA's prefix score). `auroc` is over the probabilities of
all options of all questions, `ece` over those of the most probable options. --samples adds `vote`, `pass@k`.

Departs from the paper: the authors leave answers outside the options out of the denominator.

    python eval.py --model runs/toy/cycle1/grpo --data runs/toy/data/test.jsonl --out runs/toy/answers
    python eval.py --endpoint http://host:8000 --endpoint-model Qwen/Qwen2.5-VL-72B-Instruct \\
        --data runs/toy/data/test.jsonl --out runs/toy/answers_72b
    python eval.py --predictions theirs.jsonl --answers test.json --fields prediction=said --out runs/theirs
"""

import functools
import itertools
from collections import Counter
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from medgr2 import cli, endpoint, measures, records, runs, scorers
from medgr2.answering import open_model, open_server
from medgr2.errors import require
from medgr2.images import blank_images, hash_image, open_images
from medgr2.prompts import is_match, normalise, parse_response, policy_prompt

# Fields that this stage adds to a record.
ADDED = ("response", "prediction", "reason", "correct", "image_hash")
# Fields that it adds with --blind, --scores and --samples.
OPTIONAL = ("blind", "option_logps", "option_tokens", "samples")
# The k of pass@k, as far as there are samples.
PASS_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# The reason of a response without a prediction that was cut.
CUT = "cut at --max-new-tokens"
# The reason of a question that is not asked.
TOO_LONG = "longer than the model's context"
# Flags that change no file.
FREE = ("markdown", *endpoint.FREE)


def parse_args():
    p = cli.Parser(description=__doc__)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder or hub name of the model to evaluate")
    endpoint.add_arguments(p, which, "the model")
    which.add_argument("--predictions", help="third-party file of predictions to score, without a model")
    p.add_argument("--answers", help="file with the right answers, if --predictions lacks them")
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a bad prediction row")
    p.add_argument("--fields", nargs="+", default=[], metavar="OURS=THEIRS", help="names of their fields")
    p.add_argument("--data", help="question records to answer, unless --predictions is given")
    p.add_argument("--batch", type=cli.number(int, 1), default=64, help="questions per batch")
    p.add_argument("--max-new-tokens", type=cli.number(int, 1), default=128, help="longest response")
    cli.add_switch(p, "--scores", "also compute the log-probability of each option")
    cli.add_switch(p, "--blind", "also ask without the image")
    p.add_argument("--samples", type=cli.number(int, 0), default=0, help="responses to draw per question")
    p.add_argument("--temperature", type=cli.number(float, 1e-3), default=1.0, help="of --samples")
    cli.add_switch(p, "--markdown", "print tables in Markdown")
    cli.add_image_arguments(p)
    cli.add_run_arguments(p)
    args = p.parse_args()
    endpoint.check_arguments(p, args)
    if bool(args.data) == bool(args.predictions):
        p.error("give --data with --model or --endpoint, and not with --predictions")
    if args.data and args.answers:
        p.error("--answers: belongs to --predictions; --data has its answers")
    if args.data and args.fields:
        p.error("--fields: belongs to --predictions; `records import --map` names the columns of other data")
    if args.predictions and (args.scores or args.blind or args.samples):
        p.error("--scores, --blind, --samples: they ask a model, and --predictions has none; leave them out")
    if args.endpoint and args.scores:
        p.error("--scores: a server does not say how probable the options are; leave it out")
    return args


# ---------------------------------------------------------------------------------------------------------
# Answers. Only this part needs a model: the rest takes the rows of predictions.jsonl.


class Batch(NamedTuple):
    """Records to answer, encoded. Those that are too long for the model are not asked."""

    records: list
    asked: list
    prompts: object = None
    # With blank images, for `blind`.
    blank: object = None
    # For `scores`: which of `asked` have options, and their prompts.
    closed: list = ()
    of_closed: object = None


def prepare_batch(model, rows, blind=False, scores=False):
    """Records → a Batch for predict_batch with the same options."""
    too_long = model.find_too_long(rows) if model.find_too_long else {}
    asked = [record for i, record in enumerate(rows) if i not in too_long]
    if not asked:
        return Batch(rows, asked)
    images, texts = open_images(record["image"] for record in asked), [policy_prompt(r) for r in asked]
    prompts = model.encode(images, texts)
    blank = model.encode(blank_images(images), texts) if blind else None
    closed = [i for i, record in enumerate(asked) if "options" in record] if scores else []
    if len(closed) == len(asked):
        return Batch(rows, asked, prompts, blank, closed, prompts)
    of_closed = model.encode([images[i] for i in closed], [texts[i] for i in closed]) if closed else None
    return Batch(rows, asked, prompts, blank, closed, of_closed)


def predict_batch(model, batch, blind=False, scores=False, samples=0, temperature=1.0, seed=0):
    """The rows of predictions.jsonl for a Batch.

    A row has the fields in ADDED; `blind`, `scores` and `samples` add those in OPTIONAL.
    """
    replies = model.respond(batch.prompts) if batch.asked else []
    rows = [with_prediction(record, *reply) for record, reply in zip(batch.asked, replies)]
    if blind and rows:
        replies = model.respond(batch.blank)
        rows = [row | {"blind": parse_prediction(row, text)} for row, (text, _) in zip(rows, replies)]
    if samples and rows:
        ids = [(row["id"], k) for row in rows for k in range(samples)]
        seeds = [runs.seed_of(seed, "sample", *own) for own in ids]
        replies = model.respond(batch.prompts, seeds, temperature, group=samples)
        drawn = [replies[i : i + samples] for i in range(0, len(replies), samples)]
        rows = [row | {"samples": parse_predictions(row, own)} for row, own in zip(rows, drawn)]
    if scores:
        # None for open questions.
        rows = [row | {"option_logps": None, "option_tokens": None} for row in rows]
    if batch.closed:
        scored = model.score(batch.of_closed, [rows[i] for i in batch.closed])
        for i, (logps, tokens) in zip(batch.closed, scored):
            rows[i] |= {"option_logps": logps, "option_tokens": tokens}
    return with_those_not_asked(batch, rows, blind, scores, samples)


def with_those_not_asked(batch, rows, blind, scores, samples):
    """The rows of a Batch in its order: `rows` of those that were asked, the others without an answer."""
    empty = {"blind": None} if blind else {}
    empty |= {"option_logps": None, "option_tokens": None} if scores else {}
    empty |= {"samples": [None] * samples} if samples else {}
    answered = {row["id"]: row for row in rows}
    not_asked = {"reason": TOO_LONG} | empty
    return [answered.get(r["id"]) or with_prediction(r, "") | not_asked for r in batch.records]


def parse_prediction(record, response):
    """The prediction in a response to the record's question; None if there is none."""
    return parse_response(response, record.get("options")).prediction


def parse_predictions(record, replies):
    return [parse_prediction(record, text) for text, _ in replies]


def with_prediction(record, response, truncated=False):
    """The record with the fields in ADDED. `truncated`: the response was cut at --max-new-tokens."""
    parsed = parse_response(response, record.get("options"))
    return record | {
        "response": response,
        "prediction": parsed.prediction,
        "reason": CUT if truncated and parsed.prediction is None else parsed.reason,
        "correct": is_correct(record, parsed.prediction),
        "image_hash": hash_image(record["image"]),
    }


def is_correct(record, prediction):
    """Is this prediction, an option or a text, the right answer? Case and outer punctuation do not count."""
    return is_match(prediction, record["answer"])


# ---------------------------------------------------------------------------------------------------------
# Baselines that never see the image: rows → one bool per row.


def majority_baseline(rows):
    """Is the answer the most frequent one of its task in `rows`? Of equally frequent ones, the first met."""
    counts = {}
    for row in rows:
        counts.setdefault(row.get("task"), Counter())[normalise(row["answer"])] += 1
    most_frequent = {task: counter.most_common(1)[0][0] for task, counter in counts.items()}
    return [normalise(row["answer"]) == most_frequent[row.get("task")] for row in rows]


def position_baseline(rows):
    """Is the right option at the most frequent position in `rows`? An open question counts as wrong."""
    positions = [row["options"].index(row["answer"]) if "options" in row else None for row in rows]
    most_frequent = measures.majority(positions)
    return [position is not None and position == most_frequent for position in positions]


# ---------------------------------------------------------------------------------------------------------
# Rows of predictions.jsonl → numbers.


def score_columns(rows):
    """{column: (n,) floats}: their means are the metrics. What a column cannot score is wrong in it."""
    columns = {
        "accuracy": [is_correct(row, row["prediction"]) for row in rows],
        "majority": majority_baseline(rows),
        "position": position_baseline(rows),
    }
    if all("blind" in row for row in rows):
        columns["blind"] = [is_correct(row, row["blind"]) for row in rows]
    columns["unparsed"] = [row["prediction"] is None for row in rows]
    if all("option_logps" in row for row in rows):
        columns["prefix"] = [is_prefix_correct(row) for row in rows]
    if all("samples" in row for row in rows):
        columns["vote"] = [is_correct(row, measures.majority(row["samples"])) for row in rows]
        counts = [(count_correct_samples(row), len(row["samples"])) for row in rows]
        most = min(samples for _, samples in counts)
        for k in [*(k for k in PASS_AT if k < most), most]:
            columns[f"pass@{k}"] = [measures.pass_at(k, correct, samples) for correct, samples in counts]
    return {name: np.array(values, float) for name, values in columns.items()}


def is_prefix_correct(row):
    """Does the right option have the highest mean token log-probability? An open question counts as wrong."""
    if not row["option_logps"]:
        return False
    means = np.divide(row["option_logps"], row["option_tokens"])
    return row["options"][means.argmax()] == row["answer"]


def count_correct_samples(row):
    return sum(is_correct(row, prediction) for prediction in row["samples"])


def calibrate(rows):
    """{"auroc", "ece", "bins"} of the probabilities of the options in `rows`; {} if they have none."""
    probabilities, right = [], []
    for row in rows:
        if row.get("option_logps"):
            probabilities.append(measures.probabilities(row["option_logps"]))  # (options,)
            right.append(np.array([option == row["answer"] for option in row["options"]]))  # (options,)
    if not probabilities:
        return {}
    confidence = np.array([p.max() for p in probabilities])
    top_is_right = np.array([r[p.argmax()] for p, r in zip(probabilities, right)])
    ece, bins = measures.calibration(confidence, top_is_right)
    auroc = measures.auroc(np.concatenate(probabilities), np.concatenate(right))
    return {"auroc": auroc, "ece": ece, "bins": bins}


def compute_metrics(rows, seed):
    """Accuracy with its interval, the baselines and the other columns, for all questions and by group."""
    columns = score_columns(rows)
    images = np.array([row["image_hash"] for row in rows])
    answers = np.array([normalise(row["answer"]) for row in rows])
    predictions = [row["prediction"] and normalise(row["prediction"]) for row in rows]

    def measure(index):
        low, high = measures.interval(columns["accuracy"][index], images[index], seed)
        means = {name: float(values[index].mean()) for name, values in columns.items()}
        return {
            "questions": len(index),
            "images": len(set(images[index])),
            "accuracy": means.pop("accuracy"),
            "low": low,
            "high": high,
            "balanced": measures.balanced_accuracy(answers[index], columns["accuracy"][index]),
            "f1": measures.macro_f1(answers[index], [predictions[i] for i in index]),
            **means,
            **calibrate([rows[i] for i in index]),
        }

    return measures.by_group(rows, measure)


# ---------------------------------------------------------------------------------------------------------
# Files and the command.


def read_questions(path, root=None):
    """The records of a test file. Raises RecordError if one has no image file, or has predictions already."""
    rows = list(records.read_records(path, records.QUESTION, root))
    records.require_images(path, rows)
    for row in rows:
        where = f"{path}: record {row['id']}"
        for field in ADDED + OPTIONAL:
            is_new = row.get(field) is None
            require(is_new, f"{where} has a `{field}` already: give the file without predictions")
    return rows


def score_run(run, rows, seed, markdown):
    """Print the tables of one run's predictions, write them to metrics.json and finish the run."""
    result = compute_metrics(rows, seed)
    print(measures.format_groups(result, markdown))
    result["scorers"] = scorers.score_by_group(rows)
    print(f"\n{scorers.format_scores(result['scorers'], markdown)}\n")
    reasons = Counter(row["reason"] for row in rows if row["prediction"] is None)
    result["reasons"] = dict(reasons.most_common())
    for reason, count in result["reasons"].items():
        print(f"unparsed, counted as wrong: {reason} ({count})")
    counts = f"{result['questions']} questions, {result['images']} images"
    run.finish(result, f"accuracy {result['accuracy']:.3f} on {counts}")


def answer(args):
    """Answer --data into predictions.jsonl → the run. Several processes take turns at the batches."""
    from accelerate import Accelerator

    from medgr2 import parallel

    questions, accelerator = read_questions(args.data, args.image_root), Accelerator()
    images = [record["image"] for record in questions]
    run = runs.start(args, [args.model, args.data], accelerator.is_main_process, free=FREE)
    if args.endpoint:
        model = open_server(args)
    else:
        pixels = args.min_pixels, args.max_pixels
        model = open_model(args.model, args.max_new_tokens, pixels, images)
    which = {"blind": args.blind, "scores": args.scores}
    drawn = {"samples": args.samples, "temperature": args.temperature, "seed": args.seed}
    prepare = functools.partial(prepare_batch, model, **which)
    work = functools.partial(predict_batch, model, **which, **drawn)
    run.announce(f"{len(questions)} questions to answer", args.endpoint)
    # Those about one image stand together: it is encoded once for them.
    questions = list(itertools.chain(*records.group_by(questions, itemgetter("image")).values()))
    # A resumed run divides the questions into the same batches, so that it writes the same bytes.
    steps = range(run.state.get("step", 0), -(-len(questions) // args.batch))
    batches = [questions[i * args.batch : (i + 1) * args.batch] for i in steps]
    answered = parallel.take_turns(batches, prepare, work, accelerator, args.workers)
    for step, done in zip(run.progress(steps, "eval"), answered):
        run.append("predictions.jsonl", [records.with_relative_image(row, run.folder) for row in done])
        run.commit(step=step + 1)
        if step == steps[0] and run.main:
            cli.tell_cut(len(done), sum(row["reason"] == CUT for row in done), args.max_new_tokens)
    return run


def main(args):
    if args.predictions:
        fields = cli.parse_pairs("--fields", args.fields)
        rows, _, lines = scorers.read_predictions(
            args.predictions, fields, args.answers, args.on_error == "stop"
        )
        run = runs.start(args, [args.predictions, args.answers], free=FREE)
        run.append("predictions.jsonl", [records.with_relative_image(row, run.folder) for row in rows])
        for line in lines:
            print(line)
    else:
        run = answer(args)
        if not run.main:
            return
        rows = list(records.read_records(run.path("predictions.jsonl"), root=records.ANYWHERE))
    score_run(run, rows, args.seed, args.markdown)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
