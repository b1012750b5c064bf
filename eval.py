"""Stage 5: what a policy answers to a test file, and how far the figures can be trusted.

    accuracy = Σ_i 1[prediction_i = answer_i] / number of questions

Every question of the row is in that denominator: an answer that cannot be read is a wrong answer. Answers are greedy. The
second table marks the same answers by every scorer in use (scorers.py), over the same denominator and over each one's own.

Reads   question records (JSONL) and a model; or third-party predictions
Writes  OUT/predictions.jsonl, in the order of --data: the record and `response`, `prediction` (None where it cannot be
        read, with a `reason`), `correct`, `image_hash`; OUT/metrics.json, which holds what is printed

Intervals are 95% percentile bootstraps over images, told apart by content: questions on one image are not independent,
and to resample questions would make the interval too narrow. Where all answers of a row are right, or all wrong, its
width is zero and says nothing; a row of one image has no interval. `balanced` is the mean accuracy of the right answers'
classes, `f1` their mean F1.

Beside every accuracy stand those of two answerers that never look at the image. `majority` gives the most frequent
answer of the question's task (Antol et al. 2015, VQA: the prior per question type), `position` always the option at
that position where most right ones are. Both are taken from the whole test file and then marked by row, as the model is:
they know its answers' frequencies, which the model does not, so they are what a blind answerer reaches at best with one
constant. The majority answer is not looked for among a question's own options: where answers are rare, to be offered at
all gives the right one away. `blind` (--blind) is the model itself, asked the same about a grey image of the same size.

With --scores each option is a continuation of image, question and empty reasoning (read once for all options): `prefix`
takes the one with the highest mean token log-probability (OmniMedVQA's prefix score); `auroc` and `ece` take the options'
probabilities, of all options of all questions, and of the most probable one. With --samples K: `vote` and `pass@k`.

Departs from the paper: the authors leave answers outside the options out of the denominator; here they are wrong.

    python eval.py --model runs/toy/cycle1/grpo --data runs/toy/data/test.jsonl --out runs/toy/cycle1/eval_grpo
    python eval.py --predictions theirs.jsonl --fields prediction=model_answer answer=gt_answer --out runs/theirs
"""

import argparse
import os
from collections import Counter

import numpy as np

from medgr2 import cli, measures, records, runs, scorers
from medgr2.errors import RunError, require
from medgr2.images import hash_image, open_image
from medgr2.measures import by_group, interval
from medgr2.prompts import format_response, is_match, normalise, parse_response, policy_prompt

# the fields that this stage writes
ADDED = ("response", "prediction", "reason", "correct", "image_hash")
# and those that it writes where it is asked to
ASKED = ("blind", "option_logps", "option_tokens", "samples")
GREY = (128, 128, 128)
# flags on which no file depends
FREE = ("markdown",)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--model", help="folder or hub name of the model to evaluate")
    p.add_argument("--data", help="question records to answer")
    p.add_argument("--batch", type=cli.number(int, 1), default=64, help="questions at a time")
    p.add_argument(
        "--max-new-tokens",
        type=cli.number(int, 1),
        default=128,
        help="longest response; one that is cut has no answer",
    )
    p.add_argument(
        "--scores",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also the options' log-probabilities",
    )
    p.add_argument(
        "--blind", action=argparse.BooleanOptionalAction, default=False, help="also ask without the image"
    )
    p.add_argument(
        "--samples",
        type=cli.number(int, 0),
        default=0,
        metavar="K",
        help="also draw K responses a question: majority vote, pass@k",
    )
    p.add_argument("--temperature", type=cli.number(float, 1e-3), default=1.0, help="of --samples")
    p.add_argument(
        "--predictions",
        metavar="FILE",
        help="instead of a model: anybody's predictions (JSON or JSONL) to score",
    )
    p.add_argument(
        "--fields",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="names of its fields, as prediction=model_answer",
    )
    p.add_argument(
        "--markdown", action=argparse.BooleanOptionalAction, default=False, help="print tables in Markdown"
    )
    cli.add_run_arguments(p)
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------
# Answers. The only part that needs a model: the rest takes the rows of predictions.jsonl.


