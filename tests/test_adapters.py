"""LoRA: what it learns, what it leaves as it was, and what its folder holds."""

import json
import sys

import clinic
import peft
import pytest
import torch
import transformers
from helpers import ROOT
from PIL import Image
from test_vlm import BUILD

import grpo
import sft
from medgr2 import adapters, encoding, loading, vlm
from medgr2.errors import RunError
from reward import Heads, RewardModel


@pytest.fixture(scope="module", params=["toy", "qwen2_5_vl"])
def source(request, tmp_path_factory):
    if request.param == "toy":
        return str(ROOT / "toy" / "policy")
    folder = tmp_path_factory.mktemp(request.param)
    BUILD[request.param](folder)
    return str(folder)


def compute_logps(model):
    """Log-probs of two continuations of each of two prompts, through a shared prefix: (4, C)."""
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "grey")]
    inputs = encoding.encode_prompts(model, images, ["Which side?", "?"])
    return vlm.token_logps(model, inputs, *encoding.encode_continuations(model, ["left", "x", "a cyst", ""]))[
        0
    ]


def is_adapter(name):
    return "lora_" in name


def with_random_adapter(source, rank=4):
    """The VLM with an adapter that changes what it computes: its B is no longer 0."""
    torch.manual_seed(0)
    loaded = adapters.load_to_train(source, "cpu", "images", rank)
    for name, p in loaded.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05)
    return loaded


def test_the_gradient_of_an_adapter_is_that_of_the_weights_projected(source):
    """W + 2·B A: the gradient of B is 2·(gradient of W)·Aᵀ, and where B is 0 that of A is 0."""
    torch.manual_seed(0)
    plain = adapters.load_to_train(source, "cpu", "images")
    adapted = adapters.load_to_train(source, "cpu", "images", 4)
    for loaded in (plain, adapted):
        compute_logps(loaded).sum().backward()
    weights, learning = dict(plain.model.named_parameters()), dict(adapted.model.named_parameters())
    found = {name: p for name, p in learning.items() if "lora_B" in name}
    # Every linear layer of the decoder, and nothing else.
    linear = [n for n, m in plain.model.get_decoder().named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(found) == len(linear) and all(is_adapter(n) == p.requires_grad for n, p in learning.items())
    for name, b in found.items():
        a = learning[name.replace("lora_B", "lora_A")]
        w = weights[name.replace(".lora_B.default", "")]
        assert a.grad.abs().max() == 0
        assert (b.grad - 2 * w.grad @ a.T).norm() <= 1e-4 * b.grad.norm()
        assert b.grad.norm() > 0


def test_an_adapter_learns_in_fp32_beside_frozen_weights_in_bf16(monkeypatch):
    monkeypatch.setattr(loading, "best_dtype", lambda: torch.bfloat16)
    loaded = adapters.load_to_train(str(ROOT / "toy" / "policy"), "cpu", "images", 4)
    dtypes = {p.requires_grad: p.dtype for p in loaded.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        compute_logps(loaded).sum().backward()
    assert all(p.grad is not None for p in loaded.model.parameters() if p.requires_grad)


def test_without_its_adapter_the_model_computes_as_before(source):
    plain, adapted = loading.load(source), with_random_adapter(source)
    with torch.no_grad():
        before, changed = compute_logps(plain), compute_logps(adapted)
        with adapters.without_lora(adapted):
            assert torch.equal(compute_logps(adapted), before)
        assert torch.equal(compute_logps(adapted), changed) and (changed - before).abs().max() > 0.01
    assert all(p.requires_grad for name, p in adapted.model.named_parameters() if is_adapter(name))


def test_the_saved_folder_is_a_plain_model_and_its_adapter_is_one_that_peft_loads(source, tmp_path):
    adapted = with_random_adapter(source)
    with torch.no_grad():
        want = compute_logps(adapted)
        adapters.save_trained(adapted, str(tmp_path))
        merged = loading.load(str(tmp_path))
        assert (compute_logps(merged) - want).abs().max() <= 1e-4
        base = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
        alone = peft.PeftModel.from_pretrained(base.eval(), tmp_path / "adapter")
        again = loading.wrap(alone.base_model.model, merged.processor)
        assert (compute_logps(again) - want).abs().max() <= 1e-4
    assert alone.peft_config["default"].base_model_name_or_path == source


@pytest.fixture
def data(tmp_path):
    clinic.write_clinic(str(tmp_path / "data"), (5, 1, 1, 4, 1), seed=8)
    return tmp_path / "data"


def run(monkeypatch, module, flags):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    module.main(module.parse_args())


def test_a_resumed_sft_of_an_adapter_gives_the_same_weights(monkeypatch, data, tmp_path):
    flags = ["--model", ROOT / "toy/policy", "--data", data / "expert.jsonl", "--lora", 4, "--steps", 4]
    flags += ["--save-every", 2]
    run(monkeypatch, sft, [*flags, "--out", tmp_path / "whole"])
    step, calls = sft.training.step, []

    def crash_at_the_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError
        step(*args)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sft.training, "step", crash_at_the_fourth)
        run(monkeypatch, sft, [*flags, "--out", tmp_path / "again"])
    (commit,) = (tmp_path / "again.part" / "state").glob("*.pt")
    kept = torch.load(commit, weights_only=True)["model"]
    assert kept and all(map(is_adapter, kept))
    run(monkeypatch, sft, [*flags, "--out", tmp_path / "again"])
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, again = ((tmp_path / name / file).read_bytes() for name in ("whole", "again"))
        assert whole == again


def test_grpo_measures_the_kl_from_the_model_without_its_adapter(monkeypatch, data, tmp_path):
    """The first step's adapter is still 0, so the KL is. With the adapter on, it would stay 0."""
    torch.manual_seed(0)
    (data / "rm").mkdir()
    RewardModel(loading.load(str(ROOT / "toy" / "policy")), Heads(30, 8), True).save(str(data / "rm"))
    flags = f"--model {ROOT}/toy/policy --reward {data}/rm --data {data}/expert.jsonl --out {tmp_path}/run"
    small = "--steps 3 --prompts 2 --group 4 --min-spread -1 --kl 0.1 --lr 0.01 --warmup 0 --lora 4"
    run(monkeypatch, grpo, [*flags.split(), *small.split()])
    kl = [json.loads(line)["kl"] for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-5 and kl[2] > 1e-5


def test_without_peft_lora_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match="--lora needs peft, which is not installed: pip install peft"):
        adapters.load_to_train(str(ROOT / "toy" / "policy"), "cpu", "images", 4)
