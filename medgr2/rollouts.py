"""Around the GRPO step: the batches of records, prepared ahead; micro-batches; logging."""

import itertools
from operator import itemgetter
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch.nn.functional import pad

from medgr2 import context, encoding, records, training
from medgr2.errors import RunError
from medgr2.images import open_images
from medgr2.prefetch import for_preparing, prefetch
from medgr2.prompts import policy_prompt


def read_questions(args, main):
    """The records of --data; then those of --unlabelled that are not among them, without their answers."""
    files = [(file, records.QUESTION) for file in args.data]
    files += [(file, records.UNLABELLED) for file in args.unlabelled]
    read = [rows for _, rows in training.read_data(args, files, main)]
    labelled, rest = (
        list(itertools.chain(*part)) for part in (read[: len(args.data)], read[len(args.data) :])
    )
    known = {(row["id"], row["image"]) for row in labelled}
    rest = (row for row in rest if (row["id"], row["image"]) not in known)
    return labelled + [{field: row[field] for field in row if field != "answer"} for row in rest]


def leave_out_too_long(policy, examples, max_new_tokens, on_error):
    """The question records that fit into the policy's context with the longest response."""
    parts = itemgetter("image"), policy_prompt, lambda record: max_new_tokens
    return context.leave_out_too_long(policy, examples, *parts, on_error == "skip")


class Batch(NamedTuple):
    """Records to sample for at a time, prepared. `cursor`: number of the batch to draw next."""

    cursor: int
    rows: list
    # Of each record: how often the step has drawn it before, at the end of an epoch or if there are few.
    copies: list
    # For the policy.
    inputs: encoding.Inputs
    # For the reward model (reward.EncodedPrompts).
    scored: object


def prefetch_batches(policy, reward_model, examples, cursor, args, accelerator):
    """Endlessly, from batch number `cursor`, this process's share of a step's P records: a list of Batches.

    Each holds --rollout-batch records, or all if that is None.
    """
    preparing, encode_scored = for_preparing(policy), reward_model.encoder()
    batch_of = training.shuffle([[example] for example in examples], args.prompts, args.seed)

    def encode(cursor, rows, copies):
        images, texts = open_rows(rows)
        inputs = encoding.preprocess(preparing, images, texts)
        return Batch(cursor, rows, copies, inputs, encode_scored(images, texts))

    def prepare(cursor):
        drawn = batch_of(cursor)
        copies = [sum(other is row for other in drawn[:i]) for i, row in enumerate(drawn)]
        own = slice(accelerator.process_index, None, accelerator.num_processes)
        rows, copies = drawn[own], copies[own]
        size = args.rollout_batch or len(rows)
        starts = range(0, len(rows), size)
        return [encode(cursor + 1, rows[i : i + size], copies[i : i + size]) for i in starts]

    return prefetch(itertools.count(cursor), prepare, args.workers)


def open_rows(rows):
    """The images and the prompts of question records."""
    return open_images(row["image"] for row in rows), [policy_prompt(row) for row in rows]


# ---------------------------------------------------------------------------------------------------------
# Micro-batches.


def micro_batches(groups, size, only=None):
    """Indices of groups (`only` of these), `size` at a time, the longest first: less padding."""
    order = sorted(only or range(len(groups)), key=lambda i: -int(groups[i].mask.sum(1).max()))
    return [order[i : i + size] for i in range(0, len(order), size)]


def stack(groups, field, fill=0):
    """A field of B groups, (G, C) each, as (B·G, C), cut to the longest response; None if they have none."""
    parts = [getattr(g, field) for g in groups]
    if parts[0] is None:
        return None
    width = max(int(g.mask.sum(1).max()) for g in groups)
    return torch.cat([pad(x, (0, max(0, width - x.shape[1])), value=fill)[:, :width] for x in parts])


# ---------------------------------------------------------------------------------------------------------
# What is logged and written.


def mean(values):
    return torch.tensor([float(v) for v in values]).mean().item()


