"""Stage 4: group relative policy optimisation (GRPO) with the reward model and answer match.

For each of P questions the policy samples G responses at temperature 1; each gets the hybrid reward of the paper

    r_i = α · R̄(image, question, y_i) + β · 1[extract(y_i) = answer],      R̄ = (R + 6) / 16,      malformed: the least, 0

and an advantage relative to its group, Â_i = (r_i - mean_group r) / std_group r. The policy then climbs, over the N = P·G responses,

    J = 1/N Σ_i 1/|y_i| Σ_t  min(ρ_it Â_i, clip(ρ_it, 1-ε, 1+ε) Â_i) - β_KL · KL_it
    ρ_it = π(y_it|·) / π_old(y_it|·)        KL_it = π_ref/π - log(π_ref/π) - 1      (k3, Schulman 2020)

    --loss grpo      as above (DeepSeekMath, arXiv 2402.03300)
    --loss dapo      1 / Σ|y_i| over the whole batch: every token weighs the same; DAPO's other parts are --epsilon-high 0.28
                     and --drop-zero-variance (arXiv 2503.14476)
    --loss dr_grpo   1 / (N · max_new_tokens): no bias by length; use with --scale-rewards none (arXiv 2503.20783)
    --loss gspo      ρ_i = exp(mean_t log ρ_it), one ratio a sequence; its ε is far smaller, about 3e-4 (arXiv 2507.18071)

With one update a batch of rollouts (--iterations 1, the default) every ρ is 1 and nothing is clipped, whatever the loss.

Every denominator counts the whole batch, so the step does not depend on micro-batches or processes (but with
--drop-zero-variance each process refills its own share).

What makes an image's features stays as SFT left it, tower and projector (--freeze images): an image is read once for its samples, the
reference and every update. The next batch's pixels are prepared in a thread meanwhile.

Reads   question records; a reward model; expert records for the watch
Writes  OUT/ in the Hugging Face format, rollouts.jsonl, metrics.jsonl

Departs from the paper: R is normalised to [0, 1] (`--reward-scale raw` is the letter of the paper, where the match term
is 1.5% of the spread); a watch compares the reward with the truth on expert items and warns of reward hacking.

    python grpo.py --model runs/toy/cycle1/sft --reward runs/toy/cycle1/reward --data runs/toy/cycle1/scored/accepted.jsonl \\
        --val runs/toy/data/val.jsonl --image-root runs/toy --out runs/mine
"""

import argparse
import copy
import random
import time
from dataclasses import replace

