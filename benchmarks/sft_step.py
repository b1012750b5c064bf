"""Seconds and memory of an SFT step against TRL's SFTTrainer, on the same model, examples and work.

A step learns 16 examples (8 on the longest rows): 4 questions about each image, with rationales. The vision
tower is frozen on both sides, as by default in sft.py; AdamW; one micro-batch.

    ours      the functions of sft.py's step, as its main calls them
    by image  the same with --by-image: an image is encoded and prefilled once for its questions
    trl       SFTTrainer, tuned: no gradient checkpointing, our dtype, loss on the response only
    floor     matrix products and attention of our two steps by themselves (benchmarks/floor.py)

The models are those of benchmarks/grpo_step.py: `toy` has the toy policy's shape, `mid` 50 M parameters,
`qwen` that of Qwen2.5-VL-3B, in bf16 autocast and only on a GPU, and `tiny` is to try the code. The number in
a row's name is the image tokens. TRL takes images from a datasets.Dataset of files; we take them
from the files. Each measurement is a process of its own, and the sides take turns for several rounds. Seconds
are the median of the timed steps; memory is the growth of the process above the loaded model and optimiser. A
ratio is between two sides in one round.

Same work: the first gradient before clipping, compared by norm and cosine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/sft_step.py               all rows of this machine, into benchmarks/results/
    python benchmarks/sft_step.py --rows toy-16 --rounds 1 --out /tmp/quick.json
    python benchmarks/sft_step.py --readme      writes the table from the committed result file
"""

import argparse
import json
import os
import sys
import tempfile
from collections import namedtuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks"), os.path.join(ROOT, "toy")]
import readme
from grpo_step import (
    LLAVA_SIZES,
    LR,
    SEED,
    Meter,
    build_llava,
    build_qwen,
    call,
    compare,
    environment,
    questions,
    spread,
)

from medgr2 import cli, runs
from medgr2.prompts import TASKS, policy_prompt, reference_response

RESULTS = os.path.join(ROOT, "benchmarks", "results")
# Questions about an image.
Q = 4
Row = namedtuple("Row", "shape pixels patch images steps")
ROWS = {
    "toy-16": Row("toy", 64, 16, 4, 20),
    "toy-256": Row("toy", 64, 4, 4, 5),
    "toy-1024": Row("toy", 128, 4, 4, 2),
    "mid-16": Row("mid", 64, 16, 4, 3),
    "mid-256": Row("mid", 64, 4, 4, 2),
    "mid-1024": Row("mid", 128, 4, 2, 1),
}
GPU_ROWS = {"qwen-256": Row("qwen", 448, 14, 4, 5), "qwen-1024": Row("qwen", 896, 14, 2, 3)}
TRIAL = {"tiny-64": Row("tiny", 224, 14, 2, 1)}
ALL = ROWS | GPU_ROWS | TRIAL
SIDES = ("ours", "by image", "trl")


def parse_args():
    p = cli.Parser(description=__doc__)
    count = cli.number(int, 1)
    p.add_argument("--rows", nargs="+", choices=list(ALL), help="rows to measure (all that this machine can)")
    p.add_argument("--rounds", type=count, default=3, help="processes of each side")
    p.add_argument("--steps", type=count, help="timed steps of a process, after one to warm up (the row's)")
    p.add_argument("--threads", type=count, default=os.cpu_count(), help="CPU threads, of every side")
    out = "result file (benchmarks/results/sft_step_DEVICE.json); other rows in it stay"
    p.add_argument("--out", help=out)
    cli.add_switch(p, "--readme", "only write the table, from the result file of the CPU")
    # ROW TASK FOLDER: what to do in this process.
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return p.parse_args()


def build(row, folder, steps):
    """folder/model and folder/questions.jsonl: for each step Q questions about each of its images."""
    import clinic

    from medgr2 import records

    build_model = build_llava if row.shape in LLAVA_SIZES else build_qwen
    build_model(row, os.path.join(folder, "model"))
    rows = clinic.question_rows(folder, "q", row.images * steps, SEED, Q, list(TASKS))
    records.write_records(os.path.join(folder, "questions.jsonl"), rows)
    return {}


def load_policy(folder, cuda):
    from medgr2 import adapters

    return adapters.load_to_train(os.path.join(folder, "model"), "cuda" if cuda else "cpu", "vision", None)


def ours(row, folder, steps, cuda, by_image, check=False):
    """Our step, as sft.py's main does it: seconds, memory and floor; or the gradient of the check."""
    import floor
    import torch
    from accelerate import Accelerator

    import sft
    from medgr2 import training
    from medgr2.prefetch import for_preparing, prefetch

    accelerator = Accelerator(mixed_precision="bf16" if cuda else "no", cpu=not cuda)
    policy, size = load_policy(folder, cuda), row.images * Q
    parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0, fused=True)
    examples = [sft.make_example(record, "policy", "") for record in questions(folder)]
    preparing, meter = for_preparing(policy), Meter(cuda)

    def prepare(step):
        batch = examples[step * size : (step + 1) * size]
        return sft.prepare_batch(preparing, batch, size, by_image, accelerator)

    def learn(batches, tokens):
        sft.compute_gradient(policy, parameters.values(), batches, tokens, accelerator)

    if check:
        # TRL's loss is over all tokens, banned ones included.
        policy.banned_ids = []
        learn(*prepare(0))
        gradient = {n: p.grad for n, p in parameters.items()}
        torch.save(gradient, os.path.join(folder, f"gradient-{by_image}.pt"))
        return {}
    for batches, tokens in prefetch(range(1 + steps), prepare):
        learn(batches, tokens)
        norm = training.clip_gradient(parameters.values(), 1.0)
        training.step(optimizer, LR, norm)
        meter.tick()
    result = meter.result()
    with floor.Recorder() as recorder:
        learn(batches, tokens)
    return result | {"floor_seconds": floor.measure(recorder.calls), "tokens": tokens}


