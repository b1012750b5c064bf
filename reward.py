"""Stage 2: the reward model. Trains it on four levels of expert data; scores and filters candidates with it.

    R(image, question, response) in [-6, 10]   and   P(relevant), P(coherent), P(faithful), which say why

A VLM backbone reads image, question and response; small heads read its last hidden state and *what it thinks of the
response*: its token log-probabilities, with the image and with a blank one in its place. From the expert records come
four levels of responses to each question (levels.py), drawn anew `--resamples` times:

    original 10     perturbed 6     incoherent 0     irrelevant -6

    loss = mean (R̂ - R̄)² + mean BCE of the three probabilities,     R̄ = (R + 6) / 16

Reads   train: question and report records; rollouts of the policy on expert questions    score: candidates
Writes  train: OUT/backbone/, OUT/heads.safetensors, metrics.json    score: scored.jsonl, accepted.jsonl, random.jsonl;
        with --on-error skip rejected.jsonl, whose images are unreadable

Departs from the paper: the heads read likelihoods beside the hidden state (`--no-likelihood`: the paper's plain head),
the backbone is frozen unless `--freeze nothing`, and there are three heads more than `overall`.

    python reward.py train --model toy/backbone --data runs/toy/data/expert.jsonl --out runs/toy/cycle1/reward
    python reward.py score --model runs/toy/cycle1/reward --data runs/toy/cycle1/candidates/candidates.jsonl --keep 0.5 \\
        --image-root runs/toy --out runs/toy/cycle1/scored
"""

import argparse
import json
import os
import random

from medgr2 import cli, records, runs
from medgr2.errors import ModelError, RecordError, require
from medgr2.images import find_unreadable, open_image
from medgr2.levels import LEVELS, build_levels, build_rollouts
from medgr2.measures import auroc, ranks
from medgr2.prompts import policy_prompt, reference_response, report_prompt

HEADS = ("overall", "relevant", "coherent", "faithful")


def parse_args():
    p = cli.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train", help="train a reward model on expert records")
    t.add_argument("--model", required=True, help="backbone: folder or hub name of a VLM")
    t.add_argument("--data", required=True, nargs="+", help="expert record files: questions, reports")
    t.add_argument(
        "--rollouts",
        nargs="*",
        default=[],
        help="rollouts.jsonl of the policy; those on expert questions are used",
    )
    t.add_argument(
        "--holdout", type=cli.number(float, 0, 1), default=0.2, help="share of the images kept for the report"
    )
    t.add_argument(
        "--freeze", choices=("backbone", "nothing"), default="backbone", help="what does not learn"
    )
    t.add_argument(
        "--likelihood",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="heads read token log-probabilities beside the hidden state",
    )
    t.add_argument(
        "--resamples",
        type=cli.number(int, 1),
        default=3,
        help="times that the levels are drawn from each record",
    )
    t.add_argument("--hidden", type=cli.number(int, 1), default=64, help="width of the heads' shared layer")
    t.add_argument("--steps", type=cli.number(int, 1), default=800, help="steps of training")
    t.add_argument(
        "--lr",
        type=cli.number(float, 0),
        default=2e-3,
        help="learning rate (about 1e-5 with --freeze nothing)",
    )
    s = commands.add_parser("score", help="score candidates and keep the best")
    s.add_argument("--model", required=True, help="folder of a trained reward model")
    s.add_argument("--data", required=True, help="candidates.jsonl")
    keep = s.add_mutually_exclusive_group(required=True)
    keep.add_argument(
        "--threshold", type=cli.number(float, -6, 10), help="τ: accept what scores at least this"
    )
    keep.add_argument("--top-k", type=cli.number(int, 1), help="accept the k best")
    keep.add_argument("--keep", type=cli.number(float, 0, 1), help="accept this share, the best")
    s.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at an unreadable image: skip puts its candidates into rejected.jsonl",
    )
    s.add_argument(
        "--max-rejected",
        type=cli.number(float, 0, 1),
        default=0.1,
        help="with skip: stop where more than this share is unreadable",
    )
    s.add_argument(
        "--per",
        nargs="*",
        choices=("task", "modality"),
        default=["task", "modality"],
        help="share --top-k or --keep out over these cells by their size, so that none starves",
    )
    for command in (t, s):
        command.add_argument("--batch", type=cli.number(int, 1), default=32, help="questions at a time")
        cli.add_run_arguments(command)
    return p.parse_args()


