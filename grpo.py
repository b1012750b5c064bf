"""Stage 4: group relative policy optimisation (GRPO) with the reward model and answer match.

For each of P questions the policy samples G responses at temperature 1. Each gets the paper's hybrid reward

    r_i = α · R̄(image, question, y_i) + β · 1[extract(y_i) = answer],        R̄ = (R + 6) / 16

but a malformed response gets r_i = 0, even if its answer is right. (Malformed: anything but one <answer>
part, alone or after one <think> part, or an answer that names no option.) The answer to a question of
--unlabelled, such as a candidate that was not accepted, is unknown or not trusted. R̄ stands in for the match:
r_i = (α + β) · R̄.

The advantage is relative to the group, Â_i = r_i - mean_group r. If all responses of a group are right, R
still differs with their reasoning. So a group counts only if its rewards' std is above --min-spread;
otherwise another is sampled in its place. The policy then maximises, over the N = P·G responses,

    J = 1 / Σ_i |y_i| · Σ_i Σ_t [ min(ρ_it Â_i, clip(ρ_it, 1-ε, 1+ε) Â_i) - β_KL · KL_it ]
    ρ_it = π(y_it|·) / π_old(y_it|·)        KL_it = ρ_it · k3_it        k3_it = π_ref/π - log(π_ref/π) - 1

    --loss dapo      as above: every token weighs the same. DAPO's other part is --epsilon-high 0.28
                     (arXiv 2503.14476)
    --loss grpo      1/N Σ_i 1/|y_i| in place of 1 / Σ_i |y_i| · Σ_i. With --scale-rewards group, which
                     divides Â_i by std_group r + 1e-4, it is DeepSeekMath's (arXiv 2402.03300)
    --loss dr_grpo   1 / (N · max_new_tokens) in its place: no length bias (arXiv 2503.20783)
    --loss gspo      ρ_i = exp(mean_t log ρ_it), one ratio per sequence. Its ε is far smaller, about 3e-4
                     (arXiv 2507.18071)

    --kl-estimator   KL_it, and the next-token divergence whose gradient it has in expectation (k3 and k2:
                     only while ρ is 1):
        k3_unbiased  ρ_it · k3_it            KL(π, π_ref)        DeepSeek-V3.2, arXiv 2512.02556
        k3           k3_it                   KL(π_ref, π)        Schulman 2020, and in DeepSeekMath
        k2           1/2 · log²(π_ref/π)     KL(π, π_ref)        Schulman 2020; gradient: arXiv 2510.01555

β_KL is --kl, 0 by default; --beta is the paper's weight of the answer match. With one update per batch of
rollouts (--iterations 1, the default) every ρ is 1 and nothing is clipped.

N and Σ|y_i| are totals over all processes, so a step does not depend on micro-batches or processes (but each
process replaces groups in its own share only). With --mask-truncated they leave out truncated responses.
The vision tower and its projector stay as SFT left them (--freeze images), so an image is encoded once for
its samples, the reference and every update; otherwise every pass encodes it again.

Reads   question records, with answers (--data) or without (--unlabelled); a reward model; expert records
        for the watch
Writes  OUT/ in the Hugging Face format, rollouts.jsonl, metrics.jsonl (docs/metrics.md explains each metric)

Departs from the paper:
  1. R is normalised to [0, 1]. With `--reward-scale raw`, as the paper writes it, the match term is 1.5% of
     the reward's range, and a malformed response gets α · (-6).
  2. The advantage is not divided by the group's std, which would magnify the reward model's noise.
  3. It also trains on candidates that were not accepted (--unlabelled). The policy mostly answers SFT's
     questions right, so few of their groups are informative.
  4. A watch compares the reward with the truth on expert questions and warns of reward hacking.

    python grpo.py --model runs/toy/cycle1/sft --reward runs/toy/cycle1/reward --out runs/mine \\
        --data runs/toy/cycle1/scored/accepted.jsonl --val runs/toy/data/val.jsonl --image-root runs/toy
"""

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