def trl(row, folder, steps, cuda, check=False):
    """TRL's step on the same model and examples."""
    import datasets
    import torch
    import transformers
    from trl import SFTConfig, SFTTrainer

    from medgr2 import encoding

    policy, seen = load_policy(folder, cuda), {}
    rows, end = questions(folder), policy.tokenizer.decode([policy.end_id])
    prompts, _ = encoding.write_chats(policy, [policy_prompt(row) for row in rows])
    completions = [reference_response(row) + end for row in rows]
    columns = {"prompt": prompts, "completion": completions, "image": [row["image"] for row in rows]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            meter.tick()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if check:
                found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
                seen["gradient"], control.should_training_stop = found, True

    class InOrder(SFTTrainer):
        """Takes the examples in their order, as our side does."""

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(data)

    config = SFTConfig(
        per_device_train_batch_size=row.images * Q,
        max_steps=1 + steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0 if check else 1.0,
        max_length=None,
        gradient_checkpointing=False,
        bf16=cuda,
        use_cpu=not cuda,
        seed=SEED,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = InOrder(policy.model, config, train_dataset=data, processing_class=policy.processor)
    trainer.add_callback(Watch())
    meter = Meter(cuda)
    trainer.train()
    if not check:
        return meter.result()
    found = {}
    for name in ("False", "True"):
        own = torch.load(os.path.join(folder, f"gradient-{name}.pt"), weights_only=True)
        found[name] = compare(own, seen["gradient"])
    return found


def child(args):
    """One task in this process; its result is the last line of stdout."""
    import torch

    name, task, folder = args.child
    row, cuda = ALL[name], name in GPU_ROWS
    torch.set_num_threads(args.threads)
    steps = args.steps or row.steps
    tasks = {
        "build": lambda: build(row, folder, 1 + steps),
        "ours": lambda: ours(row, folder, steps, cuda, False),
        "by image": lambda: ours(row, folder, steps, cuda, True),
        "trl": lambda: trl(row, folder, steps, cuda),
        "check ours": lambda: ours(row, folder, 0, cuda, False, check=True),
        "check by image": lambda: ours(row, folder, 0, cuda, True, check=True),
        "check trl": lambda: trl(row, folder, 0, cuda, check=True),
    }
    print(json.dumps(tasks[task]()))


def measure(name, args):
    """All rounds of a row, and the check that the sides do the same work."""
    with tempfile.TemporaryDirectory() as folder:
        call(name, "build", folder, args, __file__)
        same = [call(name, f"check {side}", folder, args, __file__) for side in SIDES][-1]
        rounds = []
        for k in range(args.rounds):
            rounds.append({side: call(name, side, folder, args, __file__) for side in SIDES})
            seconds = ", ".join(f"{side} {found['seconds']:.3f} s" for side, found in rounds[-1].items())
            print(f"{name} round {k}: {seconds}", flush=True)
    return ALL[name]._asdict() | {"same_work": same, "rounds": rounds}


def ratio(rounds, key, above, below, key_below=None):
    found = spread([turn[above][key] / turn[below][key_below or key] for turn in rounds])
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def write_table(path):
    result, rows = runs.read_json(path, "run benchmarks/sft_step.py"), []
    for name, row in result["rows"].items():
        rounds, cells = row["rounds"], [name]
        cells += [f"{spread([turn[side]['seconds'] for turn in rounds])['median']:.3f}" for side in SIDES]
        cells += [ratio(rounds, "seconds", "trl", side) for side in SIDES[:2]]
        cells += [ratio(rounds, "growth_bytes", side, "trl") for side in SIDES[:2]]
        cells += [ratio(rounds, "seconds", side, side, "floor_seconds") for side in SIDES[:2]]
        rows.append([*cells, f"{min(one['cosine'] for one in row['same_work'].values()):.7f}"])
    headers = ["row", *(f"{side} s" for side in SIDES), "trl / ours", "trl / by image"]
    headers += ["memory, ours / trl", "by image / trl", "ours / floor", "by image / its floor", "cosine"]
    first = next(iter(result["rows"].values()))
    versions, commits = first["versions"], {row["git"]["commit"][:10] for row in result["rows"].values()}
    source = (
        f"Command `python benchmarks/sft_step.py`; commit {', '.join(f'`{c}`' for c in sorted(commits))}; "
    )
    source += f"{first['threads']} CPU cores ({first['hardware']['machine']}), torch {versions['torch']}, "
    source += f"transformers {versions['transformers']}, TRL {versions['trl']}."
    readme.write_block("sft_step", f"{readme.format_table(headers, rows)}\n\n{source}")


def main(args):
    if args.child:
        return child(args)
    of_cpu = os.path.join(RESULTS, "sft_step_cpu.json")
    if args.readme:
        return write_table(of_cpu)
    here = environment()
    gpu = bool(here["hardware"]["gpus"])
    out = args.out or os.path.join(RESULTS, f"sft_step_{'cuda' if gpu else 'cpu'}.json")
    result = runs.read_json(out, "remove it") if os.path.exists(out) else {"rows": {}}
    for name in args.rows or (GPU_ROWS if gpu else ROWS):
        result["rows"][name] = measure(name, args) | {"threads": args.threads, **here}
        runs.write_json(out, result)
    if out == of_cpu:
        write_table(out)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
