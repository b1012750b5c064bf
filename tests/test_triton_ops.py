"""Properties of the ops of triton_ops: linear_logprob first, then the two losses that are formed in one pass.

The reference shares no code with it: all logits at once in float64, torch.log_softmax, Categorical.entropy,
autograd. `where` runs a property on the CPU with plain PyTorch, on the CPU with the Triton kernels
interpreted, and on CUDA.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    # counts only if nothing has imported Triton yet
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton_ops
from grpo import Counts, grpo_loss
from triton_ops import LossInputs, linear_cross_entropy, linear_grpo_loss, linear_logprob

ROOT = Path(triton_ops.__file__).parent
TRITON = triton_ops.triton
INTERPRETED = TRITON is not None and not isinstance(triton_ops.tl.sum, TRITON.JITFunction)


@pytest.fixture(
    params=[("cpu", "torch"), ("cpu", "triton"), ("cuda", "torch"), ("cuda", "triton")], ids="-".join
)
def where(request):
    device, backend = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "triton" and TRITON is None:
        pytest.skip("triton is not installed")
    if (device, backend) == ("cpu", "triton") and not INTERPRETED:
        pytest.skip(
            "Triton was imported without its interpreter: these run on CUDA, or in their own process below"
        )
    return device, backend


def make(N, D, V, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def cotangents(N, seed=1):
    return torch.randn(2, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(hidden, weight, targets, temperature, grads):
    """logps, entropy, d hidden, d weight in float64 on the CPU, through the full (N, V) logits."""
    hidden, weight = (x.detach().cpu().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T / temperature  # (N, V)
    logps = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets.cpu()]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.autograd.backward((logps, entropy), tuple(grads))
    return logps.detach(), entropy.detach(), hidden.grad, weight.grad


def ours(where, hidden, weight, targets, temperature, grads, **options):
    """The same four from linear_logprob, on the CPU again but in their own dtypes."""
    device, backend = where
    hidden, weight = (x.detach().to(device).requires_grad_() for x in (hidden, weight))
    logps, entropy = linear_logprob(
        hidden, weight, targets.to(device), temperature, backend=backend, **options
    )
    torch.autograd.backward((logps, entropy), tuple(grads.to(device, logps.dtype)))
    return [x.detach().cpu() for x in (logps, entropy, hidden.grad, weight.grad)]


def assert_equal(actual, expected, tolerance=2e-5):
    for name, a, b in zip(("logps", "entropy", "d hidden", "d weight"), actual, expected):
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )


class Watch(TorchDispatchMode):
    """Counts the GEMMs, and the bytes of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.gemms, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.gemms += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.nbytes)
        return result


# ---- values and gradients


# N, D, V, chunk
SIZES = [
    # one word
    (1, 3, 1, None),
    # an odd last chunk
    (5, 4, 7, 2),
    (17, 5, 129, 4),
    # a second, nearly empty block
    (3, 8, triton_ops.MAX_BLOCK + 3, 2),
    # exactly one block
    (2, 2, triton_ops.MAX_BLOCK, None),
]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("N, D, V, chunk", SIZES)
def test_values_and_gradients_equal_float64_autograd_through_full_logits(where, N, D, V, chunk, temperature):
    inputs = *make(N, D, V), temperature, cotangents(N)
    assert_equal(ours(where, *inputs, chunk=chunk), reference(*inputs))


@pytest.mark.parametrize("output", [0, 1], ids=["logps", "entropy"])
def test_gradient_of_one_output_alone_is_right(where, output):
    hidden, weight, targets = make(6, 4, 11)
    device, backend = where
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
    # the gradient is expanded
    linear_logprob(*leaves, targets.to(device), backend=backend)[output].sum().backward()
    grads = torch.zeros(2, 6, dtype=torch.float64)
    grads[output] = 1
    _, _, *expected = reference(hidden, weight, targets, 1.0, grads)
    for leaf, grad in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad.cpu().double(), grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk", [2, 100])
def test_gradcheck_passes_in_float64(chunk):
    hidden, weight, targets = make(5, 3, 6, torch.float64)

    def both(h, w):
        return linear_logprob(h, w, targets, 0.7, chunk=chunk)

    assert torch.autograd.gradcheck(both, (hidden.requires_grad_(), weight.requires_grad_()))


