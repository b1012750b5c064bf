"""Every stage on the emulated device: test_device.py runs this file in a process of its own.

A tensor that is left on the CPU raises here as on CUDA. What is computed is compared with the CPU's.
"""

import inspect
from dataclasses import replace

import clinic
import emulated_device
import pytest
import torch
from accelerate import Accelerator
from emulated_device import DEVICE, EmulatedTensor
from PIL import Image
from test_vlm import BUILD

import generate
import grpo
import reward
import sft
from medgr2 import adapters, encoding, loading, vlm
from triton_ops import LossInputs, linear_cross_entropy, linear_grpo_loss, linear_logprob

evaluate = __import__("eval")
MIXED = "same device"

# ---------------------------------------------------------------------------------------------------------
# The device is as strict as CUDA, and not stricter.

X, FLOATS = torch.arange(6.0, device=DEVICE).view(2, 3), torch.ones(2, 3)
INDEX, NUMBER = torch.tensor([1, 0]), torch.tensor(2.0)
REFUSED = {
    "a sum": lambda: X + FLOATS,
    "a sum, the CPU's first": lambda: FLOATS + X,
    "a sum in place": lambda: X.clone().add_(FLOATS),
    "a sum into the CPU's": lambda: torch.add(X, X, out=torch.empty(2, 3)),
    "a product of matrices": lambda: X @ FLOATS.T,
    "a number in a concatenation": lambda: torch.stack([X[0, 0], NUMBER]),
    "a concatenation": lambda: torch.cat([X, FLOATS]),
    "a choice": lambda: torch.where(X > 1, X, FLOATS),
    "a mask": lambda: X.masked_fill(FLOATS > 0, 1.0),
    "values of a mask": lambda: X.masked_scatter(X > 0, FLOATS),
    "an index of gather": lambda: X.gather(0, INDEX[None]),
    "an index of index_select": lambda: X.index_select(0, INDEX),
    "an index of index_fill": lambda: X.index_fill(0, INDEX, 0),
    "the device's index of the CPU's tensor": lambda: FLOATS[INDEX.to(DEVICE)],
    "an embedding": lambda: torch.nn.functional.embedding(INDEX, X),
    "values put at an index": lambda: X.clone().index_put_((INDEX,), FLOATS),
    "whole numbers put at an index": lambda: X.long().index_put_((INDEX,), FLOATS.long()),
    "a sum in place into a number": lambda: torch.tensor(2.0).add_(X[0, 0]),
    "what is searched for": lambda: torch.isin(X, FLOATS),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(X[None], X[None], FLOATS[None]),
}
TAKEN = {
    "a number": lambda: X + NUMBER,
    "the CPU's index": lambda: X[INDEX],
    "the CPU's mask": lambda: X[FLOATS > 0],
    "two indices": lambda: X[INDEX, INDEX.to(DEVICE)],
    "a number put at an index": lambda: X.clone().index_put_((INDEX,), NUMBER),
    "a copy": lambda: X.clone().copy_(FLOATS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_of_two_devices_are_refused_as_by_cuda(name):
    with pytest.raises(RuntimeError, match=MIXED):
        REFUSED[name]()


@pytest.mark.parametrize("name", TAKEN)
def test_what_cuda_takes_from_the_cpu_is_taken(name):
    assert TAKEN[name]().device == DEVICE


def test_numpy_takes_no_tensor_of_the_device_and_the_cpu_has_a_copy():
    with pytest.raises((RuntimeError, TypeError)):
        X.numpy()
    assert X.cpu().device.type == "cpu" and torch.equal(X.cpu().to(DEVICE).cpu(), X.cpu())


# ---------------------------------------------------------------------------------------------------------
# The functions, on the device and on the CPU.


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The folder of a small Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp("qwen")
    BUILD["qwen2_5_vl"](folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    BUILD["llava"](folder)
    return folder


@pytest.fixture(scope="module", params=["llava", "qwen"])
def pair(request):
    """A model on the device and on the CPU, with features that are kept."""
    source = str(request.getfixturevalue(request.param))
    return [adapters.load_to_train(source, device, "images") for device in (DEVICE, "cpu")]


@pytest.fixture(scope="module")
def planted(qwen):
    """The model that meets what is planted."""
    return adapters.load_to_train(str(qwen), DEVICE, "images")


def prompts_of(model):
    images = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (96, 64), "grey")]
    return encoding.encode_images(model, encoding.preprocess(model, images, ["Which side?", "?"]))


def sampled(model, **change):
    model = replace(model, **change)
    inputs = encoding.collate_prompts(model, prompts_of(model))
    return [x for temperature in (0, 1) for x in vlm.sample(model, inputs, range(4), 3, temperature, 2)]


def scored(model):
    """Log-probs and entropies, then the gradient through a prefix that is shared by parts of a group."""
    model.model.zero_grad()
    inputs = encoding.collate_prompts(model, prompts_of(model))
    ids, mask = encoding.encode_continuations(model, ["left", "x", "a cyst", ""])
    for _, states in vlm.hidden_states_in_parts(model, inputs, ids, mask, 1):
        states.sum().backward()
    grads = [p.grad for p in model.model.parameters() if p.grad is not None]
    return [*vlm.token_logps(model, inputs, ids, mask, 0.7), *grads]


def losses(model):
    """The three of triton_ops.py, with bias, softcap and a gradient."""
    model.model.zero_grad()
    states, targets = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12)
    weight, bias = torch.linspace(-1, 1, 160).view(20, 8), torch.linspace(0, 1, 20)
    states, weight, bias = (x.to(model.device).requires_grad_() for x in (states, weight, bias))
    targets = targets.to(model.device).view(4, 3)
    ones = torch.ones(4, 3, device=model.device)
    options = {"bias": bias, "softcap": 5.0, "chunk": 5}
    logps, entropy = linear_logprob(states.flatten(0, 1), weight, targets.flatten(), **options)
    masked = targets.flatten().masked_fill(targets.flatten() == 3, -100)
    sft_loss = linear_cross_entropy(states.flatten(0, 1), weight, masked, **options)
    inputs = LossInputs(ones[:, 0], ones, -2 * ones, -3 * ones)
    grpo_loss, metrics, _ = linear_grpo_loss(
        grpo.grpo_loss, states, weight, targets, inputs, kl=0.1, counts=grpo.Counts(4, 12, 3), **options
    )
    ((logps + entropy).sum() + sft_loss + grpo_loss).backward()
    return [logps, entropy, sft_loss, grpo_loss, *metrics.values(), states.grad, weight.grad, bias.grad]


