"""Stage 1: the generator writes questions, options, reasoning and answers about unlabelled images.

    (question, options, rationale, answer) ~ G(· | image, prompt of paradigm and task), at temperature 1

G is asked about each image in three paradigms: direct, stepwise, metacognitive. Their prompts, and the parser
of the replies, are in medgr2/prompts.py. Every reply becomes a candidate, or is rejected with a reason.

Reads   image records (JSONL): id, image, perhaps modality. The generator is shown the image only
Writes  OUT/candidates.jsonl; OUT/rejected.jsonl, with `reason` and `text` (the reply, or with --on-error skip
        why the image is unreadable); metrics.jsonl, metrics.json: asked = kept + rejected (docs/metrics.md)

Departs from the paper:
1. G is any VLM, on this machine (--model) or behind an OpenAI-compatible server (--endpoint). The paper asks
   Gemini-2.0-Flash.
2. The paper's prompts are not published. Ours also name the kind of question, so that the images of each
   modality cover all tasks.

    python generate.py --images runs/toy/data/unlabelled/images.jsonl --model toy/generator --out runs/mine
"""

import argparse
import functools
import os
import time
from collections import Counter
from operator import itemgetter

from medgr2 import cli, endpoint, records, runs
from medgr2.errors import RunError, require
from medgr2.images import find_unreadable, hash_image, open_images
from medgr2.prefetch import for_preparing
from medgr2.prompts import PARADIGMS, TASKS, generator_prompt, normalise, parse_candidate


