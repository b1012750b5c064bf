"""A memory plan: how much memory a GPU needs at its peak, for Qwen2.5-VL-3B and -7B, by stage and by switch.

Nothing is downloaded or allocated. The step of a stage runs on fake tensors (torch's FakeTensorMode), which
have shapes, dtypes and an autograd graph but no data, and a dispatch mode adds up the storages that are alive
(LiveBytes). It calls the project's own functions: vlm.prefill, decode_step, hidden_states_in_parts, lm_head,
the fused losses, adapters.add_lora. What is known in advance is arithmetic:

    learning weights: fp32, with fp32 gradients and AdamW's two moments    4 + 4 + 8 bytes each
    frozen weights    4 bytes each; 2 with --shard or --lora
    a step of AdamW   nothing more: its fused kernels work in place
    --shard over n    a process holds 1/n of the learning weights' 16 bytes. To learn, a unit is gathered in
                      bf16: four copies of a layer (two layers, each also in the buffer it came in), its
                      gradient in bf16 and fp32, and embedding and head, which stay. To sample and score, all
                      layers are gathered.
    reward model      its backbone in bf16, whole, through all of a GRPO run

The phases of a step have their peaks one after the other, so the largest counts:

    sample     P questions, G responses each: keys and values of all rows at their full length, a decoding
               step, the logits. --rollout-batch at a time
    score      the reward model on the same rows, twice: with the image and with a blank one
    learn      a micro-batch forward and backward, with gradients held from the micro-batch before

Not in the estimate: the CUDA context, NCCL's buffers and fragmentation (RESERVE is left free for them: an
assumption); the frozen vision tower's pass, over before the rest begins; the pixels themselves.

The check: real steps of a LLaVA of 50 M parameters on the CPU, each in a process of its own. How much the
process grows beyond the loaded model is compared with the same estimate for that model and device.

    python benchmarks/memory.py                 the plan and the check, into benchmarks/results/memory.json
    python benchmarks/memory.py --readme        writes the tables of docs/scale.md from that file
    python benchmarks/memory.py --rows grpo-7b-shard-8 --change prompts=4 --change prompt_tokens=2048
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import unittest.mock
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT]
import grpo_step
import readme

from medgr2 import cli, runs
from medgr2.errors import RunError

RESULTS = os.path.join(ROOT, "benchmarks", "results", "memory.json")
GB = 1e9
# Left free on every card: CUDA context, NCCL, fragmentation. Assumed, not measured.
RESERVE = 3.0
CARDS = (24, 48, 80)


@dataclass(frozen=True)
class Plan:
    """A stage at a size, with its switches. `prompts`: questions per process and step."""

    model: str
    stage: str
    gpus: int = 1
    shard: bool = False
    lora: int | None = None
    checkpointing: bool = False
    kl: bool = False
    reward: str | None = "3b"
    micro_batch: int = 1
    micro_group: int | None = None
    prompts: int = 2
    rollout_batch: int | None = None
    group: int = 8
    prompt_tokens: int = 768
    response_tokens: int = 512

    def flags(self):
        """The stage's flags that this plan stands for."""
        found = ["--shard"] * self.shard + ([f"--lora {self.lora}"] if self.lora else [])
        found += ["--gradient-checkpointing"] * self.checkpointing + ["--kl 0.01"] * self.kl
        found += [f"--micro-batch {self.micro_batch}"]
        if self.stage == "grpo":
            found += [f"--prompts {self.prompts * self.gpus}"]
            found += [f"--micro-group {self.micro_group}"] if self.micro_group else []
            found += [f"--rollout-batch {self.rollout_batch}"] if self.rollout_batch else []
        return " ".join(found)


