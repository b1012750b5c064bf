"""Stage 2: the reward model. It learns from four levels of expert data, then scores and filters candidates.

    R(image, question, response) in [-6, 10]   and   P(relevant), P(coherent), P(faithful), which say why

A VLM backbone encodes image, question and response. Small heads take the log-probabilities that it gives the
response's tokens, with the image and with a blank one in its place. Four levels of responses are made from
the expert records (medgr2/levels.py), `--resamples` times:

    original 10     perturbed 6     incoherent 0     irrelevant -6

    loss = mean (R̂ - R̄)² + mean BCE of the three probabilities,     R̄ = (R + 6) / 16

Reads   train: expert questions and reports; rollouts of the policy on expert questions    score: candidates
Writes  train: OUT/backbone/, OUT/heads.safetensors, heads.json, metrics.jsonl, metrics.json (docs/metrics.md)
        score: OUT/scored.jsonl, accepted.jsonl, random.jsonl (as many, drawn at random), metrics.json, and
        rejected.jsonl if --on-error skip finds unreadable images or candidates that are too long

Departs from the paper:
1. The heads take log-probabilities. --no-likelihood is the paper's plain head, on the last hidden state.
2. Three more heads give reasons for R.
3. The backbone is frozen (--freeze nothing: it learns too). Each cycle trains the heads again, also on
   the policy's rollouts, at most --per-outcome for each expert question and outcome.
4. --threshold is the paper's τ. --cap, --top-k and --keep divide what they accept over tasks and modalities
   (--per).

    python reward.py train --model toy/backbone --data runs/toy/data/expert.jsonl --out runs/mine
    python reward.py score --model runs/mine --data runs/toy/cycle1/candidates/candidates.jsonl --keep 0.5 \\
        --image-root runs/toy --out runs/mine_scored
"""

import contextlib
import functools
import itertools
import json
import math
import os
import random
import textwrap
from typing import NamedTuple

from medgr2 import cli, measures, records, runs, selection, training
from medgr2.errors import ModelError, in_one_line, require
from medgr2.images import blank_images, open_images
from medgr2.levels import (
    LEVELS,
    evaluate_levels,
    evaluate_pairs,
    leave_out_too_long,
    load_groups,
    print_evaluation,
)
from medgr2.prefetch import for_preparing, prefetch
from medgr2.prompts import prompt_of, reference_response
from medgr2.records import R_MAX, R_MIN

HEADS = ("overall", "relevant", "coherent", "faithful")
# The likelihood features: three series over the tokens of two parts of a response, five statistics each.
LOWEST = 3
LIKELIHOOD_FEATURES = 3 * 2 * (2 + LOWEST)
# Responses per step of training the heads on precomputed features, and steps between lines of the log.
HEADS_BATCH, LOG_EVERY = 512, 50
# Levels whose answer is right, and wrong. The answer of a perturbed response may be either.
RIGHT, WRONG = ("original", "right"), ("incoherent", "irrelevant", "wrong")


