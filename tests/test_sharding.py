"""Sharding over real processes (gloo): gradients, updates, memory, commits, against one plain process.

benchmarks/sharding.py computes the other cases, over 1, 2 and 3 processes.
"""

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import clinic
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from test_vlm import BUILD

import grpo
import sft
from medgr2 import adapters, encoding, records, rollouts, sharding, training, vlm

# What is computed, and the flags that change how.
CASES = {
    "sft": {},
    "sft --gradient-checkpointing": {"checkpointing": True},
    "sft --lora --gradient-checkpointing": {"lora": 4, "checkpointing": True},
    "sft --freeze nothing": {"freeze": "nothing"},
    "grpo": {"freeze": "images"},
    "grpo --micro-group --kl": {"freeze": "images", "micro_group": 2, "kl": 0.1},
    "grpo --micro-group --gradient-checkpointing": {
        "freeze": "images",
        "micro_group": 2,
        "checkpointing": True,
    },
    "grpo --lora --kl": {"freeze": "images", "lora": 4, "kl": 0.1},
    "sft --by-image": {"by_image": True},
    "sft --by-image --gradient-checkpointing": {"by_image": True, "checkpointing": True},
}
# Those that the suite computes, and for how many steps; the rest takes minutes.
FEW = {"sft": 2, "sft --lora --gradient-checkpointing": 1, "sft --by-image --gradient-checkpointing": 1}
FEW |= {"sft --by-image": 1}
FEW |= {"grpo --micro-group --kl": 1, "grpo --micro-group --gradient-checkpointing": 1}


# ---------------------------------------------------------------------------------------------------------
# Real processes, forked so that each need not import torch again.


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_rank(rank, world, port, work, out, more):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world)} | more
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    found = work(Accelerator(cpu=True))
    if rank == 0:
        torch.save(found, out)
    torch.distributed.barrier()