def parse_part(text):
    """`2/3` → (2, 3). Raises ArgumentTypeError for anything else."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text} is not a part: give K/N with K from 1 to N, such as 2/3")
    return int(k), int(n)


def parse_args():
    p = cli.Parser(description=__doc__)
    count, share = cli.number(int, 1), cli.number(float, 0, 1)
    p.add_argument("--images", required=True, help="image records (JSONL)")
    part = "ask only about part K of N of the images, so that each cycle has new ones"
    p.add_argument("--part", type=parse_part, default="1/1", metavar="K/N", help=part)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder or hub name of the generator")
    endpoint.add_arguments(p, which, "the generator")
    names = list(PARADIGMS)
    p.add_argument("--paradigms", nargs="+", choices=names, default=names, help="ways to ask for reasoning")
    tasks = p.add_mutually_exclusive_group()
    kinds = "kinds of question to ask for, in turn"
    tasks.add_argument("--tasks", nargs="+", default=list(TASKS), help=kinds)
    tasks.add_argument("--tasks-of", metavar="FILE", help="or the kinds that occur in this record file")
    p.add_argument("--per-image", type=count, default=1, help="candidates per image and paradigm")
    p.add_argument("--temperature", type=cli.number(float, 0), default=1.0, help="0 is greedy")
    p.add_argument("--max-new-tokens", type=count, default=160, help="longer replies are rejected")
    p.add_argument("--batch", type=count, default=16, help="images per batch; each batch is committed")
    skip = "at a bad line, or an unreadable or too large image: skip leaves it out"
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=skip)
    most = "largest share of bad lines, and of unreadable images, that skip may leave out"
    p.add_argument("--max-rejected", type=share, default=0.1, help=most)
    cycle = "number of the cycle, kept in each candidate; it also seeds the samples"
    p.add_argument("--cycle", type=cli.number(int, 0), default=1, help=cycle)
    cli.add_image_arguments(p)
    cli.add_run_arguments(p)
    args = p.parse_args()
    endpoint.check_arguments(p, args)
    if len(set(args.paradigms)) < len(args.paradigms):
        p.error("--paradigms: one is named twice; --per-image asks more often")
    return args


if __name__ == "__main__":
    # Before torch is imported, so that --help answers at once.
    ARGS = parse_args()

from accelerate import Accelerator

from medgr2 import answering, context, encoding, loading, parallel

# ---------------------------------------------------------------------------------------------------------
# What to ask.


def find_tasks(path, root=None):
    """The tasks that the records have: those of TASKS in its order, then others by name."""
    found = {record["task"] for record in records.read_records(path, ("task",), root)}
    return [task for task in TASKS if task in found] + sorted(found - set(TASKS))


def read_images(path, skip=0, root=None, part=(1, 1)):
    """One record per image: in a file of questions, the first about each.

    `part` (k, n): every n-th image from the k-th on. `skip`: the share of bad lines that may be left out.
    Raises RecordError for a missing image now rather than after hours, unless `skip`.
    """
    images = {}
    for record in records.read_kept(path, ("image",), root, skip):
        images.setdefault(record["image"], record)
    if not skip:
        records.require_images(path, images.values())
    k, n = part
    share = list(images.values())[k - 1 :: n]
    require(share, f"{path}: {len(images)} images: too few for part {k} of {n}; give more, or fewer parts")
    return share


def assign_turns(images):
    """For each image, a number that decides which task it is asked for first (build_drafts).

    It counts up within a modality, so that a modality's images cycle through all tasks. Each modality starts
    at another number, so that a few images of many modalities cover all tasks too.
    """
    last, turns = {}, []
    for record in images:
        modality = record.get("modality")
        last[modality] = last[modality] + 1 if modality in last else len(last)
        turns.append(last[modality])
    return turns


def build_drafts(record, turn, paradigms, tasks, per_image, cycle, seed, generator):
    """The drafts about one image: candidates that lack only what the generator will write.

    Tasks rotate within a modality and paradigm, so that each of these cells asks for all tasks equally often.
    The paradigms start at different tasks, so that one image covers as many as possible.
    """
    drafts = []
    for p, paradigm in enumerate(paradigms):
        for k in range(per_image):
            draft = {
                "id": f"{record['id']}-c{cycle}-{paradigm}-{k}",
                "image": record["image"],
                "task": tasks[((turn + p) * per_image + k) % len(tasks)],
                "modality": record.get("modality"),
                "source": "generated",
                "paradigm": paradigm,
                "cycle": cycle,
                "parent": record["id"],
                # 31 bits: servers take no more.
                "seed": runs.seed_of(seed, cycle, record["id"], paradigm, k) >> 32,
                "generator": generator,
            }
            drafts.append({field: value for field, value in draft.items() if value is not None})
    return drafts


# ---------------------------------------------------------------------------------------------------------
# Asking.


def open_generator(args, tasks, images):
    """(encode, ask, the images that fit into the generator's context).

    encode(drafts) → what ask takes. ask(drafts, encoded) → replies [(text, truncated)] in their order, each
    sampled with its own draft's seed.
    """
    if args.endpoint:
        sampling = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
        return images_of, functools.partial(ask_server, ask=endpoint.connect(args), **sampling), images
    generator = loading.load(args.model, dtype=loading.best_dtype())
    loading.limit_pixels(generator, args.min_pixels, args.max_pixels)
    context.tell_image_tokens(generator, [record["image"] for record in images])
    prompts = [generator_prompt(paradigm, task) for paradigm in args.paradigms for task in tasks]
    parts = itemgetter("image"), lambda image: max(prompts, key=len), lambda image: args.max_new_tokens
    images = context.leave_out_too_long(generator, images, *parts, args.on_error == "skip")
    # With a single task, all drafts about an image in one paradigm have the same prompt.
    group = args.per_image if len(tasks) == 1 else 1
    sampling = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    encode = functools.partial(encode_drafts, for_preparing(generator), group)
    return encode, functools.partial(ask_model, generator=generator, group=group, **sampling), images


def images_of(drafts):
    return open_images(draft["image"] for draft in drafts)


def ask_server(drafts, images, ask, **sampling):
    """Ask a model behind a server, one request per draft. ask: from endpoint.connect."""
    requests = []
    for draft, image in zip(drafts, images):
        prompt = generator_prompt(draft["paradigm"], draft["task"])
        requests.append(endpoint.Request(image, prompt, draft["seed"]))
    return ask(requests, **sampling)


def encode_drafts(generator, group, drafts):
    """The Inputs of a model on this machine, on the CPU. `group` consecutive drafts share a prompt."""
    asked = drafts[::group]
    prompts = [generator_prompt(draft["paradigm"], draft["task"]) for draft in asked]
    return encoding.encode_by_image(generator, images_of(asked), prompts, "cpu")


def ask_model(drafts, inputs, generator, temperature, max_new_tokens, group):
    """Ask a model on this machine. Each image is prefilled once, each prompt once for its `group` drafts."""
    seeds = [draft["seed"] for draft in drafts]
    return answering.ask_model(generator, max_new_tokens, inputs, seeds, temperature, group)


# ---------------------------------------------------------------------------------------------------------
# What comes back.


# The candidates about one image are consecutive, so a small cache hashes each image once.
@functools.lru_cache(maxsize=16)
def cached_hash(path):
    return hash_image(path)


def duplicate_key(candidate):
    """Candidates with the same key are duplicates: same image (by content), same question, same answer."""
    return cached_hash(candidate["image"]), normalise(candidate["question"]), normalise(candidate["answer"])


def split_replies(drafts, replies, seen):
    """Drafts and their replies → (candidates, rejected). `seen`: the keys of earlier candidates."""
    candidates, rejected, new = [], [], set()
    for draft, (text, truncated) in zip(drafts, replies, strict=True):
        parsed, reason = (None, "truncated") if truncated else parse_candidate(text)
        key = duplicate_key(draft | parsed) if parsed else None
        if key in seen or key in new:
            reason = "duplicate"
        if reason:
            rejected.append(draft | {"reason": reason, "text": text})
        else:
            candidates.append(draft | parsed)
            new.add(key)
    return candidates, rejected


def split_unreadable(drafts, unreadable):
    """Drafts → (those to ask, those rejected for an unreadable image). `unreadable`: {path: why}."""
    readable, rejected = [], []
    for draft in drafts:
        if draft["image"] in unreadable:
            rejected.append(draft | {"reason": "unreadable image", "text": unreadable[draft["image"]]})
        else:
            readable.append(draft)
    return readable, rejected


# ---------------------------------------------------------------------------------------------------------
# Counts.


def read_committed(run, name):
    """Stream the records of one of the run's files so far; none if there is no such file yet."""
    path = run.path(name)
    if not os.path.exists(path) or not os.path.getsize(path):
        return ()
    return records.read_records(path, root=records.ANYWHERE)


def count_outcomes(run, paradigms):
    """{paradigm: Counter of `kept` and the reasons}, from the files, also those of a resumed run."""
    counts = {paradigm: Counter() for paradigm in paradigms}
    for record in read_committed(run, "candidates.jsonl"):
        counts[record["paradigm"]]["kept"] += 1
    for record in read_committed(run, "rejected.jsonl"):
        counts[record["paradigm"]][record["reason"]] += 1
    return counts


def count_entry(counter):
    """A Counter of outcomes → its entry in metrics.json."""
    rejected = {reason: n for reason, n in sorted(counter.items()) if reason != "kept"}
    return {"asked": counter.total(), "kept": counter["kept"], "rejected": rejected}


def format_counts(counts, total):
    """A table: one row each for asked, kept and the reasons; one column per paradigm, and one for all."""
    columns = [*counts.values(), total]
    rows = [["asked", *(column.total() for column in columns)]]
    for outcome in ("kept", *(reason for reason, _ in total.most_common() if reason != "kept")):
        rows.append([outcome, *(column[outcome] for column in columns)])
    return cli.format_table(rows, ["", *counts, "all"])


# ---------------------------------------------------------------------------------------------------------


def main(args):
    skip = args.on_error == "skip"
    images = read_images(args.images, skip and args.max_rejected, args.image_root, args.part)
    unreadable = find_unreadable(images, args.max_rejected) if skip else {}
    tasks = find_tasks(args.tasks_of, args.image_root) if args.tasks_of else args.tasks
    inputs, accelerator = [args.images, args.model, args.tasks_of], Accelerator()
    run = runs.start(args, inputs, accelerator.is_main_process, free=endpoint.FREE)
    encode, ask, images = open_generator(args, tasks, images)
    generator = args.model or args.endpoint_model
    # The same for all drafts.
    settings = args.paradigms, tasks, args.per_image, args.cycle, args.seed, generator
    turns = assign_turns(images)
    seen = {duplicate_key(candidate) for candidate in read_committed(run, "candidates.jsonl")}

    def prepare(step):
        """(drafts to ask, encoded, rejected drafts) about a batch of images."""
        batch = range(step, min(step + args.batch, len(images)))
        drafts = [draft for i in batch for draft in build_drafts(images[i], turns[i], *settings)]
        # Reject what cannot be asked (--on-error skip).
        readable, not_asked = split_unreadable(drafts, unreadable)
        return readable, encode(readable) if readable else None, not_asked

    def ask_batch(prepared):
        """(drafts that were asked, their replies, rejected drafts, seconds)."""
        started, (drafts, encoded, not_asked) = time.time(), prepared
        return drafts, ask(drafts, encoded) if drafts else [], not_asked, time.time() - started

    number = len(images) * len(args.paradigms) * args.per_image
    run.announce(f"{number} candidates about {len(images)} images", args.endpoint)
    steps = range(run.state.get("step", 0), len(images), args.batch)
    # Ask the generator, a batch of images at a time. Processes take turns.
    asked = parallel.take_turns(steps, prepare, ask_batch, accelerator, args.workers)
    for step, (drafts, replies, not_asked, seconds) in zip(run.progress(steps, "generate"), asked):
        # Parse the replies; reject what is malformed, truncated or a duplicate.
        candidates, rejected = split_replies(drafts, replies, seen)
        seen |= {duplicate_key(candidate) for candidate in candidates}
        # Write, log and commit.
        for name, rows in (("candidates.jsonl", candidates), ("rejected.jsonl", rejected + not_asked)):
            run.append(name, [records.with_relative_image(row, run.part) for row in rows])
        run.log(step=step, asked=len(drafts) + len(not_asked), kept=len(candidates), seconds=seconds)
        run.commit(step=step + args.batch)
        if not step and run.main:
            cut = sum(truncated for _, truncated in replies)
            cli.tell_cut(len(replies), cut, args.max_new_tokens)
    if not run.main:
        return

    counts = count_outcomes(run, args.paradigms)
    total = sum(counts.values(), Counter())
    assert total.total() == number, "a draft is neither kept nor rejected"
    print(format_counts(counts, total))
    by_paradigm = {paradigm: count_entry(counter) for paradigm, counter in counts.items()}
    if not total["kept"]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in total.most_common())
        raise RunError(
            f"none of {number} candidates is kept ({reasons}): see {run.path('rejected.jsonl')}; "
            "take another generator, or other flags, with another --out"
        )
    metrics = {"images": len(images), **count_entry(total), "by_paradigm": by_paradigm}
    run.finish(metrics, f"kept {total['kept']} of {number} candidates about {len(images)} images")


if __name__ == "__main__":
    cli.run_main(main, ARGS)