from medgr2 import cli, leakage, records, runs
from medgr2.errors import RunError
from medgr2.images import open_image
from medgr2.prompts import is_match, parse_response, policy_prompt


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--model", required=True, help="policy to start from, also the frozen reference")
    p.add_argument("--reward", required=True, help="folder of a reward model")
    p.add_argument("--data", required=True, nargs="+", help="question record files to practise on")
    p.add_argument("--val", help="expert question records for the watch")
    p.add_argument("--steps", type=cli.number(int, 1), default=40, help="batches of rollouts")
    p.add_argument("--prompts", type=cli.number(int, 1), default=16, help="P, questions a step")
    p.add_argument("--group", type=cli.number(int, 2), default=8, help="G, responses to each")
    p.add_argument(
        "--iterations", type=cli.number(int, 1), default=1, help="updates on each batch of rollouts"
    )
    p.add_argument("--max-new-tokens", type=cli.number(int, 1), default=96, help="longest response")
    p.add_argument("--loss", choices=("grpo", "dr_grpo", "dapo", "gspo"), default="grpo", help="see above")
    p.add_argument(
        "--epsilon", type=cli.number(float, 0, 1), default=0.2, help="the ratio is clipped below at 1 - this"
    )
    p.add_argument(
        "--epsilon-high",
        type=cli.number(float, 0),
        help="and above at 1 + this; without it, at 1 + --epsilon",
    )
    p.add_argument(
        "--kl", type=cli.number(float, 0), default=0.02, help="weight of the KL term; 0 loads no reference"
    )
    p.add_argument("--alpha", type=cli.number(float, 0), default=0.8, help="weight of the reward model")
    p.add_argument("--beta", type=cli.number(float, 0), default=0.2, help="weight of the answer match")
    p.add_argument(
        "--reward-scale", choices=("unit", "raw"), default="unit", help="R in [0, 1], or in [-6, 10]"
    )
    p.add_argument(
        "--scale-rewards",
        choices=("group", "batch", "none"),
        default="group",
        help="whose standard deviation divides",
    )
    p.add_argument(
        "--mask-truncated",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="a response cut at --max-new-tokens teaches nothing",
    )
    p.add_argument(
        "--drop-zero-variance",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="skip groups all right or all wrong, and refill the batch with other questions",
    )
    p.add_argument(
        "--lr",
        type=cli.number(float, 0),
        default=1e-4,
        help="learning rate (the toy's; about 1e-6 for a 7B model)",
    )
    p.add_argument("--clip", type=cli.number(float, 0), default=1.0, help="largest gradient norm")
    p.add_argument(
        "--freeze",
        choices=("images", "vision", "nothing"),
        default="images",
        help="what does not learn: the vision tower and its projector (each image is then read once), the tower alone, nothing",
    )
    p.add_argument(
        "--micro-batch",
        type=cli.number(int, 1),
        default=8,
        help="groups to learn from at a time: less memory, same result (sampling takes all)",
    )
    p.add_argument(
        "--watch-every", type=cli.number(int, 1), default=10, help="steps between looks at the truth on --val"
    )
    p.add_argument("--watch-items", type=cli.number(int, 1), default=200, help="records of --val to look at")
    p.add_argument("--test", help="the test file: refuse to train on what it holds (leakage.py)")
    p.add_argument(
        "--allow-leakage",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train on it all the same",
    )
    p.add_argument("--save-every", type=cli.number(int, 1), default=25, help="steps between checkpoints")
    cli.add_run_arguments(p)
    return p.parse_args()


if __name__ == "__main__":
    # before torch is imported: --help answers at once
    ARGS = parse_args()

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from medgr2 import loading, vlm
from reward import RewardModel
from triton_ops import linear_grpo_loss

# how often a batch is refilled before a step makes do with fewer groups
REFILLS = 4


# ---------------------------------------------------------------------------------------------------------
# The loss.