from medgr2 import cli, records, runs, training
from medgr2.errors import RunError
from medgr2.prompts import is_match, parse_response


def parse_args():
    p = cli.Parser(description=__doc__)
    count, from_0 = cli.number(int, 1), cli.number(float, 0)
    p.add_argument("--model", required=True, help="policy to start from, also the frozen reference")
    p.add_argument("--reward", required=True, help="folder of a reward model")
    p.add_argument("--data", required=True, nargs="+", help="question record files to train on")
    unlabelled = "more of them, less those of --data; R stands in for the match with the answer"
    p.add_argument("--unlabelled", nargs="*", default=[], help=unlabelled)
    p.add_argument("--val", help="expert question records for the watch")
    p.add_argument("--steps", type=count, default=200, help="batches of rollouts")
    p.add_argument("--prompts", type=count, default=8, help="P, questions per step")
    p.add_argument("--group", type=cli.number(int, 2), default=8, help="G, responses to each")
    p.add_argument("--iterations", type=count, default=1, help="updates on each batch of rollouts")
    p.add_argument("--max-new-tokens", type=count, default=96, help="longest response")
    p.add_argument("--loss", choices=("grpo", "dr_grpo", "dapo", "gspo"), default="dapo", help="see above")
    p.add_argument("--epsilon", type=cli.number(float, 0, 1), default=0.2, help="clip the ratio at 1 - this")
    p.add_argument("--epsilon-high", type=from_0, help="clip the ratio at 1 + this (default: --epsilon)")
    p.add_argument("--kl", type=from_0, default=0.0, help="weight of the KL term; 0 loads no reference")
    estimators = ("k3", "k3_unbiased", "k2")
    p.add_argument("--kl-estimator", choices=estimators, default="k3_unbiased", help="see above")
    p.add_argument("--alpha", type=from_0, default=0.8, help="weight of the reward model")
    p.add_argument("--beta", type=from_0, default=0.2, help="weight of the answer match (not of the KL)")
    p.add_argument("--reward-scale", choices=("unit", "raw"), default="unit", help="R in [0, 1] or [-6, 10]")
    scale = "divide advantages by the std of this"
    p.add_argument("--scale-rewards", choices=("group", "batch", "none"), default="none", help=scale)
    cli.add_switch(p, "--mask-truncated", "leave responses cut at --max-new-tokens out of the loss")
    spread = "replace groups whose rewards' std is not above this by others; -1 keeps every group"
    p.add_argument("--min-spread", type=cli.number(float, -1), default=0.25, help=spread)
    p.add_argument("--lr", type=from_0, default=3e-4, help="peak rate (the toy's; about 1e-6 for 7B)")
    share = cli.number(float, 0, 1)
    p.add_argument("--warmup", type=share, default=0.1, help="share of the steps in which the rate rises")
    p.add_argument("--clip", type=cli.number(float, 1e-6), default=1.0, help="largest gradient norm")
    freeze = "what does not learn: vision tower and projector, the tower only, nothing"
    p.add_argument("--freeze", choices=("images", "vision", "nothing"), default="images", help=freeze)
    lora = "train a LoRA adapter of this rank, then merge it; OUT/adapter holds it alone (needs peft)"
    p.add_argument("--lora", type=count, metavar="R", help=lora)
    cli.add_switch(p, "--shard", "hold weights, gradients and moments in parts, one per process (FSDP2)")
    rollout_batch = "questions to sample and score at a time (default: all): less memory, same result"
    p.add_argument("--rollout-batch", type=count, help=rollout_batch)
    p.add_argument("--micro-batch", type=count, default=8, help="groups per backward pass; same result")
    micro_group = "responses of each group per backward pass (default: all): less memory, same result"
    p.add_argument("--micro-group", type=count, help=micro_group)
    cli.add_switch(p, "--gradient-checkpointing", "recompute activations: less memory, more time")
    patience = "end the run after this many steps in a row without any reward, or with most responses cut"
    p.add_argument("--patience", type=cli.number(int, 0), default=20, help=f"{patience}; 0 never")
    p.add_argument("--watch-every", type=count, default=25, help="steps between accuracy checks on --val")
    p.add_argument("--watch-items", type=count, default=200, help="records of --val to check")
    skip = "at a bad line or unreadable image of these files, or a record too long: skip leaves it out"
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=skip)
    p.add_argument("--test", help="test file: refuse to train on anything it holds (medgr2/leakage.py)")
    cli.add_switch(p, "--allow-leakage", "with --test: train anyway")
    p.add_argument("--save-every", type=count, default=25, help="steps between checkpoints")
    cli.add_image_arguments(p)
    cli.add_training_arguments(p)
    return p.parse_args()


