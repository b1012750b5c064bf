"""Stage 1: a generator looks at images and writes questions, options, reasoning and answers about them.

    (question, options, rationale, answer) ~ G(· | image, prompt of paradigm and task), at temperature 1

The prompts of the three paradigms, and the parser of what comes back, are one contract and stand in records.py. Every
reply is kept: those that hold a question in candidates.jsonl, the others, with the reason, in rejected.jsonl. There too, with
--on-error skip, what was not asked because its image is unreadable (text: why).

Reads   image records (JSONL): id, image, perhaps modality; whatever else a record holds is not shown to the generator
Writes  OUT/candidates.jsonl, OUT/rejected.jsonl (and reason, text), metrics.json (asked = kept + rejected, by paradigm)

Departs from the paper: its prompts are not published, and it asks Gemini-2.0-Flash. Here G is any VLM, on this machine
(--model) or behind any OpenAI-compatible server (--endpoint), and the prompt names the kind of question, so that every
task gets its share of every modality.

    python generate.py --images runs/toy/data/unlabelled/images.jsonl --model toy/generator --out runs/toy/cycle1/candidates
    python generate.py --images images.jsonl --endpoint http://localhost:8000 --endpoint-model Qwen/Qwen2.5-VL-72B-Instruct \\
        --max-new-tokens 512 --concurrency 32 --out candidates
"""

import base64
import functools
import io
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from medgr2 import cli, records, runs
from medgr2.errors import RunError, require
from medgr2.images import find_unreadable, hash_image, open_image
from medgr2.prompts import PARADIGMS, TASKS, generator_prompt, normalise, parse_candidate

# seconds before the first retry; each further one waits twice as long
FIRST_WAIT = 1.0
# no secret: --endpoint stands in args.json
URL = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^/@:\[\]\s]+)(:\d+)?(/\S*)?")


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--images", required=True, help="image records (JSONL)")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder or hub name of the generator")
    which.add_argument(
        "--endpoint", metavar="URL", help="base URL of an OpenAI-compatible server to ask instead"
    )
    p.add_argument("--endpoint-model", metavar="NAME", help="the generator's name on that server")
    p.add_argument(
        "--endpoint-key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable that holds the server's API key, if it wants one",
    )
    p.add_argument("--concurrency", type=cli.number(int, 1), default=8, help="requests at a time")
    p.add_argument(
        "--retries",
        type=cli.number(int, 0),
        default=6,
        help="of a request that met no server, a 429 or a 5xx",
    )
    p.add_argument("--timeout", type=cli.number(float, 1), default=300, help="seconds to wait for a reply")
    p.add_argument(
        "--paradigms",
        nargs="+",
        choices=PARADIGMS,
        default=list(PARADIGMS),
        help="how the generator is asked to reason",
    )
    p.add_argument("--tasks", nargs="+", default=list(TASKS), help="kinds of question to ask for, in turn")
    p.add_argument("--per-image", type=cli.number(int, 1), default=1, help="candidates an image and paradigm")
    p.add_argument("--temperature", type=cli.number(float, 0), default=1.0, help="0 is greedy")
    p.add_argument(
        "--max-new-tokens",
        type=cli.number(int, 1),
        default=160,
        help="longer replies are rejected as truncated",
    )
    p.add_argument(
        "--batch", type=cli.number(int, 1), default=16, help="images at a time, and between commits"
    )
    p.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at an unreadable image: skip puts it into rejected.jsonl",
    )
    p.add_argument(
        "--max-rejected",
        type=cli.number(float, 0, 1),
        default=0.1,
        help="with skip: stop where more than this share is unreadable",
    )
    p.add_argument(
        "--cycle",
        type=cli.number(int, 0),
        default=1,
        help="number of the cycle, for provenance; another one, other samples",
    )
    cli.add_run_arguments(p)
    args = p.parse_args()
    if bool(args.endpoint) != bool(args.endpoint_model):
        p.error("--endpoint and --endpoint-model go together")
    if args.endpoint and not URL.fullmatch(args.endpoint):
        p.error("--endpoint: give a URL like http://host:8000 or https://host/v1, without user and password")
    if len(set(args.paradigms)) < len(args.paradigms):
        p.error("--paradigms: one is named twice; --per-image asks it more often")
    return args


if __name__ == "__main__":
    # before torch is imported: --help answers at once
    ARGS = parse_args()

from medgr2 import loading, vlm

# ---------------------------------------------------------------------------------------------------------
# What to ask.


