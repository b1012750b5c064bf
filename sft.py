"""Stage 3: supervised fine-tuning (SFT) of the policy, or of the generator.

    loss = - Σ_i Σ_t log π(y_it | image_i, prompt_i, y_i<t) / Σ_i |y_i|

over the batch's response tokens: the end of turn counts, prompt and padding do not. The denominator counts
the whole batch, so a step does not depend on micro-batches or processes. A record without a rationale
teaches the policy the bare answer, not an empty <think></think> (medgr2/prompts.py).

Reads   question or report records (JSONL), one file or several; --val, the same
Writes  OUT/ in the Hugging Face format, metrics.jsonl, metrics.json (docs/metrics.md explains each metric)

Departs from the paper:
1. Its SFT settings are not published. Ours: AdamW, gradients clipped, linear warm-up, then half a cosine;
   the vision tower frozen (--freeze).

    python sft.py --model toy/policy --data runs/toy/cycle1/scored/accepted.jsonl --image-root runs/toy \\
        --out runs/mine
"""

import functools
import itertools
import math
from operator import attrgetter
from typing import NamedTuple

from medgr2 import cli, records, runs, training
from medgr2.errors import RunError, require
from medgr2.images import open_images
from medgr2.prefetch import for_preparing, prefetch
from medgr2.progress import tell
from medgr2.prompts import (
    format_candidate,
    generator_prompt,
    policy_prompt,
    reference_response,
    report_prompt,
)


def parse_args():
    p = cli.Parser(description=__doc__)
    count, from_0 = cli.number(int, 1), cli.number(float, 0)
    p.add_argument("--model", required=True, help="folder or hub name of the model to start from")
    p.add_argument("--data", required=True, nargs="+", help="record files to learn from")
    p.add_argument("--weights", type=from_0, nargs="+", help="passes per epoch over each file (default: 1)")
    p.add_argument("--val", help="record file to measure the loss on")
    role = "policy: learn the response to image and question; generator: question and response to the image"
    p.add_argument("--role", choices=("policy", "generator"), default="policy", help=role)
    p.add_argument("--epochs", type=from_0, default=6, help="times through the data")
    p.add_argument("--steps", type=count, help="steps, instead of --epochs")
    p.add_argument("--batch", type=count, default=8, help="examples per step")
    p.add_argument("--micro-batch", type=count, default=32, help="examples per backward pass; same result")
    by_image = "keep the examples about an image together: it is encoded and prefilled once for them"
    cli.add_switch(p, "--by-image", by_image)
    p.add_argument("--lr", type=from_0, default=1e-3, help="peak rate (the toy's; about 1e-5 for 7B)")
    share = cli.number(float, 0, 1)
    p.add_argument("--warmup", type=share, default=0.05, help="share of the steps in which the rate rises")
    p.add_argument("--weight-decay", type=from_0, default=0.01, help="AdamW's")
    p.add_argument("--clip", type=cli.number(float, 1e-6), default=1.0, help="largest gradient norm")
    p.add_argument("--freeze", choices=("vision", "nothing"), default="vision", help="what does not learn")
    lora = "train a LoRA adapter of this rank, then merge it; OUT/adapter holds it alone (needs peft)"
    p.add_argument("--lora", type=count, metavar="R", help=lora)
    cli.add_switch(p, "--shard", "hold weights, gradients and moments in parts, one per process (FSDP2)")
    cli.add_switch(p, "--gradient-checkpointing", "recompute activations: less memory, more time")
    skip = "at a bad line or unreadable image of --data, or a record too long: skip leaves it out"
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=skip)
    p.add_argument("--test", help="test file: refuse to train on anything it holds (medgr2/leakage.py)")
    cli.add_switch(p, "--allow-leakage", "with --test: train anyway")
    p.add_argument("--save-every", type=count, default=200, help="steps between checkpoints")
    cli.add_image_arguments(p)
    cli.add_training_arguments(p)
    return p.parse_args()


if __name__ == "__main__":
    # Before torch is imported, so that --help answers at once.
    ARGS = parse_args()

import torch

from medgr2 import adapters, context, encoding, loading, sharding, vlm
from triton_ops import linear_cross_entropy

# ---------------------------------------------------------------------------------------------------------
# Examples.


class Example(NamedTuple):
    image: str
    prompt: str
    response: str


class MicroBatch(NamedTuple):
    """B examples, encoded on the CPU: prompts with their responses (encoding.append_replies)."""

    inputs: encoding.Inputs  # (B, W)
    index: torch.Tensor  # (T,)
    targets: torch.Tensor  # (T,)