def test_non_contiguous_inputs_give_the_same(where):
    hidden = make(9, 2 * 6, 1)[0][:, ::2].T  # (6, 9), strided both ways
    weight = make(9, 13, 1, seed=2)[0].T  # (13, 9)
    targets = make(12, 1, 13, seed=3)[2][::2]  # (6,)
    assert not (hidden.is_contiguous() or weight.is_contiguous() or targets.is_contiguous())
    grads = cotangents(12)[:, ::2]
    inputs = hidden, weight, targets, 1.0, grads
    assert_equal(ours(where, *inputs, chunk=4), reference(*inputs))


def test_chunk_size_changes_rounding_only(where):
    inputs = *make(11, 4, 23), 0.8, cotangents(11)
    whole = [x.double() for x in ours(where, *inputs, chunk=1000)]
    for chunk in (1, 3, 11):
        assert_equal(ours(where, *inputs, chunk=chunk), whole, tolerance=1e-5)


def test_two_runs_agree_bit_for_bit(where):
    inputs = *make(9, 4, 300), 0.8, cotangents(9)
    first, second = (ours(where, *inputs, chunk=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_equal_logits_give_minus_log_v_and_log_v(where):
    hidden, weight, targets = torch.ones(3, 2), torch.full((10, 2), 0.5), torch.tensor([0, 4, 9])
    logps, entropy, _, d_weight = ours(
        where, hidden, weight, targets, 1.0, torch.tensor([[1.0] * 3, [0.0] * 3])
    )
    log_v = torch.full((3,), 10.0).log()
    torch.testing.assert_close(logps, -log_v)
    torch.testing.assert_close(entropy, log_v)
    expected = torch.full((10, 2), -0.3)
    # each target gets its own gradient and not that of another tied word
    expected[targets] += 1
    torch.testing.assert_close(d_weight, expected)


INF = float("inf")
# logits of one row; the target is the last
EXTREME = {
    "one certain word": [0.0, -1e4, -1e4, 1e4],
    "huge and tied": [1e38, -1e38, 1e38, 1e38],
    "huge and negative": [-3e38, -1e38, -1e38],
    "a large common offset": [100000.0, 100001.0, 100000.5, 100002.0],
    "impossible words": [-INF, 0.0, -INF, 1.0],
    "impossible words first, over whole blocks": [-INF] * 5 + [0.5, 0.0, 1.0],
    "rising over blocks": [float(j) for j in range(-40, 40, 7)],
    "falling over blocks": [float(-j) for j in range(-40, 40, 7)],
    "an impossible target": [0.0, 1.0, -INF],
}


# NumPy's, under the interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits_give_the_float64_values_and_no_nan(where, name, monkeypatch):
    # Several blocks per row.
    monkeypatch.setattr(triton_ops, "MAX_BLOCK", 2)
    # (V, 1): with hidden = 1 these are the logits
    weight = torch.tensor(EXTREME[name])[:, None]
    hidden, targets = torch.ones(1, 1), torch.tensor([len(weight) - 1])
    grads = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    logps, entropy, _, d_weight = ours(where, hidden, weight, targets, 1.0, grads)
    log_p = torch.log_softmax(weight.double(), 0)[:, 0]  # (V,)
    H = torch.special.entr(log_p.exp()).sum()
    d_entropy = torch.where(log_p > -INF, -log_p.exp() * (log_p + H), 0.0)
    one_hot = torch.nn.functional.one_hot(targets[0], len(weight))
    torch.testing.assert_close(logps.double(), log_p[-1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), H[None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        d_weight[:, 0].double(), one_hot - log_p.exp() + d_entropy, rtol=1e-5, atol=1e-6
    )


def test_a_nan_reaches_its_own_row_and_no_other(where):
    device, backend = where
    hidden, weight, targets = (x.to(device) for x in make(4, 3, 9))
    hidden[2, 1] = float("nan")
    for result in linear_logprob(hidden, weight, targets, backend=backend):
        assert result.isnan().tolist() == [False, False, True, False]


def test_no_rows_give_empty_results_and_zero_gradients(where):
    logps, entropy, d_hidden, d_weight = ours(where, *make(0, 3, 5), 1.0, cotangents(0))
    assert logps.shape == entropy.shape == (0,) and d_hidden.shape == (0, 3)
    assert torch.equal(d_weight, torch.zeros(5, 3))


# ---- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_are_float32_or_float64_and_gradients_have_their_input_s_dtype(where, dtype):
    if dtype == torch.float64 and where[1] == "triton":
        pytest.skip("refused: see the error messages")
    logps, entropy, d_hidden, d_weight = ours(where, *make(3, 4, 5, dtype), 1.0, cotangents(3))
    assert logps.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert d_hidden.dtype == d_weight.dtype == dtype


def test_bf16_error_is_not_above_that_of_plain_bf16_logits(where):
    hidden, weight, targets = make(64, 32, 200, torch.bfloat16)
    grads = cotangents(64)
    plain_hidden, plain_weight = (x.clone().requires_grad_() for x in (hidden, weight))
    log_p = torch.log_softmax((plain_hidden @ plain_weight.T).float(), -1)
    plain = log_p[torch.arange(64), targets], -(log_p.exp() * log_p).sum(-1)
    torch.autograd.backward(plain, tuple(grads.float()))
    plain = [x.detach().double() for x in (*plain, plain_hidden.grad, plain_weight.grad)]
    exact = reference(hidden, weight, targets, 1.0, grads)
    fused = ours(where, hidden, weight, targets, 1.0, grads, chunk=16)
    for name, a, b, c in zip(("logps", "entropy", "d hidden", "d weight"), fused, plain, exact):
        assert (a.double() - c).norm() <= 1.1 * (b - c).norm(), name


def test_one_minus_p_is_formed_before_rounding_to_bf16(where):
    # p = 0.99909, which bf16 would round to 1
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16)
    hidden, targets = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([0])
    d_weight = ours(where, hidden, weight, targets, 1.0, torch.tensor([[1.0], [0.0]]))[3]
    one_minus_p = 1 - torch.sigmoid(torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(
        d_weight[:, 0].double(), torch.stack([one_minus_p, -one_minus_p]), rtol=1e-2, atol=0
    )


def test_bf16_weight_gradient_is_summed_over_chunks_in_fp32(where):
    # each row adds 1 - 1/64 to the target's gradient; a bf16 sum would stop at 256
    N, V = 320, 64
    hidden, weight = torch.ones(N, 1, dtype=torch.bfloat16), torch.zeros(V, 1, dtype=torch.bfloat16)
    grads = torch.stack([torch.ones(N), torch.zeros(N)])
    d_weight = ours(where, hidden, weight, torch.zeros(N, dtype=torch.int64), 1.0, grads, chunk=5)[3]
    torch.testing.assert_close(d_weight[0, 0].item(), N * (1 - 1 / V), rtol=1e-2, atol=0)


def test_autocast_does_not_change_what_is_computed(where):
    inputs = *make(5, 8, 20), 1.0, cotangents(5)
    outside = ours(where, *inputs)
    with torch.autocast(where[0], dtype=torch.bfloat16):
        inside = ours(where, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside))


# ---- memory and work


def test_inputs_are_not_mutated(where):
    device, backend = where
    inputs = [x.to(device) for x in make(5, 4, 9)]
    before = [x.clone() for x in inputs]
    leaves = inputs[0].requires_grad_(), inputs[1].requires_grad_()
    grads = [torch.ones(5, device=device), torch.ones(5, device=device)]
    torch.autograd.backward(linear_logprob(*leaves, inputs[2], 0.5, chunk=2, backend=backend), grads)
    assert all(
        torch.equal(x, y) for x, y in zip([*inputs, *grads], [*before, *[torch.ones_like(g) for g in grads]])
    )


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight(where):
    N, D, V, chunk = 64, 4, 256, 8
    inputs = *make(N, D, V), 1.0, cotangents(N)
    with Watch() as watch:
        ours(where, *inputs, chunk=chunk)
    # bytes; the weight is half of that, (N, V) logits would be eight times it
    assert watch.largest == 4 * chunk * V


def test_default_chunk_fits_the_budget_and_has_at_least_one_row(where, monkeypatch):
    inputs = *make(10, 3, 25), 1.0, cotangents(10)
    # four fp32 rows and a byte; less than one; all; all, but for the limit of rows
    for budget, limit, chunks in ((4 * 25 * 4 + 1, 99, 3), (1, 99, 10), (2**20, 99, 1), (2**20, 6, 2)):
        monkeypatch.setitem(triton_ops.CHUNK_BYTES, where[0], budget)
        monkeypatch.setitem(triton_ops.CHUNK_ROWS, where[0], limit)
        with Watch() as watch:
            ours(where, *inputs)
        # a chunk: one GEMM forward, three backward
        assert watch.gemms == 4 * chunks


@pytest.mark.parametrize("frozen, backward_gemms", [((), 3), (("weight",), 2), (("hidden",), 2)])
def test_a_frozen_input_gets_no_gradient_and_costs_no_gemm(where, frozen, backward_gemms):
    device, backend = where
    hidden, weight, targets = (x.to(device) for x in make(6, 3, 8))
    leaves = {"hidden": hidden, "weight": weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    with Watch() as watch:
        logps, entropy = linear_logprob(hidden, weight, targets, chunk=2, backend=backend)
    assert watch.gemms == 3
    with Watch() as watch:
        (logps + entropy).sum().backward()
    assert watch.gemms == 3 * backward_gemms
    assert all((leaf.grad is None) == (name in frozen) for name, leaf in leaves.items())


# ---- bias and softcap, and the losses in one pass


def full_logits(hidden, weight, bias, softcap, temperature):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature


def leaves(where, *tensors):
    """On the device, each a leaf with a gradient of its own."""
    return [x if x is None else x.detach().to(where[0]).requires_grad_() for x in tensors]


def exact(*tensors):
    return [x if x is None else x.detach().cpu().double().requires_grad_() for x in tensors]


def logps_and_entropies(logits, targets):
    """Logits (N, V), targets (N,) → (N,) each."""
    logps = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return logps, torch.distributions.Categorical(logits=logits).entropy()


def assert_gradients(ours, theirs, tolerance=2e-5):
    for name, a, b in zip(("d hidden", "d weight", "d bias"), ours, theirs):
        if a is not None:
            torch.testing.assert_close(
                a.grad.cpu().double(), b.grad, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
            )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bias_and_softcap_give_the_float64_values_and_gradients(where, with_bias, softcap):
    hidden, weight, targets = make(7, 4, 13)
    bias, grads = (make(1, 13, 1)[0][0] if with_bias else None), cotangents(7)
    theirs = exact(hidden, weight, bias)
    logits = full_logits(*theirs, softcap, 0.7)
    want = logps_and_entropies(logits, targets)
    torch.autograd.backward(want, tuple(grads))
    mine = leaves(where, hidden, weight, bias)
    got = linear_logprob(*mine[:2], targets.to(where[0]), 0.7, mine[2], softcap, chunk=3, backend=where[1])
    torch.autograd.backward(got, tuple(grads.float().to(where[0])))
    assert_equal([x.detach().cpu() for x in got], [x.detach() for x in want])
    assert_gradients(mine, theirs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_bias_of_minus_infinity_leaves_a_softmax_over_the_other_tokens(
    where, softcap, dtype, tolerance, monkeypatch
):
    # The first block holds excluded tokens only.
    monkeypatch.setattr(triton_ops, "MAX_BLOCK", 4)
    hidden, weight, _ = make(7, 4, 13, dtype)
    excluded, allowed = [0, 1, 2, 3, 9], [4, 5, 6, 7, 8, 10, 11, 12]
    # They would be the most probable.
    weight[excluded] *= 8
    bias = make(1, 13, 1, dtype)[0][0].index_fill(0, torch.tensor(excluded), -torch.inf)
    # The target's place among the allowed tokens.
    place = torch.tensor([0, 3, 4, 5, 7, 1, 2])
    targets, grads = torch.tensor(allowed)[place], cotangents(7)
    theirs = exact(hidden, weight[allowed], bias[allowed])
    logits = full_logits(*theirs, softcap, 0.7)
    want = logps_and_entropies(logits, place)
    torch.autograd.backward(want, tuple(grads))
    mine = leaves(where, hidden, weight, bias)
    arguments = *mine[:2], targets.to(where[0])
    options = {"temperature": 0.7, "bias": mine[2], "softcap": softcap, "chunk": 3, "backend": where[1]}
    got = linear_logprob(*arguments, **options)
    torch.autograd.backward(got, tuple(grads.float().to(where[0])))
    assert_equal([x.detach().cpu() for x in got], [x.detach() for x in want], tolerance)
    for ours, wanted in zip(mine, (theirs[0].grad, *(x.grad for x in theirs[1:])), strict=True):
        found = ours.grad.cpu().double()
        if ours is not mine[0]:
            assert (found[excluded] == 0).all()
            found = found[allowed]
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    loss = linear_cross_entropy(*arguments, **options)
    torch.testing.assert_close(
        loss.detach().cpu().double(), -want[0].mean().detach(), rtol=tolerance, atol=tolerance
    )


def test_an_excluded_target_has_log_probability_minus_infinity(where):
    hidden, weight, targets = make(3, 4, 13)
    bias = torch.zeros(13).index_fill(0, targets[:1], -torch.inf)
    mine = leaves(where, hidden, weight)
    logps, entropy = linear_logprob(
        *mine, targets.to(where[0]), 1.0, bias.to(where[0]), 2.0, backend=where[1]
    )
    assert logps[0] == -torch.inf and entropy.isfinite().all()
    (logps[1:].sum() + entropy.sum()).backward()
    assert all(x.grad.isfinite().all() for x in mine)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias, softcap", [(False, None), (True, None), (False, 2.0), (True, 2.0)])
def test_cross_entropy_equals_pytorch_s_through_full_float64_logits(where, reduction, with_bias, softcap):
    hidden, weight, targets = make(9, 4, 13)
    targets[[0, 4, 5]] = -7
    bias = make(1, 13, 1)[0][0] if with_bias else None
    theirs, mine = exact(hidden, weight, bias), leaves(where, hidden, weight, bias)
    want = torch.nn.functional.cross_entropy(
        full_logits(*theirs, softcap, 0.7), targets, ignore_index=-7, reduction=reduction
    )
    options = {"temperature": 0.7, "bias": mine[2], "softcap": softcap, "chunk": 4, "backend": where[1]}
    got = linear_cross_entropy(*mine[:2], targets.to(where[0]), -7, reduction=reduction, **options)
    (3 * want).backward()
    # what comes after the loss scales its gradient
    (3 * got).backward()
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=1e-5, atol=1e-5)
    assert_gradients(mine, theirs)


def rollout(S=6, C=5, D=4, V=17):
    """Sequences of all lengths, one empty, two without advantage; ratios inside the clip, below and above."""
    hidden, weight, targets = make(S * C, D, V)
    g = torch.Generator().manual_seed(5)
    mask = (torch.arange(C)[None] < torch.tensor([5, 1, 0, 3, 5, 2])[:, None]).long()
    now = (hidden @ weight.T).log_softmax(-1)[torch.arange(S * C), targets].reshape(S, C)
    old, ref = (now + 0.4 * torch.randn(S, C, generator=g) for _ in range(2))
    advantages = torch.tensor([0.9, -1.3, 0.4, 0.0, -0.6, 0.0])
    return (
        hidden.reshape(S, C, D),
        weight,
        targets.reshape(S, C),
        old * mask,
        ref * mask,
        advantages,
        mask,
    ), Counts(5, 16, 8)


def plain_grpo(inputs, counts, **variant):
    """The same loss through full float64 logits and autograd."""
    hidden, weight, targets, old, ref, advantages, mask = inputs
    hidden, weight = exact(hidden, weight)
    logps = (hidden @ weight.T / 0.8).log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask
    old = logps.detach() if old is None else old.double()
    loss_inputs = LossInputs(advantages.double(), mask, old, ref.double())
    loss, metrics = grpo_loss(logps, loss_inputs, counts, **variant)
    loss.backward()
    return loss.item(), metrics, logps.detach(), (hidden, weight)


def as_loss_inputs(targets, old, ref, advantages, mask):
    return targets, LossInputs(advantages, mask, old, ref)


def fused_grpo(where, inputs, counts, chunk=4, **variant):
    moved = [x if x is None else x.to(where[0]) for x in inputs]
    mine = leaves(where, *moved[:2])
    targets, loss_inputs = as_loss_inputs(*moved[2:])
    options = {"counts": counts, "temperature": 0.8, "chunk": chunk, "backend": where[1]}
    loss, metrics, logps = linear_grpo_loss(grpo_loss, *mine, targets, loss_inputs, **options, **variant)
    loss.backward()
    return loss.item(), metrics, logps.cpu(), mine


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_grpo_loss_in_one_pass_equals_the_plain_one_through_full_logits(where, loss, kl, on_policy):
    inputs, counts = rollout()
    inputs = *inputs[:3], None if on_policy else inputs[3], *inputs[4:]
    variant = {"loss": loss, "kl": kl, "epsilon": 0.1, "epsilon_high": 0.15}
    want, sums, logps, theirs = plain_grpo(inputs, counts, **variant)
    # less than a sequence, several sequences, all
    for chunk in (1, 6, 100):
        got, metrics, mine_logps, mine = fused_grpo(where, inputs, counts, chunk, **variant)
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert_gradients(mine, theirs)
        assert {k: float(metrics[k]) for k in sums} == pytest.approx(
            {k: float(v) for k, v in sums.items()}, rel=1e-4, abs=1e-5
        )
        computed = inputs[6].bool() if kl else inputs[6].bool() & (inputs[5] != 0)[:, None]
        torch.testing.assert_close(mine_logps.double(), logps * computed, rtol=1e-5, atol=1e-5)
        assert metrics["rows"] == int(computed.sum())
    if not on_policy:
        # or the branch would not have been tested
        assert sums["clip_low"] + sums["clip_high"] > 0


def test_the_entropy_in_the_metrics_is_the_sum_over_the_tokens_computed(where):
    inputs, counts = rollout()
    _, metrics, _, _ = fused_grpo(where, inputs, counts, kl=0.3)
    hidden, weight, mask = inputs[0].double(), inputs[1].double(), inputs[6]
    want = (torch.distributions.Categorical(logits=hidden @ weight.T / 0.8).entropy() * mask).sum()
    torch.testing.assert_close(metrics["entropy"].cpu().double(), want, rtol=1e-5, atol=1e-5)


class Rows(TorchDispatchMode):
    """Counts the GEMMs, and adds up their FLOPs / 2 V: rows times D each."""

    def __init__(self, V):
        super().__init__()
        self.V, self.rows, self.gemms = V, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            m, k, n = *a.shape, b.shape[1]
            self.gemms += 1
            self.rows += m * k * n // self.V
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen, gemms", [((), 3), (("weight",), 2), (("hidden", "weight"), 1)])
def test_three_gemms_per_chunk_two_with_a_frozen_head_and_rows_without_gradient_in_none(where, frozen, gemms):
    (hidden, weight, targets, old, ref, advantages, mask), counts = rollout()
    kept = mask.bool() & (advantages != 0)[:, None]
    # it would spread if it were read
    hidden = hidden.masked_fill(~kept[..., None], float("nan"))
    moved = [x.to(where[0]) for x in (hidden, weight, targets, old, ref, advantages, mask)]
    for name, leaf in zip(("hidden", "weight"), moved):
        leaf.requires_grad_(name not in frozen)
    with Rows(17) as watch:
        targets, loss_inputs = as_loss_inputs(*moved[2:])
        options = {"counts": counts, "chunk": 100, "backend": where[1]}
        loss, metrics, _ = linear_grpo_loss(grpo_loss, *moved[:2], targets, loss_inputs, **options)
        if gemms > 1:
            loss.backward()
    assert (
        loss.isfinite() and watch.gemms == gemms and watch.rows == gemms * int(kept.sum()) * hidden.shape[-1]
    )
    assert all((leaf.grad is None) == (name in frozen) for name, leaf in zip(("hidden", "weight"), moved))
    if "hidden" not in frozen:
        assert (
            torch.equal(moved[0].grad.cpu()[~kept], torch.zeros(int((~kept).sum()), 4))
            and moved[0].grad.isfinite().all()
        )


def test_cross_entropy_reads_no_ignored_row_and_without_gradient_needs_one_gemm(where):
    hidden, weight, targets = make(6, 4, 17)
    targets[2] = -100
    hidden[2] = float("nan")
    mine = leaves(where, hidden, weight)
    with torch.no_grad(), Rows(17) as watch:
        assert linear_cross_entropy(*mine, targets.to(where[0]), backend=where[1]).isfinite()
    assert watch.gemms == 1 and watch.rows == 5 * 4


def test_a_batch_all_masked_has_loss_zero_and_gradient_zero(where):
    inputs, counts = rollout()
    loss, metrics, logps, mine = fused_grpo(where, (*inputs[:6], torch.zeros_like(inputs[6])), counts, kl=0.1)
    assert loss == 0 and metrics["rows"] == 0 and not logps.any() and not any(x.grad.any() for x in mine)
    hidden, weight, targets = make(3, 4, 5)
    mine = leaves(where, hidden, weight)
    loss = linear_cross_entropy(*mine, torch.full_like(targets, -100).to(where[0]), backend=where[1])
    loss.backward()
    assert loss == 0 and not any(x.grad.any() for x in mine)


def test_one_token_and_one_word_lose_nothing(where):
    mine = leaves(where, torch.ones(1, 3), torch.ones(1, 3))
    loss = linear_cross_entropy(*mine, torch.zeros(1, dtype=torch.int64, device=where[0]), backend=where[1])
    loss.backward()
    assert loss == 0 and not any(x.grad.any() for x in mine)


def test_a_second_backward_pass_through_a_loss_is_refused_in_one_line(where):
    hidden, weight, targets = make(3, 4, 5)
    loss = linear_cross_entropy(*leaves(where, hidden, weight), targets.to(where[0]), backend=where[1])
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="^the gradient of this loss has been used already: compute the loss again$"
    ):
        loss.backward()


def test_two_runs_of_the_losses_agree_bit_for_bit_and_leave_their_inputs_alone(where):
    inputs, counts = rollout()
    before = [x.clone() for x in inputs]
    runs = [fused_grpo(where, inputs, counts, loss="gspo", kl=0.3) for _ in range(2)]
    assert runs[0][0] == runs[1][0] and all(
        torch.equal(a.grad, b.grad) for a, b in zip(runs[0][3], runs[1][3])
    )
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


class Afresh(torch.autograd.Function):
    """function(*leaves), computed again for every backward pass: gradcheck asks for several per forward."""

    @staticmethod
    def forward(ctx, function, *leaves):
        ctx.function, ctx.leaves = function, leaves
        return function(*leaves)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            copies = [x.detach().requires_grad_() for x in ctx.leaves]
            return None, *torch.autograd.grad(ctx.function(*copies), copies, grad)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_passes_in_float64_for_the_losses(softcap):
    inputs, counts = rollout(V=7)
    hidden, weight, targets, old, ref, advantages, mask = (
        x.double() if x.is_floating_point() else x for x in inputs
    )
    bias = make(1, 7, 1, torch.float64)[0][0]
    hidden, weight, bias = (x.requires_grad_() for x in (hidden, weight, bias))

    def cross_entropy(h, w, b):
        return linear_cross_entropy(h[0], w, targets[0], bias=b, softcap=softcap, chunk=2)

    def grpo(h, w, b):
        options = {"counts": counts, "bias": b, "softcap": softcap, "chunk": 6, "kl": 0.3}
        return linear_grpo_loss(grpo_loss, h, w, targets, LossInputs(advantages, mask, old, ref), **options)[
            0
        ]

    for function in (cross_entropy, grpo):
        assert torch.autograd.gradcheck(lambda *x, f=function: Afresh.apply(f, *x), (hidden, weight, bias))


def test_bf16_error_of_the_cross_entropy_is_not_above_that_of_plain_bf16_logits(where):
    hidden, weight, targets = make(64, 32, 200, torch.bfloat16)
    plain, mine, theirs = (
        leaves(("cpu",), hidden, weight),
        leaves(where, hidden, weight),
        exact(hidden, weight),
    )
    losses = [torch.nn.functional.cross_entropy((plain[0] @ plain[1].T).float(), targets),
              linear_cross_entropy(*mine, targets.to(where[0]), chunk=16, backend=where[1]),
              torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].T, targets)]  # fmt: skip
    for loss in losses:
        loss.backward()
    for a, b, c in zip(mine, plain, theirs):
        assert (a.grad.cpu().double() - c.grad).norm() <= 1.1 * (b.grad.double() - c.grad).norm()


