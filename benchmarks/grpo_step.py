"""Seconds and memory of a GRPO step against TRL's GRPOTrainer, on the same model, prompts and work.

A step takes P questions about images and samples G = 8 responses of C = 32 tokens to each. No token that
ends a turn may be sampled, so all responses have one length. Rewards are computed from the ids, so no
reward model is measured. The step learns by the GRPO loss (β = 0, ε = 0.2, one update per rollout) with
AdamW. The vision tower and the projector are frozen on both sides, as in grpo.py.

    ours     the functions of grpo.py's step, as its main calls them; its default micro-batch of 8 questions
    trl      GRPOTrainer, tuned: no gradient checkpointing, our dtype, the largest micro-batch (ROWS)
    default  GRPOTrainer's defaults: gradient checkpointing, bf16 autocast, 8 responses per micro-batch
    floor    matrix products and attention of our step by themselves (benchmarks/floor.py)

Only what the comparison needs is set on both sides: the above, and no learning-rate schedule. TRL takes
images from a datasets.Dataset of files, as is usual with it; we take them from the files. The models are
LLaVA with random weights and the toy's tokenizer: `toy` has the toy policy's shape (1 M parameters, P = 8),
`mid` has 50 M parameters (P = 4, 2 and 1: with 8 a step would take minutes). Smaller patches or larger
images give 16 to 1024 image tokens. `qwen` has Qwen2.5-VL-3B's shape and a made-up tokenizer, in bf16
autocast, only on a GPU; `tiny` is a small one for a CPU, to try the code.

Each measurement is a process of its own, and the sides take turns for several rounds. Seconds are the
median of the timed steps. Memory is the peak of the process (resident; on a GPU allocated), and its growth
above what was held once model and optimiser were made. A ratio is TRL's value over ours in one round: its
median over rounds, lowest and highest.

Same work: both sides get the same completions and keep their gradient before clipping. (For TRL a subclass
returns them in place of its generation, only in this check.) Compared are the loss (zero by construction at
a first step, since advantages sum to zero), the gradient's norm and the cosine of the two gradients.

    pip install -r benchmarks/requirements.txt
    python benchmarks/grpo_step.py              all rows of this machine, into benchmarks/results/
    python benchmarks/grpo_step.py --rows toy-16 --rounds 1 --steps 1 --out /tmp/quick.json
    python benchmarks/grpo_step.py --readme     writes the table from the committed result file
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "toy")]
import readme

from medgr2 import cli, runs
from medgr2.errors import RunError
from medgr2.prompts import TASKS, policy_prompt

# Responses to a question, tokens of a response, learning rate.
G, C, LR, SEED = 8, 32, 1e-5, 0
# trl_batch: responses in TRL's tuned micro-batch.
Row = namedtuple("Row", "shape pixels patch prompts trl_batch steps")
ROWS = {
    "toy-16": Row("toy", 64, 16, 8, 64, 5),
    "toy-256": Row("toy", 64, 4, 8, 64, 3),
    "toy-1024": Row("toy", 128, 4, 8, 64, 1),
    "mid-64": Row("mid", 64, 8, 4, 32, 1),
    "mid-256": Row("mid", 64, 4, 2, 16, 1),
    "mid-1024": Row("mid", 128, 4, 1, 8, 1),
}
GPU_ROWS = {"qwen-256": Row("qwen", 448, 14, 8, 64, 5), "qwen-1024": Row("qwen", 896, 14, 8, 16, 3)}
TRIAL = {"tiny-64": Row("tiny", 224, 14, 2, 16, 1)}
SIDES = ("ours", "trl", "default")


def parse_args():
    p = cli.Parser(description=__doc__)
    count, rows = cli.number(int, 1), [*ROWS, *GPU_ROWS, *TRIAL]
    p.add_argument("--rows", nargs="+", choices=rows, help="rows to measure (all that this machine can)")
    p.add_argument(
        "--sides", nargs="+", choices=SIDES, help="sides to measure (all; no default at 1024 tokens)"
    )
    p.add_argument("--rounds", type=count, default=2, help="processes of each side (of `default` one)")
    p.add_argument(
        "--steps", type=count, help="timed steps of a process, after one to warm up (the row's own)"
    )
    p.add_argument("--threads", type=count, default=os.cpu_count(), help="CPU threads, of every side")
    p.add_argument(
        "--out", help="result file (benchmarks/results/grpo_step_DEVICE.json); other rows in it stay"
    )
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    # ROW TASK FOLDER: what to do in this process.
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------
# The model and the questions, made once per row.


# (text, vision): changes of the toy policy's sizes.
LLAVA_SIZES = {
    "toy": ({}, {}),
    "mid": (
        {
            "hidden_size": 512,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "layer_types": ["full_attention"] * 8,
        },
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
    ),
}


def build_llava(row, folder):
    """A LLaVA of (pixels / patch)² image tokens with the toy's tokenizer and random weights."""
    import torch
    import transformers

    from medgr2 import loading

    policy = os.path.join(ROOT, "toy", "policy")
    config = transformers.AutoConfig.from_pretrained(policy, trust_remote_code=False)
    config.image_seq_length, config.dtype = (row.pixels // row.patch) ** 2, "float32"
    text, vision = LLAVA_SIZES[row.shape]
    config.text_config.update(text | {"max_position_embeddings": 4096})
    config.vision_config.update(vision | {"image_size": row.pixels, "patch_size": row.patch})
    processor = loading.load_processor(policy)
    processor.patch_size = row.patch
    processor.image_processor.size = {"height": row.pixels, "width": row.pixels}
    processor.save_pretrained(folder)
    torch.manual_seed(SEED)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)


