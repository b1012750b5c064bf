"""Stage 3: supervised fine-tuning, of the policy or of the generator.

    loss = - Σ_i Σ_t log π(y_it | image_i, prompt_i, y_i<t) / Σ_i |y_i|

over a whole batch: response tokens alone, the end-of-turn token included, padding and prompt not. The denominator
counts the batch's response tokens over all micro-batches and processes, so the step does not depend on how it is cut.

Reads   question or report records (JSONL), one file or several
Writes  OUT/ in the Hugging Face format, metrics.jsonl (loss, grad_norm, lr, tokens), metrics.json (loss on --val)

Departs from the paper: its SFT settings are not published; here AdamW, cosine schedule with warm-up, gradients clipped.

    python sft.py --model toy/policy --data runs/toy/cycle1/scored/accepted.jsonl --image-root runs/toy --out runs/toy/cycle1/sft
    accelerate launch --num_processes 8 sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data accepted.jsonl --out policy
"""

import argparse
import math

from medgr2 import cli, leakage, records, runs, training
from medgr2.errors import RunError, require
from medgr2.images import open_image
from medgr2.prompts import (
    format_candidate,
    generator_prompt,
    policy_prompt,
    reference_response,
    report_prompt,
)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--model", required=True, help="folder or hub name of the model to start from")
    p.add_argument("--data", required=True, nargs="+", help="record files to learn from")
    p.add_argument(
        "--weights",
        type=cli.number(float, 0),
        nargs="+",
        help="how often an epoch goes through each file of --data (1)",
    )
    p.add_argument("--val", help="record file to measure the loss on")
    p.add_argument(
        "--role",
        choices=("policy", "generator"),
        default="policy",
        help="policy: learn the response given image and question; generator: question, options and response given the image",
    )
    p.add_argument("--epochs", type=cli.number(float, 0), default=6, help="times through the data")
    p.add_argument("--batch", type=cli.number(int, 1), default=32, help="examples a step")
    p.add_argument(
        "--micro-batch",
        type=cli.number(int, 1),
        default=32,
        help="examples at a time: less memory, same result",
    )
    p.add_argument(
        "--lr",
        type=cli.number(float, 0),
        default=1e-3,
        help="peak learning rate (the toy's; about 1e-5 for a 7B model)",
    )
    p.add_argument(
        "--warmup",
        type=cli.number(float, 0, 1),
        default=0.05,
        help="share of the steps in which the rate rises",
    )
    p.add_argument("--weight-decay", type=cli.number(float, 0), default=0.01, help="AdamW's")
    p.add_argument("--clip", type=cli.number(float, 0), default=1.0, help="largest gradient norm")
    p.add_argument("--freeze", choices=("vision", "nothing"), default="vision", help="what does not learn")
    p.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations: less memory, more time",
    )
    p.add_argument("--test", help="the test file: refuse to train on what it holds (leakage.py)")
    p.add_argument(
        "--allow-leakage",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train on it all the same",
    )
    p.add_argument("--save-every", type=cli.number(int, 1), default=200, help="steps between checkpoints")
    cli.add_run_arguments(p)
    return p.parse_args()


if __name__ == "__main__":
    # before torch is imported: --help answers at once
    ARGS = parse_args()

import torch
from accelerate import Accelerator

from medgr2 import loading, vlm
from triton_ops import linear_cross_entropy


def load_examples(files, weights, role, root=None):
    """[(image path, prompt, response)], each file's as often as its weight says (its last round a prefix)."""
    examples = []
    for file, weight in zip(files, weights):
        rows = [example(r, role, file) for r in records.read_records(file, ("image",), root)]
        whole, rest = divmod(round(weight * len(rows)), len(rows))
        examples += rows * whole + rows[:rest]
    require(examples, f"{files[0]}: nothing to learn from; give another file, or a larger --weights")
    return examples