def parse_args():
    p = cli.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    count, share = cli.number(int, 1), cli.number(float, 0, 1)
    t = commands.add_parser("train", help="train a reward model on expert records")
    t.add_argument("--model", required=True, help="backbone: folder or hub name of a VLM")
    t.add_argument("--data", required=True, nargs="+", help="expert record files: questions, reports")
    t.add_argument("--rollouts", nargs="*", default=[], help="rollouts.jsonl files of the policy")
    t.add_argument("--holdout", type=share, default=0.2, help="share of the images held out to evaluate on")
    freeze = ("backbone", "nothing")
    t.add_argument("--freeze", choices=freeze, default="backbone", help="what does not learn")
    cli.add_switch(t, "--shard", "with --freeze nothing: hold weights in parts, one per process (FSDP2)")
    cli.add_switch(
        t, "--likelihood", "the heads take token log-probabilities, not the last hidden state", default=True
    )
    t.add_argument("--resamples", type=count, default=3, help="times that each record's levels are drawn")
    most = "at most this many rollouts of each question and outcome (right, wrong, malformed)"
    t.add_argument("--per-outcome", type=count, default=3, help=most)
    t.add_argument("--hidden", type=count, default=64, help="width of the heads' shared layer")
    t.add_argument("--steps", type=count, default=2400, help="steps of training")
    lr = "learning rate (about 1e-5 with --freeze nothing)"
    t.add_argument("--lr", type=cli.number(float, 0), default=2e-3, help=lr)
    save = "steps between checkpoints, with --freeze nothing"
    t.add_argument("--save-every", type=count, default=200, help=save)
    s = commands.add_parser("score", help="score candidates and keep the best")
    s.add_argument("--model", required=True, help="folder of a trained reward model")
    s.add_argument("--data", required=True, help="candidates.jsonl")
    keep = s.add_mutually_exclusive_group(required=True)
    threshold = "τ: accept if R is at least this"
    keep.add_argument("--threshold", type=cli.number(float, R_MIN, R_MAX), help=threshold)
    keep.add_argument("--top-k", type=count, help="accept the k best")
    keep.add_argument("--keep", type=share, help="accept the best, this share of all")
    s.add_argument("--cap", type=count, help="with --threshold: at most this many per cell of --per")
    answered = "predictions.jsonl of eval.py --samples on --data: adds `pass_rate`, which --cap uses"
    s.add_argument("--answered", help=answered)
    skip = "at a bad line or unreadable image of --data, or a record too long: skip leaves it out"
    t.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=skip)
    skip = "at an unreadable image or a candidate longer than the context (skip: rejected.jsonl), or a bad "
    skip += "line (skip: left out)"
    s.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=skip)
    most = "largest share of bad lines, and of unreadable images, that skip may leave out"
    s.add_argument("--max-rejected", type=share, default=0.1, help=most)
    fields = ["task", "modality"]
    per = "cells over which --top-k and --keep are divided, and in which --cap counts"
    s.add_argument("--per", nargs="*", choices=fields, default=fields, help=per)
    for command in (t, s):
        batch = "questions at a time (train --freeze nothing: per step)"
        command.add_argument("--batch", type=count, default=32, help=batch)
        cli.add_image_arguments(command)
    cli.add_training_arguments(t)
    cli.add_run_arguments(s)
    args = p.parse_args()
    if args.command == "score" and args.cap and args.threshold is None:
        s.error("--cap goes with --threshold; --top-k and --keep already set a number")
    if args.command == "train" and args.shard and args.freeze != "nothing":
        t.error("--shard goes with --freeze nothing; a frozen backbone has no gradients to shard")
    return args


if __name__ == "__main__":
    # Before torch is imported, so that --help answers at once.
    ARGS = parse_args()

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits, gelu, mse_loss, pad

from medgr2 import context, encoding, loading, parallel, sharding, vlm

# ---------------------------------------------------------------------------------------------------------
# The features.


def answer_mask(backbone, responses, mask):
    """(N, C) bool: the tokens from `<answer>` to the end of turn; none in a report."""
    answer = torch.zeros(mask.shape, dtype=torch.bool)
    for row, response in zip(answer, responses):
        # The tokens of encoding.encode_continuations, with the place where each begins in the text.
        settings = {"add_special_tokens": False, "split_special_tokens": True}
        offsets = backbone.tokenizer(response, return_offsets_mapping=True, **settings)["offset_mapping"]
        start = response.find("<answer>")
        if start >= 0:
            row[: len(offsets) + 1] = torch.tensor([begin >= start for begin, _ in offsets] + [True])
    return answer.to(mask.device)


def token_statistics(x, part):
    """Sum, mean and the lowest three of x (N, C) over `part` (N, C) bool → (N, 5); zeros if it is empty."""
    total, count = (x * part).sum(1, keepdim=True), part.sum(1, keepdim=True)  # (N, 1)
    values = pad(x.masked_fill(~part, torch.inf), (0, LOWEST), value=torch.inf)
    lowest = values.topk(LOWEST, largest=False).values  # (N, 3)
    return torch.cat([total, total / count.clamp(min=1), lowest.masked_fill(lowest.isinf(), 0.0)], 1)