if __name__ == "__main__":
    # Before torch is imported, so that --help answers at once.
    ARGS = parse_args()

import torch
from accelerate.utils import gather_object

from medgr2 import adapters, context, encoding, loading, rollouts, sharding, vlm
from medgr2.watch import Watch
from reward import RewardModel, normalise_reward
from triton_ops import LossInputs, linear_grpo_loss

# A step samples at most this many batches before it makes do with fewer informative groups.
MAX_BATCHES = 4


# ---------------------------------------------------------------------------------------------------------
# The loss.


def compute_advantages(rewards, scale, batch_std=None):
    """(P, G) rewards → (P, G) advantages: what a response earned beyond the mean of its group."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    std = rewards.std(1, keepdim=True) if scale == "group" else batch_std
    return centred / (std + 1e-4)


class Counts(NamedTuple):
    """The denominators, over the whole batch: responses and tokens in the loss, and --max-new-tokens."""

    sequences: int
    tokens: int
    max_new_tokens: int


def grpo_loss(
    logps, inputs, counts, *, loss="dapo", epsilon=0.2, epsilon_high=None, kl=0.0, kl_estimator="k3_unbiased"
):
    """-J of the module docstring, summed over S of the batch's N responses → (loss, {metric: token sum}).

    logps (S, C), C response tokens with the end of turn; inputs: LossInputs of the same S responses; counts:
    the denominators. linear_grpo_loss calls this on chunks of whole sequences and adds up, so divide only by
    counts, not by the size of a tensor. With kl 0 it masks out sequences whose advantage is 0.
    """
    mask, advantages = inputs.mask, inputs.advantages[:, None]  # (S, C), (S, 1)
    lengths = mask.sum(1).clamp(min=1)  # (S,) tokens of each response
    log_ratio = (logps - inputs.old_logps) * mask  # (S, C)
    # For the KL term, with gspo too.
    token_ratio = log_ratio.exp()
    if loss == "gspo":
        # One ratio per sequence, the same at each of its tokens.
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    objective = torch.minimum(ratio * advantages, clipped * advantages)  # (S, C)
    k3 = kl_term = torch.zeros_like(objective)
    if kl:
        log_ref_ratio = (inputs.ref_logps - logps) * mask
        k3 = log_ref_ratio.exp() - log_ref_ratio - 1
        estimators = {"k3_unbiased": token_ratio * k3, "k3": k3, "k2": log_ref_ratio**2 / 2}
        kl_term = estimators[kl_estimator]
    per_token = -(objective - kl * kl_term) * mask  # (S, C)
    if loss in ("grpo", "gspo"):
        # The mean over responses of the mean over tokens.
        total = (per_token.sum(1) / lengths).sum() / counts.sequences
    elif loss == "dapo":
        # The mean over the batch's tokens.
        total = per_token.sum() / counts.tokens
    else:
        # dr_grpo: a constant, the same for short and long responses.
        total = per_token.sum() / (counts.sequences * counts.max_new_tokens)
    with torch.no_grad():
        clip_low = ((ratio < clipped) & (advantages < 0) & (mask > 0)).sum()
        clip_high = ((ratio > clipped) & (advantages > 0) & (mask > 0)).sum()
        return total, {"kl": (k3 * mask).sum(), "clip_low": clip_low, "clip_high": clip_high}


# ---------------------------------------------------------------------------------------------------------
# Rollouts and their rewards.


@dataclass
class Group:
    """One question, G responses to it, and all that is computed from them, in this order."""

    # Sampled; C counts the end of turn too. `texts` are the decoded ids.
    record: dict
    prompt: encoding.Prompt
    ids: torch.Tensor  # (G, C)
    mask: torch.Tensor  # (G, C)
    truncated: torch.Tensor  # (G,)
    texts: list
    # Parsed (prompts.ParsedResponse), and whether the answer is the record's; None if that has none.
    parsed: list
    match: list
    # Scored: {head: G floats} of the reward model, the hybrid rewards, and whether their std is above
    # --min-spread. If not, the group is not learned from.
    scores: dict = None
    rewards: torch.Tensor = None  # (G,)
    informative: bool = None
    # For the loss. old_logps are those of the policy that sampled, known from the second update on. The
    # log-probs are as wide as their micro-batch was; rollouts.stack aligns them.
    advantages: torch.Tensor = None  # (G,)
    loss_mask: torch.Tensor = None  # (G, C)
    ref_logps: torch.Tensor = None  # (G, C)
    old_logps: torch.Tensor = None  # (G, C)


def sample_groups(policy, batch, group, max_new_tokens, seed):
    """G responses to each of the batch's records. No --rollout-batch or number of processes changes them."""
    prompts = encoding.encode_images(policy, batch.inputs)
    numbered = [(r["id"], n * group + g) for r, n in zip(batch.rows, batch.copies) for g in range(group)]
    seeds = [runs.seed_of(seed, batch.cursor, name, number) for name, number in numbered]
    inputs = encoding.collate_prompts(policy, prompts)
    ids, mask, truncated = vlm.sample(policy, inputs, seeds, max_new_tokens, 1.0, group)  # (P·G, C)
    texts, groups = encoding.decode(policy, ids, mask), []
    for b, (record, prompt) in enumerate(zip(batch.rows, prompts)):
        rows = slice(b * group, (b + 1) * group)
        parsed = [parse_response(text, record.get("options")) for text in texts[rows]]
        match = [is_match(p.prediction, record["answer"]) if "answer" in record else None for p in parsed]
        sampled = {"ids": ids[rows], "mask": mask[rows], "truncated": truncated[rows], "texts": texts[rows]}
        groups.append(Group(record, prompt, **sampled, parsed=parsed, match=match))
    return groups