SPECIAL = "<|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
# (text, vision): Qwen2.5-VL-3B's sizes, and some for a CPU.
QWEN_SIZES = {
    "qwen": (
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
        },
    ),
    "tiny": (
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
        },
        {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
        },
    ),
}


def save_qwen_processor(row, folder):
    """An image processor, and the toy's tokenizer with tokens that no text has. Returns the latter."""
    import transformers

    policy = os.path.join(ROOT, "toy", "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy, trust_remote_code=False)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    words = raw["model"]["vocab"]
    last = max(*words.values(), *(token["id"] for token in raw["added_tokens"]))
    for i in range(last + 1, 150000 if row.shape == "qwen" else 1000):
        words[f"unused{i}"] = i
    fast = type(tokenizer.backend_tokenizer).from_str(json.dumps(raw))
    ends = {"pad_token": "<|pad|>", "eos_token": "<|im_end|>", "additional_special_tokens": SPECIAL}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **ends)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": row.pixels**2, "longest_edge": row.pixels**2}
    transformers.Qwen2VLImageProcessorPil(patch_size=row.patch, size=size).save_pretrained(folder)
    with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as f:
        f.write(CHAT)
    return tokenizer


def build_qwen(row, folder):
    """A Qwen2.5-VL with random weights and a made-up tokenizer."""
    import torch
    import transformers

    tokenizer = save_qwen_processor(row, folder)
    text, vision = QWEN_SIZES[row.shape]
    # Rotary pairs of a head, shared by time, height and width.
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(SPECIAL[2:])))
    more = {"rope_parameters": rope, "tie_word_embeddings": True, "bos_token_id": None}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | more | ends,
        vision_config=vision | {"patch_size": row.patch},
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(**ends)
    model.save_pretrained(folder)


def build(row, folder, steps):
    """folder/model and folder/questions.jsonl: P questions per step, one per image."""
    import clinic

    from medgr2 import records

    build_model = build_llava if row.shape in ("toy", "mid") else build_qwen
    build_model(row, os.path.join(folder, "model"))
    rows = clinic.question_rows(folder, "q", row.prompts * steps, SEED, 1, list(TASKS))
    records.write_records(os.path.join(folder, "questions.jsonl"), rows)
    return {}


def questions(folder):
    from medgr2 import records

    return list(records.read_records(os.path.join(folder, "questions.jsonl")))


def reward(ids):
    """The reward of a response: the mean of its ids. It differs within a group, so all have an advantage."""
    return sum(ids) / len(ids) / 1000


# ---------------------------------------------------------------------------------------------------------
# A process's measurements.


class Meter:
    """Times of the ends of steps, and memory above what was there at the start."""

    def __init__(self, cuda):
        self.cuda, self.ends = cuda, []
        self.start = self.now()

    def now(self):
        """Bytes held: resident on a CPU, allocated on a GPU."""
        if self.cuda:
            import torch

            return torch.cuda.memory_allocated()
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def tick(self):
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def result(self):
        """Of the steps after the first: seconds each, their median; peak bytes and growth."""
        # Linux counts in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.cuda:
            import torch

            peak = torch.cuda.max_memory_allocated()
        seconds = [b - a for a, b in zip(self.ends, self.ends[1:])]
        return {
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "peak_bytes": peak,
            "growth_bytes": peak - self.start,
        }


def unending(policy):
    """A policy that never samples the end of a turn: all its responses are of the same length."""
    from dataclasses import replace

    return replace(policy, banned_ids=sorted({*policy.banned_ids, *policy.stop_ids}))


