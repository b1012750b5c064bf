"""Sampling, scoring and evaluating against what a user would write with transformers alone.

The model is one of benchmarks/grpo_step.py with 256 image tokens per image, so a prompt has about 300 tokens:
on a CPU that of 50 M parameters, on a GPU Qwen2.5-VL-3B's shape in bf16. Replies have C = 32. Both sides
compute the same, in one process and in turns:

    sample G     G replies to each of some prompts: vlm.sample against model.generate (num_return_sequences),
                 on a GPU also with a static cache, which the library compiles
    rewards      features of the reward model for 8 answers about each of 4 images: each answer a plain row,
                 one by one; or all rows in one batch
    options      scores of the 4 options of each of 8 questions, in the same two ways
    evaluate     greedy replies to questions, from image files to texts: eval.py's functions against batches
                 of processor and model.generate; 4 questions per image, or those of --data (VQA-RAD, ...)

floor: matrix products and attention of our side by themselves (benchmarks/floor.py); of samples also C times
reading the weights. Ratios are between two sides in one round.

    python benchmarks/inference.py                        into benchmarks/results/ and docs/performance.md
    python benchmarks/inference.py --data a=FILE b=FILE   with questions of record files too
    python benchmarks/inference.py --readme               writes the table from the committed result file
"""

import itertools
import os
import random
import sys
import tempfile
import time
from functools import partial
from operator import itemgetter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks"), os.path.join(ROOT, "toy")]
import readme
from grpo_step import GPU_ROWS, ROWS, SEED, build_llava, build_qwen, spread

from medgr2 import cli, records, runs
from medgr2.errors import RunError
from medgr2.prompts import TASKS, format_response, policy_prompt

RESULTS = os.path.join(ROOT, "benchmarks", "results")
MODEL, GPU_MODEL, C = "mid-256", "qwen-256", 32
# G: prompts.
SAMPLED = {1: 8, 8: 4, 64: 1}
# Images and answers to each, questions with options, images of `evaluate` and questions about each.
SCORED, OPTIONS, ASKED = (4, 8), 8, (16, 4)
# Questions of a file of --data.
FEW = 64
IMAGE = itemgetter("image")


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=FILE", help="question records to answer too"
    )
    p.add_argument("--rounds", type=cli.number(int, 1), default=3, help="turns of each side, after one")
    p.add_argument("--threads", type=cli.number(int, 1), default=os.cpu_count(), help="CPU threads")
    p.add_argument("--out", help="result file (benchmarks/results/inference_DEVICE.json)")
    cli.add_switch(p, "--readme", "only write the table, from the result file of the CPU")
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------
# What a user would write: processor, model and generate.


def plain_inputs(policy, rows):
    """The library's inputs of questions, from their image files."""
    from medgr2.images import open_image

    images = [[open_image(row["image"])] for row in rows]
    content = [[{"type": "image"}, {"type": "text", "text": policy_prompt(row)}] for row in rows]
    chats = [
        policy.processor.apply_chat_template([{"role": "user", "content": c}], add_generation_prompt=True)
        for c in content
    ]
    how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return policy.processor(text=chats, images=images, **how).to(policy.device)


def generate(policy, inputs, group=1, sampled=False, cache=None):
    """New tokens (N, C) of model.generate, which may not end."""
    P = inputs["input_ids"].shape[1]
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": group} if sampled else {"do_sample": False}
    never = {"suppress_tokens": policy.banned_ids, "max_new_tokens": C, "min_new_tokens": C}
    how |= {"cache_implementation": cache} if cache else {}
    return policy.model.generate(**inputs, **how, **never)[:, P:]


def plain_states(policy, inputs, ids):
    """Hidden states of prompt rows and what follows them (N, C) in one pass: (N, C+1, D)."""
    import torch

    whole = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    return policy.model.base_model(**whole, use_cache=False).last_hidden_state[:, -ids.shape[1] - 1 :]


def plain_sums(policy, rows, texts):
    """Σ log π of texts after the prompts of rows, each in a pass of its own, (N,)."""
    import torch

    sums = []
    for row, text in zip(rows, texts):
        ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ids], device=policy.device)
        logits = policy.head(plain_states(policy, plain_inputs(policy, [row]), ids)[:, :-1])
        logits[..., policy.banned_ids] = -torch.inf
        sums.append(logits.log_softmax(-1).gather(-1, ids[..., None]).sum().item())
    return sums