def score_groups(reward_model, encoded, groups, args):
    """The groups with their scores and hybrid rewards; a malformed response gets the least R and no match.

    encoded: the groups' prompts, as the reward model takes them.
    """
    scores = reward_model(encoded, [text for g in groups for text in g.texts])  # {head: P·G floats}
    scored, G = [], len(groups[0].texts)
    for b, g in enumerate(groups):
        own = {head: values[b * G : (b + 1) * G] for head, values in scores.items()}
        R = torch.tensor(own["overall"])  # (G,)
        well_formed = torch.tensor([p.well_formed for p in g.parsed])
        R_bar, lowest = (R, records.R_MIN) if args.reward_scale == "raw" else (normalise_reward(R), 0)
        # Without an answer R scaled to [0, 1], as the match is, takes its place.
        match = torch.tensor(g.match, dtype=torch.float32) if "answer" in g.record else normalise_reward(R)
        rewards = torch.where(well_formed, args.alpha * R_bar + args.beta * match, args.alpha * lowest)
        informative = rewards.std().item() > args.min_spread
        scored.append(replace(g, scores=own, rewards=rewards, informative=informative))
    return scored


def rollout(policy, reward_model, batches, args, accelerator):
    """Sample and score groups until P are informative → (those of this process, all, cursor)."""
    kept, drawn = [], []
    for _ in range(MAX_BATCHES):
        parts = next(batches)
        for batch in parts:
            with accelerator.autocast():
                groups = sample_groups(policy, batch, args.group, args.max_new_tokens, args.seed)
            drawn += score_groups(reward_model, batch.scored, groups, args)
        share = sum(len(batch.rows) for batch in parts)
        kept = [g for g in drawn if g.informative][:share]
        missing = torch.tensor(share - len(kept), device=policy.device)
        if not accelerator.reduce(missing, "sum").item():
            # Every process has enough: all stop at the same cursor.
            break
    # If there is no informative group, keep one so that there is a step; its tokens do not count.
    return kept or drawn[:1], drawn, batch.cursor


