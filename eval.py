"""Stage 5: what a policy answers to a test file, and how far the figures can be trusted.

    accuracy = Σ_i 1[prediction_i = answer_i] / number of questions

Every question of the row is in that denominator: an answer that cannot be read is a wrong answer. Answers are greedy.

Reads   question records (JSONL); with --compare, the predictions of two runs on the same questions
Writes  OUT/predictions.jsonl, in the order of --data: the record and `response`, `prediction` (None where it cannot be
        read, with a `reason`), `correct`, `image_hash`; OUT/metrics.json, which holds the table that is printed

Intervals are 95% percentile bootstraps over images, told apart by content: questions on one image are not independent,
and to resample questions would make the interval too narrow. Where all answers of a row are right, or all wrong, its
width is zero and says nothing; a row of one image has no interval.

Beside every accuracy stand those of two answerers that never look at the image. `majority` gives the most frequent
answer of the question's task (Antol et al. 2015, VQA: the prior per question type), `position` always the option at
that position where most right ones are. Both are taken from the whole test file and then marked by row, as the model is:
they know its answers' frequencies, which the model does not, so they are what a blind answerer reaches at best with one
constant. The majority answer is not looked for among a question's own options: where answers are rare, to be offered at
all gives the right one away.

Departs from the paper: the authors leave answers outside the options out of the denominator; here they are wrong.

    python eval.py --model runs/toy/cycle1/grpo --data runs/toy/data/test.jsonl --out runs/toy/cycle1/eval_grpo
    python eval.py --compare runs/toy/cycle1/eval_sft runs/toy/cycle1/eval_grpo --out runs/toy/cycle1/compare
"""
import os
from collections import Counter

import numpy as np

import records
import runs

ADDED = ("response", "prediction", "reason", "correct", "image_hash")  # the fields that this stage writes
SAME = ("question", "options", "answer", "image_hash")  # two predictions on one item agree in these
RESAMPLES = 2000


def parse_args():
    p = runs.Parser(description=__doc__)
    p.add_argument("--model", help="folder or hub name of the model to evaluate")
    p.add_argument("--data", help="question records to answer")
    p.add_argument("--batch", type=int, default=64, help="questions at a time")
    p.add_argument("--max-new-tokens", type=int, default=128, help="longest response; one that is cut has no answer")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"),
                   help="instead of a model: folders of two runs of this script, or their predictions.jsonl; B minus A")
    runs.add_arguments(p)
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------
# Answers. The only part that needs a model: the rest takes the rows of predictions.jsonl.

def predict(model, batches, max_new_tokens):
    """Load the model, then yield for each batch of records their predictions: the records, with ADDED."""
    import vlm  # here: metrics and --compare do without torch
    vlm_ = vlm.load(model, dtype=vlm.best_dtype())
    for batch in batches:
        images = [records.open_image(r["image"]) for r in batch]
        prompts = vlm.encode_prompts(vlm_, images, [records.policy_prompt(r) for r in batch])
        ids, mask = vlm.sample(vlm_, prompts, None, max_new_tokens, temperature=0)  # (B, C); greedy needs no seeds
        ends = ids.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0].tolist()  # (B,) the last token of each
        yield [mark(record, text, cut=end not in vlm_.stop_ids)
               for record, text, end in zip(batch, vlm.decode(vlm_, ids, mask), ends)]


def mark(record, response, cut=False):
    """The record with its response, read and marked. `cut`: the response did not end by itself."""
    parsed = records.parse_response(response, record.get("options"))
    reason = "cut at --max-new-tokens" if cut and parsed.prediction is None else parsed.reason
    return record | {"response": response, "prediction": parsed.prediction, "reason": reason,
                     "correct": is_correct(record, parsed.prediction), "image_hash": records.image_hash(record["image"])}


# ---------------------------------------------------------------------------------------------------------
# Scorers: (record, prediction) → bool.

def is_correct(record, prediction):
    """Letter or text, ours: the option that `parse_response` read is the right one; open answers match exactly."""
    return records.is_match(prediction, record["answer"])


# ---------------------------------------------------------------------------------------------------------
# Answerers that never look: rows → one bool a row.

def majority_baseline(rows):
    """Is the most frequent answer of its task in `rows` the right one? The first met of equally frequent ones."""
    counts = {}
    for row in rows:
        counts.setdefault(row.get("task"), Counter())[records.normalise(row["answer"])] += 1
    common = {task: counter.most_common(1)[0][0] for task, counter in counts.items()}
    return [records.normalise(row["answer"]) == common[row.get("task")] for row in rows]


def position_baseline(rows):
    """Is the right option where most are in `rows`? An open question has no position and counts as wrong."""
    positions = [row["options"].index(row["answer"]) if "options" in row else None for row in rows]
    common = Counter(p for p in positions if p is not None).most_common(1)
    return [bool(common) and p == common[0][0] for p in positions]


# ---------------------------------------------------------------------------------------------------------
# Metrics: arrays (n,), one value a question → numbers.

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


def by_group(rows, measure):
    """`measure` of all rows' indices, and beside it {"modality": {name: ...}, "task": {name: ...}}, where known."""
    result = measure(np.arange(len(rows)))
    for field in ("modality", "task"):
        if any(field in row for row in rows):
            names = np.array([row.get(field, "(none)") for row in rows])
            result[field] = {str(name): measure(np.flatnonzero(names == name)) for name in np.unique(names)}
    return result