if __name__ == "__main__":
    # before torch is imported: --help answers at once
    ARGS = parse_args()

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits, gelu, mse_loss

from medgr2 import loading, vlm

# ---------------------------------------------------------------------------------------------------------
# The reward model.


def prompt_of(record):
    return report_prompt() if "report" in record else policy_prompt(record)


def answer_mask(vlm_, responses, mask):
    """(N, C) bool: the tokens from `<answer>` on; none in a report."""
    starts = [t.find("<answer>") if "<answer>" in t else len(t) + 1 for t in responses]
    offsets = [
        vlm_.tokenizer(t, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        # cut as vlm.encode_continuations does
        for t in responses
    ]
    rows = [
        [a >= start for a, _ in row] + [start <= len(t)] for row, start, t in zip(offsets, starts, responses)
    ]
    return torch.tensor([r + [False] * (mask.shape[1] - len(r)) for r in rows], device=mask.device)


def summary(x, part):
    """Sum, mean and the three lowest of x (N, C) over `part` (N, C) bool → (N, 5); zeros over nothing."""
    total, count = (x * part).sum(1), part.sum(1)
    lowest = (
        torch.nn.functional.pad(x.masked_fill(~part, torch.inf), (0, 3), value=torch.inf)
        .topk(3, largest=False)
        .values
    )
    return torch.cat(
        [total[:, None], (total / count.clamp(min=1))[:, None], lowest.masked_fill(lowest.isinf(), 0.0)], 1
    )


def read_features(vlm_, images, prompts, responses, likelihood):
    """What the heads read: (N, D), or (N, D + 30) with likelihoods. B images and prompts, N = B·G responses.

    Three series over the tokens: log p; log p + entropy (how much less likely than what the backbone expected there: free
    wording costs nothing, contradicting the image does); log p with the image less log p with a blank one.
    """
    ids, mask = vlm.encode_continuations(vlm_, responses)  # (N, C)
    inputs = vlm.encode_prompts(vlm_, images, prompts)
    states = vlm.hidden_states(vlm_, inputs, ids, mask)  # (N, C+1, D)
    # (N, D): the state after the end of turn
    last = states[torch.arange(len(ids)), mask.sum(1)]
    if not likelihood:
        return last.float()
    seen, entropy = vlm.token_logps(vlm_, inputs, ids, mask, states=states)
    blank = vlm.encode_prompts(vlm_, [Image.new("RGB", i.size, (128, 128, 128)) for i in images], prompts)
    unseen, _ = vlm.token_logps(vlm_, blank, ids, mask)
    answer = answer_mask(vlm_, responses, mask)
    parts = (mask.bool() & ~answer, mask.bool() & answer)
    series = (seen, seen + entropy, seen - unseen)
    return torch.cat([last.float(), *(summary(x, part) for x in series for part in parts)], 1)


class Heads(torch.nn.Module):
    """One shared layer over standardised features (N, F); four outputs: R̄ and three logits, (N, 4)."""

    def __init__(self, features, hidden):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.shared = torch.nn.Linear(features, hidden)
        self.out = torch.nn.Linear(hidden, len(HEADS))

    def forward(self, x):
        return self.out(gelu(self.shared((x - self.mean) / self.std)))


class RewardModel:
    """Backbone and heads. Called with B images and prompts and N = B·G responses: {head: N floats}."""

    def __init__(self, backbone, heads, likelihood):
        self.backbone, self.heads, self.likelihood = backbone, heads, likelihood

    def features(self, images, prompts, responses):
        return read_features(self.backbone, images, prompts, responses, self.likelihood)

    @torch.no_grad()
    def __call__(self, images, prompts, responses):
        out = self.heads(self.features(images, prompts, responses))  # (N, 4)
        overall = (out[:, 0] * 16 - 6).clamp(-6, 10)
        return dict(zip(HEADS, torch.cat([overall[:, None], out[:, 1:].sigmoid()], 1).T.tolist()))

    def save(self, folder):
        loading.save(self.backbone, os.path.join(folder, "backbone"))
        save_file(self.heads.state_dict(), os.path.join(folder, "heads.safetensors"))
        runs.write_json(
            os.path.join(folder, "heads.json"),
            {
                "features": self.heads.mean.numel(),
                "hidden": self.heads.out.in_features,
                "likelihood": self.likelihood,
            },
        )

    @classmethod
    def load(cls, folder):
        """Raises ModelError where `folder` holds no reward model."""
        try:
            with open(os.path.join(folder, "heads.json"), encoding="utf-8") as f:
                config = json.load(f)
            heads = Heads(config["features"], config["hidden"])
            heads.load_state_dict(load_file(os.path.join(folder, "heads.safetensors")))
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as e:
            raise ModelError(
                f"{folder}: not a reward model (reward.py train makes one): {loading.in_one_line(e)}"
            ) from e
        backbone = loading.load(os.path.join(folder, "backbone"), dtype=loading.best_dtype())
        width = backbone.head.weight.shape[1] + (30 if config["likelihood"] else 0)
        if width != config["features"]:
            raise ModelError(
                f"{folder}: not a reward model: its heads read {config['features']} features, "
                f"its backbone has {width}; train it again"
            )
        return cls(backbone, heads.to(backbone.device), config["likelihood"])


# ---------------------------------------------------------------------------------------------------------
# Training.


def collect(model, groups, batch, progress):
    """Features of all responses, each image and prompt read once: (N, F), and [(record, level)] of the rows."""
    features, rows = [], []
    for i in progress(range(0, len(groups), batch)):
        part = sorted(groups[i : i + batch], key=lambda g: len(g[1]))
        width = max(len(drawn) for _, drawn in part)
        # same G for all
        padded = [response for _, drawn in part for _, response in (drawn * width)[:width]]
        images = [open_image(r["image"]) for r, _ in part]
        out = model.features(images, [prompt_of(r) for r, _ in part], padded)  # (B·width, F)
        for k, (record, drawn) in enumerate(part):
            features.append(out[k * width : k * width + len(drawn)])
            rows += [(record, level) for level, _ in drawn]
    return torch.cat(features), rows


def targets_of(levels, device):
    """(N, 4): R̄ and the three probabilities that the levels imply; NaN where they imply nothing."""
    t = torch.tensor([LEVELS[level] for level in levels], dtype=torch.float32, device=device)
    return torch.cat([(t[:, :1] + 6) / 16, t[:, 1:]], 1)


def reward_loss(out, targets):
    """MSE of R̄ plus the mean BCE of the three probabilities, over the targets that there are. Both (N, 4)."""
    known = ~targets[:, 1:].isnan()
    bce = binary_cross_entropy_with_logits(out[:, 1:][known], targets[:, 1:][known]) if known.any() else 0.0
    return mse_loss(out[:, 0], targets[:, 0]) + bce


def fit(model, groups, args, run):
    """Train the heads on features computed once, or, with --freeze nothing, heads and backbone together."""
    with torch.no_grad():
        features, rows = collect(model, groups, args.batch, lambda it: run.progress(it, "features"))
    targets = targets_of([level for _, level in rows], features.device)
    model.heads.mean.copy_(features.mean(0))
    model.heads.std.copy_(features.std(0).clamp(min=1e-3))
    whole = args.freeze == "nothing"
    parameters = [*model.heads.parameters()] + ([*model.backbone.model.parameters()] if whole else [])
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.1)
    rng = random.Random(runs.seed_of(args.seed, "fit"))
    for step in run.progress(range(args.steps), "heads"):
        if whole:
            x, picked = collect(model, rng.sample(groups, min(len(groups), args.batch)), args.batch, iter)
            y = targets_of([level for _, level in picked], x.device)
        else:
            index = rng.sample(range(len(rows)), min(len(rows), 512))
            x, y = features[index], targets[index]
        loss = reward_loss(model.heads(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            run.log(step=step, loss=loss.item())


# ---------------------------------------------------------------------------------------------------------
# The report on held-out images.


def spearman(x, y):
    """Correlation of the ranks; None where either is constant."""
    x, y = ranks(x), ranks(y)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else None


@torch.no_grad()
def report(model, groups, batch, seed):
    """Held-out quality: by level, by pair of levels, and what replacing the image does to originals."""
    features, rows = collect(model, groups, batch, iter)
    scores = (model.heads(features)[:, 0] * 16 - 6).clamp(-6, 10).cpu().numpy()
    level = np.array([l for _, l in rows])
    truth = np.array([LEVELS[l][0] for l in level])
    present = [l for l in LEVELS if (level == l).any()]
    ordered = {
        f"{a} > {b}": auroc(
            np.concatenate([scores[level == a], scores[level == b]]),
            np.repeat([True, False], [(level == a).sum(), (level == b).sum()]),
        )
        for i, a in enumerate(present)
        for b in present[i + 1 :]
        if LEVELS[a][0] > LEVELS[b][0]
    }
    originals = [r for r, drawn in groups if drawn[0][0] == "original" or ("original" in dict(drawn))]
    swapped = random.Random(seed).sample(originals, len(originals))
    pairs = [(a, b) for a, b in zip(originals, swapped) if a["image"] != b["image"]]
    drops = [
        x - y
        for i in range(0, len(pairs), batch)
        for x, y in zip(
            *(
                model(
                    [open_image(p[k]["image"]) for p in pairs[i : i + batch]],
                    [prompt_of(a) for a, _ in pairs[i : i + batch]],
                    [reference_response(a) for a, _ in pairs[i : i + batch]],
                )["overall"]
                for k in (0, 1)
            )
        )
    ]
    answered = np.array(["answer" in r for r, _ in rows]) & np.isin(
        level, ("original", "incoherent", "irrelevant", "right", "wrong")
    )
    return {
        "levels": {
            l: {
                "n": int((level == l).sum()),
                "mean": float(scores[level == l].mean()),
                "mae": float(np.abs(scores - truth)[level == l].mean()),
            }
            for l in present
        },
        "ordered": ordered,
        "spearman": spearman(scores, truth),
        "auroc": auroc(scores[answered], np.isin(level, ("original", "right"))[answered]),
        "image_swap_drop": float(np.mean(drops)) if drops else None,
    }


def print_report(found):
    print(
        cli.format_table(
            [(l, m["n"], LEVELS[l][0], m["mean"], m["mae"]) for l, m in found["levels"].items()],
            ("level", "n", "target", "mean", "MAE"),
        )
    )
    print(cli.format_table(list(found["ordered"].items()), ("pair", "in order")))


def train(args):
    run = runs.start(args, [args.model, *args.data, *args.rollouts])
    rows = [r for file in args.data for r in records.read_records(file, ("image",), args.image_root)]
    rows = [r for r in rows if "answer" in r or "report" in r]
    require(rows, f"{args.data[0]}: neither questions with answers nor reports; give expert records")
    parts = records.split_records(rows, (1 - args.holdout, 0, args.holdout), args.seed)
    held_images = {r["image"] for r in parts["test"]}
    groups = build_levels(parts["train"], args.resamples, args.seed)
    held = build_levels(parts["test"], 1, args.seed)
    for record, drawn in build_rollouts(args.rollouts, args.image_root):
        (held if record["image"] in held_images else groups).append((record, drawn))
    if not groups or not held:
        raise RecordError(
            f"{args.data[0]}: too few records to train on and hold out; more data, or another --holdout"
        )
    # frozen, it computes in what it will score with; trained, its weights stay fp32
    backbone = loading.load(
        args.model, dtype=loading.best_dtype() if args.freeze == "backbone" else torch.float32
    )
    width = backbone.head.weight.shape[1] + (30 if args.likelihood else 0)
    model = RewardModel(backbone, Heads(width, args.hidden).to(backbone.device), args.likelihood)
    fit(model, groups, args, run)
    found = report(model, held, args.batch, args.seed)
    print_report(found)
    model.save(run.part)
    run.finish(
        found | {"examples": sum(len(d) for _, d in groups)},
        "held-out "
        + ", ".join(
            f"{k} {found[k]:.3f}" for k in ("auroc", "spearman", "image_swap_drop") if found[k] is not None
        ),
    )


# ---------------------------------------------------------------------------------------------------------
# Scoring and filtering.


def shares(sizes, total):
    """`total` places over cells of these sizes, in proportion; what rounding leaves goes to the largest remainders."""
    exact = [total * n / max(1, sum(sizes)) for n in sizes]
    places = [int(x) for x in exact]
    for i in sorted(range(len(sizes)), key=lambda i: places[i] - exact[i])[: total - sum(places)]:
        places[i] += 1
    return places


def choose(rows, seed, per=(), threshold=None, top_k=None, keep=None):
    """(accepted, random) indices: the best of each cell, and as many of the same cell at random for comparison."""
    cells = {}
    for i, r in enumerate(rows):
        cells.setdefault(tuple(r.get(field, "") for field in per), []).append(i)
    # ties: order of the file
    best = [sorted(c, key=lambda i: -rows[i]["reward"]["overall"]) for c in cells.values()]
    if threshold is not None:
        places = [sum(rows[i]["reward"]["overall"] >= threshold for i in c) for c in best]
    else:
        places = shares(
            [len(c) for c in best], min(len(rows), top_k if keep is None else round(keep * len(rows)))
        )
    rng = random.Random(runs.seed_of(seed, "random"))
    return (
        sorted(i for c, k in zip(best, places) for i in c[:k]),
        sorted(i for c, k in zip(cells.values(), places) for i in rng.sample(c, k)),
    )


def print_summary(rows, accepted):
    """How many were kept by task and modality, and where the scores lie."""
    for field in ("task", "modality"):
        names = sorted({r.get(field, "") for r in rows})
        print(
            cli.format_table(
                [
                    (
                        n,
                        sum(r.get(field, "") == n for r in rows),
                        sum(rows[i].get(field, "") == n for i in accepted),
                    )
                    for n in names
                ],
                (field, "scored", "accepted"),
            )
        )
    counts, edges = np.histogram([r["reward"]["overall"] for r in rows], bins=8, range=(-6, 10))
    print(
        "\n".join(
            f"{a:5.0f} to {b:3.0f} {'█' * round(50 * c / max(counts))} {c}"
            for a, b, c in zip(edges, edges[1:], counts)
        )
    )


def score(args):
    run = runs.start(args, [args.model, args.data])
    rows = list(records.read_records(args.data, records.QUESTION, args.image_root))
    unreadable = find_unreadable(rows, args.max_rejected) if args.on_error == "skip" else {}
    rejected = [
        r | {"reason": "unreadable image", "text": unreadable[r["image"]]}
        for r in rows
        if r["image"] in unreadable
    ]
    rows = [r for r in rows if r["image"] not in unreadable]
    model = RewardModel.load(args.model)
    here = lambda rows: (records.with_relative_image(r, run.folder) for r in rows)  # noqa: E731
    if rejected and not run.state:
        run.append("rejected.jsonl", here(rejected))
    for i in run.progress(range(run.state.get("step", 0), len(rows), args.batch), "score"):
        part = rows[i : i + args.batch]
        rewards = model(
            [open_image(r["image"]) for r in part],
            [prompt_of(r) for r in part],
            [reference_response(r) for r in part],
        )
        run.append(
            "scored.jsonl",
            here(r | {"reward": {h: round(rewards[h][k], 4) for h in HEADS}} for k, r in enumerate(part)),
        )
        run.commit(step=i + args.batch)
    rows = list(records.read_records(run.path("scored.jsonl"), root=records.ANYWHERE))
    accepted, drawn = choose(rows, args.seed, args.per, args.threshold, args.top_k, args.keep)
    records.write_records(run.path("accepted.jsonl"), (rows[i] for i in accepted))
    records.write_records(run.path("random.jsonl"), (rows[i] for i in drawn))
    print_summary(rows, accepted)
    mean = lambda index: float(np.mean([rows[i]["reward"]["overall"] for i in index])) if index else None  # noqa: E731
    run.finish(
        {
            "scored": len(rows),
            "accepted": len(accepted),
            "rejected": len(rejected),
            "mean": mean(range(len(rows))),
            "mean_accepted": mean(accepted),
        },
        f"accepted {len(accepted)} of {len(rows)}"
        + (f", {len(rejected)} with an unreadable image set aside" if rejected else ""),
    )


def main(args):
    {"train": train, "score": score}[args.command](args)


if __name__ == "__main__":
    cli.run_main(main, ARGS)