def with_advantages(groups, args):
    """The groups with advantages and the mask of the tokens that count."""
    updated, batch_std = [], None
    if args.scale_rewards == "batch":
        batch_std = torch.tensor(gather_object(torch.cat([g.rewards for g in groups]).tolist())).std()
    for g in groups:
        advantages = compute_advantages(g.rewards[None], args.scale_rewards, batch_std)[0]
        mask = g.mask * ~g.truncated[:, None] if args.mask_truncated else g.mask
        g = replace(g, advantages=advantages, loss_mask=mask)
        # Without information it is here only because there was no other (rollout).
        updated.append(g if g.informative else without_weight(g))
    return updated


def without_weight(group):
    """The group as one that counts for nothing in the loss."""
    advantages, mask = torch.zeros_like(group.advantages), torch.zeros_like(group.mask)
    return replace(group, advantages=advantages, loss_mask=mask)


# ---------------------------------------------------------------------------------------------------------
# Learning.


def count_batch(groups, max_new_tokens, accelerator):
    """The Counts of the whole batch."""
    sequences = sum(int((g.loss_mask.sum(1) > 0).sum()) for g in groups)
    tokens = sum(int(g.loss_mask.sum()) for g in groups)
    local = torch.tensor([sequences, tokens], device=groups[0].ids.device)
    return Counts(*accelerator.reduce(local, "sum").clamp(min=1).tolist(), max_new_tokens)


def collate(model, groups):
    """B groups → the inputs of their prompts, ids and mask of their responses (B·G, C)."""
    ids = rollouts.stack(groups, "ids", model.tokenizer.pad_token_id)
    return encoding.collate_prompts(model, [g.prompt for g in groups]), ids, rollouts.stack(groups, "mask")


@torch.no_grad()
def with_reference_logps(reference, groups, micro_batch, accelerator):
    """The groups with the reference's log-probs, for the KL term."""
    updated = list(groups)
    for index in rollouts.micro_batches(groups, micro_batch):
        inputs, ids, mask = collate(reference, [groups[i] for i in index])
        with accelerator.autocast(), adapters.without_lora(reference):
            logps, _ = vlm.token_logps(reference, inputs, ids, mask)  # (B·G, C)
        for i, own in zip(index, logps.split(len(groups[0].texts))):
            updated[i] = replace(groups[i], ref_logps=own)
    return updated