def mean_metrics(sums, tokens, accelerator):
    """Sums over parts of this process's tokens → means over the batch's `tokens`. The loss is only summed."""
    names = sorted(sums[0])
    own = torch.stack([sum(part[name] for part in sums).float() for name in names])
    totals = accelerator.reduce(own, "sum")
    totals = dict(zip(names, totals.tolist()))
    # The entropy is of the tokens that were computed: without a KL term not those of advantage 0.
    denominators = {"loss": 1, "entropy": totals.pop("rows") or 1}
    means = {name: total / denominators.get(name, tokens) for name, total in totals.items()}
    return means | {"tokens": tokens}


def log_step(run, step, groups, drawn, times, metrics, watched):
    """Write the step's rollouts and its line of metrics.jsonl, both of all processes; return the metrics.

    groups: those that were learned from; drawn: all that this process sampled. times: the start, the end of
    sampling (with scoring), the end of learning. metrics: update_policy's. watched: Watch.check's.
    """
    started, sampled, updated = times
    tokens, sampling, learning = metrics["tokens"], sampled - started, updated - sampled
    drawn_tokens = sum(gather_object([int(g.mask.sum()) for g in drawn]))
    informative = mean(gather_object([g.informative for g in drawn]))
    metrics = reward_metrics(drawn) | {"informative": informative} | metrics
    metrics |= {"sample_seconds": sampling, "learn_seconds": learning}
    metrics |= {"sample_tokens_per_s": drawn_tokens / sampling, "learn_tokens_per_s": tokens / learning}
    run.append("rollouts.jsonl", rollout_rows(groups, step, run.folder))
    run.log(step=step, **metrics, **watched)
    return metrics


def reward_metrics(groups):
    """Means over the responses of all processes; of `match` over those whose record has an answer."""
    rows = []
    for g in groups:
        lengths, truncated, rewards = g.mask.sum(1).tolist(), g.truncated.tolist(), g.rewards.tolist()
        for k, parsed in enumerate(g.parsed):
            R = g.scores["overall"][k]
            row = {"reward": rewards[k], "reward_model": R, "match": g.match[k]}
            row |= {"saturated": R in (records.R_MIN, records.R_MAX)}
            row |= {"length": lengths[k], "truncated": truncated[k], "unparsed": parsed.prediction is None}
            rows.append(row)
    rows = gather_object(rows)
    known = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: mean(values) for name, values in known.items() if values}


def rollout_rows(groups, step, folder):
    """rollouts.jsonl, of all processes: the record, one response, how it was parsed and what it earned."""
    rows = []
    for g in groups:
        record = records.with_relative_image(g.record, folder)
        for k, text in enumerate(g.texts):
            response = {
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
            rows.append(record | response)
    # The step may have drawn a record twice, so its responses are numbered over the whole step.
    return [row | {"id": f"{row['record']}/{step}/{i}"} for i, row in enumerate(gather_object(rows))]


class Patience:
    """Reports steps in which no response earns anything or most are cut; too many in a row end the run.

    The count starts again when a run resumes.
    """

    def __init__(self, steps, lowest, main):
        # lowest: the reward of a malformed response. steps: so many in a row end the run (0: never).
        self.lowest, self.steps, self.main = lowest, steps, main
        self.lost = 0

    def check(self, step, metrics, groups):
        """Count the step. Raises RunError, in every process, at the last of `steps` such steps in a row."""
        earned = metrics["reward"] > self.lowest + 1e-6
        if earned and metrics["truncated"] <= 0.5:
            self.lost = 0
            return
        self.lost += 1
        what = "most responses were cut at --max-new-tokens" if earned else "no response earned a reward"
        shares = f"{metrics['unparsed']:.0%} without a readable answer, {metrics['truncated']:.0%} cut"
        problem = f"step {step}: {what} ({shares}), for example {groups[0].texts[0][:80]!r}"
        advice = "check the model's stop tokens, --max-new-tokens, and whether it follows the prompt's form"
        if self.lost == self.steps:
            raise RunError(f"{problem}; {self.lost} such steps in a row: {advice}")
        if self.lost == 1 and self.main:
            print(f"{problem}; {advice}", flush=True)