def read_images(path, skip=False, root=None):
    """One record an image (of a question file, the first about each), all of whose files exist unless `skip`. Raises RecordError.

    Better found missing now than after hours.
    """
    images = {}
    for record in records.read_records(path, ("image",), root):
        require(
            skip or os.path.isfile(record["image"]),
            f"{path}: record {record['id']}: no image {record['image']}: correct the record's `image`",
        )
        images.setdefault(record["image"], record)
    return list(images.values())


def turns(images):
    """For each image, its number within its modality; each modality counts from another start."""
    last = {}
    for record in images:
        modality = record.get("modality")
        last[modality] = last[modality] + 1 if modality in last else len(last)
        yield last[modality]


def drafts_of(record, turn, paradigms, tasks, per_image, cycle, seed, generator):
    """The candidates to be of one image: records that lack only what the generator will write.

    Tasks go round within a modality and paradigm, so that each of these cells asks for all tasks equally often; the
    paradigms start at different tasks, so that one image is asked for as many different ones as there are.
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
                # 31 bits: servers take no more
                "seed": runs.seed_of(seed, cycle, record["id"], paradigm, k) >> 32,
                "generator": generator,
            }
            drafts.append({field: value for field, value in draft.items() if value is not None})
    return drafts


# ---------------------------------------------------------------------------------------------------------
# Two ways to ask. Both: drafts → [(text, truncated)], in their order, each sampled with its own draft's seed.


def ask_model(drafts, vlm_, temperature, max_new_tokens, group):
    """Ask the VLM on this machine. `group`: so many neighbouring drafts share one prompt, which is read once."""
    images = {path: open_image(path) for path in {d["image"] for d in drafts}}
    asked = drafts[::group]
    prompts = vlm.encode_prompts(
        vlm_, [images[d["image"]] for d in asked], [generator_prompt(d["paradigm"], d["task"]) for d in asked]
    )
    seeds = [d["seed"] for d in drafts]
    ids, mask, truncated = vlm.sample(vlm_, prompts, seeds, max_new_tokens, temperature, group)  # (N, C)
    return list(zip(vlm.decode(vlm_, ids, mask), truncated.tolist()))


def connect(url, key, timeout):
    """A client of an OpenAI-compatible server; `url` with or without /v1."""
    from huggingface_hub import InferenceClient, get_session

    # one would take the images to a host that nobody named
    get_session().follow_redirects = False
    # without any key the client would send this machine's Hugging Face token to a stranger
    return InferenceClient(base_url=url.rstrip("/"), api_key=(key or "").strip() or "EMPTY", timeout=timeout)


def data_url(path):
    """The image as the local model would see it, as a PNG in a data URL."""
    png = io.BytesIO()
    open_image(path).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def ask_server(drafts, client, concurrency, retries, **settings):
    """Ask the server, `concurrency` requests at a time. Raises RunError where it refuses, or stays away."""
    images = {path: data_url(path) for path in {d["image"] for d in drafts}}

    def ask(draft):
        content = [
            {"type": "image_url", "image_url": {"url": images[draft["image"]]}},
            {"type": "text", "text": generator_prompt(draft["paradigm"], draft["task"])},
        ]
        return request(
            client, retries, [{"role": "user", "content": content}], seed=draft["seed"], **settings
        )

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, drafts))


def request(client, retries, messages, **settings):
    """One chat completion → (text, truncated); again after a lost connection, a time-out, a 429 or a 5xx.

    Raises RunError at any other 4xx, at a reply that is no chat completion, and when the retries are used up.
    """
    # the base class of whichever HTTP library the hub's version uses
    from huggingface_hub.errors import HTTPError

    for attempt in range(retries + 1):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            choice = client.chat_completion(messages, **settings).choices[0]
            # JSON may hold half a surrogate pair
            text = (choice.message.content or "").encode(errors="replace").decode()
            return text, choice.finish_reason == "length"
        except (HTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            problem = (
                f"{error}"
                if status is None
                else f"HTTP {status} {getattr(error, 'server_message', None) or ''}"
            )
            problem = " ".join(problem.split())[:300].replace(client.token, "***")
            if status is not None and status != 429 and status < 500:
                raise RunError(
                    f"{client.model}: {problem}; check --endpoint, --endpoint-model and the API key"
                ) from None
        except (ValueError, TypeError, AttributeError, LookupError):
            raise RunError(
                f"{client.model}: its reply is no chat completion (a redirect is not followed); check --endpoint"
            ) from None
    raise RunError(
        f"{client.model}: {problem}; gave up after {retries} retries, the same command goes on from here"
    )


# ---------------------------------------------------------------------------------------------------------
# What came back.


# an image's candidates stand together
@functools.lru_cache(maxsize=16)
def image_hash(path):
    return hash_image(path)


def identity(candidate):
    """Two candidates with the same identity are duplicates: same image (by content), same question, same answer."""
    return image_hash(candidate["image"]), normalise(candidate["question"]), normalise(candidate["answer"])


def judge(drafts, replies, seen):
    """Drafts and their replies → (candidates, rejected), together as many; `seen`: identities of earlier candidates."""
    candidates, rejected, new = [], [], set()
    for draft, (text, truncated) in zip(drafts, replies, strict=True):
        parsed, reason = (None, "truncated") if truncated else parse_candidate(text)
        key = parsed and identity(draft | parsed)
        if key in seen or key in new:
            reason = "duplicate"
        if reason:
            rejected.append(draft | {"reason": reason, "text": text})
        else:
            candidates.append(draft | parsed)
            new.add(key)
    return candidates, rejected


def committed(run, name):
    """Stream the records of one of the run's files so far; none where it has none yet."""
    path = run.path(name)
    return (
        records.read_records(path, root=records.ANYWHERE)
        if os.path.exists(path) and os.path.getsize(path)
        else ()
    )