def fed_completions(policy, prompts):
    """(P·G, C) ids that any response might have: the completions of the check."""
    import torch

    free = torch.tensor(sorted(set(range(policy.head.weight.shape[0])) - set(unending(policy).banned_ids)))
    return free[torch.randint(len(free), (prompts * G, C), generator=torch.Generator().manual_seed(SEED))]


def given_groups(policy, batch):
    """Groups of the check's completions instead of samples."""
    import torch

    import grpo
    from medgr2 import encoding

    prompts, groups = encoding.encode_images(policy, batch.inputs), []
    completions = fed_completions(policy, len(batch.rows)).to(policy.device).split(G)
    for record, prompt, ids in zip(batch.rows, prompts, completions):
        mask, truncated = torch.ones_like(ids), torch.ones(G, dtype=torch.bool, device=ids.device)
        texts = encoding.decode(policy, ids, mask)
        groups.append(grpo.Group(record, prompt, ids, mask, truncated, texts, parsed=[], match=[]))
    return groups


def ours(row, folder, steps, cuda, check=False, micro_batch=8, micro_group=None, checkpointing=False):
    """Our step, as grpo.py's main does it: `steps` after one to warm up, or the gradient of the check."""
    from dataclasses import replace

    import floor
    import torch
    from accelerate import Accelerator

    import grpo
    from medgr2 import encoding, loading, rollouts

    accelerator = Accelerator(mixed_precision="bf16" if cuda else "no", cpu=not cuda)
    policy = unending(loading.load(os.path.join(folder, "model"), accelerator.device))
    loading.freeze_images(policy)
    parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0, fused=True)
    rows, meter = questions(folder), Meter(cuda)
    loss = {"loss": "grpo", "epsilon": 0.2, "epsilon_high": None, "kl": 0.0, "kl_estimator": "k3"}
    groups = {"mask_truncated": False, "scale_rewards": "group"}
    sizes = {"micro_batch": micro_batch, "micro_group": micro_group, "gradient_checkpointing": checkpointing}
    args = argparse.Namespace(clip=1.0, **sizes, **loss, **groups)

    def take(step):
        """A step → its groups; the check only leaves its gradient and returns the metrics."""
        part = rows[step * row.prompts : (step + 1) * row.prompts]
        inputs = encoding.preprocess(policy, *rollouts.open_rows(part))
        batch = rollouts.Batch(step, part, [0] * len(part), inputs, None)
        with accelerator.autocast():
            groups = given_groups(policy, batch) if check else grpo.sample_groups(policy, batch, G, C, SEED)
        rewards = [torch.tensor([reward(ids) for ids in g.ids.tolist()]) for g in groups]
        groups = [replace(g, rewards=r, informative=True) for g, r in zip(groups, rewards)]
        groups = grpo.with_advantages(groups, args)
        counts = grpo.count_batch(groups, C, accelerator)
        if check:
            # TRL's log-probs are over all tokens, banned ones included.
            learner = replace(policy, banned_ids=[])
            return grpo.policy_gradient(learner, groups, counts, args, accelerator)[1]
        grpo.update_policy(policy, optimizer, groups, counts, LR, args, accelerator)
        return groups

    if check:
        metrics = take(0)
        torch.save({n: p.grad for n, p in parameters.items()}, os.path.join(folder, "gradient.pt"))
        return {"loss": metrics["loss"], "grad_norm": norm_of(p.grad for p in parameters.values())}
    for step in range(1 + steps):
        groups = take(step)
        meter.tick()
    result = meter.result()
    with floor.Recorder() as recorder:
        take(0)
    result["floor_seconds"] = floor.measure(recorder.calls)
    prompt_tokens = max(g.prompt.inputs["input_ids"].shape[1] for g in groups)
    size = {"parameters": sum(p.numel() for p in policy.model.parameters()), "prompt_tokens": prompt_tokens}
    return result | size | {"response_tokens": int(sum(g.mask.sum() for g in groups))}


def norm_of(gradients):
    return sum((g.double() ** 2).sum() for g in gradients).sqrt().item()


def trl_config(row, steps, side, policy, cuda, check):
    """GRPOConfig: what must be the same on both sides, and for `trl` what makes it fast."""
    from trl import GRPOConfig

    batch = row.trl_batch if side == "trl" else 8
    same = dict(
        num_generations=G,
        max_completion_length=C,
        generation_batch_size=row.prompts * G,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=row.prompts * G // batch,
        max_steps=1 + steps,
        shuffle_dataset=False,
        seed=SEED,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0 if check else 1.0,
        loss_type="grpo",
        beta=0.0,
        epsilon=0.2,
        generation_kwargs={"suppress_tokens": policy.banned_ids},
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not cuda,
    )
    return GRPOConfig(**same, **({"gradient_checkpointing": False, "bf16": cuda} if side == "trl" else {}))