def plain_features(policy, rows, texts, size):
    """The reward model's features of texts after the prompts of rows, `size` rows in a pass."""
    import torch

    import reward
    from medgr2 import encoding
    from medgr2.images import open_image

    found = []
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        images, prompts = [open_image(row["image"]) for row in part], [policy_prompt(row) for row in part]
        encoded = reward.encode_with_blank(policy, True, images, prompts, encode=encoding.encode_prompts)
        found.append(reward.compute_features(policy, encoded, texts[i : i + size]))
    return torch.cat(found)


# ---------------------------------------------------------------------------------------------------------
# The comparisons: {name: {side: function}}; the results of `ours` and of another side are checked.


def sampling(policy, rows):
    from medgr2 import encoding, vlm

    found = {}
    for G, P in SAMPLED.items():
        inputs = plain_inputs(policy, rows[:P])
        prompts = encoding.Inputs(inputs, [])
        found[f"sample G = {G}"] = {
            "ours": partial(vlm.sample, policy, prompts, range(P * G), C, group=G),
            "generate": partial(generate, policy, inputs, G, sampled=True),
        }
        if policy.device.type == "cuda":
            static = partial(generate, policy, inputs, G, sampled=True, cache="static")
            found[f"sample G = {G}"]["generate, static cache"] = static
    return found


def rewards(policy, rows):
    import torch

    import reward
    from medgr2.images import open_images

    B, G = SCORED
    rows = rows[:: ASKED[1]][:B]
    texts = [format_response(f"I see {n}.", option) for row in rows for n, option in enumerate(2 * TASKS[:4])]
    repeated = [row for row in rows for _ in range(G)]

    def ours():
        images, prompts = open_images(row["image"] for row in rows), [policy_prompt(row) for row in rows]
        return reward.compute_features(policy, reward.encode_with_blank(policy, True, images, prompts), texts)

    sides = {"ours": ours, "one by one": partial(plain_features, policy, repeated, texts, 1)}
    sides["one batch"] = partial(plain_features, policy, repeated, texts, len(texts))
    with torch.no_grad():
        wanted, *others = (side() for side in sides.values())
    if any((wanted - other).abs().max() > 0.01 for other in others):
        raise RunError("rewards: the sides compute different features")
    return {"rewards": sides}


def options(policy, rows):
    import torch

    from medgr2 import answering, encoding
    from medgr2.images import open_images

    rows = [row for row in rows if "options" in row][:OPTIONS]
    texts = [format_response(None, option) for row in rows for option in row["options"]]
    repeated = [row for row in rows for _ in row["options"]]

    def ours():
        images, prompts = open_images(row["image"] for row in rows), [policy_prompt(row) for row in rows]
        inputs = encoding.encode_by_image(policy, images, prompts)
        found = answering.compute_option_logps(policy, inputs, rows)
        return [logp for sums, _ in found for logp in sums]

    with torch.no_grad():
        # The plain way counts the opening tag too, which all options of a question share.
        found, wanted = torch.tensor(ours()), torch.tensor(plain_sums(policy, repeated, texts))
    differences = (found - wanted).split([len(row["options"]) for row in rows])
    if any(own.std() > 0.01 for own in differences):
        raise RunError("options: the sides compute different scores")
    return {"options": {"ours": ours, "one by one": partial(plain_sums, policy, repeated, texts)}}


def evaluating(policy, sets, size=32):
    """{evaluate NAME: sides} of each {NAME: rows}."""
    import eval as evaluation
    from medgr2 import answering, encoding

    model = answering.Model(
        partial(encoding.encode_by_image, policy), partial(answering.ask_model, policy, C)
    )

    def ours(rows):
        rows, found = list(itertools.chain(*records.group_by(rows, IMAGE).values())), []
        for i in range(0, len(rows), size):
            batch = evaluation.prepare_batch(model, rows[i : i + size])
            found += evaluation.predict_batch(model, batch)
        return {row["id"]: row["response"] for row in found}

    def plain(rows):
        found = {}
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            ids = generate(policy, plain_inputs(policy, part))
            texts = policy.processor.batch_decode(ids, skip_special_tokens=True)
            found |= {row["id"]: text for row, text in zip(part, texts)}
        return found

    found = {}
    for name, rows in sets.items():
        found[f"evaluate {name}"] = {"ours": partial(ours, rows), "generate": partial(plain, rows)}
        if (same := count_equal(ours(rows), plain(rows))) < 0.95 * len(rows):
            raise RunError(f"evaluate {name}: only {same} of {len(rows)} replies are the same")
    return found