def advantages_of(rewards, scale, batch_std=None):
    """(P, G) rewards → (P, G) advantages: what a response earned beyond the mean of its group."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    std = rewards.std(1, keepdim=True) if scale == "group" else batch_std
    return centred / (std + 1e-4)


def grpo_loss(
    logps,
    old_logps,
    ref_logps,
    advantages,
    mask,
    counts,
    *,
    loss="grpo",
    epsilon=0.2,
    epsilon_high=None,
    kl=0.0,
):
    """The objective of the docstring, negated. Returns (loss, sums of metrics over the tokens under `mask`).

    logps, old_logps, ref_logps, mask: (N, C), of which old and ref carry no gradient; advantages: (N,); ref_logps is None at
    kl 0. `counts` = (sequences, tokens, longest) of the whole batch: what the denominators count.
    """
    sequences, tokens, longest = counts
    lengths = mask.sum(1).clamp(min=1)  # (N,) tokens of each response
    log_ratio = (logps - old_logps) * mask  # (N, C)
    # one ratio a sequence, the same at each of its tokens
    if loss == "gspo":
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    gain = advantages[:, None]
    objective = torch.minimum(ratio * gain, clipped * gain)  # (N, C)
    k3 = torch.zeros_like(objective)
    if kl:
        log_ref = (ref_logps - logps) * mask
        k3 = log_ref.exp() - log_ref - 1
    per_token = -(objective - kl * k3) * mask  # (N, C)
    if loss in ("grpo", "gspo"):
        # mean over responses of the mean over tokens
        total = (per_token.sum(1) / lengths).sum() / sequences
    elif loss == "dapo":
        # mean over the batch's tokens
        total = per_token.sum() / tokens
    else:
        # dr_grpo: a constant, the same for short and long
        total = per_token.sum() / (sequences * longest)
    with torch.no_grad():
        metrics = {
            "kl": (k3 * mask).sum(),
            "clip_low": ((ratio < clipped) & (gain < 0) & (mask > 0)).sum(),
            "clip_high": ((ratio > clipped) & (gain > 0) & (mask > 0)).sum(),
        }
    return total, metrics


# ---------------------------------------------------------------------------------------------------------
# Rollouts and their rewards.


class Group:
    """One question and its G responses: texts, ids and mask (G, C), truncated (G,), match (G,), then rewards and advantages."""

    def __init__(self, record, prompt, ids, mask, texts, truncated):
        self.record, self.prompt = record, prompt
        self.ids, self.mask, self.texts = ids, mask, texts
        self.parsed = [parse_response(t, record.get("options")) for t in texts]
        self.match = [is_match(p.prediction, record["answer"]) for p in self.parsed]
        self.truncated = truncated

    @property
    def has_spread(self):
        """Do the outcomes differ? (The continuous reward always does, by noise if by nothing else.)"""
        return 0 < sum(self.match) < len(self.match)


def prepare(policy, rows):
    """What vlm.encode_images asks for of the records: (images, texts, prepared)."""
    images, texts = [open_image(r["image"]) for r in rows], [policy_prompt(r) for r in rows]
    return images, texts, vlm.preprocess(policy, images, texts)


def batches(policy, examples, cursor, args, accelerator):
    """Without end, from `cursor` on: (the next cursor, this process's share of a batch of P records, what `prepare` makes of them)."""
    while True:
        index = runs.batch_indices(cursor, args.prompts, len(examples), args.seed)
        cursor += 1
        rows = [examples[i] for i in index[accelerator.process_index :: accelerator.num_processes]]
        yield cursor, rows, prepare(policy, rows)


def sample_groups(policy, rows, prepared, group, max_new_tokens, *seed):
    """G responses to each of the records, in one batch; each row's randomness is its own."""
    prompts = vlm.encode_images(policy, *prepared)
    seeds = [runs.seed_of(*seed, r["id"], g) for r in rows for g in range(group)]
    ids, mask, truncated = vlm.sample(policy, vlm.collate_prompts(policy, prompts), seeds, max_new_tokens, 1.0, group)
    texts = vlm.decode(policy, ids, mask)
    cut = [slice(b * group, (b + 1) * group) for b in range(len(rows))]
    return [Group(r, p, ids[c], mask[c], texts[c], truncated[c]) for r, p, c in zip(rows, prompts, cut)]


def judge(reward_model, groups, alpha, beta, scale):
    """Give each group its hybrid rewards (G,), and keep the two parts beside."""
    scores = reward_model(
        [g.prompt.image for g in groups],
        [g.prompt.text for g in groups],
        [t for g in groups for t in g.texts],
    )
    size = len(groups[0].texts)
    for b, g in enumerate(groups):
        g.scores = {head: values[b * size : (b + 1) * size] for head, values in scores.items()}
        r = torch.tensor(g.scores["overall"])
        formed = torch.tensor([p.well_formed for p in g.parsed])
        part, least = (r, -6) if scale == "raw" else ((r + 6) / 16, 0)
        g.rewards = torch.where(
            formed, alpha * part + beta * torch.tensor(g.match, dtype=torch.float32), alpha * least
        )


def roll_out(policy, reward_model, coming, args, accelerator):
    """One batch of P judged groups (this process's share) of the `coming` batches → groups, share of groups without spread, cursor."""
    groups, seen, spread = [], 0, 0
    for _ in range(REFILLS if args.drop_zero_variance else 1):
        cursor, rows, prepared = next(coming)
        with accelerator.autocast():
            fresh = sample_groups(policy, rows, prepared, args.group, args.max_new_tokens, args.seed, cursor)
        seen, spread = seen + len(fresh), spread + sum(g.has_spread for g in fresh)
        groups += [g for g in fresh if g.has_spread or not args.drop_zero_variance]
        missing = accelerator.reduce(
            torch.tensor(len(rows) - len(groups), device=policy.device).clamp(min=0), "sum"
        )
        # every process has enough: all stop at the same cursor
        if not missing.item():
            break
    # this process found none with spread: one that has none, so that there is a step
    groups = groups[: len(rows)] or fresh[:1]
    judge(reward_model, groups, args.alpha, args.beta, args.reward_scale)
    return groups, 1 - spread / seen, cursor


def rollout_rows(groups, step, folder):
    """rollouts.jsonl: the record, one response, how it was read and what it earned."""
    for g in groups:
        for k, text in enumerate(g.texts):
            yield records.with_relative_image(g.record, folder) | {
                "id": f"{g.record['id']}/{step}/{k}",
                "record": g.record["id"],
                "step": step,
                "response": text,
                "prediction": g.parsed[k].prediction,
                "reason": g.parsed[k].reason,
                "correct": g.match[k],
                "rollout_reward": round(g.rewards[k].item(), 4),
                "advantage": round(g.advantages[k].item(), 4),
                "rollout_scores": {head: round(values[k], 4) for head, values in g.scores.items()},
            }


# ---------------------------------------------------------------------------------------------------------
# Learning.


def collate(policy, groups):
    """Groups side by side: model inputs of B prompts; ids and mask (B·G, C); advantages (B·G,)."""
    # trimmed to this micro-batch's longest
    width = max(int(g.mask.sum(1).max()) for g in groups)
    wide = lambda x, value: torch.nn.functional.pad(x, (0, max(0, width - x.shape[1])), value=value)[
        :, :width
    ]  # noqa: E731
    ids = torch.cat([wide(g.ids, policy.tokenizer.pad_token_id) for g in groups])
    mask = torch.cat([wide(g.mask, 0) for g in groups])
    prompts = vlm.collate_prompts(policy, [g.prompt for g in groups])
    return prompts, ids, mask, torch.cat([g.advantages for g in groups]).to(policy.device)


def learn(policy, reference, groups, args, accelerator, old=None):
    """Leave the gradient of the whole batch in the policy. Returns metrics, and the log-probs before the update.

    `old`: log-probs of the policy that sampled, a list of micro-batches; None at the first update, where they are the
    policy's own, so that the ratio is exactly 1.
    """
    masks = [g.mask * ~g.truncated[:, None] if args.mask_truncated else g.mask for g in groups]
    local = torch.tensor(
        [sum(int((m.sum(1) > 0).sum()) for m in masks), sum(int(m.sum()) for m in masks)],
        device=policy.device,
    )
    # counted before the next line drops any
    sequences, tokens = accelerator.reduce(local, "sum").clamp(min=1).tolist()
    # no KL, no advantage: no gradient; one stays, for zeros
    groups = [g for g in groups if args.kl or g.advantages.any()] or groups[:1]
    # less padding; the same order at every update, as `old` asks
    groups = sorted(groups, key=lambda g: -int(g.mask.sum(1).max()))
    sums, before = {}, []
    for k, part in enumerate(
        groups[i : i + args.micro_batch] for i in range(0, len(groups), args.micro_batch)
    ):
        prompts, ids, mask, advantages = collate(policy, part)
        counted = mask * ~torch.cat([g.truncated for g in part])[:, None] if args.mask_truncated else mask
        ref_logps = None
        if reference is not None:
            with torch.no_grad():
                ref_logps, _ = vlm.token_logps(reference, prompts, ids, mask)
        states, weight, head = vlm.lm_head(
            policy, vlm.hidden_states(policy, prompts, ids, mask)[:, :-1]
        )  # (B·G, C, D), (V, D)
        # grpo_loss of a few sequences at a time, from their logits to their gradient: the logits of all never exist
        loss, metrics, logps = linear_grpo_loss(
            grpo_loss,
            states,
            weight,
            ids,
            None if old is None else old[k],
            ref_logps,
            advantages,
            counted,
            (sequences, tokens, args.max_new_tokens),
            loss=args.loss,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            kl=args.kl,
            **head,
        )
        loss.backward()
        before.append(logps)
        # sums over tokens, but the loss is a mean already
        for name, value in (metrics | {"loss": loss.detach() * tokens}).items():
            sums[name] = sums.get(name, 0) + value / tokens
    names = sorted(sums)
    reduced = accelerator.reduce(torch.stack([sums[n].float() for n in names]), "sum")
    means = dict(zip(names, reduced.tolist())) | {"tokens": tokens}
    # rows: the tokens that linear_grpo_loss computed, without KL not those of advantage 0
    means["entropy"] /= means.pop("rows") or 1
    return means, before


def rollout_metrics(groups):
    """Means over this process's responses: with several, metrics.jsonl has the first one's. What `learn` returns is of all."""
    flat = {
        "reward": torch.cat([g.rewards for g in groups]),
        "reward_model": torch.tensor([s for g in groups for s in g.scores["overall"]]),
        "match": torch.tensor([float(m) for g in groups for m in g.match]),
        "length": torch.cat([g.mask.sum(1) for g in groups]).float(),
        "truncated": torch.cat([g.truncated for g in groups]).float(),
        "unparsed": torch.tensor([float(p.prediction is None) for g in groups for p in g.parsed]),
    }
    return {name: values.mean().item() for name, values in flat.items()}


# ---------------------------------------------------------------------------------------------------------
# The watch.


def watch(policy, reward_model, rows, max_new_tokens, batch, accelerator):
    """True accuracy and mean reward-model score of the policy's greedy answers to expert items, `batch` at a time."""
    right, scores = 0, []
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        images, texts = [open_image(r["image"]) for r in part], [policy_prompt(r) for r in part]
        with accelerator.autocast():
            ids, mask, _ = vlm.sample(
                policy, vlm.encode_prompts(policy, images, texts), None, max_new_tokens, temperature=0
            )
        responses = vlm.decode(policy, ids, mask)
        right += sum(
            is_match(parse_response(t, r.get("options")).prediction, r["answer"])
            for t, r in zip(responses, part)
        )
        scores += reward_model(images, texts, responses)["overall"]
    return {"watch_accuracy": right / len(rows), "watch_reward": sum(scores) / len(scores)}


def hacking(first, now, n):
    """Does the reward rise while the truth falls, by more than one standard error of an accuracy over n items?"""
    p = first["watch_accuracy"]
    return (
        now["watch_reward"] > first["watch_reward"] and now["watch_accuracy"] < p - (p * (1 - p) / n) ** 0.5
    )


def main(args):
    accelerator = Accelerator(mixed_precision="bf16" if loading.best_dtype() == torch.bfloat16 else "no")
    if args.test:
        leakage.refuse_leakage(
            args.data,
            args.test,
            args.allow_leakage,
            args.out.rstrip("/") + ".leaks.jsonl",
            args.image_root,
            accelerator.is_main_process,
        )
    run = runs.start(
        args, [args.model, args.reward, *args.data, args.val, args.test], accelerator.is_main_process
    )
    examples = [
        r for file in args.data for r in records.read_records(file, records.QUESTION, args.image_root)
    ]
    watched = list(records.read_records(args.val, records.QUESTION, args.image_root)) if args.val else []
    watched = random.Random(runs.seed_of(args.seed, "watch")).sample(
        watched, min(len(watched), args.watch_items)
    )
    if args.prompts < accelerator.num_processes:
        raise RunError(
            f"--prompts {args.prompts}: {accelerator.num_processes} processes need at least one each"
        )
    policy, reward_model = loading.load(args.model, accelerator.device), RewardModel.load(args.reward)
    if args.freeze == "images":
        loading.freeze_images(policy)
    if args.freeze == "vision":
        loading.freeze_vision(policy)
    reference = loading.frozen_copy(policy) if args.kl else None
    parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, weight_decay=0.0)
    if "optimizer" in run.state:
        policy.model.load_state_dict(run.state.pop("model"), strict=False)
        optimizer.load_state_dict(run.state.pop("optimizer"))
    first, seen = run.state.get("first"), run.state.get("seen", {})
    # the thread's: a tokenizer must not serve two at a time
    own = replace(policy, processor=copy.deepcopy(policy.processor))
    coming = runs.prefetch(batches(own, examples, run.state.get("cursor", 0), args, accelerator))
    check = lambda: watch(
        policy, reward_model, watched, args.max_new_tokens, args.micro_batch * args.group, accelerator
    )  # noqa: E731

    for step in run.progress(range(run.state.get("step", 0), args.steps), "grpo"):
        if watched and step % args.watch_every == 0:
            seen = check()
            first = first or seen
            if run.main and hacking(first, seen, len(watched)):
                print(
                    f"step {step}: reward hacking? reward {first['watch_reward']:.2f} → {seen['watch_reward']:.2f}, "
                    f"true accuracy {first['watch_accuracy']:.3f} → {seen['watch_accuracy']:.3f}",
                    flush=True,
                )
        start = time.perf_counter()
        groups, flat, cursor = roll_out(policy, reward_model, coming, args, accelerator)
        # of the whole batch
        std = torch.tensor(gather_object(torch.cat([g.rewards for g in groups]).tolist())).std()
        for g in groups:
            g.advantages = advantages_of(g.rewards[None], args.scale_rewards, std)[0]
            # there for want of another (roll_out)
            if args.drop_zero_variance and not g.has_spread:
                g.advantages = torch.zeros_like(g.advantages)
        sampled, old = time.perf_counter(), None
        for _ in range(args.iterations):
            with accelerator.autocast():
                metrics, before = learn(policy, reference, groups, args, accelerator, old)
            old = old or before
            runs.sum_gradients(parameters.values(), accelerator)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), args.clip).item()
            optimizer.step()
            optimizer.zero_grad()
        learned = time.perf_counter()
        run.append("rollouts.jsonl", gather_object(list(rollout_rows(groups, step, run.folder))))
        run.log(
            step=step,
            **rollout_metrics(groups),
            zero_variance=flat,
            **metrics,
            grad_norm=norm,
            sample_seconds=sampled - start,
            learn_seconds=learned - sampled,
            sample_tokens_per_s=metrics["tokens"] / (sampled - start),
            learn_tokens_per_s=metrics["tokens"] / (learned - sampled),
            **(seen if step % args.watch_every == 0 else {}),
        )
        if run.due(step + 1, args.save_every):
            run.commit(
                step=step + 1,
                cursor=cursor,
                first=first,
                seen=seen,
                optimizer=optimizer.state_dict(),
                model={n: p.detach() for n, p in parameters.items()},
            )

    result = {"steps": args.steps, "first": first, "last": check() if watched else None}
    if run.main:
        loading.save(policy, run.part)
    run.finish(
        result,
        f"accuracy on the watch {first['watch_accuracy']:.3f} → {result['last']['watch_accuracy']:.3f}, "
        f"reward {first['watch_reward']:.2f} → {result['last']['watch_reward']:.2f}"
        if first
        else "",
    )


if __name__ == "__main__":
    cli.run_main(main, ARGS)