COMPUTED = {
    "samples": sampled,
    "samples without a shared prefix": lambda model: sampled(model, prefix_sharing="never"),
    "samples without kept features": lambda model: sampled(model, reuses_features=False),
    "log-probs and gradients": scored,
    "losses": losses,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_the_device_computes_what_the_cpu_computes(pair, name):
    there, here = (COMPUTED[name](model) for model in pair)
    assert len(there) == len(here) > 2
    for a, b in zip(there, here):
        assert isinstance(a, EmulatedTensor)
        a, b = a.detach().cpu().double(), b.detach().double()
        # Attention is another kernel's, which rounds differently.
        assert (a - b).norm() <= 1e-5 * b.norm()


# A copy of the function with one tensor on the CPU: where, what is replaced by what, and who meets it.
PLANTED = {
    "numbers of the draw": (vlm, "sample", "uniform.to(vlm.device)", "uniform", sampled),
    "rows to repeat": (vlm, "sample", "torch.arange(N, device=vlm.device)", "torch.arange(N)", sampled),
    "continuations": (
        encoding,
        "encode_continuations",
        "ids.to(device or vlm.device), mask.to(device or vlm.device)",
        "ids, mask",
        scored,
    ),
    "banned tokens": (vlm, "lm_head", "device=weight.device", "device='cpu'", scored),
    "zeros to scatter into": (vlm, "token_logps", "device=mask.device", "device='cpu'", scored),
    "image": (encoding, "encode_images", "inputs.to(vlm.device)", "inputs", sampled),
}


def plant(monkeypatch, module, function, own, other):
    source, scope = inspect.getsource(getattr(module, function)), {}
    assert own in source
    exec(source.replace(own, other), vars(module), scope)
    monkeypatch.setattr(module, function, scope[function])


@pytest.mark.parametrize("name", PLANTED)
def test_one_tensor_that_is_left_on_the_cpu_is_found(planted, monkeypatch, name):
    *where, meet = PLANTED[name]
    plant(monkeypatch, *where)
    with pytest.raises(RuntimeError, match=MIXED):
        meet(planted)


# ---------------------------------------------------------------------------------------------------------
# The stages, by their command lines.


def reduce(accelerator, x, *_, **__):
    """Of one process. Between processes the device's tensors are reduced, and no others (NCCL)."""
    assert isinstance(x, EmulatedTensor)
    return x


@pytest.fixture
def on_device(monkeypatch, call):
    """on_device(module, flags) runs a stage on the emulated device. `error`: its one line, if any."""
    monkeypatch.setattr(loading, "best_device", lambda: DEVICE)
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    monkeypatch.setattr(Accelerator, "reduce", reduce)
    # The checks at loading, which `pair` has passed.
    monkeypatch.setattr(loading, "find_prefix_sharing", lambda loaded, learns: "always")
    monkeypatch.setattr(loading, "find_processor_fault", lambda loaded: None)
    monkeypatch.setattr(loading, "can_reuse_features", lambda loaded: True)

    def run(module, flags, error=""):
        before = emulated_device.count
        status, _, err = call(module, flags)
        assert error in err and bool(status) == bool(error), err
        assert emulated_device.count > before + 1000

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, qwen):
    """Records, and a reward model whose heads are random."""
    folder = tmp_path_factory.mktemp("stages")
    clinic.write_clinic(str(folder / "data"), (3, 3, 2, 2, 1), seed=8)
    backbone = loading.load(str(qwen), "cpu")
    (folder / "rm").mkdir()
    reward.RewardModel(backbone, reward.Heads(reward.LIKELIHOOD_FEATURES, 8), True).save(str(folder / "rm"))
    return folder