def over(world, work, **more):
    """work(accelerator) in `world` processes → what it returned in the first, or the exit statuses."""
    context, port = multiprocessing.get_context("fork"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found")
        ranks = [
            context.Process(target=run_rank, args=(k, world, port, work, out, more)) for k in range(world)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + 240
        while any(rank.is_alive() for rank in ranks):
            time.sleep(0.05)
            # As a launcher does: if one fails, all end. So they do if they wait for each other.
            if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
                for rank in ranks:
                    rank.kill()
        statuses = [rank.exitcode for rank in ranks]
        return statuses if any(statuses) else torch.load(out)


# ---------------------------------------------------------------------------------------------------------
# The computations, the same ones in one plain process and in several.


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    BUILD[request.param](folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    clinic.write_clinic(str(folder), (3, 1, 1, 1, 1), seed=5)
    return folder / "expert.jsonl"


def train(source, data, case, accelerator, steps=1, shard=False):
    """`steps` updates → {"gradient": of the first, "update": of the weights, "bytes": held} by name."""
    options = {"freeze": "vision", "lora": None, "checkpointing": False, "kl": 0.0, "micro_group": None}
    options["by_image"] = False
    options |= CASES[case]
    torch.manual_seed(0)
    policy = adapters.load_to_train(source, "cpu", options["freeze"], options["lora"])
    for name, p in policy.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05)
    if shard:
        sharding.shard(policy)
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values())
    before, found = whole(parameters), {}
    compute = (sft_gradient if case.startswith("sft") else grpo_gradient)(
        source, policy, data, options, accelerator, shard
    )
    for step in range(steps):
        compute(list(parameters.values()))
        if step == 0:
            found["gradient"] = whole({name: p.grad for name, p in parameters.items()})
        norm = training.clip_gradient(parameters.values(), 1.0)
        gradients = {name: p.grad for name, p in parameters.items()}
        training.step(optimizer, 1e-3, norm)
    moments = [x for state in optimizer.state.values() for x in state.values()]
    held = [*policy.model.parameters(), *gradients.values(), *moments]
    found["bytes"] = sum(local(x).nbytes for x in held)
    found["update"] = {name: x - before[name] for name, x in whole(parameters).items()}
    found["norm"] = norm
    return found


def local(x):
    return x.to_local() if sharding.DTensor in type(x).__mro__ else x


def whole(tensors):
    return {
        name: (x.detach().full_tensor() if hasattr(x, "full_tensor") else x.detach()).clone()
        for name, x in tensors.items()
    }


def sft_gradient(source, policy, data, options, accelerator, shard):
    examples = sft.load_examples([(str(data), list(records.read_records(data)))], [1.0], "policy")[:5]

    def compute(parameters):
        # So small that the processes' numbers of passes differ: 5, 2 + 3, 1 + 2 + 2.
        size, by_image = (2, True) if options["by_image"] else (1, False)
        batch = sft.prepare_batch(policy, examples, size, by_image, accelerator)
        with vlm.checkpointing(policy, options["checkpointing"]):
            sft.compute_gradient(policy, parameters, *batch, accelerator)

    return compute


def grpo_gradient(source, policy, data, options, accelerator, shard):
    """Five groups of four. The second and the fourth have no advantage, so processes differ in passes."""
    rows = list(records.read_records(data))[:5]
    prompts = encoding.encode_images(policy, encoding.preprocess(policy, *rollouts.open_rows(rows)))
    texts = ["a cyst", "left", "<answer>right</answer>", "x"]
    ids, mask = encoding.encode_continuations(policy, texts)
    groups = []
    for k, (record, prompt) in enumerate(zip(rows, prompts)):
        rewards = torch.tensor([0.1, 0.5, 0.4, 0.9]) * (k + 1) if k % 2 == 0 else torch.ones(4)
        group = grpo.Group(record, prompt, ids, mask, torch.zeros(4, dtype=torch.bool), texts, [], [])
        groups.append(replace(group, rewards=rewards, informative=True))
    args = argparse.Namespace(micro_batch=1, micro_group=options["micro_group"], kl=options["kl"])
    args.gradient_checkpointing = options["checkpointing"]
    args.loss, args.epsilon, args.epsilon_high, args.kl_estimator = "dapo", 0.2, None, "k3_unbiased"
    args.scale_rewards, args.mask_truncated, args.shard = "none", False, shard
    args.lora, args.model, args.clip = options["lora"], source, 1.0
    groups = grpo.with_advantages(groups[accelerator.process_index :: accelerator.num_processes], args)
    if args.kl:
        reference = grpo.load_reference(policy, args)
        with sharding.gathered(reference):
            groups = grpo.with_reference_logps(reference, groups, 2, accelerator)
    counts = grpo.count_batch(groups, 8, accelerator)
    kept = [groups]

    def compute(parameters):
        kept[0] = grpo.policy_gradient(policy, kept[0], counts, args, accelerator)[0]
        training.sum_gradients(parameters, accelerator)

    return compute


def difference(found, wanted):
    """1 - cosine, and the largest relative difference of one tensor (of those that are not rounding)."""
    a, b = (torch.cat([x[name].double().flatten() for name in wanted]) for x in (found, wanted))
    pairs = [(found[name].double(), wanted[name].double()) for name in wanted]
    largest = max(((x - y).norm() / y.norm()).item() for x, y in pairs if y.norm() > 1e-4 * b.norm())
    return 1 - torch.nn.functional.cosine_similarity(a, b, 0).item(), largest


def compare(source, data, world, steps, **more):
    """{case: how sharded training over `world` processes differs from one plain process}.

    steps: {case: how many}; more: added to the processes' environment.
    """

    def work(accelerator):
        return {case: train(source, data, case, accelerator, n, shard=True) for case, n in steps.items()}

    result, found = {}, over(world, work, **more)
    for case, n in steps.items():
        plain = train(source, data, case, Accelerator(cpu=True), n)
        assert sorted(found[case]["gradient"]) == sorted(plain["gradient"])
        gradient, tensor = difference(found[case]["gradient"], plain["gradient"])
        update, _ = difference(found[case]["update"], plain["update"])
        result[case] = {"gradient": gradient, "tensor": tensor, "update": update}
        result[case]["bytes"] = found[case]["bytes"] / plain["bytes"]
    return result


def test_sharded_training_over_two_processes_is_that_of_one_plain_process(source, data):
    found = compare(source, data, 2, FEW)
    require_equal(found)
    # Weights, gradients and moments. The frozen tower is whole.
    assert found["sft"]["bytes"] <= 0.6


def require_equal(found):
    for case, differs in found.items():
        assert differs["gradient"] <= 1e-6 and differs["tensor"] <= 1e-3, (case, differs)
        assert differs["update"] <= 1e-4, (case, differs)


# ---------------------------------------------------------------------------------------------------------
# Commits and the finished folder.


def run_sft(flags, dies_at=None):
    """work(accelerator): sft.py with these flags; the last process kills itself before a step."""

    def work(accelerator):
        step, calls = training.step, []

        def step_or_die(*args):
            calls.append(1)
            if len(calls) == dies_at and accelerator.is_last_process:
                os.kill(os.getpid(), signal.SIGKILL)
            step(*args)

        training.step = step_or_die
        sys.argv = ["sft.py", *map(str, flags)]
        with open(os.devnull, "w") as sys.stderr:
            sft.main(sft.parse_args())

    return work


def read_weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}


