"""What a machine without a GPU can say about one: no tensor on the wrong device, bf16, the dtype of weights.

test_triton_ops.py compiles the kernels for GPUs that are not there.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_vlm import BUILD, build_qwen

from medgr2 import adapters, loading, vlm

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


@pytest.fixture
def bf16(monkeypatch):
    """The device computes in bf16."""
    monkeypatch.setattr(loading, "best_dtype", lambda: torch.bfloat16)


def gradient(model):
    """The gradient of what learns, in one vector."""
    return torch.cat([p.grad.flatten() for p in model.model.parameters() if p.requires_grad])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), 0).item()


def test_the_weights_of_an_adapter_are_fp32_beside_frozen_weights_in_bf16(source, bf16):
    adapted = adapters.load_to_train(source, "cpu", "images", 4)
    assert {(p.requires_grad, p.dtype) for p in adapted.model.parameters()} == {
        (False, torch.bfloat16),
        (True, torch.float32),
    }


def test_with_lora_in_bf16_a_model_that_cannot_train_through_a_prefix_does_not(bf16, tmp_path):
    build_qwen(tmp_path, "Qwen3_5")
    policy = adapters.load_to_train(str(tmp_path), "cpu", "images", 2)
    assert policy.prefix_sharing == "without gradient" and policy.model.dtype == torch.bfloat16
    inputs = vlm.encode_prompts(policy, [Image.new("RGB", (64, 64))], ["Which side?"])
    vlm.token_logps(policy, inputs, *vlm.encode_continuations(policy, ["left", "a cyst"]))[0].sum().backward()
    assert gradient(policy).abs().sum() > 0