def accumulate_gradient(policy, groups, counts, args):
    """Add a micro-batch's gradient to the policy's → (log-probs (B·G, C), [sums of metrics and the loss])."""
    inputs, ids, mask = collate(policy, groups)
    advantages = torch.cat([g.advantages for g in groups]).to(policy.device)  # (B·G,)
    loss_inputs = LossInputs(
        advantages=advantages,
        mask=rollouts.stack(groups, "loss_mask"),  # (B·G, C)
        old_logps=rollouts.stack(groups, "old_logps"),  # (B·G, C) or None
        ref_logps=rollouts.stack(groups, "ref_logps"),  # (B·G, C) or None
    )
    options = {"loss": args.loss, "epsilon": args.epsilon, "epsilon_high": args.epsilon_high}
    options |= {"kl": args.kl, "kl_estimator": args.kl_estimator}
    logps, sums = torch.zeros(ids.shape, device=policy.device), []
    for rows, states in vlm.hidden_states_in_parts(policy, inputs, ids, mask, args.micro_group):
        # State t predicts token t. The first is the prompt's last; the one after the last predicts nothing.
        hidden, weight, head_options = vlm.lm_head(policy, states[:, :-1])  # (n, C, D), (V, D)
        # The same as these three lines, but the logits (n, C, V) never exist (triton_ops.py). head_options is
        # the rest of the head: bias (-inf for banned tokens), divisor and softcap of the logits. At the first
        # update old_logps is None and stands for logps.detach(): the ratio is 1.
        #     logps = log_softmax(hidden @ weight.T, -1).gather(-1, ids[rows, :, None])[..., 0]
        #     loss, metrics = grpo_loss(logps, loss_inputs.select(rows), counts, **options)
        #     loss.backward()
        loss, metrics, logps[rows] = linear_grpo_loss(
            grpo_loss, hidden, weight, ids[rows], loss_inputs.select(rows), counts=counts, **options,
            **head_options,
        )  # fmt: skip
        loss.backward()
        sums.append(metrics | {"loss": loss.detach()})
    return logps, sums


def policy_gradient(policy, groups, counts, args, accelerator):
    """Leave this process's share of the gradient in the policy → (groups with old_logps, metrics)."""
    updated, sums = list(groups), []
    # Without a KL term a group whose advantages are all 0 contributes nothing and is skipped. If all are, the
    # first is kept, so that there is a gradient, of zeros.
    learning = [i for i, g in enumerate(groups) if args.kl or g.advantages.any()] or [0]
    batches = rollouts.micro_batches(groups, args.micro_batch, learning)
    # A sharded model computes in all processes at once: those with fewer passes add some of weight 0.
    dummies = sharding.dummy_passes(policy, len(batches))
    for index in batches:
        with accelerator.autocast(), vlm.checkpointing(policy, args.gradient_checkpointing):
            logps, of_parts = accumulate_gradient(policy, [groups[i] for i in index], counts, args)
        sums += of_parts
        for i, own in zip(index, logps.split(len(groups[0].texts))):
            if groups[i].old_logps is None:
                # The first update: the policy is still the one that sampled.
                updated[i] = replace(groups[i], old_logps=own)
    for _ in range(dummies):
        with accelerator.autocast(), vlm.checkpointing(policy, args.gradient_checkpointing):
            accumulate_gradient(policy, [without_weight(updated[learning[0]])], counts, args)
    return updated, rollouts.mean_metrics(sums, counts.tokens, accelerator)


def update_policy(policy, optimizer, groups, counts, lr, args, accelerator):
    """One update of the policy on a batch of rollouts → (groups with old_logps, metrics)."""
    groups, metrics = policy_gradient(policy, groups, counts, args, accelerator)
    parameters = [p for part in optimizer.param_groups for p in part["params"]]
    # A sum, not a mean: every process has divided by the whole batch's counts.
    training.sum_gradients(parameters, accelerator)
    norm = training.clip_gradient(parameters, args.clip)
    training.step(optimizer, lr, norm)
    return groups, metrics | {"grad_norm": norm, "lr": lr}


# ---------------------------------------------------------------------------------------------------------


def load_models(args, accelerator):
    """The policy, the reference (None without a KL term), and the reward model.

    The reference is a frozen copy of the policy, or with --lora the policy itself, its adapter off.
    """
    policy = adapters.load_to_train(args.model, accelerator.device, args.freeze, args.lora)
    reward_model = RewardModel.load(args.reward)
    for loaded in (policy, reward_model.backbone):
        loading.limit_pixels(loaded, args.min_pixels, args.max_pixels)
    if args.shard:
        sharding.shard(policy)
    return policy, load_reference(policy, args) if args.kl else None, reward_model