def count(run, paradigms):
    """{paradigm: {kept or a reason: number}}, counted in the files themselves: so a resumed run counts all of them."""
    counts = {paradigm: Counter() for paradigm in paradigms}
    for record in committed(run, "candidates.jsonl"):
        counts[record["paradigm"]]["kept"] += 1
    for record in committed(run, "rejected.jsonl"):
        counts[record["paradigm"]][record["reason"]] += 1
    return counts


def summary(counter):
    """One Counter of `count` → its entry in metrics.json."""
    rejected = {reason: n for reason, n in sorted(counter.items()) if reason != "kept"}
    return {"asked": counter.total(), "kept": counter["kept"], "rejected": rejected}


def report(counts, total):
    """A table: a row each for asked, kept and the reasons; a column a paradigm, and all."""
    columns = [*counts.values(), total]
    reasons = [reason for reason, _ in total.most_common() if reason != "kept"]
    rows = [
        ["asked", *(c.total() for c in columns)],
        *([r, *(c[r] for c in columns)] for r in ("kept", *reasons)),
    ]
    return cli.format_table(rows, ["", *counts, "all"])


def main(args):
    skip = args.on_error == "skip"
    images = read_images(args.images, skip, args.image_root)
    unreadable = find_unreadable(images, args.max_rejected) if skip else {}
    run = runs.start(args, [args.images, args.model], free=("concurrency", "retries", "timeout"))
    if args.endpoint:
        client = connect(args.endpoint, os.environ.get(args.endpoint_key_env), args.timeout)
        ask = functools.partial(
            ask_server,
            client=client,
            concurrency=args.concurrency,
            retries=args.retries,
            model=args.endpoint_model,
            temperature=args.temperature,
            max_tokens=args.max_new_tokens,
        )
    else:
        group = args.per_image if len(args.tasks) == 1 else 1
        ask = functools.partial(
            ask_model,
            vlm_=loading.load(args.model, dtype=loading.best_dtype()),
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            group=group,
        )
    draft = functools.partial(
        drafts_of,
        paradigms=args.paradigms,
        tasks=args.tasks,
        per_image=args.per_image,
        cycle=args.cycle,
        seed=args.seed,
        generator=args.model or args.endpoint_model,
    )
    plan = list(zip(images, turns(images)))
    seen = {identity(candidate) for candidate in committed(run, "candidates.jsonl")}

    for step in run.progress(range(run.state.get("step", 0), len(plan), args.batch), "generate"):
        drafts = [d for record, turn in plan[step : step + args.batch] for d in draft(record, turn)]
        start = time.time()
        good = [d for d in drafts if d["image"] not in unreadable]
        candidates, rejected = judge(good, ask(good) if good else [], seen)
        rejected += [
            d | {"reason": "unreadable image", "text": unreadable[d["image"]]}
            for d in drafts
            if d["image"] in unreadable
        ]
        seen |= {identity(candidate) for candidate in candidates}
        for name, rows in (("candidates.jsonl", candidates), ("rejected.jsonl", rejected)):
            run.append(name, [records.with_relative_image(row, run.part) for row in rows])
        run.log(step=step, asked=len(drafts), kept=len(candidates), seconds=time.time() - start)
        run.commit(step=step + args.batch)

    counts = count(run, args.paradigms)
    total = sum(counts.values(), Counter())
    assert total.total() == len(plan) * len(args.paradigms) * args.per_image, (
        "a draft is neither kept nor rejected"
    )
    print(report(counts, total))
    run.finish(
        {"images": len(images), **summary(total), "by_paradigm": {p: summary(c) for p, c in counts.items()}},
        f"kept {total['kept']} of {total.total()} candidates about {len(images)} images",
    )


if __name__ == "__main__":
    cli.run_main(main, ARGS)
