"""The watch: does a rising reward mean a better policy, or reward hacking? Expert questions show it."""

import random

from accelerate.utils import gather_object

from medgr2 import encoding, records, runs, vlm
from medgr2.prefetch import for_preparing, prefetch
from medgr2.prompts import is_match, parse_response
from medgr2.rollouts import open_rows


def measure_policy(policy, reward_model, rows, max_new_tokens, batch, accelerator, workers=0):
    """True accuracy and mean reward-model score of the policy's greedy answers to `rows`, `batch` at a time.

    The rows are shared out over the processes; every process returns the figures of all.
    """
    correct, scores = [], []
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    parts, preparing = [mine[i : i + batch] for i in range(0, len(mine), batch)], for_preparing(policy)
    encode = reward_model.encoder()

    def prepare(part):
        images, texts = open_rows(part)
        return encoding.encode_prompts(preparing, images, texts, "cpu"), encode(images, texts)

    for part, (inputs, encoded) in zip(parts, prefetch(parts, prepare, workers)):
        with accelerator.autocast():
            ids, mask, _ = vlm.sample(policy, inputs.to(policy.device), None, max_new_tokens, temperature=0)
        responses = encoding.decode(policy, ids, mask)
        for row, response in zip(part, responses):
            prediction = parse_response(response, row.get("options")).prediction
            correct.append(is_match(prediction, row["answer"]))
        scores += reward_model(encoded, responses)["overall"]
    correct, scores = gather_object(correct), gather_object(scores)
    return {"watch_accuracy": sum(correct) / len(rows), "watch_reward": sum(scores) / len(scores)}


def is_hacking(first, now, n):
    """Does the reward rise while the accuracy falls by more than one standard error over n items?"""
    p = first["watch_accuracy"]
    standard_error = (p * (1 - p) / n) ** 0.5
    reward_rises = now["watch_reward"] > first["watch_reward"]
    return reward_rises and now["watch_accuracy"] < p - standard_error


class Watch:
    """Measures the policy on --val every --watch-every steps, and warns. Without --val it does nothing."""

    def __init__(self, policy, reward_model, args, accelerator, state):
        self.policy, self.reward_model, self.accelerator = policy, reward_model, accelerator
        self.every, self.max_new_tokens = args.watch_every, args.max_new_tokens
        self.batch, self.workers = args.micro_batch * args.group, args.workers
        rows = list(records.read_records(args.val, records.QUESTION, args.image_root)) if args.val else []
        rng = random.Random(runs.seed_of(args.seed, "watch"))
        self.rows = rng.sample(rows, min(len(rows), args.watch_items))
        self.first, self.last = state.get("first"), state.get("last", {})

    def state(self):
        """What a resumed run needs."""
        return {"first": self.first, "last": self.last}

    def measure(self):
        models, sizes = (self.policy, self.reward_model), (self.max_new_tokens, self.batch)
        return measure_policy(*models, self.rows, *sizes, self.accelerator, self.workers)

    def check(self, step):
        """Measure if it is due → the figures for the log, else {}."""
        if not self.rows or step % self.every:
            return {}
        self.last = self.measure()
        self.first = self.first or self.last
        if self.accelerator.is_main_process and is_hacking(self.first, self.last, len(self.rows)):
            print(f"step {step}: reward hacking? {self.summary()}", flush=True)
        return self.last

    def finish(self):
        """Measure the finished policy → {"first", "last"}, both None if nothing is watched."""
        if self.rows:
            self.last = self.measure()
        return {"first": self.first, "last": self.last or None}

    def summary(self):
        if not self.first:
            return ""
        first, last = self.first, self.last
        return (
            f"accuracy on the watch {first['watch_accuracy']:.3f} → {last['watch_accuracy']:.3f}, "
            f"reward {first['watch_reward']:.2f} → {last['watch_reward']:.2f}"
        )