CHECKPOINTED = Plan("7b", "grpo", gpus=8, shard=True, micro_group=2, kl=True, checkpointing=True)
# P = 512 tokens of an image (--max-pixels 401408) and 256 of text; C = 512. The last rows: larger images.
PLANS = {
    "sft-3b": Plan("3b", "sft"),
    "sft-3b-checkpointing": Plan("3b", "sft", checkpointing=True, micro_batch=4),
    "sft-3b-lora": Plan("3b", "sft", lora=32, micro_batch=2),
    "sft-3b-shard-1": Plan("3b", "sft", shard=True, checkpointing=True, micro_batch=4),
    "sft-3b-shard-8": Plan("3b", "sft", gpus=8, shard=True, checkpointing=True, micro_batch=4),
    "sft-7b": Plan("7b", "sft", checkpointing=True),
    "sft-7b-lora": Plan("7b", "sft", lora=32, micro_batch=1),
    "sft-7b-shard-8": Plan("7b", "sft", gpus=8, shard=True),
    "sft-7b-shard-8-checkpointing": Plan("7b", "sft", gpus=8, shard=True, checkpointing=True, micro_batch=4),
    "grpo-3b": Plan("3b", "grpo", prompts=16, rollout_batch=4, micro_group=1),
    "grpo-3b-shard-1": Plan("3b", "grpo", shard=True, prompts=16, rollout_batch=4, micro_group=2),
    "grpo-3b-lora": Plan("3b", "grpo", lora=32, kl=True, prompts=16, rollout_batch=4, micro_group=2),
    "grpo-3b-shard-8": Plan("3b", "grpo", gpus=8, shard=True, micro_group=2),
    "grpo-3b-shard-8-kl": Plan("3b", "grpo", gpus=8, shard=True, micro_group=2, kl=True),
    "grpo-7b-lora": Plan("7b", "grpo", lora=32, kl=True, prompts=16, rollout_batch=4, micro_group=1),
    "grpo-7b-shard-8-whole-groups": Plan("7b", "grpo", gpus=8, shard=True),
    "grpo-7b-shard-8": Plan("7b", "grpo", gpus=8, shard=True, micro_group=1),
    "grpo-7b-shard-8-kl": Plan("7b", "grpo", gpus=8, shard=True, micro_group=1, kl=True),
    "grpo-7b-shard-8-reward-7b": Plan("7b", "grpo", gpus=8, shard=True, micro_group=1, reward="7b"),
    "grpo-7b-shard-8-P-1280": Plan("7b", "grpo", gpus=8, shard=True, micro_group=1, prompt_tokens=1280),
    "grpo-7b-shard-8-checkpointing": replace(CHECKPOINTED, kl=False),
    "grpo-7b-shard-8-checkpointing-kl": CHECKPOINTED,
    "grpo-7b-shard-8-checkpointing-reward-7b": replace(CHECKPOINTED, reward="7b"),
    "grpo-7b-shard-8-checkpointing-P-1280": replace(CHECKPOINTED, prompt_tokens=1280),
    "sft-7b-shard-8-P-1280": Plan(
        "7b", "sft", gpus=8, shard=True, checkpointing=True, micro_batch=4, prompt_tokens=1280
    ),
}

# Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct as their config.json have them.
TEXT = {
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--rows", nargs="+", choices=PLANS, help="estimate only these rows, print, write nothing")
    p.add_argument("--change", action="append", default=[], metavar="FIELD=VALUE", help="of these rows")
    fits = "only check that these rows of the result file fit a GPU of this memory, with the flags in use"
    p.add_argument("--fits", type=cli.number(float, 1), metavar="GB", help=fits)
    cli.add_switch(p, "--readme", "only write the tables, from the result file")
    # ROW FOLDER: measure this row of CHECKS in this process.
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------
# What is alive.


def live_bytes():
    """A dispatch mode that counts: `now` and `peak`, bytes of storages that were made within it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def storages(tree):
        found = (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
        return [(storage._cdata, storage) for storage in found]

    class LiveBytes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.now = self.peak = 0
            self.alive = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            given = {key for key, _ in storages((args, kwargs))}
            for key, storage in storages(out):
                # A view's, or what was written in place, was there before.
                if key not in given and key not in self.alive:
                    self.alive.add(key)
                    self.change(storage.nbytes())
                    weakref.finalize(storage, self.remove, key, storage.nbytes())
            return out

        def remove(self, key, size):
            self.alive.discard(key)
            self.change(-size)

        def change(self, size):
            self.now += size
            self.peak = max(self.peak, self.now)

    return LiveBytes()


def growth(work, *args):
    """Bytes by which the live storages grow at most while work(*args) runs."""
    meter = live_bytes()
    with meter:
        work(*args)
    return meter.peak


# ---------------------------------------------------------------------------------------------------------
# A model of fake tensors.


def build_qwen(name, dtype, layers=None):
    """Qwen2.5-VL of this name as a VLM, all of its decoder layers or so many. Made within FakeTensorMode."""
    import transformers

    text = TEXT[name] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=VISION | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=name == "3b",
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for key, p in model.named_parameters():
        # --freeze images. SFT's default lets the merger learn too, which is 1% of the tower's memory.
        p.requires_grad_("visual" not in key)
    return as_vlm(model.eval())


def as_vlm(model):
    """The VLM of a model, without its processor: what computes needs only the padding's id."""
    from medgr2.vlm import VLM

    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    return VLM(model, processor, 0, [0], [1], None)


def count(parameters):
    return sum(p.numel() for p in parameters)


# ---------------------------------------------------------------------------------------------------------
# The phases of a step, as the stages call them. Prompts are text: an image's tokens cost the decoder as much.


def tokens(rows, length):
    """(ids, mask), (rows, length) each."""
    import torch

    ids = torch.zeros(rows, length, dtype=torch.long)
    return ids, torch.ones_like(ids)


def prompts(rows, length):
    from medgr2 import encoding

    ids, mask = tokens(rows, length)
    # One is padded, as in most batches: a mask is then made, and the keys are repeated for all heads.
    mask[0, 0] = 0
    return encoding.Inputs({"input_ids": ids, "attention_mask": mask}, [])


def sample(policy, plan, rows):
    """The last decoding step of `rows` questions, when keys and values are longest."""
    import torch

    from medgr2 import vlm

    C = plan.response_tokens
    with torch.no_grad():
        prefix, _ = vlm.prefill(policy, prompts(rows, plan.prompt_tokens), plan.group)
        prefix.reserve(C)
        for layer in prefix.cache.layers:
            layer.length += C - 1
            layer.show()
        N = rows * plan.group
        prefix.mask = tokens(N, plan.prompt_tokens + C - 1)[1]
        state = vlm.decode_step(policy, prefix, *tokens(N, 1))[:, 0]
        logits = policy.head(state).float()
        vlm.sample_token(logits, 1.0, torch.zeros(N))


def score(backbone, plan, rows):
    """The features of the responses to `rows` questions: with the image and with a blank one."""
    import torch

    from medgr2 import vlm

    with torch.no_grad():
        ids, mask = tokens(rows * plan.group, plan.response_tokens)
        inputs = prompts(rows, plan.prompt_tokens)
        states = vlm.hidden_states(backbone, inputs, ids, mask)
        head_loss(backbone, states, ids)
        # `states` are kept meanwhile, as in reward.compute_features.
        head_loss(backbone, vlm.hidden_states(backbone, inputs, ids, mask), ids)


def learn_sft(policy, plan):
    from medgr2 import vlm

    ids, mask = tokens(plan.micro_batch, plan.response_tokens)
    states = vlm.hidden_states(policy, prompts(plan.micro_batch, plan.prompt_tokens), ids, mask)
    head_loss(policy, states, ids, with_entropy=False).backward()


def learn_grpo(policy, plan):
    from medgr2 import vlm

    B = min(plan.micro_batch, plan.prompts)
    ids, mask = tokens(B * plan.group, plan.response_tokens)
    inputs = prompts(B, plan.prompt_tokens)
    for rows, states in vlm.hidden_states_in_parts(policy, inputs, ids, mask, plan.micro_group):
        head_loss(policy, states, ids[rows]).backward()


def head_loss(policy, states, ids, with_entropy=True):
    """The fused loss of all tokens, as linear_cross_entropy and linear_grpo_loss compute it.

    They select the rows that count by their values, which fake tensors do not have: here all count.
    """
    import torch

    import triton_ops
    from medgr2 import vlm

    hidden, weight, head = vlm.lm_head(policy, states[:, :-1])
    hidden, targets = hidden.flatten(0, 1).clone(), ids.flatten()
    row_bytes = len(weight) * 4
    device = "cuda" if hidden.dtype == torch.bfloat16 else "cpu"
    size = max(1, min(triton_ops.CHUNK_ROWS[device], triton_ops.CHUNK_BYTES[device] // row_bytes))
    # On a GPU the rows' operations are Triton kernels, which allocate less (plan_kernels).
    options = triton_ops._Options(1.0, 0.0, "triton" if device == "cuda" else "torch", size)
    chunks = triton_ops._chunks_of_rows(len(hidden), size)
    needed = triton_ops._needs_grad(hidden, weight, head["bias"])

    def chunk_loss(k, logps, entropy):
        return -logps.sum()

    arguments = hidden, weight, head["bias"], targets, chunks, options, chunk_loss, needed, with_entropy
    return triton_ops._LinearLoss.apply(*arguments)[0]


def plan_kernels():
    """Let the Triton kernels and the GEMMs of triton_ops.py do nothing: they allocate nothing on a GPU."""
    import triton_ops

    triton_ops._launch = lambda *args: None
    triton_ops._matmul_into = lambda out, a, b, beta=0: out


# ---------------------------------------------------------------------------------------------------------
# The estimate.

# Decoder layers of the models that are run. Peaks grow by the same for each layer, so two give any number.
FEW, MORE = 2, 4


def estimate(plan, build=None, bf16=True):
    """{phase: bytes at its peak} of a process. build(name, dtype, layers) makes a model; bf16: autocast."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    build, half = build or build_qwen, torch.bfloat16 if bf16 else torch.float32
    trained = half if plan.shard or plan.lora else torch.float32
    with FakeTensorMode():
        fixed = fixed_sizes(build, trained, half, plan)
        few, more = (moving_sizes(plan, build, trained, half, layers) for layers in (FEW, MORE))
        names = {phase: plan.reward if phase == "score" else plan.model for phase in few}
        layers = {name: len(build(name, half).model.get_decoder().layers) for name in set(names.values())}
    for phase in few:
        by_layer = (more[phase] - few[phase]) / (MORE - FEW)
        fixed[phase] += few[phase] + by_layer * (layers[names[phase]] - FEW)
    return fixed


def moving_sizes(plan, build, trained, half, layers):
    """{phase: bytes of what a phase allocates and frees} for models of so many layers."""
    import torch

    policy, found = build(plan.model, trained, layers), {}
    if plan.lora:
        add_lora(policy, plan.lora)

    def autocast():
        # One per phase, as in the stages: it keeps the weights that it has cast.
        return torch.autocast("cpu", torch.bfloat16, enabled=half == torch.bfloat16)

    rows = plan.rollout_batch or plan.prompts
    if plan.stage == "grpo":
        with autocast():
            found["sample"] = growth(sample, policy, plan, rows)
    if plan.stage == "grpo" and plan.reward:
        found["score"] = growth(score, build(plan.reward, half, layers), plan, rows)
    with autocast():
        found["learn"] = learning_growth(policy, plan)
    return found


def add_lora(policy, rank):
    """adapters.add_lora of fake tensors, which cannot be moved to a device."""
    import torch

    from medgr2 import adapters

    with unittest.mock.patch.object(torch.nn.Module, "to", lambda module, *args, **options: module):
        adapters.add_lora(policy, rank, "")


def fixed_sizes(build, trained, half, plan):
    """{phase: bytes} of weights, gradients, moments and gathered units."""
    policy = build(plan.model, trained)
    model = policy.model
    layer = count(model.get_decoder().layers[0].parameters())
    ends = {id(p): p for m in (model.get_input_embeddings(), policy.head) for p in m.parameters()}
    ends = count(ends.values())
    if plan.lora:
        add_lora(policy, plan.lora)
    learning = count(p for p in model.parameters() if p.requires_grad)
    other = (count(model.parameters()) - learning) * (half.itemsize if plan.shard or plan.lora else 4)
    n = plan.gpus if plan.shard else 1
    if plan.kl and not plan.lora:
        # The reference. With --lora it is the policy itself.
        other += learning * (half.itemsize if plan.shard else 4) / n
    # To learn, and to sample.
    units = (5 * layer + 2 * ends) * half.itemsize + 4 * layer if plan.shard else 0
    whole = learning * half.itemsize if plan.shard else 0
    if plan.stage == "grpo" and plan.reward:
        other += count(build(plan.reward, half).model.parameters()) * half.itemsize
    found = {"learn": other + 16 * learning / n + units}
    if plan.stage == "sft":
        return found
    rollout = other + 12 * learning / n + whole
    return {"sample": rollout, "score": rollout} | found


def learning_growth(policy, plan):
    """Activations and temporaries of a micro-batch, above weights and gradients of the one before."""
    import torch

    from medgr2 import vlm

    for p in policy.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with vlm.checkpointing(policy, plan.checkpointing):
        return growth(learn_sft if plan.stage == "sft" else learn_grpo, policy, plan)


# ---------------------------------------------------------------------------------------------------------
# The check: real steps of a small model on the CPU.

# (row of grpo_step.py, the plan). P and C are measured. A step has several micro-batches or parts,
# as a real one has: gradients are there when the second one learns.
CHECKS = {
    "GRPO": ("mid-256", Plan("mid", "grpo", reward=None)),
    "GRPO, `--micro-group 2`": ("mid-256", Plan("mid", "grpo", reward=None, micro_batch=8, micro_group=2)),
    "GRPO, `--micro-group 4`": ("mid-1024", Plan("mid", "grpo", reward=None, prompts=1, micro_group=4)),
    "GRPO, `--micro-group 2 --gradient-checkpointing`": (
        "mid-256",
        Plan("mid", "grpo", reward=None, micro_batch=8, micro_group=2, checkpointing=True),
    ),
    "SFT": ("mid-256", Plan("mid", "sft", micro_batch=4)),
    "SFT, `--gradient-checkpointing`": ("mid-256", Plan("mid", "sft", micro_batch=4, checkpointing=True)),
}
# So that a process's size follows what is alive: glibc gives back what is freed at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def child(name, folder):
    """In a process of its own: print what a real step measures."""
    row_name, plan = CHECKS[name]
    row = grpo_step.ROWS[row_name]
    if plan.stage == "grpo":
        size = {"micro_batch": plan.micro_batch, "micro_group": plan.micro_group}
        found = grpo_step.ours(row, folder, 1, False, checkpointing=plan.checkpointing, **size)
        found["response_tokens"] = grpo_step.C
    else:
        found = real_sft(folder, plan)
    print(json.dumps(found))


def real_sft(folder, plan, steps=2):
    """The growth of a process that takes steps of sft.py."""
    import torch
    from accelerate import Accelerator

    import sft
    from medgr2 import adapters, encoding, vlm
    from medgr2.images import open_image
    from medgr2.prompts import policy_prompt, reference_response

    accelerator = Accelerator(cpu=True)
    policy = adapters.load_to_train(os.path.join(folder, "model"), accelerator.device, "images")
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=grpo_step.LR, fused=True)
    rows = (grpo_step.questions(folder) * 2 * plan.micro_batch)[: 2 * plan.micro_batch]
    examples = [sft.Example(r["image"], policy_prompt(r), reference_response(r)) for r in rows]
    images = [open_image(example.image) for example in examples]
    prompt = encoding.encode_prompts(policy, images, [example.prompt for example in examples])
    response, _ = encoding.encode_continuations(policy, [example.response for example in examples])
    meter = grpo_step.Meter(False)
    for _ in range(steps):
        batch = sft.prepare_batch(policy, examples, plan.micro_batch, False, accelerator)
        with vlm.checkpointing(policy, plan.checkpointing):
            sft.compute_gradient(policy, parameters, *batch, accelerator)
        optimizer.step()
        optimizer.zero_grad()
        meter.tick()
    sizes = {"prompt_tokens": prompt["input_ids"].shape[1], "response_tokens": response.shape[1]}
    return meter.result() | sizes


def check(name, folder):
    """{measured, estimated, ratio, ...} of a row of CHECKS, in bytes beyond the loaded model."""
    plan = CHECKS[name][1]
    command = [sys.executable, __file__, "--child", name, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | MALLOC)
    if done.returncode:
        raise RunError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    plan = replace(plan, **{key: measured[key] for key in ("prompt_tokens", "response_tokens")})
    found = estimate(plan, functools.partial(build_llava, folder), bf16=False)
    # Weights are there before; moments are from the first step on, gradients only to learn.
    weights = 4 * sizes_of(functools.partial(build_llava, folder))
    estimated = max(found.values()) - weights
    measured = measured["growth_bytes"]
    sizes = {"prompt_tokens": plan.prompt_tokens, "response_tokens": plan.response_tokens}
    return sizes | {"measured": measured, "estimated": estimated, "ratio": estimated / measured}


def build_llava(folder, name, dtype, layers=None):
    """The LLaVA of grpo_step.py that is in `folder`, as build_qwen."""
    import transformers
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.from_pretrained(os.path.join(folder, "model"), trust_remote_code=False)
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:1] * layers
    # Random numbers are not to be had of fake tensors in every way that a tower asks for them.
    with no_init_weights():
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    learning = {
        id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()
    }
    for p in model.parameters():
        p.requires_grad_(id(p) in learning)
    return as_vlm(model.eval())


def sizes_of(build):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return count(build("mid", None).model.parameters())


# ---------------------------------------------------------------------------------------------------------
# Time, as arithmetic.

# bf16 TFLOP/s and GB/s of memory, from the makers' data sheets.
SPEEDS = {"L40, 48 GB": (181, 864), "A100, 80 GB": (312, 2039)}
# Assumed: the shares of these that are reached in the matrix products of learning, and in decoding.
REACHED_FLOPS, REACHED_BANDWIDTH = 0.35, 0.5
# A cycle as the paper's: samples, the share of them that is accepted; GRPO's steps and questions per step.
SAMPLES, ACCEPTED, EPOCHS, GRPO_STEPS, QUESTIONS = 50_000, 0.5, 2, 500, 16
# Rows that generate.py decodes at a time per GPU: --batch 4 images x 3 paradigms.
GENERATE_ROWS = 12


def decoder_weights(name):
    """Weights that a token goes through: those of the layers' matrices, and the head's."""
    text = TEXT[name]
    D, F, heads = (text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    keys_and_values = 2 * text["num_key_value_heads"] * D // heads
    layer = D * (2 * D + keys_and_values) + 3 * D * F
    return text["num_hidden_layers"] * layer + text["vocab_size"] * D


def hours(plan, card, gpus):
    """{stage: hours} of one cycle, and what they follow from. Nothing here is measured."""
    tflops, bandwidth = SPEEDS[card]
    text, weights = TEXT[plan.model], decoder_weights(plan.model)
    # Keys and values of a token, in all layers.
    kv = 2 * text["num_key_value_heads"] * text["hidden_size"] // text["num_attention_heads"]
    kv *= text["num_hidden_layers"]
    P, C, G = plan.prompt_tokens, plan.response_tokens, plan.group

    def decode(rows):
        """Seconds of C decoding steps of so many rows: all weights and the rows' keys and values, bf16."""
        bytes_read = 2 * weights + rows * 2 * kv * (P + C / 2)
        return C * bytes_read / (bandwidth * 1e9 * REACHED_BANDWIDTH)

    def compute(tokens, passes, weights=weights):
        """Seconds of 2 FLOP per weight and token: 1 pass forward, 3 with backward, 4 with recomputing."""
        return 2 * weights * passes * tokens / (tflops * 1e12 * REACHED_FLOPS)

    generate = SAMPLES / GENERATE_ROWS * (decode(GENERATE_ROWS) + compute(GENERATE_ROWS * P, 1))
    sft = EPOCHS * SAMPLES * ACCEPTED * compute(P + C, 4)
    at_once = plan.rollout_batch or QUESTIONS / gpus
    rollout = QUESTIONS / gpus * (compute(P, 1) + decode(at_once * G) / at_once)
    # The reward model reads each response with the image and with a blank one.
    judge = decoder_weights(plan.reward)
    scored = QUESTIONS / gpus * 2 * compute(P + G * C, 1, judge)
    learned = QUESTIONS / gpus * compute(P + G * C, 4 if plan.checkpointing else 3)
    found = {
        "generate": generate / gpus,
        "score": SAMPLES * 2 * compute(P + C, 1, judge) / gpus,
        "sft": sft / gpus,
        "grpo": GRPO_STEPS * (rollout + scored + learned),
    }
    step = {"tokens": QUESTIONS * (P + G * C), "rollout": rollout, "score": scored, "learn": learned}
    per_token = (2 * weights / (at_once * G) + 2 * kv * (P + C / 2)) / 1e6
    return {
        "hours": {name: seconds / 3600 for name, seconds in found.items()},
        "grpo_step": step | {"megabytes_per_token": per_token},
    }


TIMES = {
    "7B, 8 x 48 GB, `--shard`": ("grpo-7b-shard-8-checkpointing", "L40, 48 GB", 8),
    "7B, 1 x 48 GB, `--lora`": ("grpo-7b-lora", "L40, 48 GB", 1),
    "3B, 1 x 80 GB, `--shard`": ("grpo-3b-shard-1", "A100, 80 GB", 1),
}

# ---------------------------------------------------------------------------------------------------------
# The result and its tables.


def plan_table(result):
    rows = []
    for name, row in result["plans"].items():
        phases = row["gigabytes"]
        cells = [f"{phases[phase]:.1f}" if phase in phases else "" for phase in PHASES]
        fits = [str(card) for card in CARDS if row["peak"] + RESERVE <= card]
        label = f"{row['model'].upper()} {row['stage'].upper()}"
        label += f", P = {row['prompt_tokens']:,}" if row["prompt_tokens"] != Plan.prompt_tokens else ""
        label += f", {row['reward'].upper()} reward model" if row["reward"] != Plan.reward else ""
        rows.append([label, row["gpus"], f"`{row['flags']}`"])
        rows[-1] += [*cells, f"**{row['peak']:.1f}**", ", ".join(fits) or "none"]
    return markdown(["", "GPUs", "flags", *PHASES, "peak GB", "fits GB"], rows)


def check_table(result):
    rows = []
    for name, row in result["checks"].items():
        gigabytes = (f"{row[key] / GB:.3f}" for key in ("measured", "estimated"))
        sizes = row["prompt_tokens"], row["response_tokens"]
        rows.append([name, *sizes, *gigabytes, f"{row['ratio']:.3f}"])
    return markdown(["step", "P", "C", "measured GB", "estimated GB", "estimated / measured"], rows)


def time_table(result):
    rows = []
    for name, row in result["times"].items():
        step, cycle = row["grpo_step"], row["hours"]
        seconds = [f"{step[part]:.0f}" for part in ("rollout", "score", "learn")]
        rows.append([name, step["tokens"], f"{step['megabytes_per_token']:.0f}", *seconds])
        rows[-1] += [*(f"{cycle[stage]:.1f}" for stage in cycle), f"{sum(cycle.values()):.0f}"]
    parts = ["rollout s", "score s", "learn s"]
    stages = [f"{stage} h" for stage in next(iter(result["times"].values()))["hours"]]
    return markdown(["", "tokens per step", "MB per decoded token", *parts, *stages, "cycle h"], rows)


# In the order of a step.
PHASES = ("sample", "score", "learn")


def markdown(headers, rows):
    return cli.format_table(rows, headers, markdown=True)


def write_tables():
    result = runs.read_json(RESULTS, "run benchmarks/memory.py")
    hardware = f"{result['hardware']['cpus']} CPU cores ({result['hardware']['machine']})"
    source = (
        f"Command `{result['command']}`; commit `{(result['git']['commit'] or '?')[:10]}`; {hardware}, "
        f"torch {result['versions']['torch']}, transformers {result['versions']['transformers']}. "
        f"Result file: `{os.path.relpath(RESULTS, ROOT)}`."
    )
    readme.write_block("memory", f"{plan_table(result)}\n\n{source}")
    readme.write_block("memory-check", check_table(result))
    readme.write_block("memory-time", time_table(result))


def describe(name, plan):
    """The row of a plan in the result file; bytes in GB."""
    gigabytes = {phase: size / GB for phase, size in estimate(plan).items()}
    row = {key: value for key, value in vars(plan).items() if value not in (None, False)}
    row |= {"flags": plan.flags(), "gigabytes": gigabytes, "peak": max(gigabytes.values())}
    print(
        f"{name}: {row['peak']:.1f} GB, " + ", ".join(f"{k} {v:.1f}" for k, v in gigabytes.items()),
        flush=True,
    )
    return row


def changed(plan, changes):
    """The plan with other values, FIELD=VALUE each. Raises RunError for a field that it does not have."""
    for name, text in cli.parse_pairs("--change", changes).items():
        if name not in vars(plan):
            raise RunError(f"--change {name}: no such field; give one of {', '.join(vars(plan))}")
        plan = replace(plan, **{name: json.loads(text) if text[0] in "0123456789tfn" else text})
    return plan


def check_fits(names, card):
    """Print the peaks of these rows of the committed plan. Raises RunError for a row that does not fit `card`
    (GB), or whose flags are not those of its stage in the environment (SFT_FLAGS, GRPO_FLAGS).
    """
    plans = runs.read_json(RESULTS, "run benchmarks/memory.py")["plans"]
    for name in names:
        if name not in plans:
            raise RunError(f"{RESULTS}: no row {name} yet; run benchmarks/memory.py")
        row, variable = plans[name], f"{plans[name]['stage'].upper()}_FLAGS"
        print(f"plan {name}: {row['peak']:.1f} GB of {card:g} (estimated), with {row['flags']}")
        if row["peak"] + RESERVE > card:
            raise RunError(f"{name}: {row['peak']:.1f} GB and {RESERVE:g} in reserve do not fit {card:g} GB")
        words = os.environ.get(variable, row["flags"]).split()
        for flag in row["flags"].split(" --"):
            flag = f"--{flag.removeprefix('--')}".split()
            if flag[0] != "--prompts" and not any(
                words[i : i + len(flag)] == flag for i in range(len(words))
            ):
                raise RunError(f"{variable} lacks {' '.join(flag)}, which plan {name} counts on; add it")


def main(args):
    os.environ["TRITON_INTERPRET"] = "1"
    if args.child:
        return child(*args.child)
    if args.readme:
        return write_tables()
    if args.fits:
        return check_fits(args.rows or [], args.fits)
    plan_kernels()
    if args.rows:
        for name in args.rows:
            describe(name, changed(PLANS[name], args.change))
        return
    result = {"command": "python benchmarks/memory.py", "reserve": RESERVE, "checks": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (row, _) in CHECKS.items():
            own = os.path.join(folder, row)
            if not os.path.exists(own):
                os.mkdir(own)
                grpo_step.build(grpo_step.ROWS[row], own, 2)
            result["checks"][name] = check(name, own)
            print(name, result["checks"][name], flush=True)
    result["plans"] = {name: describe(name, plan) for name, plan in PLANS.items()}
    result["times"] = {name: hours(PLANS[row], *more) for name, (row, *more) in TIMES.items()}
    runs.write_json(RESULTS, result | runs.environment())
    write_tables()


if __name__ == "__main__":
    cli.run_main(main, parse_args())