def load_examples(data, weights, role):
    """The Examples of each (file, records), by weight: 2.5 is all of them twice and the first half once."""
    examples = []
    for (file, rows), weight in zip(data, weights):
        own = [make_example(record, role, file) for record in rows]
        times, rest = divmod(round(weight * len(own)), len(own))
        examples += own * times + own[:rest]
    require(examples, f"{data[0][0]}: nothing to learn from; give another file, or a larger --weights")
    return examples


def make_example(record, role, file):
    """What a role learns from a record: an Example. Raises RecordError if the record has nothing to teach."""
    if "report" in record:
        return Example(record["image"], report_prompt(), reference_response(record))
    lacking = f"{file}: record {record['id']} has neither question and answer nor a report; leave it out"
    require("question" in record and "answer" in record, lacking)
    if role == "policy":
        return Example(record["image"], policy_prompt(record), reference_response(record))
    prompt = generator_prompt(record.get("paradigm", "stepwise"), record.get("task"))
    return Example(record["image"], prompt, format_candidate(record))


def leave_out_too_long(policy, examples, on_error):
    """The examples that fit into the policy's context."""

    def count(example):
        return encoding.encode_continuations(policy, [example.response])[0].shape[1]

    parts = attrgetter("image"), attrgetter("prompt"), count
    return context.leave_out_too_long(policy, examples, *parts, on_error == "skip")


def micro_batches(examples, size, by_image):
    """Examples, `size` at a time, similar lengths together: less padding. by_image: sorted by image too."""
    examples = sorted(examples, key=lambda example: len(example.prompt) + len(example.response))
    if by_image:
        examples = list(itertools.chain(*group_by_image(examples)))
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def group_by_image(examples):
    """A list of Examples for each image."""
    return list(records.group_by(examples, attrgetter("image")).values())


def collate(policy, examples, encode):
    """Examples → a MicroBatch. encode: encoding.encode_prompts or encode_by_image."""
    images, prompts, responses = zip(*examples)
    ids, mask = encoding.encode_continuations(policy, responses, device="cpu")  # (B, C)
    inputs = encode(policy, open_images(images), prompts, "cpu")  # (B, P)
    return MicroBatch(*encoding.append_replies(inputs, ids, mask))


