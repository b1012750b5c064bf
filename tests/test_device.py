"""What a machine without a GPU can say about one: no tensor on the wrong device, bf16, the dtype of weights.

test_triton_ops.py compiles the kernels for GPUs that are not there.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import clinic
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from test_vlm import BUILD, build_qwen

import generate
import grpo
import reward
import sft
from medgr2 import adapters, encoding, loading, records, rollouts, vlm
from medgr2.images import open_image
from medgr2.prompts import policy_prompt, reference_response

evaluate = __import__("eval")
ROOT = Path(__file__).parent.parent
TOY = ROOT / "toy"


def test_every_stage_runs_on_a_device_that_refuses_tensors_of_the_cpu():
    """In a process of its own: autograd knows only devices that were there at its first backward pass."""
    checks = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "tests/device_checks.py",
    ]
    done = subprocess.run(checks, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------------------
# bf16, by autocast over fp32 weights or in the weights, as on a GPU: its rounding is 2**-9 = 0.002.


@pytest.fixture(scope="module", params=["toy", "qwen2_5_vl"])
def source(request, tmp_path_factory):
    if request.param == "toy":
        return str(TOY / "policy")
    folder = tmp_path_factory.mktemp(request.param)
    BUILD[request.param](folder)
    return str(folder)


@pytest.fixture(autouse=True)
def reset_accelerate():
    """accelerate keeps the precision of its first Accelerator."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def bf16(monkeypatch):
    """The device computes in bf16."""
    monkeypatch.setattr(loading, "best_dtype", lambda: torch.bfloat16)


def gradient(model):
    """The gradient of what learns, in one vector."""
    return torch.cat([p.grad.flatten() for p in model.model.parameters() if p.requires_grad])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), 0).item()


def test_with_lora_in_bf16_a_model_that_cannot_train_through_a_prefix_does_not(bf16, tmp_path):
    build_qwen(tmp_path, "Qwen3_5")
    policy = adapters.load_to_train(str(tmp_path), "cpu", "images", 2)
    assert policy.prefix_sharing == "without gradient" and policy.model.dtype == torch.bfloat16
    inputs = encoding.encode_prompts(policy, [Image.new("RGB", (64, 64))], ["Which side?"])
    vlm.token_logps(policy, inputs, *encoding.encode_continuations(policy, ["left", "a cyst"]))[
        0
    ].sum().backward()
    assert gradient(policy).abs().sum() > 0