def trl(row, folder, steps, cuda, side="trl", check=False):
    """TRL's step on the same model and questions."""
    import datasets
    import torch
    import transformers
    from trl import GRPOTrainer

    from medgr2 import loading

    policy = unending(loading.load(os.path.join(folder, "model"), "cuda" if cuda else "cpu"))
    loading.freeze_images(policy)
    rows = questions(folder)
    data = datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": policy_prompt(r)}] for r in rows],
            "image": [r["image"] for r in rows],
        }
    ).cast_column("image", datasets.Image())
    seen = {}

    class Fed(GRPOTrainer):
        """Takes the check's completions in place of its own: TRL has no other way to give it some."""

        def _generate_single_turn(self, *args, **kwargs):
            return fed_completions(policy, row.prompts).tolist(), None

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            meter.tick()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if check:
                seen["gradient"] = {
                    n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None
                }
                control.should_training_stop = True

    def score(completion_ids, **kwargs):
        seen["tokens"] = sum(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]

    trainer = (Fed if check else GRPOTrainer)(
        policy.model,
        score,
        trl_config(row, steps, side, policy, cuda, check),
        data,
        processing_class=policy.processor,
        callbacks=[Watch()],
    )
    meter = Meter(cuda)
    out = trainer.train()
    if check:
        return compare(
            torch.load(os.path.join(folder, "gradient.pt"), weights_only=True), seen["gradient"]
        ) | {"loss": out.training_loss}
    return meter.result() | {"response_tokens": seen["tokens"]}


def compare(a, b):
    """Two gradients by parameter name → cosine, and the second one's norm."""
    if a.keys() != b.keys():
        raise RunError(f"the sides train different parameters: {sorted(a.keys() ^ b.keys())[:3]}")
    dot = sum((a[n].double().to(b[n].device) * b[n].double()).sum() for n in a).item()
    return {"cosine": dot / (norm_of(a.values()) * norm_of(b.values())), "grad_norm": norm_of(b.values())}


def child(args):
    """One task in this process; its result is the last line of stdout."""
    import torch

    name, task, folder = args.child
    row = (ROWS | GPU_ROWS | TRIAL)[name]
    cuda = name in GPU_ROWS
    torch.set_num_threads(args.threads)
    steps = args.steps or row.steps
    tasks = {
        "build": lambda: build(row, folder, 1 + steps),
        "ours": lambda: ours(row, folder, steps, cuda),
        "trl": lambda: trl(row, folder, steps, cuda),
        "default": lambda: trl(row, folder, steps, cuda, "default"),
        "check-ours": lambda: ours(row, folder, 0, cuda, check=True),
        "check-trl": lambda: trl(row, folder, 0, cuda, check=True),
    }
    print(json.dumps(tasks[task]()))


# ---------------------------------------------------------------------------------------------------------
# All processes. This one imports no torch: its memory when it starts a child would count in the child's peak.