def count_equal(a, b):
    return sum(a[name] == b[name] for name in b)


# ---------------------------------------------------------------------------------------------------------


def measure(args):
    """{comparison: {"seconds": {side: of each round}, "floor_seconds", "reading_seconds" of samples}}."""
    import clinic
    import floor
    import torch

    from medgr2 import loading

    torch.set_num_threads(args.threads)
    found, gpu = {}, torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if gpu:
            build_qwen(GPU_ROWS[GPU_MODEL], folder)
        else:
            build_llava(ROWS[MODEL], folder)
        policy = loading.load(folder, dtype=loading.best_dtype())
        # All that a decoded token reads: not the vision tower and its projector.
        loading.freeze_images(policy)
        decoder = [p for p in policy.model.parameters() if p.requires_grad]
        # All replies have C tokens.
        policy.banned_ids = sorted({*policy.banned_ids, *policy.stop_ids})
        rows = list(clinic.question_rows(folder, "q", ASKED[0], SEED, ASKED[1], list(TASKS)))
        sets = {"4 per image": rows}
        for name, path in cli.parse_pairs("--data", args.data).items():
            groups = records.group_by(records.read_records(path, records.QUESTION, records.ANYWHERE), IMAGE)
            # Images at random, with all questions about each.
            drawn = random.Random(SEED).sample(list(groups.values()), len(groups))
            sets[name] = list(itertools.chain(*drawn))[:FEW]
        sides = sampling(policy, rows) | rewards(policy, rows) | options(policy, rows)
        for name, ways in (sides | evaluating(policy, sets)).items():
            seconds = {side: [] for side in ways}
            for k in range(1 + args.rounds):
                for side, way in ways.items():
                    floor.synchronise()
                    start = time.perf_counter()
                    way()
                    floor.synchronise()
                    # The first round warms up.
                    seconds[side] += [time.perf_counter() - start] * (k > 0)
            with floor.Recorder() as recorder:
                ways["ours"]()
            found[name] = {"seconds": seconds, "floor_seconds": floor.measure(recorder.calls)}
            if name.startswith("sample"):
                found[name]["reading_seconds"] = C * floor.measure_reading(decoder)
            print(name, {side: round(min(own), 3) for side, own in seconds.items()}, flush=True)
    return found


def write_table(result):
    rows = []
    for name, found in result["comparisons"].items():
        seconds, floor_seconds = found["seconds"], found["floor_seconds"]
        above = spread([own / floor_seconds for own in seconds["ours"]])["median"]
        reading = found.get("reading_seconds")
        read = f"{spread(seconds['ours'])['median'] / reading:.2f}" if reading else ""
        for side in list(seconds)[1:]:
            ratio = spread([theirs / own for theirs, own in zip(seconds[side], seconds["ours"])])
            cells = [name, side, f"{spread(seconds['ours'])['median']:.3f}"]
            cells += [f"{spread(seconds[side])['median']:.3f}"]
            cells += [f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})", f"{above:.2f}", read]
            rows.append(cells)
    hardware, versions = result["hardware"], result["versions"]
    source = f"Command `{result['command']}`; commit `{(result['git']['commit'] or '?')[:10]}`; "
    source += f"{result['threads']} CPU cores ({hardware['machine']}), torch {versions['torch']}, "
    source += f"transformers {versions['transformers']}."
    headers = ["", "against", "ours s", "theirs s", "theirs / ours", "ours / floor", "ours / reading"]
    readme.write_block("inference", f"{readme.format_table(headers, rows)}\n\n{source}")


def main(args):
    of_cpu = os.path.join(RESULTS, "inference_cpu.json")
    if args.readme:
        return write_table(runs.read_json(of_cpu, "run benchmarks/inference.py"))
    names = " ".join(value.partition("=")[0] + "=FILE" for value in args.data)
    command = "python benchmarks/inference.py" + (f" --data {names}" if names else "")
    result = {"command": command, "threads": args.threads, "comparisons": measure(args)} | runs.environment()
    gpu = bool(result["hardware"]["gpus"])
    out = args.out or os.path.join(RESULTS, f"inference_{'cuda' if gpu else 'cpu'}.json")
    runs.write_json(out, result)
    if out == of_cpu:
        write_table(result)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