class EncodedPrompts(NamedTuple):
    """B images and prompts, encoded on the CPU: also with blank images, if the heads take likelihoods."""

    inputs: encoding.Inputs  # (B, P)
    blank: encoding.Inputs | None  # (B, P)


def encode_with_blank(backbone, likelihood, images, prompts, encode=encoding.encode_by_image):
    """B images and prompts → EncodedPrompts. Images of one size share their blank image."""
    inputs = encode(backbone, images, prompts, "cpu")
    if not likelihood:
        return EncodedPrompts(inputs, None)
    return EncodedPrompts(inputs, encode(backbone, blank_images(images), prompts, "cpu"))


def compute_features(backbone, encoded, responses, owner=None):
    """B images and prompts, N responses → the heads' features: (N, 30) likelihoods, or states (N, D).

    owner: as vlm.hidden_states takes it. By default each prompt has N / B responses.

    Three series over the tokens: log p; log p + entropy, how much less likely a token is than the backbone
    expected there (free wording costs nothing, contradicting the image does); log p with the image minus
    log p with a blank one.
    """
    ids, mask = encoding.encode_continuations(backbone, responses)  # (N, C)
    inputs = encoded.inputs.to(backbone.device)
    states = vlm.hidden_states(backbone, inputs, ids, mask, owner)  # (N, C+1, D)
    if encoded.blank is None:
        # The state after the end of turn.
        return states[torch.arange(len(ids)), mask.sum(1)].float()  # (N, D)
    logps, entropy = vlm.token_logps(backbone, inputs, ids, mask, states=states)  # (N, C)
    blank = encoded.blank.to(backbone.device)
    states = vlm.hidden_states(backbone, blank, ids, mask, owner)
    blank_logps, _ = vlm.token_logps(backbone, blank, ids, mask, states=states)  # (N, C)
    answer = answer_mask(backbone, responses, mask)
    # The reasoning (or the whole report) and the answer.
    parts = mask.bool() & ~answer, mask.bool() & answer
    series = logps, logps + entropy, logps - blank_logps
    return torch.cat([token_statistics(x, part) for x in series for part in parts], 1)


def feature_width(backbone, likelihood):
    return LIKELIHOOD_FEATURES if likelihood else backbone.head.weight.shape[1]


# ---------------------------------------------------------------------------------------------------------
# The reward model.


def normalise_reward(R):
    """R in [-6, 10] → R̄ in [0, 1]."""
    return (R - R_MIN) / (R_MAX - R_MIN)


def denormalise_reward(R_bar):
    """R̄ → R, clamped to [-6, 10]. Raises ModelError if an R̄ is not finite."""
    if not R_bar.isfinite().all():
        raise ModelError("a reward is not finite; train the reward model again with a lower --lr")
    return (R_bar * (R_MAX - R_MIN) + R_MIN).clamp(R_MIN, R_MAX)