def predict(model, batches, max_new_tokens, scores=False, blind=False, samples=0, temperature=1.0, seed=0):
    """Load the model, then yield for each batch of records their predictions: the records, with ADDED, and what is asked for."""
    from medgr2 import loading, vlm

    vlm_ = loading.load(model, dtype=loading.best_dtype())
    for batch in batches:
        images, texts = [open_image(r["image"]) for r in batch], [policy_prompt(r) for r in batch]
        prompts = vlm.encode_prompts(vlm_, images, texts)
        rows = [mark(r, *reply) for r, reply in zip(batch, respond(vlm_, prompts, max_new_tokens))]
        if blind:
            prompts_ = vlm.encode_prompts(vlm_, [blank(image) for image in images], texts)
            rows = [
                r | {"blind": read(r, text)}
                for r, (text, _) in zip(rows, respond(vlm_, prompts_, max_new_tokens))
            ]
        if samples:
            seeds = [runs.seed_of(seed, "sample", r["id"], k) for r in batch for k in range(samples)]
            drawn = [text for text, _ in respond(vlm_, prompts, max_new_tokens, seeds, temperature, samples)]
            rows = [
                r | {"samples": [read(r, text) for text in drawn[i * samples : (i + 1) * samples]]}
                for i, r in enumerate(rows)
            ]
        yield score_options(vlm_, images, rows) if scores else rows


def respond(vlm_, prompts, max_new_tokens, seeds=None, temperature=0, group=1):
    """[(response, whether it did not end by itself)] to each prompt, `group` of them; greedy ones need no seeds."""
    from medgr2 import vlm

    ids, mask, truncated = vlm.sample(vlm_, prompts, seeds, max_new_tokens, temperature, group)  # (N, C)
    return list(zip(vlm.decode(vlm_, ids, mask), truncated.tolist()))


def blank(image):
    """What a blind answerer sees: an image of the same size, hence as many tokens, that shows nothing."""
    from PIL import Image

    return Image.new("RGB", image.size, GREY)


def read(record, response):
    """The prediction in a response, None where there is none."""
    return parse_response(response, record.get("options")).prediction


def mark(record, response, cut=False):
    """The record with its response, read and marked. `cut`: the response did not end by itself."""
    parsed = parse_response(response, record.get("options"))
    reason = "cut at --max-new-tokens" if cut and parsed.prediction is None else parsed.reason
    return record | {
        "response": response,
        "prediction": parsed.prediction,
        "reason": reason,
        "correct": is_correct(record, parsed.prediction),
        "image_hash": hash_image(record["image"]),
    }


def score_options(vlm_, images, rows):
    """The rows with `option_logps` and `option_tokens`, one an option; None in open questions."""
    rows = [row | {"option_logps": None, "option_tokens": None} for row in rows]
    # equally many make a group
    for n in {len(row["options"]) for row in rows if "options" in row}:
        index = [i for i, row in enumerate(rows) if len(row.get("options", ())) == n]
        logps, tokens = option_scores(vlm_, [images[i] for i in index], [rows[i] for i in index])
        for i, own, counts in zip(index, logps, tokens):
            rows[i] |= {"option_logps": own, "option_tokens": counts}
    return rows


def option_scores(vlm_, images, asked):
    """(Σ log π, tokens) of each option of B questions with n options each, [[n] · B] both; image and question are read once.

    The option stands where the prompt wants it, behind empty reasoning, and ends with its closing tag: without that, `CT` would
    be as probable as all that begins with `CT`. Only the option and the tag count.
    """
    import torch

    from medgr2 import vlm

    head, tail = format_response("", "\n").split("\n")
    n = len(asked[0]["options"])
    ids, mask = vlm.encode_continuations(
        vlm_, [option + tail for r in asked for option in r["options"]], end=False
    )  # (B·n, C)
    before = vlm.encode_continuations(vlm_, [head], end=False)[0].expand(len(ids), -1)  # (B·n, H)
    ids, scored = torch.cat([before, ids], 1), torch.cat([torch.zeros_like(before), mask], 1)  # (B·n, H+C)
    with torch.no_grad():
        prompts = vlm.encode_prompts(vlm_, images, [policy_prompt(r) for r in asked])
        states = vlm.hidden_states(vlm_, prompts, ids, torch.cat([torch.ones_like(before), mask], 1))
        logps, _ = vlm.token_logps(
            vlm_, prompts, ids, scored, states=states
        )  # (B·n, H+C), zero where not scored
    return logps.double().sum(1).view(-1, n).tolist(), scored.sum(1).view(-1, n).tolist()