@pytest.fixture
def killed(data, tmp_path):
    """(flags of a sharded run, folder of the same run in one plain process); two processes ended in step 4.

    Their commits are of steps 2, 3 and 4, and the two last ones are kept.
    """
    BUILD["llava"](tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--data", data, "--steps", 5, "--batch", 3, "--micro-batch", 1]
    over(1, run_sft([*flags, "--save-every", 1, "--out", tmp_path / "plain"]))
    flags += ["--save-every", 1, "--shard", "--out", tmp_path / "run"]
    assert -signal.SIGKILL in over(2, run_sft(flags, dies_at=5))
    return flags, tmp_path / "plain", tmp_path / "run.part" / "state"


def test_a_killed_run_resumes_over_other_numbers_of_processes(killed, capfd):
    """From the commit before the last, which is damaged, over three; then over one."""
    flags, plain, state = killed
    commits = sorted(path.name[:8] for path in state.glob("*.pt"))
    assert commits == ["00000003", "00000004"]
    assert {path.name for path in state.glob("*.shards")} >= {f"{number}.shards" for number in commits}
    shard = max((state / "00000004.shards").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capfd.readouterr()
    assert -signal.SIGKILL in over(3, run_sft(flags, dies_at=2))
    said = capfd.readouterr().out
    assert "00000004" in said and "damaged, set aside" in said and "resuming from step 3" in said
    over(1, run_sft(flags))
    assert "resuming from step 4" in capfd.readouterr().out
    wanted, found = read_weights(plain), read_weights(state.parent.parent / "run")
    assert list(wanted) == list(found)
    assert all(found[name].dtype == wanted[name].dtype for name in wanted)
    before = read_weights(Path(flags[1]))
    updates = ({name: x[name] - before[name] for name in wanted} for x in (found, wanted))
    assert difference(*updates)[0] <= 1e-4
    folders = [sorted(p.name for p in folder.iterdir()) for folder in (plain, state.parent.parent / "run")]
    assert folders[0] == [name for name in folders[1] if not name.endswith(".damaged")]


def test_a_resumed_optimiser_has_its_state_on_the_device_of_the_weights(monkeypatch):
    """On CUDA the fused kernels refuse a `step` on the CPU. The device here is meta, so nothing is read."""
    monkeypatch.setattr(sharding.dcp, "load", lambda tensors, **options: None)
    weight = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    sharding.restore("folder", {"weight": weight}, optimizer)
    assert {x.device.type for x in optimizer.state[weight].values()} == {"meta"}