def metrics(rows, seed):
    """The table of one run: accuracy, its interval, the baselines and the unparsed share, in all and by group."""
    images = np.array([row["image_hash"] for row in rows])
    shares = {"accuracy": [is_correct(row, row["prediction"]) for row in rows],
              "majority": majority_baseline(rows), "position": position_baseline(rows),
              "unparsed": [row["prediction"] is None for row in rows]}
    shares = {name: np.array(values, float) for name, values in shares.items()}  # (n,) each

    def measure(i):
        low, high = interval(shares["accuracy"][i], images[i], seed)
        means = {name: float(values[i].mean()) for name, values in shares.items()}
        return {"questions": len(i), "images": len(set(images[i])), "accuracy": means.pop("accuracy"),
                "low": low, "high": high, **means}

    return by_group(rows, measure)


def comparison(rows_a, rows_b, seed):
    """The table of two runs on the same items, in the same order: accuracies, B minus A, what B changed."""
    images = np.array([row["image_hash"] for row in rows_a])
    a, b = (np.array([is_correct(row, row["prediction"]) for row in rows], float) for rows in (rows_a, rows_b))  # (n,)

    def measure(i):
        low, high = interval((b - a)[i], images[i], seed)
        return {"questions": len(i), "images": len(set(images[i])), "a": float(a[i].mean()), "b": float(b[i].mean()),
                "difference": float((b - a)[i].mean()), "low": low, "high": high,
                "corrected": int((b > a)[i].sum()), "introduced": int((a > b)[i].sum())}

    return by_group(rows_a, measure)


def table(result):
    """What `metrics` or `comparison` returned, as aligned text: a line for all, each modality, each task."""
    lines = [("all", result)] + [(f"{field}: {name}", group) for field in ("modality", "task")
                                 for name, group in result.get(field, {}).items()]
    columns = [name for name, value in result.items() if not isinstance(value, dict)]
    return runs.table([[label, *(group[c] for c in columns)] for label, group in lines], ["", *columns])


# ---------------------------------------------------------------------------------------------------------
# Files.

def read_questions(path):
    """The question records of a test file. Raises RecordError where one has been answered before, or has no image."""
    rows = list(records.read(path, records.QUESTION))
    for row in rows:
        records.demand(os.path.isfile(row["image"]), f"{path}: record {row['id']}: no such image {row['image']}: correct `image`")
        field = next((f for f in ADDED if f in row), None)
        records.demand(not field, f"{path}: record {row['id']} has a `{field}` already: give the file without predictions")
    return rows


def read_pair(a, b):
    """The predictions in two files on the same items, in A's order. Raises RunError where the items are not the same."""
    rows_a, rows_b = ({row["id"]: row for row in records.read(path, (*records.QUESTION, "prediction", "image_hash"))}
                      for path in (a, b))
    lacking = [f"{path} lacks {len(missing)} of {len(other)} ({min(missing)})" for path, missing, other in
               ((a, rows_b.keys() - rows_a.keys(), rows_b), (b, rows_a.keys() - rows_b.keys(), rows_a)) if missing]
    if lacking:
        raise runs.RunError(f"--compare: not the same items: {', '.join(lacking)}; give two runs on the same --data")
    for name, row in rows_a.items():
        field = next((f for f in SAME if row.get(f) != rows_b[name].get(f)), None)
        if field:
            raise runs.RunError(f"--compare: item {name} has another `{field}` in {b} than in {a}; "
                                "give two runs on the same --data")
    return list(rows_a.values()), [rows_b[name] for name in rows_a]


def predictions_file(path):
    """The predictions of a run's folder, or the file itself."""
    return os.path.join(path, "predictions.jsonl") if os.path.isdir(path) else path


def evaluate(args):
    rows = read_questions(args.data)
    run = runs.start(args, [args.model, args.data])
    first, last = run.state.get("step", 0), -(-len(rows) // args.batch)
    batches = (rows[i * args.batch:(i + 1) * args.batch] for i in range(first, last))  # never cut anew: same bytes
    for step, done in zip(run.progress(range(first, last), "eval"), predict(args.model, batches, args.max_new_tokens)):
        run.append("predictions.jsonl", [records.relative(row, run.folder) for row in done])
        run.commit(step=step + 1)

    rows = list(records.read(run.path("predictions.jsonl")))
    result = metrics(rows, args.seed)
    print(table(result))
    result["reasons"] = dict(Counter(row["reason"] for row in rows if row["prediction"] is None).most_common())
    for reason, count in result["reasons"].items():
        print(f"unparsed, counted as wrong: {reason} ({count})")
    run.finish(result, f"accuracy {result['accuracy']:.3f} on {result['questions']} questions, {result['images']} images")


def compare(args):
    a, b = map(predictions_file, args.compare)
    rows_a, rows_b = read_pair(a, b)
    run = runs.start(args, [a, b])
    result = comparison(rows_a, rows_b, args.seed)
    print(f"a: {a}\nb: {b}")
    print(table(result))
    run.finish(result, f"b - a {result['difference']:+.3f}, errors corrected {result['corrected']}, "
                       f"introduced {result['introduced']}")


def main(args):
    if bool(args.compare) == bool(args.model or args.data) or bool(args.model) != bool(args.data):
        raise runs.RunError("give --model and --data, or --compare A B")
    if args.batch < 1 or args.max_new_tokens < 1:
        raise runs.RunError("--batch and --max-new-tokens: give at least 1")
    compare(args) if args.compare else evaluate(args)


if __name__ == "__main__":
    runs.cli(main, parse_args())