def example(record, role, file):
    """What a role learns from a record: (image path, prompt, response). Raises RecordError where it has nothing to teach."""
    if "report" in record:
        return record["image"], report_prompt(), reference_response(record)
    require(
        "question" in record and "answer" in record,
        f"{file}: record {record['id']} has neither question and answer nor a report; leave it out",
    )
    if role == "policy":
        return record["image"], policy_prompt(record), reference_response(record)
    prompt = generator_prompt(record.get("paradigm", "stepwise"), record.get("task"))
    return record["image"], prompt, format_candidate(record)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def token_losses(vlm_, examples, micro_batch):
    """Yield (sum of -log π over response tokens, their number) for each micro-batch of similar lengths."""
    examples = sorted(examples, key=lambda e: len(e[1]) + len(e[2]))
    for i in range(0, len(examples), micro_batch):
        images, prompts, responses = zip(*examples[i : i + micro_batch])
        ids, mask = vlm.encode_continuations(vlm_, responses)  # (B, C)
        inputs = vlm.encode_prompts(vlm_, [open_image(p) for p in images], prompts)
        states, weight, head = vlm.lm_head(
            vlm_, vlm.hidden_states(vlm_, inputs, ids, mask)[:, :-1]
        )  # (B, C, D), (V, D)
        targets = ids.masked_fill(mask == 0, -100)  # (B, C), padding ignored
        yield (
            linear_cross_entropy(states.flatten(0, 1), weight, targets.flatten(), reduction="sum", **head),
            int(mask.sum()),
        )


def count_tokens(vlm_, examples):
    """Response tokens of a batch, ends of turn included: the denominator of the loss."""
    return int(vlm.encode_continuations(vlm_, [e[2] for e in examples])[1].sum())


def train_step(vlm_, parameters, examples, micro_batch, accelerator):
    """Leave the gradient of the whole batch in the parameters; returns (loss, tokens)."""
    tokens = count_tokens(vlm_, examples)
    mine, total = examples[accelerator.process_index :: accelerator.num_processes], 0.0
    for loss, _ in token_losses(vlm_, mine, micro_batch) if mine else ():
        # divided by the whole batch's tokens, not the micro-batch's
        (loss / tokens).backward()
        total += loss.item() / tokens
    training.sum_gradients(parameters, accelerator)
    return accelerator.reduce(torch.tensor(total, device=vlm_.device), "sum").item(), tokens


@torch.no_grad()
def mean_loss(vlm_, examples, micro_batch):
    """Mean -log π a response token over all examples."""
    losses, counts = zip(*((loss.item(), n) for loss, n in token_losses(vlm_, examples, micro_batch)))
    return sum(losses) / sum(counts)


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
    run = runs.start(args, [args.model, *args.data, args.val, args.test], accelerator.is_main_process)
    weights = args.weights or [1.0] * len(args.data)
    if len(weights) != len(args.data):
        raise RunError(f"--weights: {len(weights)} for {len(args.data)} files of --data; give one each")
    examples = load_examples(args.data, weights, args.role, args.image_root)
    vlm_ = loading.load(args.model, accelerator.device)
    if args.freeze == "vision":
        loading.freeze_vision(vlm_)
    # needs train(); otherwise eval(), so that learning and sampling compute the same
    if args.gradient_checkpointing:
        vlm_.model.train().gradient_checkpointing_enable()
    parameters = {n: p for n, p in vlm_.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, weight_decay=args.weight_decay)
    if "optimizer" in run.state:
        vlm_.model.load_state_dict(run.state.pop("model"), strict=False)
        optimizer.load_state_dict(run.state.pop("optimizer"))

    steps, loss = math.ceil(args.epochs * len(examples) / args.batch), run.state.get("loss")
    for step in run.progress(range(run.state.get("step", 0), steps), "sft"):
        batch = [examples[i] for i in training.batch_indices(step, args.batch, len(examples), args.seed)]
        with accelerator.autocast():
            loss, tokens = train_step(vlm_, parameters.values(), batch, args.micro_batch, accelerator)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), args.clip).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step=step, loss=loss, grad_norm=norm, lr=group["lr"], tokens=tokens)
        if run.due(step + 1, args.save_every):
            run.commit(
                step=step + 1,
                loss=loss,
                model={n: p.detach() for n, p in parameters.items()},
                optimizer=optimizer.state_dict(),
            )

    result = {"steps": steps, "examples": len(examples), "train_loss": loss}
    if args.val:
        with accelerator.autocast():
            result["val_loss"] = mean_loss(
                vlm_, load_examples([args.val], [1.0], args.role, args.image_root), args.micro_batch
            )
    if run.main:
        loading.save(vlm_, run.part)
    run.finish(result, ", ".join(f"{k} {v:.4g}" for k, v in result.items() if v is not None))


if __name__ == "__main__":
    cli.run_main(main, ARGS)