class Heads(torch.nn.Module):
    """One shared layer over standardised features (N, F) → R̄ and three logits, (N, 4)."""

    def __init__(self, features, hidden):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.shared = torch.nn.Linear(features, hidden)
        self.out = torch.nn.Linear(hidden, len(HEADS))

    def standardise(self, features):
        """Take mean and standard deviation from these features (N, F)."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0).clamp(min=1e-3))

    def forward(self, x):
        return self.out(gelu(self.shared((x - self.mean) / self.std)))


class RewardModel:
    """Backbone and heads. Called with EncodedPrompts (B) and N = B·G responses: {head: N floats}."""

    def __init__(self, backbone, heads, likelihood, autocast=contextlib.nullcontext):
        # autocast: of the backbone's passes, if its weights learn.
        self.backbone, self.heads, self.likelihood, self.autocast = backbone, heads, likelihood, autocast

    def encoder(self, encode=encoding.encode_by_image):
        """encode(images, prompts) → EncodedPrompts, which a thread or another process may call."""
        return functools.partial(
            encode_with_blank, for_preparing(self.backbone), self.likelihood, encode=encode
        )

    def features(self, encoded, responses, owner=None):
        """The heads' features (N, F). Raises ModelError if they are not finite."""
        with self.autocast():
            features = compute_features(self.backbone, encoded, responses, owner)
        broken = (~features.isfinite()).any(1).nonzero()[:, 0].tolist()
        if broken:
            response = textwrap.shorten(responses[broken[0]], 80, placeholder=" ...")
            raise ModelError(
                f"the backbone's features are not finite for the response {response!r}; "
                "take another --model, or leave the record out"
            )
        return features

    @torch.no_grad()
    def __call__(self, encoded, responses):
        B = encoding.count_prompts(encoded.inputs)
        pairs = [(n * B // len(responses), response) for n, response in enumerate(responses)]
        # Equal responses to a question are computed once.
        different = list(dict.fromkeys(pairs))
        owner, texts = zip(*different)
        # One response to each prompt is one pass over both.
        owner = list(owner) if len(texts) > B else None
        out = self.heads(self.features(encoded, texts, owner))  # (n, 4)
        scores = torch.cat([denormalise_reward(out[:, :1]), out[:, 1:].sigmoid()], 1).tolist()
        score_of = dict(zip(different, scores))
        return dict(zip(HEADS, map(list, zip(*(score_of[pair] for pair in pairs)))))

    def save(self, folder):
        loading.save(self.backbone, os.path.join(folder, "backbone"))
        save_file(self.heads.state_dict(), os.path.join(folder, "heads.safetensors"))
        sizes = {"features": self.heads.mean.numel(), "hidden": self.heads.out.in_features}
        runs.write_json(os.path.join(folder, "heads.json"), sizes | {"likelihood": self.likelihood})

    @classmethod
    def load(cls, folder):
        """The reward model that `save` wrote. Raises ModelError if `folder` holds none."""
        try:
            with open(os.path.join(folder, "heads.json"), encoding="utf-8") as f:
                config = json.load(f)
            features, likelihood = config["features"], config["likelihood"]
            heads = Heads(features, config["hidden"])
            heads.load_state_dict(load_file(os.path.join(folder, "heads.safetensors")))
            if name := training.find_not_finite(heads.state_dict()):
                raise ValueError(f"{name} of its heads is not finite")
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            message = f"{folder}: not a reward model (reward.py train makes one): {in_one_line(error)}"
            raise ModelError(message) from error
        backbone = loading.load(os.path.join(folder, "backbone"), dtype=loading.best_dtype())
        width = feature_width(backbone, likelihood)
        if width != features:
            misfit = f"its heads take {features} features and its backbone gives {width}; train it again"
            raise ModelError(f"{folder}: not a reward model: {misfit}")
        return cls(backbone, heads.to(backbone.device), likelihood)


# ---------------------------------------------------------------------------------------------------------
# Training. A group is a record with its labelled responses: (record, [(level, response)]).


def encode_groups(encode, groups):
    """The groups, the smallest first, and their EncodedPrompts. encode: RewardModel.encoder()."""
    # fit_heads samples from the rows in this order.
    groups = sorted(groups, key=lambda group: len(group[1]))
    images = open_images(record["image"] for record, _ in groups)
    return groups, encode(images, [prompt_of(record) for record, _ in groups])


def group_features(model, encoded, batch=None):
    """Features of all responses, (n, F), and the (record, level) of each. Each prompt is prefilled once.

    encoded: from encode_groups. batch: the groups of all processes, if they must make the same passes.
    """
    groups, prompts = encoded
    owner = [b for b, (_, labelled) in enumerate(groups) for _ in labelled]
    if all(len(labelled) == 1 for _, labelled in batch or groups):
        # One pass over prompt and response.
        owner = None
    responses = [response for _, labelled in groups for _, response in labelled]
    rows = [(record, level) for record, labelled in groups for level, _ in labelled]
    return model.features(prompts, responses, owner), rows


def collect_features(model, groups, args, accelerator, progress=iter):
    """`group_features` of any number of groups, --batch at a time. Processes take turns; each gets all."""

    def work(encoded):
        features, rows = group_features(model, encoded)
        return features.cpu(), rows

    batches = [groups[i : i + args.batch] for i in range(0, len(groups), args.batch)]
    prepare = functools.partial(encode_groups, model.encoder())
    turns = parallel.take_turns(batches, prepare, work, accelerator, args.workers)
    features, rows = zip(*(found for _, found in zip(progress(batches), turns)))
    return torch.cat(features).to(model.backbone.device), list(itertools.chain(*rows))


def targets_of(levels, device):
    """(n, 4): R̄ and the three probabilities that the levels imply; NaN if a level implies nothing."""
    targets = torch.tensor([LEVELS[level] for level in levels], dtype=torch.float32, device=device)
    return torch.cat([normalise_reward(targets[:, :1]), targets[:, 1:]], 1)


def reward_loss(out, targets, whole=None):
    """MSE of R̄ plus the mean BCE of the three probabilities, over the known targets. Both (n, 4).

    `whole`: the targets of a batch (N, 4) of which these are a part: the losses of the parts then add up.
    """
    whole = targets if whole is None else whole
    known = ~targets[:, 1:].isnan()
    mse = mse_loss(out[:, 0], targets[:, 0], reduction="sum") / len(whole)
    bce = binary_cross_entropy_with_logits(out[:, 1:][known], targets[:, 1:][known], reduction="sum")
    return mse + bce / (~whole[:, 1:].isnan()).sum().clamp(min=1)


def standardise(model, groups, args, run, accelerator):
    """Let the heads standardise by the features of these groups → (features (n, F), their levels)."""
    progress = functools.partial(run.progress, description="features", together=True)
    with torch.no_grad(), sharding.gathered(model.backbone):
        features, rows = collect_features(model, groups, args, accelerator, progress)
    model.heads.standardise(features)
    return features, [level for _, level in rows]


def fit_heads(model, groups, args, run, accelerator):
    """Train the heads on features computed once → the number of skipped steps (training.step).

    Of several processes each computes the same.
    """
    features, levels = standardise(model, groups, args, run, accelerator)
    targets = targets_of(levels, features.device)
    optimizer = torch.optim.AdamW(model.heads.parameters(), lr=args.lr, weight_decay=0.1, fused=True)
    rng, skipped = random.Random(runs.seed_of(args.seed, "fit")), training.Skipped()
    for step in run.progress(range(args.steps), "heads", together=True):
        # Loss and gradient of a batch.
        index = rng.sample(range(len(levels)), min(len(levels), HEADS_BATCH))
        loss = reward_loss(model.heads(features[index]), targets[index])
        loss.backward()
        # Step. Nothing is clipped: only the norm is wanted.
        norm = training.clip_gradient(model.heads.parameters(), math.inf)
        training.step(optimizer, args.lr, norm)
        skipped.count(step, loss.item(), norm)
        # Log.
        if step % LOG_EVERY == 0:
            run.log(step=step, loss=loss.item(), grad_norm=norm, skipped=skipped.total)
    return skipped.total


def fit_jointly(model, groups, args, run, accelerator):
    """Train heads and backbone together → the number of skipped steps."""
    both = torch.nn.ModuleDict({"heads": model.heads, "backbone": model.backbone.model})
    parameters = {name: p for name, p in both.named_parameters() if p.requires_grad}
    # Apart, because the backbone's weights may be sharded. They do not decay: some get no gradient at all.
    learning = [[p for p in part.parameters() if p.requires_grad] for part in both.values()]
    decays = [{"params": part, "weight_decay": decay} for part, decay in zip(learning, (0.1, 0.0))]
    optimizer = torch.optim.AdamW(decays, lr=args.lr, fused=True)
    if run.state:
        model.heads.load_state_dict(run.state["standardisation"], strict=False)
        training.restore_state(run.state, both, optimizer)
    else:
        standardise(model, groups, args, run, accelerator)
    remaining = range(run.state.get("step", 0), args.steps)
    skipped = training.Skipped(run.state.get("skipped", 0))
    batches = prefetch_groups(model, groups, remaining, args, accelerator)
    for step, batch in zip(run.progress(remaining, "heads and backbone"), batches):
        # Loss and gradient of the whole batch.
        loss = joint_loss(model, *batch)
        loss.backward()
        training.sum_gradients(parameters.values(), accelerator)
        loss = accelerator.reduce(loss.detach(), "sum").item()
        # Step. Nothing is clipped: only the norm is wanted.
        norm = math.hypot(*(training.clip_gradient(part, math.inf) for part in learning))
        training.step(optimizer, args.lr, norm)
        skipped.count(step, loss, norm)
        # Log and commit.
        run.log(step=step, loss=loss, grad_norm=norm, skipped=skipped.total)
        if run.due(step + 1, args.save_every):
            standardisation = dict(model.heads.named_buffers())
            state = training.state(parameters, optimizer) | {"standardisation": standardisation}
            run.commit(step=step + 1, skipped=skipped.total, **state)
    return skipped.total


def prefetch_groups(model, groups, steps, args, accelerator):
    """For each step: (a batch of groups, this process's share of it, encoded, and its weight)."""
    # A sharded backbone computes in all processes at once, so all must make the same passes: no image is
    # shared, which would take one more.
    rng, encode = random.Random(runs.seed_of(args.seed, "fit")), model.encoder(encode=encoding.encode_prompts)
    drawn = [rng.sample(groups, min(len(groups), args.batch)) for _ in range(args.steps)]

    def prepare(step):
        batch = drawn[step]
        own = batch[accelerator.process_index :: accelerator.num_processes]
        # A process without a group of its own makes them with weight 0.
        return batch, encode_groups(encode, own or batch[:1]), bool(own)

    return prefetch(steps, prepare, args.workers)


def joint_loss(model, batch, encoded, weight):
    """This process's part, `encoded`, of the loss of a batch of groups, through the backbone."""
    x, rows = group_features(model, encoded, batch)
    y = targets_of([level for _, level in rows], x.device)
    whole = targets_of([level for _, labelled in batch for level, _ in labelled], x.device)
    return reward_loss(model.heads(x), y, whole) * weight


# ---------------------------------------------------------------------------------------------------------
# Evaluation on held-out images. docs/metrics.md explains each number.


@torch.no_grad()
def evaluate_heads(model, groups, args, accelerator, progress=iter):
    """{metric: value} of R on held-out groups."""
    features, rows = collect_features(model, groups, args, accelerator, progress)
    scores = denormalise_reward(model.heads(features)[:, 0]).cpu().numpy()  # (n,)
    levels = np.array([level for _, level in rows])
    targets = np.array([LEVELS[level][0] for level in levels])
    answered = np.array(["answer" in record for record, _ in rows]) & np.isin(levels, RIGHT + WRONG)
    return {
        "levels": evaluate_levels(scores, targets, levels),
        "ordered": evaluate_pairs(scores, levels),
        "spearman": measures.spearman(scores, targets),
        "auroc": measures.auroc(scores[answered], np.isin(levels, RIGHT)[answered]),
        "image_swap_drop": image_swap_drop(model, groups, args, accelerator, progress),
    }


def image_swap_drop(model, groups, args, accelerator, progress=iter):
    """Mean fall of R when each original gets another record's image; None if there is no other."""
    originals = [record for record, labelled in groups if "original" in dict(labelled)]
    others = random.Random(args.seed).sample(originals, len(originals))
    pairs = [(own, other) for own, other in zip(originals, others) if own["image"] != other["image"]]
    batches = [pairs[i : i + args.batch] for i in range(0, len(pairs), args.batch)]
    encode = model.encoder()

    def prepare(batch):
        rows, swapped = zip(*batch)
        encoded = [
            encode_references(encode, rows, [row["image"] for row in shown]) for shown in (rows, swapped)
        ]
        return rows, *encoded

    def work(batch):
        rows, *encoded = batch
        before, after = (score_references(model, rows, own)["overall"] for own in encoded)
        return [a - b for a, b in zip(before, after)]

    turns = parallel.take_turns(batches, prepare, work, accelerator, args.workers)
    drops = [drop for _, found in zip(progress(batches), turns) for drop in found]
    return float(np.mean(drops)) if drops else None


def train(args):
    accelerator = loading.start_accelerator()
    run = runs.start(args, [args.model, *args.data, *args.rollouts], accelerator.is_main_process)
    groups, held_out = load_groups(args)
    # A frozen backbone has the dtype that it scores in. Weights that learn stay fp32.
    dtype = loading.best_dtype() if args.freeze == "backbone" else torch.float32
    backbone = loading.load(args.model, accelerator.device, dtype)
    loading.limit_pixels(backbone, args.min_pixels, args.max_pixels)
    if args.freeze == "nothing":
        loading.freeze(backbone, "nothing")
    if args.shard:
        sharding.shard(backbone)
    groups, held_out = (leave_out_too_long(backbone, part, args.on_error) for part in (groups, held_out))
    heads = Heads(feature_width(backbone, args.likelihood), args.hidden).to(backbone.device)
    autocast = contextlib.nullcontext if args.freeze == "backbone" else accelerator.autocast
    model = RewardModel(backbone, heads, args.likelihood, autocast)
    work = f"{args.steps} steps on the responses to {len(groups)} questions and reports"
    context.tell_image_tokens(backbone, [record["image"] for record, _ in groups + held_out])
    run.announce(f"{work}, then {len(held_out)} held out")
    fit = fit_heads if args.freeze == "backbone" else fit_jointly
    skipped = fit(model, groups, args, run, accelerator)
    progress = functools.partial(run.progress, description="held out", together=True)
    with sharding.gathered(backbone):
        metrics = evaluate_heads(model, held_out, args, accelerator, progress)
    if args.shard:
        sharding.collect(backbone, run.main)
    if run.main:
        print_evaluation(metrics)
        model.save(run.part)
    known = [k for k in ("auroc", "spearman", "image_swap_drop") if metrics[k] is not None]
    line = "held-out " + ", ".join(f"{k} {metrics[k]:.3f}" for k in known)
    metrics |= {"examples": sum(len(labelled) for _, labelled in groups), "skipped": skipped}
    run.finish(metrics, line)


# ---------------------------------------------------------------------------------------------------------
# Scoring and filtering.


def encode_references(encode, rows, image_paths):
    """These images with the prompts of the records: EncodedPrompts."""
    return encode(open_images(image_paths), [prompt_of(row) for row in rows])


def score_references(model, rows, encoded):
    """{head: a score each} of the records' reference responses."""
    return model(encoded, [reference_response(row) for row in rows])


def select_candidates(rows, seed, per=(), threshold=None, top_k=None, keep=None, cap=None):
    """(accepted, random, tied): indices of the best of each cell, and of as many of the same cell at random.

    The best have the highest R. With a threshold, all with at least this R are accepted; a cap then prefers
    pass rates near one half, and among equal ones the highest R. A random draw breaks ties; `tied` counts the
    candidates in a tie that it broke.
    """
    cells = {}
    for i, row in enumerate(rows):
        cells.setdefault(tuple(row.get(field, "") for field in per), []).append(i)
    overall = [row["reward"]["overall"] for row in rows]
    # A random order, which sorting keeps among equals.
    draw = random.Random(runs.seed_of(seed, "ties"))
    eligible = [draw.sample(cell, len(cell)) for cell in cells.values()]
    order = [(0, -R) for R in overall]
    if threshold is not None:
        eligible = [[i for i in cell if overall[i] >= threshold] for cell in eligible]
        # What the policy always answers right teaches it nothing.
        order = [(abs(row.get("pass_rate", 0.5) - 0.5), -R) for row, R in zip(rows, overall)]
        places = [cap if cap else len(cell) for cell in eligible]
    else:
        total = round(keep * len(rows)) if top_k is None else top_k
        places = selection.allocate([len(cell) for cell in eligible], min(len(rows), total))
    ranked = [sorted(cell, key=lambda i: order[i]) for cell in eligible]
    best = [cell[:n] for cell, n in zip(ranked, places)]
    tied = sum(selection.count_tied([order[i] for i in cell], n) for cell, n in zip(ranked, places))
    # The control: as many of all candidates of each cell.
    rng = random.Random(runs.seed_of(seed, "random"))
    drawn = [i for cell, chosen in zip(cells.values(), best) for i in rng.sample(cell, len(chosen))]
    return sorted(itertools.chain(*best)), sorted(drawn), tied


def score(args):
    accelerator = Accelerator()
    run = runs.start(args, [args.model, args.data], accelerator.is_main_process)
    rows, rejected = selection.read_candidates(args)
    if args.answered:
        rows = selection.with_pass_rates(rows, args.answered)
    model = RewardModel.load(args.model)
    loading.limit_pixels(model.backbone, args.min_pixels, args.max_pixels)
    rows, too_long = selection.split_too_long(model.backbone, rows, args.on_error)
    rejected += too_long

    def append(name, rows):
        run.append(name, [records.with_relative_image(row, run.folder) for row in rows])

    if rejected and not run.state:
        append("rejected.jsonl", rejected)

    encode = model.encoder()

    def prepare(i):
        part = rows[i : i + args.batch]
        return part, encode_references(encode, part, [row["image"] for row in part])

    def score_batch(prepared):
        """The candidates, each with the reward of its reference response."""
        part, encoded = prepared
        scores = score_references(model, part, encoded)
        rewards = [{head: round(scores[head][k], 4) for head in HEADS} for k in range(len(part))]
        return [row | {"reward": reward} for row, reward in zip(part, rewards)]

    context.tell_image_tokens(model.backbone, [row["image"] for row in rows])
    run.announce(f"{len(rows)} candidates to score")
    steps = range(run.state.get("step", 0), len(rows), args.batch)
    # Score the candidates, a batch at a time. Processes take turns.
    scored = parallel.take_turns(steps, prepare, score_batch, accelerator, args.workers)
    for i, batch in zip(run.progress(steps, "score"), scored):
        append("scored.jsonl", batch)
        run.commit(step=i + args.batch)
    if run.main:
        accept(run, len(rejected), args)


def accept(run, rejected, args):
    """Keep the best of the scored candidates, and as many at random to compare with; finish the run."""
    rows = list(records.read_records(run.path("scored.jsonl"), root=records.ANYWHERE))
    how = args.per, args.threshold, args.top_k, args.keep, args.cap
    accepted, drawn, tied = select_candidates(rows, args.seed, *how)
    R = [row["reward"]["overall"] for row in rows]
    why = selection.explain_rejection(R, args.threshold)
    require(accepted, f"{args.data}: none of {len(rows)} is accepted: {why}")
    records.write_records(run.path("accepted.jsonl"), (rows[i] for i in accepted))
    records.write_records(run.path("random.jsonl"), (rows[i] for i in drawn))
    selection.print_selection(rows, accepted, R_MIN, R_MAX)
    saturated = R.count(R_MIN) + R.count(R_MAX)
    print(f"{saturated} of {len(rows)} have the least or greatest R that there is, {R_MIN} or {R_MAX}")
    print(f"{tied} are equal at the limit of what is accepted: a draw decided")
    metrics = {"scored": len(rows), "accepted": len(accepted), "rejected": rejected}
    metrics |= {"saturated": saturated, "tied": tied}
    metrics |= {"mean": float(np.mean(R)), "mean_accepted": float(np.mean([R[i] for i in accepted]))}
    aside = f", {rejected} set aside" if rejected else ""
    run.finish(metrics, f"accepted {len(accepted)} of {len(rows)}{aside}")


def main(args):
    {"train": train, "score": score}[args.command](args)


if __name__ == "__main__":
    cli.run_main(main, ARGS)