@pytest.mark.parametrize("capability, dtype", [(7, torch.float32), (8, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(monkeypatch, capability, dtype):
    """Compute capability 7 is a V100 or T4: torch makes bf16 tensors there, but their products are slow."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability))
    assert loading.best_dtype() == dtype


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    clinic.write_clinic(str(folder), (3, 1, 1, 1, 1), seed=8)
    return list(records.read_records(folder / "expert.jsonl"))[:4]


@pytest.fixture
def in_both(monkeypatch):
    """in_both(compute) → compute(an Accelerator as a stage makes it) in fp32 and in bf16."""

    def run(compute):
        found = []
        for dtype, precision in ((torch.float32, "no"), (torch.bfloat16, "bf16")):
            monkeypatch.setattr(loading, "best_dtype", lambda dtype=dtype: dtype)
            AcceleratorState._reset_state(True)
            found.append(compute(Accelerator(mixed_precision=precision)))
        return found

    return run


@pytest.mark.parametrize("lora", [None, 4])
def test_the_loss_and_gradient_of_sft_in_bf16_are_those_in_fp32_but_for_rounding(source, rows, in_both, lora):
    examples = [sft.make_example(row, "policy", "expert.jsonl") for row in rows]

    def compute(accelerator):
        torch.manual_seed(0)
        policy = adapters.load_to_train(source, "cpu", "vision", lora)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        # In bf16 most of an optimiser's steps would round to nothing.
        assert {p.dtype for p in parameters} == {torch.float32}
        assert lora is None or policy.model.dtype == loading.best_dtype()
        batch = sft.prepare_batch(policy, examples, 2, False, accelerator)
        with accelerator.autocast():
            loss = sft.compute_gradient(policy, parameters, *batch, accelerator)
        return loss, gradient(policy)

    (loss, exact), (rounded_loss, rounded) = in_both(compute)
    assert rounded.dtype == torch.float32 and 0 < abs(rounded_loss - loss) < 0.01 * loss
    assert cosine(exact, rounded) > 0.99


def groups_of(policy, rows, args):
    """A group for each record, of four responses that differ in their rewards."""
    texts = ["left", "right", "a cyst", "no lesion"]
    ids, mask = encoding.encode_continuations(policy, texts)
    sampled = {"ids": ids, "mask": mask, "truncated": torch.zeros(4, dtype=torch.bool), "texts": texts}
    scored = {"rewards": torch.tensor([0.1, 0.5, 0.4, 0.9]), "informative": True}
    prompts = encoding.encode_images(policy, encoding.preprocess(policy, *rollouts.open_rows(rows)))
    groups = [
        grpo.Group(row, prompt, **sampled, parsed=[], match=[], **scored)
        for row, prompt in zip(rows, prompts)
    ]
    return grpo.with_advantages(groups, args)


def test_the_loss_and_gradient_of_grpo_in_bf16_are_those_in_fp32_but_for_rounding(source, rows, in_both):
    options = {"loss": "dapo", "epsilon": 0.2, "epsilon_high": None, "kl": 0.1, "kl_estimator": "k3_unbiased"}
    options |= {
        "micro_batch": 2,
        "micro_group": 2,
        "gradient_checkpointing": False,
        "scale_rewards": "none",
        "mask_truncated": False,
    }
    args = SimpleNamespace(**options)

    def compute(accelerator):
        policy = adapters.load_to_train(source, "cpu", "images")
        with accelerator.autocast():
            groups = groups_of(policy, rows, args)
        groups = grpo.with_reference_logps(policy, groups, 2, accelerator)
        counts = grpo.count_batch(groups, 8, accelerator)
        groups, metrics = grpo.policy_gradient(policy, groups, counts, args, accelerator)
        return groups[0].old_logps, metrics["entropy"], gradient(policy)

    (logps, entropy, exact), (rounded_logps, rounded_entropy, rounded) = in_both(compute)
    assert rounded_logps.dtype == rounded.dtype == torch.float32
    assert 0 < (rounded_logps - logps).abs().max() < 0.02 * logps.abs().max()
    assert 0 < abs(rounded_entropy - entropy) < 0.01 * entropy
    assert cosine(exact, rounded) > 0.99


@pytest.mark.parametrize("freeze, autocast", [("nothing", True), ("backbone", False)])
def test_the_reward_model_computes_every_pass_in_autocast_if_the_backbone_learns(
    monkeypatch, bf16, call, rows, tmp_path, freeze, autocast
):
    """A frozen backbone has bf16 weights and is called as it is to score."""
    build_qwen(tmp_path / "qwen", "Qwen2_5_")
    found, compute = [], reward.compute_features

    def observe(*args):
        found.append(torch.is_autocast_enabled("cpu"))
        return compute(*args)

    monkeypatch.setattr(reward, "compute_features", observe)
    AcceleratorState._reset_state(True)
    data = Path(rows[0]["image"]).parent.parent / "expert.jsonl"
    flags = f"--data {data} --steps 1 --resamples 1 --freeze {freeze} --out {tmp_path}/rm"
    assert call(reward, f"train --model {tmp_path}/qwen {flags}")[0] == 0
    # To standardise, for the step if the backbone learns, and to evaluate.
    assert len(found) == 2 + autocast and set(found) == {autocast}


def test_rewards_in_bf16_are_those_in_fp32_but_for_rounding(source, rows, in_both, tmp_path):
    torch.manual_seed(0)
    model = reward.RewardModel(loading.load(source), reward.Heads(30, 8), True)
    images = [open_image(row["image"]) for row in rows]
    texts, responses = [policy_prompt(row) for row in rows], [reference_response(row) for row in rows]
    with torch.no_grad():
        model.heads.standardise(model.features(model.encoder()(images, texts), responses))
    model.save(str(tmp_path))

    def compute(accelerator):
        model = reward.RewardModel.load(str(tmp_path))
        return torch.tensor(model(model.encoder()(images, texts), responses)["overall"])

    exact, rounded = in_both(compute)
    # R spans 16.
    assert 0 < (exact - rounded).abs().max() < 0.5


def test_every_stage_runs_in_bf16(bf16, call, rows, tmp_path):
    build_qwen(tmp_path / "qwen", "Qwen2_5_")
    model, data = f"--model {tmp_path}/qwen", f"--data {Path(rows[0]['image']).parent.parent}/expert.jsonl"
    images, few = data.replace("--data", "--images"), "--max-new-tokens 4"
    commands = {
        "candidates": (generate, f"{model} {images} --paradigms direct {few}"),
        "rm": (reward, f"train {model} {data} --steps 1 --resamples 1"),
        "scored": (reward, f"score --model {tmp_path}/rm {data} --keep 1"),
        "sft": (sft, f"{model} {data} --steps 1"),
        "grpo": (
            grpo,
            f"--model {tmp_path}/sft --reward {tmp_path}/rm {data} --steps 1 --prompts 1 --kl 1 {few}",
        ),
        "eval": (evaluate, f"--model {tmp_path}/grpo {data} --scores {few}"),
    }
    errors = {}
    for name, (module, flags) in commands.items():
        AcceleratorState._reset_state(True)
        status, _, error = call(module, f"{flags} --out {tmp_path}/{name}")
        errors |= {name: error} if status else {}
    # Random weights write no candidate; that is the end of the run.
    assert list(errors) == ["candidates"] and "is kept" in errors["candidates"], errors
    # What has learned is saved in fp32, what only scores in bf16.
    for folder, dtype in (("sft", "float32"), ("grpo", "float32"), ("rm/backbone", "bfloat16")):
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == dtype