def load_reference(policy, args):
    if args.lora:
        return policy
    if not args.shard:
        return loading.frozen_copy(policy)
    reference = sharding.load_frozen(args.model, policy.device)
    return replace(reference, processor=policy.processor, pixels=policy.pixels)


def main(args):
    accelerator = loading.start_accelerator()
    if args.prompts < accelerator.num_processes:
        processes = f"{accelerator.num_processes} processes"
        raise RunError(f"--prompts {args.prompts}: {processes} need at least one each")
    examples = rollouts.read_questions(args, accelerator.is_main_process)
    paths = [args.model, args.reward, *args.data, *args.unlabelled, args.val, args.test]
    # May change when the run resumes, for example because memory ran out.
    free = ("micro_batch", "micro_group", "gradient_checkpointing", "rollout_batch")
    run = runs.start(args, paths, accelerator.is_main_process, free=free)
    policy, reference, reward_model = load_models(args, accelerator)
    for reader in (policy, reward_model.backbone):
        examples = rollouts.leave_out_too_long(reader, examples, args.max_new_tokens, args.on_error)
    parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, weight_decay=0.0, fused=True)
    training.restore_state(run.state, policy.model, optimizer)
    watch = Watch(policy, reward_model, args, accelerator, run.state)
    cursor, skipped = run.state.get("cursor", 0), training.Skipped(run.state.get("skipped", 0))
    lowest = args.alpha * (records.R_MIN if args.reward_scale == "raw" else 0)
    patience = rollouts.Patience(args.patience, lowest, run.main)
    batches = rollouts.prefetch_batches(policy, reward_model, examples, cursor, args, accelerator)

    work = f"{args.steps} steps of {args.prompts} questions x {args.group} responses"
    context.tell_image_tokens(policy, [r["image"] for r in examples])
    run.announce(f"{work} out of {len(examples)} questions")
    for step in run.progress(range(run.state.get("step", 0), args.steps), "grpo"):
        # A sharded policy is gathered once to sample.
        with sharding.gathered(policy):
            # Compare the reward with the truth on expert questions.
            watched = watch.check(step)
            started = time.perf_counter()
            # Sample G responses to each of P questions; score them by reward model and answer match.
            groups, drawn, cursor = rollout(policy, reward_model, batches, args, accelerator)
        # Advantages: what each response earned beyond the mean of its group.
        groups = with_advantages(groups, args)
        scored = time.perf_counter()
        # Log-probs of the reference, for the KL term.
        if reference:
            with sharding.gathered(reference):
                groups = with_reference_logps(reference, groups, args.micro_batch, accelerator)
        # Maximise J on these responses, its denominators counted over the whole batch.
        counts = count_batch(groups, args.max_new_tokens, accelerator)
        lr = training.learning_rate(step, args.steps, args.lr, args.warmup)
        for _ in range(args.iterations):
            groups, metrics = update_policy(policy, optimizer, groups, counts, lr, args, accelerator)
            skipped.count(step, metrics["loss"], metrics["grad_norm"])
        # Log and commit.
        times = started, scored, time.perf_counter()
        metrics |= {"skipped": skipped.total}
        metrics = rollouts.log_step(run, step, groups, drawn, times, metrics, watched)
        patience.check(step, metrics, drawn)
        if run.due(step + 1, args.save_every):
            state = training.state(parameters, optimizer) | watch.state()
            run.commit(step=step + 1, cursor=cursor, skipped=skipped.total, **state)

    with sharding.gathered(policy):
        result = {"steps": args.steps, "skipped": skipped.total, **watch.finish()}
    if args.shard:
        sharding.collect(policy, run.main)
    if run.main:
        adapters.save_trained(policy, run.part)
    run.finish(result, watch.summary())


if __name__ == "__main__":
    cli.run_main(main, ARGS)