def test_generate_and_the_reward_model(on_device, folder, qwen):
    images = f"--images {folder}/data/unlabelled/images.jsonl --model {qwen} --out {folder}/candidates"
    # Its weights are random, so no candidate is kept, which is said at the end.
    on_device(generate, f"{images} --paradigms direct --max-new-tokens 4", "none of 2 candidates is kept")
    train = f"train --model {qwen} --data {folder}/data/expert.jsonl"
    few = "--resamples 1 --hidden 8 --batch 4"
    on_device(reward, f"{train} --out {folder}/rm_heads {few} --steps 2")
    whole = "--freeze nothing --no-likelihood --lr 1e-5"
    on_device(reward, f"{train} --out {folder}/rm_whole {few} --steps 1 {whole}")
    scored = f"score --model {folder}/rm --data {folder}/data/expert.jsonl --keep 1"
    on_device(reward, f"{scored} --out {folder}/scored")


def run_twice(on_device, monkeypatch, module, flags):
    """The second of two steps fails, and the same command resumes from the first one's checkpoint."""
    calls = []

    def crash(*args):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        step(*args)

    step = module.training.step
    monkeypatch.setattr(module.training, "step", crash)
    with pytest.raises(ZeroDivisionError):
        on_device(module, flags)
    on_device(module, flags)


def test_sft(on_device, folder, qwen, monkeypatch):
    data = f"--data {folder}/data/expert.jsonl --val {folder}/data/val.jsonl --batch 2"
    flags = f"--model {qwen} {data} --save-every 1 --out {folder}"
    run_twice(on_device, monkeypatch, sft, f"{flags}/sft --steps 2")
    on_device(sft, f"{flags}/sft_whole --steps 1 --gradient-checkpointing --freeze nothing")
    on_device(sft, f"{flags}/sft_lora --steps 1 --lora 2")


def test_grpo(on_device, folder, qwen, monkeypatch):
    models = f"--model {qwen} --reward {folder}/rm --data {folder}/data/expert.jsonl --patience 0"
    small = "--prompts 1 --group 2 --max-new-tokens 4 --min-spread -1 --save-every 1"
    watch = f"--val {folder}/data/val.jsonl --watch-items 1"
    more = "--steps 2 --kl 0.1 --micro-group 1 --iterations 2 --scale-rewards batch --mask-truncated"
    run_twice(on_device, monkeypatch, grpo, f"{models} {small} {watch} {more} --out {folder}/grpo")
    more = "--steps 1 --kl 0.1 --lora 2 --loss gspo --freeze vision --gradient-checkpointing"
    on_device(grpo, f"{models} {small} {more} --out {folder}/grpo_lora")
    plant(
        monkeypatch, grpo, "accumulate_gradient", "for g in groups]).to(policy.device)", "for g in groups])"
    )
    with pytest.raises(RuntimeError, match=MIXED):
        on_device(grpo, f"{models} {small} --steps 1 --out {folder}/grpo_planted")


def test_eval(on_device, folder, qwen):
    data = f"--model {qwen} --data {folder}/data/test.jsonl --out {folder}/eval"
    on_device(evaluate, f"{data} --scores --blind --samples 2 --max-new-tokens 4")