def is_correct(record, prediction):
    """Letter or text, ours: the option that `parse_response` read is the right one; open answers match exactly."""
    return is_match(prediction, record["answer"])


# ---------------------------------------------------------------------------------------------------------
# Answerers that never look: rows → one bool a row.


def majority_baseline(rows):
    """Is the most frequent answer of its task in `rows` the right one? The first met of equally frequent ones."""
    counts = {}
    for row in rows:
        counts.setdefault(row.get("task"), Counter())[normalise(row["answer"])] += 1
    common = {task: counter.most_common(1)[0][0] for task, counter in counts.items()}
    return [normalise(row["answer"]) == common[row.get("task")] for row in rows]


def position_baseline(rows):
    """Is the right option where most are in `rows`? An open question has no position and counts as wrong."""
    positions = [row["options"].index(row["answer"]) if "options" in row else None for row in rows]
    common = Counter(p for p in positions if p is not None).most_common(1)
    return [bool(common) and p == common[0][0] for p in positions]


# ---------------------------------------------------------------------------------------------------------
# Tables: rows → numbers.


def marks(rows):
    """{column: one number a question}: what `metrics` takes the means of. A question that a column cannot mark is wrong in it."""
    columns = {
        "accuracy": [is_correct(row, row["prediction"]) for row in rows],
        "majority": majority_baseline(rows),
        "position": position_baseline(rows),
    }
    if all("blind" in row for row in rows):
        columns["blind"] = [is_correct(row, row["blind"]) for row in rows]
    columns["unparsed"] = [row["prediction"] is None for row in rows]
    if all("option_logps" in row for row in rows):
        means = [row["option_logps"] and np.divide(row["option_logps"], row["option_tokens"]) for row in rows]
        columns["prefix"] = [
            m is not None and row["options"][m.argmax()] == row["answer"] for m, row in zip(means, rows)
        ]
    if all("samples" in row for row in rows):
        columns["vote"] = [is_correct(row, measures.majority(row["samples"])) for row in rows]
        k = min(len(row["samples"]) for row in rows)
        for k in sorted({1, k} | {2**i for i in range(1, 10) if 2**i < k}):
            columns[f"pass@{k}"] = [
                measures.pass_at(k, sum(is_correct(row, s) for s in row["samples"]), len(row["samples"]))
                for row in rows
            ]
    return {name: np.array(values, float) for name, values in columns.items()}  # (n,) each


def calibrate(rows):
    """{"auroc", "ece", "bins"} of the options' probabilities in `rows`; {} where they have none."""
    scored = [
        (measures.probabilities(row["option_logps"]), row["options"].index(row["answer"]))
        for row in rows
        if row.get("option_logps")
    ]
    if not scored:
        return {}
    # one bool an option
    right = np.concatenate([np.arange(len(p)) == i for p, i in scored])
    ece, bins = measures.calibration(
        np.array([p.max() for p, _ in scored]), np.array([p.argmax() == i for p, i in scored])
    )
    return {"auroc": measures.auroc(np.concatenate([p for p, _ in scored]), right), "ece": ece, "bins": bins}


def metrics(rows, seed):
    """The table of one run: accuracy, its interval, the baselines and the unparsed share, in all and by group."""
    images, columns = np.array([row["image_hash"] for row in rows]), marks(rows)
    answers = np.array([normalise(row["answer"]) for row in rows])
    said = [row["prediction"] and normalise(row["prediction"]) for row in rows]

    def measure(i):
        low, high = interval(columns["accuracy"][i], images[i], seed)
        means = {name: float(values[i].mean()) for name, values in columns.items()}
        return {
            "questions": len(i),
            "images": len(set(images[i])),
            "accuracy": means.pop("accuracy"),
            "low": low,
            "high": high,
            "balanced": measures.balanced_accuracy(answers[i], columns["accuracy"][i]),
            "f1": measures.macro_f1(answers[i], [said[j] for j in i]),
            **means,
            **calibrate([rows[j] for j in i]),
        }

    return by_group(rows, measure)