def prepare_batch(policy, examples, micro_batch, by_image, accelerator):
    """The examples of a step → (this process's MicroBatches, response tokens of the whole batch)."""
    tokens = int(encoding.encode_continuations(policy, [e.response for e in examples], device="cpu")[1].sum())
    process, N = accelerator.process_index, accelerator.num_processes
    own = examples[len(examples) * process // N : len(examples) * (process + 1) // N]
    # With by_image also if no image occurs twice, so that all processes make the same passes.
    by_image_always = functools.partial(encoding.encode_by_image, always=True)
    encode = by_image_always if by_image else encoding.encode_prompts
    batches = [collate(policy, part, encode) for part in micro_batches(own, micro_batch, by_image)]
    if not own:
        # A process without examples computes one that does not count: -100 is no target.
        batch = collate(policy, examples[:1], encode)
        batches = [batch._replace(targets=torch.full_like(batch.targets, -100))]
    return batches, tokens


# ---------------------------------------------------------------------------------------------------------
# The loss and its gradient. `policy` is the VLM that learns, in the role of a generator too.


def micro_batch_losses(policy, batch):
    """Yield the sum of -log π over the response tokens of a MicroBatch, once; the caller runs backward()."""
    inputs, index, targets = (x.to(policy.device) for x in batch)
    for states in vlm.row_states(policy, inputs):  # (B, W, D)
        hidden, weight, head = vlm.lm_head(policy, states.flatten(0, 1)[index])  # (T, D), (V, D)
        # The same as cross_entropy(hidden @ weight.T, targets), but the logits (T, V) never exist.
        yield linear_cross_entropy(hidden, weight, targets, reduction="sum", **head)


def compute_gradient(policy, parameters, batches, tokens, accelerator):
    """Leave the gradient of the whole batch in the parameters → its loss.

    batches: this process's MicroBatches; tokens: the response tokens of the whole batch.
    """
    # A sharded model computes in all processes at once: those with fewer passes add some of weight 0.
    dummies, total = sharding.dummy_passes(policy, len(batches)), 0.0
    for batch in batches:
        for loss in micro_batch_losses(policy, batch):
            # Divided by the whole batch's tokens, so that gradients of micro-batches and processes add up.
            (loss / tokens).backward()
            total += loss.item() / tokens
    for _ in range(dummies):
        for loss in micro_batch_losses(policy, batches[0]):
            (0 * loss).backward()
    training.sum_gradients(parameters, accelerator)
    return accelerator.reduce(torch.tensor(total, device=policy.device), "sum").item()


@torch.no_grad()
def mean_loss(policy, examples, micro_batch, workers=0, progress=iter):
    """Mean -log π per response token over all examples."""
    total, tokens, parts = 0.0, 0, micro_batches(examples, micro_batch, by_image=True)
    encode = functools.partial(collate, for_preparing(policy), encode=encoding.encode_by_image)
    encoded = prefetch(parts, encode, workers)
    for _, batch in zip(progress(parts), encoded):
        total += sum(loss.item() for loss in micro_batch_losses(policy, batch))
        tokens += len(batch.targets)
    return total / tokens


# ---------------------------------------------------------------------------------------------------------


def main(args):
    accelerator = loading.start_accelerator()
    files = [(file, ("image",)) for file in args.data]
    data = training.read_data(args, files, accelerator.is_main_process)
    val = [(args.val, training.read_usable(args.val, ("image",), args.image_root))] if args.val else None
    paths = [args.model, *args.data, args.val, args.test]
    # May change when the run resumes, for example because memory ran out.
    run = runs.start(args, paths, accelerator.is_main_process, free=("micro_batch", "gradient_checkpointing"))
    weights = args.weights or [1.0] * len(args.data)
    if len(weights) != len(args.data):
        raise RunError(f"--weights: {len(weights)} for {len(args.data)} files of --data; give one each")
    examples = load_examples(data, weights, args.role)
    held_out = load_examples(val, [1.0], args.role) if val else []
    policy = adapters.load_to_train(args.model, accelerator.device, args.freeze, args.lora)
    loading.limit_pixels(policy, args.min_pixels, args.max_pixels)
    if args.by_image and not policy.shares_images:
        tell(f"{args.model}: its prompts cannot share an image: --by-image saves nothing")
    examples, held_out = (leave_out_too_long(policy, part, args.on_error) for part in (examples, held_out))
    if args.shard:
        sharding.shard(policy)
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    training.restore_state(run.state, policy.model, optimizer)

    steps = args.steps or math.ceil(args.epochs * len(examples) / args.batch)
    loss, skipped = run.state.get("loss"), training.Skipped(run.state.get("skipped", 0))
    context.tell_image_tokens(policy, [example.image for example in examples])
    run.announce(f"{steps} steps of {args.batch} examples out of {len(examples)}")
    preparing, remaining = for_preparing(policy), range(run.state.get("step", 0), steps)
    groups = group_by_image(examples) if args.by_image else [[example] for example in examples]
    batch_of = training.shuffle(groups, args.batch, args.seed)

    def prepare(step):
        # Each epoch is another permutation of the examples, or of their images.
        return prepare_batch(preparing, batch_of(step), args.micro_batch, args.by_image, accelerator)

    prepared = prefetch(remaining, prepare, args.workers)
    for step, (batches, tokens) in zip(run.progress(remaining, "sft"), prepared):
        # Loss and gradient of the whole batch.
        with accelerator.autocast(), vlm.checkpointing(policy, args.gradient_checkpointing):
            loss = compute_gradient(policy, parameters.values(), batches, tokens, accelerator)
        # Clip the gradient.
        norm = training.clip_gradient(parameters.values(), args.clip)
        # Step, at this step's learning rate; not if the gradient is not finite.
        lr = training.learning_rate(step, steps, args.lr, args.warmup)
        training.step(optimizer, lr, norm)
        skipped.count(step, loss, norm)
        # Log and commit.
        run.log(step=step, loss=loss, grad_norm=norm, lr=lr, tokens=tokens, skipped=skipped.total)
        if run.due(step + 1, args.save_every):
            state = training.state(parameters, optimizer)
            run.commit(step=step + 1, loss=loss, skipped=skipped.total, **state)

    result = {"steps": steps, "examples": len(examples), "train_loss": loss, "skipped": skipped.total}
    if held_out:
        with accelerator.autocast(), sharding.gathered(policy):
            progress = functools.partial(run.progress, description="validation", together=True)
            result["val_loss"] = mean_loss(policy, held_out, args.micro_batch, args.workers, progress)
    if args.shard:
        sharding.collect(policy, run.main)
    if run.main:
        adapters.save_trained(policy, run.part)
    run.finish(
        result, ", ".join(f"{name} {value:.4g}" for name, value in result.items() if value is not None)
    )


if __name__ == "__main__":
    cli.run_main(main, ARGS)