def call(name, task, folder, args, script=__file__):
    """Run a script's task in a process of its own → its result."""
    command = [sys.executable, os.path.abspath(script), "--child", name, task, folder]
    command += ["--threads", str(args.threads)]
    command += ["--steps", str(args.steps)] if args.steps else []
    env = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RunError(f"{name}, {task}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values):
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(name, args):
    """All rounds of a row, and the check that both sides do the same work."""
    row = (ROWS | GPU_ROWS | TRIAL)[name]
    # Qwen merges four patches into a token.
    image_tokens = (row.pixels // row.patch) ** 2 // (1 if row.shape in ("toy", "mid") else 4)
    sides = args.sides or (SIDES if image_tokens <= 256 else SIDES[:2])
    with tempfile.TemporaryDirectory() as folder:
        call(name, "build", folder, args)
        same = {s: call(name, f"check-{s}", folder, args) for s in ("ours", "trl")}
        rounds = []
        for k in range(args.rounds):
            rounds.append(
                {side: call(name, side, folder, args) for side in sides if side != "default" or k == 0}
            )
            print(
                f"{name} round {k}: " + ", ".join(f"{s} {r['seconds']:.2f} s" for s, r in rounds[-1].items()),
                flush=True,
            )
    tokens = {r["response_tokens"] for turn in rounds for r in turn.values()}
    if tokens != {row.prompts * G * C}:
        raise RunError(
            f"{name}: responses of {tokens} tokens per step in all; {row.prompts * G * C} were expected"
        )
    result = row._asdict() | {
        "image_tokens": image_tokens,
        "group": G,
        "completion": C,
        "same_work": same,
        "rounds": rounds,
    }
    for peer in [s for s in sides if s != "ours" and "ours" in sides]:
        result[f"{peer}_over_ours"] = {
            key: spread([r[peer][key] / r["ours"][key] for r in rounds if peer in r])
            for key in ("seconds", "peak_bytes", "growth_bytes")
        }
    return result


def median_of(rounds, side, key):
    return statistics.median(turn[side][key] for turn in rounds if side in turn)


def row_cells(name, row):
    """{column: cell} of a row: medians over rounds, TRL's values over ours, the cosine of the gradients."""
    rounds = row["rounds"]
    sides = [side for side in SIDES if side in rounds[0]]
    cells = {"row": name, "prompts": row["prompts"]}
    cells |= {f"{side} s": median_of(rounds, side, "seconds") for side in sides}
    cells |= {f"{side} GB": median_of(rounds, side, "peak_bytes") / 1e9 for side in sides}
    for side in sides:
        if f"{side}_over_ours" in row:
            ratios = row[f"{side}_over_ours"]
            low, high = ratios["seconds"]["low"], ratios["seconds"]["high"]
            cells[f"{side}/ours"] = f"{ratios['seconds']['median']:.1f} ({low:.1f}-{high:.1f})"
            cells[f"{side}/ours growth"] = ratios["growth_bytes"]["median"]
    if "floor_seconds" in rounds[0]["ours"]:
        above = [turn["ours"]["seconds"] / turn["ours"]["floor_seconds"] for turn in rounds]
        cells["ours/floor"] = f"{statistics.median(above):.2f}"
    return cells | {"cosine": f"{row['same_work']['trl']['cosine']:.7f}"}


def table(result, markdown=False):
    """A line per row of the result."""
    lines = [row_cells(name, row) for name, row in result["rows"].items()]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    return cli.format_table([[line.get(column) for column in columns] for line in lines], columns, markdown)


def provenance(result):
    first = next(iter(result["rows"].values()))
    commits = dict.fromkeys(f"`{row['git']['commit'][:10]}`" for row in result["rows"].values())
    hardware, versions = first["hardware"], first["versions"]
    device = ", ".join(hardware["gpus"]) or f"{first['threads']} CPU cores"
    return (
        f"Command `python benchmarks/grpo_step.py`; commit {', '.join(commits)}; "
        f"{device} ({hardware['machine']}), torch {versions['torch']}, "
        f"transformers {versions['transformers']}, TRL {versions['trl']}."
    )


def write_table(path):
    """The table of docs/performance.md."""
    with open(path, encoding="utf-8") as f:
        result = json.load(f)
    readme.write_block("grpo_step", f"{table(result, markdown=True)}\n\n{provenance(result)}")


def environment():
    """runs.environment of a process that has torch, and so knows the GPUs; with TRL's version."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import torch; from medgr2 import runs; "
        "from importlib.metadata import version; found = runs.environment(); "
        "found['versions']['trl'] = version('trl'); print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{done.stderr.strip().splitlines()[-1]}; pip install -r benchmarks/requirements.txt")
    return json.loads(done.stdout)


def main(args):
    if args.child:
        return child(args)
    results = os.path.join(ROOT, "benchmarks", "results")
    if args.readme:
        return write_table(args.out or os.path.join(results, "grpo_step_cpu.json"))
    here = environment()
    gpu = bool(here["hardware"]["gpus"])
    names = args.rows or (list(GPU_ROWS) if gpu else [*ROWS, *GPU_ROWS])
    skipped = [n for n in names if n in GPU_ROWS and not gpu]
    if skipped:
        print(f"no CUDA device: {', '.join(skipped)} skipped, not measured")
    out = args.out or os.path.join(results, f"grpo_step_{'cuda' if gpu else 'cpu'}.json")
    result = {"rows": {}}
    if os.path.exists(out):
        with open(out, encoding="utf-8") as f:
            result = json.load(f)
    for name in [n for n in names if n not in skipped]:
        command = (
            f"python benchmarks/grpo_step.py --rows {name} --rounds {args.rounds}"
            + (f" --steps {args.steps}" if args.steps else "")
            + (f" --sides {' '.join(args.sides)}" if args.sides else "")
        )
        result["rows"][name] = measure(name, args) | {"command": command, "threads": args.threads, **here}
        runs.write_json(out, result)
    print(table(result))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