def scorer_table(result, markdown=False):
    """What `scorers.scores` returned by group, as text: every scorer over all questions; then by modality or data set, accuracy alone."""
    parts = []
    if "closed" in result:
        figures_ = {name: found for name, found in result["closed"].items() if name != "questions"}
        parts.append(
            cli.format_table(
                [[name, *found.values()] for name, found in figures_.items()],
                [f"{result['closed']['questions']} closed questions", *next(iter(figures_.values()))],
                markdown,
            )
        )
        for field in [f for f in ("modality", "dataset") if f in result]:
            parts.append(
                cli.format_table(
                    [
                        [name, g["closed"]["questions"], *(g["closed"][s]["accuracy"] for s in figures_)]
                        for name, g in result[field].items()
                        if "closed" in g
                    ],
                    [field, "questions", *figures_],
                    markdown,
                )
            )
    if "open" in result:
        parts.append(
            cli.format_table(
                [list(result["open"].values())], ["open questions", *list(result["open"])[1:]], markdown
            )
        )
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------
# Files.


def read_questions(path, root=None):
    """The question records of a test file. Raises RecordError where one has been answered before, or has no image."""
    rows = list(records.read_records(path, records.QUESTION, root))
    for row in rows:
        require(
            os.path.isfile(row["image"]),
            f"{path}: record {row['id']}: no such image {row['image']}: correct `image`",
        )
        field = next((f for f in ADDED + ASKED if f in row), None)
        require(
            not field,
            f"{path}: record {row['id']} has a `{field}` already: give the file without predictions",
        )
    return rows


# ---------------------------------------------------------------------------------------------------------
# What one call does.


def summarise(run, rows, args):
    """Print and keep the tables of one run's predictions, and its reliability diagram where options have scores."""
    result, read_ = metrics(rows, args.seed), [scorers.readings(row) for row in rows]
    print(measures.format_groups(result, args.markdown))
    result["scorers"] = by_group(rows, lambda i: scorers.scores([rows[j] for j in i], [read_[j] for j in i]))
    print(f"\n{scorer_table(result['scorers'], args.markdown)}\n")
    result["reasons"] = dict(
        Counter(row["reason"] for row in rows if row["prediction"] is None).most_common()
    )
    for reason, count in result["reasons"].items():
        print(f"unparsed, counted as wrong: {reason} ({count})")
    run.finish(
        result,
        f"accuracy {result['accuracy']:.3f} on {result['questions']} questions, {result['images']} images",
    )


def evaluate(args):
    rows = read_questions(args.data, args.image_root)
    run = runs.start(args, [args.model, args.data], free=FREE)
    first, last = run.state.get("step", 0), -(-len(rows) // args.batch)
    # never cut anew: same bytes
    batches = (rows[i * args.batch : (i + 1) * args.batch] for i in range(first, last))
    answered = predict(
        args.model,
        batches,
        args.max_new_tokens,
        args.scores,
        args.blind,
        args.samples,
        args.temperature,
        args.seed,
    )
    for step, done in zip(run.progress(range(first, last), "eval"), answered):
        run.append("predictions.jsonl", [records.with_relative_image(row, run.folder) for row in done])
        run.commit(step=step + 1)
    summarise(run, list(records.read_records(run.path("predictions.jsonl"), root=records.ANYWHERE)), args)


def score_file(args):
    wrong = [f for f in args.fields if not all(f.partition("="))]
    if wrong:
        raise RunError(f"--fields {wrong[0]}: give OURS=THEIRS, as prediction=model_answer")
    rows, unsure = scorers.read_predictions(args.predictions, dict(f.split("=", 1) for f in args.fields))
    run = runs.start(args, [args.predictions], free=FREE)
    run.append("predictions.jsonl", [records.with_relative_image(row, run.folder) for row in rows])
    if unsure:
        print(f"{unsure} rows: options that hold ` or ` may have been cut there")
    summarise(run, rows, args)


def main(args):
    if bool(args.model) == bool(args.predictions) or bool(args.model) != bool(args.data):
        raise RunError("give --model and --data, or --predictions")
    (evaluate if args.model else score_file)(args)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