def test_the_losses_hold_no_tensor_larger_than_a_chunk_of_logits_or_the_weight(where):
    hidden, weight, targets = make(64, 4, 256)
    mine = leaves(where, hidden, weight)
    with Watch() as watch:
        linear_cross_entropy(*mine, targets.to(where[0]), chunk=8, backend=where[1]).backward()
    assert watch.largest == 4 * 8 * 256


# ---- errors and backends


H, W, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((H[:, :, None], W, Y), {}, "must be (N, D) and (V, D)"),
        ((H, W[0], Y), {}, "must be (N, D) and (V, D)"),
        ((H, W[:, :2], Y), {}, "(2, 3) and (5, 2)"),
        ((H, W[:0], Y), {}, "V > 0"),
        ((H, W.bfloat16(), Y), {}, "hidden is torch.float32, weight torch.bfloat16"),
        ((H.long(), W.long(), Y), {}, "floating-point"),
        ((H, W, Y[:1]), {}, "targets are torch.int64 (1,): they must be int64 (2,)"),
        ((H, W, Y.int()), {}, "targets are torch.int32"),
        ((H, W, torch.tensor([0, 5])), {}, "targets span 0 to 5: they must be in [0, 5)"),
        ((H, W, torch.tensor([-1, 2])), {}, "targets span -1 to 2"),
        ((H, W, Y, 0.0), {}, "temperature is 0.0"),
        ((H, W, Y, float("nan")), {}, "temperature is nan"),
        ((H, W, Y), {"chunk": 0}, "chunk 0"),
        ((H, W, Y), {"softcap": -1.0}, "softcap -1.0"),
        ((H, W, Y), {"bias": W[:, 0].double()}, "bias is torch.float64 (5,): it must be torch.float32 (5,)"),
        ((H, W, Y), {"bias": W[0]}, "bias is torch.float32 (3,)"),
        ((H, W, Y), {"backend": "cuda"}, "backend is 'cuda'"),
        pytest.param(
            (H.double(), W.double(), Y),
            {"backend": "triton"},
            "use backend='torch' for float64",
            marks=pytest.mark.skipif(TRITON is None, reason="triton is not installed"),
        ),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments, options, message):
    with pytest.raises(ValueError) as error:
        linear_logprob(*arguments, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(TRITON is None, reason="triton is not installed")
def test_triton_on_the_cpu_without_its_interpreter_is_one_line(monkeypatch):
    # as if tl.sum had been compiled and not interpreted
    monkeypatch.setattr(TRITON, "JITFunction", object)
    with pytest.raises(
        ValueError, match="^backend='triton' runs on the CPU only if TRITON_INTERPRET=1 is set.*$"
    ):
        linear_logprob(H, W, Y, backend="triton")


def test_a_target_outside_the_vocabulary_is_nan_in_the_kernel_and_touches_no_other_row(where):
    device, backend = where
    if backend == "torch":
        pytest.skip("PyTorch's gather raises")
    logits = torch.zeros(3, 4, device=device)
    (logps, entropy), _ = triton_ops._statistics_triton(
        logits, torch.tensor([1, 4, -1], device=device), 1.0, 0.0
    )
    assert logps.isnan().tolist() == [False, True, True] and not entropy.isnan().any()


def test_the_cpu_default_is_plain_pytorch(monkeypatch):
    monkeypatch.delitem(triton_ops._STATISTICS, "triton")
    logps, _ = linear_logprob(H, W, Y)
    torch.testing.assert_close(logps, torch.full((2,), 0.2).log())


def test_without_triton_the_module_imports_and_says_so_only_when_asked_for_it(monkeypatch):
    # makes `import triton` an ImportError
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("triton_ops_without_triton", triton_ops.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.linear_logprob(H, W, Y)[0].shape == (2,)
    with pytest.raises(ImportError, match="^backend='triton' needs the triton package.*use backend='torch'$"):
        module.linear_logprob(H, W, Y, backend="triton")


# ---- what needs a process of its own, because Triton chooses between compiler and interpreter when it is
# imported


def run_python(*arguments, **environment):
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


COMPILE = """
import triton_ops
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

GPUS = [*(GPUTarget("cuda", arch, 32) for arch in (75, 80, 90)), GPUTarget("hip", "gfx942", 64)]


def build(kernel, gpu, grad, constants):
    types = {"targets_ptr": "*i64", "grad_ptr": grad, "temperature": "fp32", "softcap": "fp32", "V": "i32"}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    code = compile(source, target=gpu, options={"num_warps": 8}).asm
    if gpu.backend == "cuda":
        assert f".target sm_{gpu.arch}" in code["ptx"]
        assert "atom." not in code["ptx"] and "red.global" not in code["ptx"]
    # The machine's own code.
    assert code["cubin" if gpu.backend == "cuda" else "hsaco"]
    print("compiled", kernel.__name__, gpu.arch, grad, constants)


for kernel in (triton_ops._statistics_kernel, triton_ops._gradient_kernel):
    assert [p.name for p in kernel.params if p.is_constexpr] == ["BLOCK"]
    for gpu in GPUS:
        # The gradient of fp32 logits takes their place; that for bf16 GEMMs is written in bf16.
        for grad in ("*bf16", "*fp32") if "grad_ptr" in kernel.arg_names else (None,):
            build(kernel, gpu, grad, {"BLOCK": triton_ops.MAX_BLOCK})
    # Triton makes a V of 1 a constant.
    build(kernel, GPUS[1], "*bf16", {"BLOCK": 1, "V": 1})
"""


@pytest.mark.skipif(TRITON is None, reason="triton is not installed")
def test_kernels_compile_for_gpus_that_are_not_there_and_without_atomics(tmp_path):
    """Turing, Ampere, Hopper and AMD's MI300."""
    out = run_python("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert out.count("compiled") == 14


@pytest.mark.skipif(INTERPRETED or TRITON is None, reason="they ran in this process")
def test_interpreted_kernels_pass_in_a_process_of_their_own():
    out = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "cpu-triton", TRITON_INTERPRET="1"
    )
    assert " passed" in out
