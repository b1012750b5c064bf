"""grpo.py: the loss against a computation by hand, what must not change it, and rewards, groups and watch."""

import argparse
import copy
import json
import math
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import clinic
import pytest
import torch
from helpers import run_in_one_and_two

import grpo
from medgr2 import encoding, loading, records, rollouts, training, vlm, watch
from medgr2.errors import RecordError, RunError, UserError
from medgr2.prompts import is_match, parse_response, policy_prompt
from medgr2.watch import is_hacking
from reward import Heads, RewardModel
from triton_ops import LossInputs

ROOT = Path(__file__).parent.parent


# ---- the loss, number by number, in plain Python


def by_hand(logps, old, ref, advantages, mask, counts, loss, low, high, beta, estimator):
    sequences, tokens, longest = counts
    total = 0.0
    for i, a in enumerate(advantages):
        n = sum(mask[i])
        steps = [t for t in range(len(mask[i])) if mask[i][t]]
        for t in steps:
            if loss == "gspo":
                rho = math.exp(sum(logps[i][s] - old[i][s] for s in steps) / n)
            else:
                rho = math.exp(logps[i][t] - old[i][t])
            clipped = min(max(rho, 1 - low), 1 + high)
            gain = min(rho * a, clipped * a)
            kl = 0.0
            if beta:
                d = ref[i][t] - logps[i][t]
                k3 = math.exp(d) - d - 1
                own_ratio = math.exp(logps[i][t] - old[i][t])
                kl = {"k3": k3, "k3_unbiased": own_ratio * k3, "k2": d * d / 2}[estimator]
            term = -(gain - beta * kl)
            total += (
                term
                / {
                    "grpo": n * sequences,
                    "gspo": n * sequences,
                    "dapo": tokens,
                    "dr_grpo": sequences * longest,
                }[loss]
            )
    return total


def loss_of(logps, old, ref, advantages, mask, counts, **options):
    """grpo_loss of tensors, (loss, sums of metrics)."""
    return grpo.grpo_loss(logps, LossInputs(advantages, mask, old, ref), grpo.Counts(*counts), **options)


OLD = [[-1.0, -2.0, -0.5], [-1.5, -1.0, -3.0]]
REF = [[-1.1, -1.7, -0.9], [-1.2, -1.4, -2.0]]
# log ratio against a clip of 0.2 and 0.28
BRANCHES = {"inside": 0.05, "below": -0.5, "above": 0.5}


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    "beta, estimator", [(0.0, "k3_unbiased"), (0.3, "k3"), (0.3, "k3_unbiased"), (0.3, "k2")]
)
def test_loss_equals_a_computation_by_hand_in_every_branch_of_the_clip(loss, branch, sign, beta, estimator):
    logps = [[o + BRANCHES[branch] for o in row] for row in OLD]
    # tokens of a sequence differ, or gspo could not be told from grpo
    logps[1][0] -= 0.03
    mask, advantages, counts = [[1, 1, 1], [1, 1, 0]], [0.7 * sign, 1.3 * sign], (2, 5, 8)
    want = by_hand(logps, OLD, REF, advantages, mask, counts, loss, 0.2, 0.28, beta, estimator)
    t = torch.tensor
    got, metrics = loss_of(
        t(logps),
        t(OLD),
        t(REF),
        t(advantages),
        t(mask),
        counts,
        loss=loss,
        epsilon=0.2,
        epsilon_high=0.28,
        kl=beta,
        kl_estimator=estimator,
    )
    assert got.item() == pytest.approx(want, rel=1e-5)
    clipped = {("below", -1.0): "clip_low", ("above", 1.0): "clip_high"}.get((branch, sign))
    assert {k: int(metrics[k]) for k in ("clip_low", "clip_high")} == {"clip_low": 0, "clip_high": 0} | (
        {clipped: 5} if clipped else {}
    )


@pytest.mark.parametrize(
    "branch,sign,moves",
    [
        ("inside", 1, True),
        ("inside", -1, True),
        ("below", 1, True),
        ("below", -1, False),
        ("above", 1, False),
        ("above", -1, True),
    ],
)
def test_a_clipped_token_has_no_gradient_and_every_other_has(branch, sign, moves):
    logps = (torch.tensor(OLD) + BRANCHES[branch]).requires_grad_()
    loss_of(logps, torch.tensor(OLD), None, torch.full((2,), float(sign)), torch.ones(2, 3), (2, 6, 3))[
        0
    ].backward()
    assert (logps.grad != 0).all() if moves else (logps.grad == 0).all()


def test_epsilon_high_is_epsilon_unless_given_even_when_it_is_zero():
    logps = torch.tensor(OLD) + 0.1

    def run(**options):
        same = torch.ones(2), torch.ones(2, 3), (2, 6, 3)
        return loss_of(logps, torch.tensor(OLD), None, *same, **options)[0].item()

    assert run() == pytest.approx(-math.exp(0.1), rel=1e-5) and run(epsilon_high=0.0) == pytest.approx(-1.0)


# ---- the expected gradient of the KL term, over all 9 sequences of two tokens of a vocabulary of three


def tables(seed):
    """Log-probs of a policy: of the first token (3,), and of the second one after each first one (3, 3)."""
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((3,), (3, 3))]
    return [x.requires_grad_() for x in logits], [x.log_softmax(-1) for x in logits]


def expected_kl_term(policy, sampler, ref, loss, estimator):
    """Σ over all sequences of their probability under the sampler · grpo_loss of no advantage."""
    total = 0.0
    for a in range(3):
        for b in range(3):
            logps, old, ref_logps = (torch.stack([x[a], y[a, b]])[None] for x, y in (policy, sampler, ref))
            nothing, ones = torch.zeros(1, dtype=torch.float64), torch.ones(1, 2)
            options = {"loss": loss, "kl": 1.0, "kl_estimator": estimator}
            value, _ = loss_of(logps, old.detach(), ref_logps.detach(), nothing, ones, (1, 2, 2), **options)
            total = total + old.detach().sum().exp() * value
    return total


def exact_kl(p, q, sampler):
    """Mean over the two tokens of KL(p, q) of the next token; prefixes are the sampler's, a constant."""
    first = (p[0].exp() * (p[0] - q[0])).sum()
    second = sampler[0].detach().exp() @ (p[1].exp() * (p[1] - q[1])).sum(-1)
    return (first + second) / 2


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize(
    "estimator, on_policy, is_gradient",
    [
        ("k3_unbiased", True, True),
        ("k3_unbiased", False, True),
        ("k2", True, True),
        ("k2", False, False),
        ("k3", True, False),
        ("k3", False, False),
    ],
)
def test_which_estimators_have_the_gradient_of_the_kl_in_expectation(loss, estimator, on_policy, is_gradient):
    logits, policy = tables(0)
    sampler, ref = policy if on_policy else tables(1)[1], tables(2)[1]
    estimate = expected_kl_term(policy, sampler, ref, loss, estimator)
    want = exact_kl(policy, [x.detach() for x in ref], sampler)
    got, wanted = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, logits, retain_graph=True)])
        for x in (estimate, want)
    )
    assert ((got - wanted).norm() < 1e-12) == is_gradient
    # If it is not, it is not by far.
    assert is_gradient or (got - wanted).norm() > 0.1 * wanted.norm()
    if estimator == "k3_unbiased" or (estimator == "k3" and on_policy):
        assert estimate.item() == pytest.approx(want.item(), rel=1e-12)


def test_the_expected_gradient_of_k3_is_that_of_the_kl_the_other_way_round():
    logits, policy = tables(0)
    ref = [x.detach() for x in tables(2)[1]]
    got = torch.autograd.grad(expected_kl_term(policy, policy, ref, "grpo", "k3"), logits, retain_graph=True)
    wanted = torch.autograd.grad(exact_kl(ref, policy, policy), logits)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, wanted))


def test_a_masked_token_and_an_all_masked_row_do_not_count():
    logps, mask = torch.tensor(OLD), torch.tensor([[1, 1, 0], [0, 0, 0]])
    base = loss_of(logps, logps - 0.1, None, torch.ones(2), mask, (1, 2, 3))[0]
    other = torch.where(mask > 0, logps, torch.tensor(-50.0))
    masked = loss_of(other, logps - 0.1, None, torch.ones(2), mask, (1, 2, 3))[0]
    assert base.equal(masked) and base.isfinite()


def test_advantages_by_hand_and_equal_rewards_give_exactly_zero():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]])
    group = grpo.compute_advantages(r, "group")
    # of (1, 0, 0, 1) with n - 1
    std = math.sqrt(4 * 0.25 / 3)
    assert (
        group[0].tolist() == pytest.approx([s * 0.5 / (std + 1e-4) for s in (1, -1, -1, 1)])
        and not group[1].any()
    )
    assert grpo.compute_advantages(r, "none")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert grpo.compute_advantages(r, "batch", torch.tensor(2.0))[0].tolist() == pytest.approx(
        [s * 0.5 / 2.0001 for s in (1, -1, -1, 1)]
    )


# ---- on the toy policy


class OneProcess:
    """An accelerate.Accelerator for one of several shares, whose sums a test adds up itself."""

    def __init__(self, counts=None):
        self.counts = counts

    def autocast(self):
        return nullcontext()

    def reduce(self, tensor, how):
        return (
            torch.tensor(self.counts)
            if self.counts and tensor.dtype == torch.long and tensor.numel() == 2
            else tensor
        )


def flags(**over):
    return argparse.Namespace(
        **{
            "micro_batch": 8,
            "micro_group": None,
            "gradient_checkpointing": False,
            "mask_truncated": False,
            "max_new_tokens": 24,
            "loss": "grpo",
            "epsilon": 0.2,
            "epsilon_high": None,
            "kl": 0.0,
            "kl_estimator": "k3_unbiased",
        }
        | over
    )


class Texts:
    """In place of a reward model, whose encoder gives back the texts of the prompts."""

    def encoder(self):
        return lambda images, texts: texts


TEXTS_ALONE = Texts()


def batch_of(policy, rows):
    inputs = encoding.preprocess(policy, *rollouts.open_rows(rows))
    return rollouts.Batch(0, rows, [0] * len(rows), inputs, None)


def with_advantages(groups, **over):
    given = {"scale_rewards": "group", "mask_truncated": False} | over
    return grpo.with_advantages(groups, argparse.Namespace(**given))


def load_policy():
    """The toy's policy with smaller logits: less sure, so that the responses of a group differ."""
    policy = loading.load(str(ROOT / "toy" / "policy"))
    policy.model.model.language_model.norm.weight.data.mul_(0.7)
    return policy


@pytest.fixture(scope="module")
def policy():
    return load_policy()


@pytest.fixture(scope="module")
def groups(policy, tmp_path_factory):
    """Six scored groups of four responses, some of them truncated (24 tokens are few)."""
    folder = tmp_path_factory.mktemp("clinic")
    clinic.write_clinic(str(folder), (3, 1, 1, 1, 1), seed=5)
    rows = list(records.read_records(folder / "expert.jsonl"))[:6]
    made = grpo.sample_groups(policy, batch_of(policy, rows), 4, 24, 0)
    scale = torch.tensor([0.1, 0.5, 0.4, 0.9])
    scored = [replace(g, rewards=scale * (k + 1), informative=True) for k, g in enumerate(made)]
    return with_advantages(scored)


def gradient(policy, groups, accelerator=None, reference=None, **over):
    """(gradient by name, metrics, the groups afterwards) of one update."""
    policy.model.zero_grad()
    args, accelerator = flags(**over), accelerator or OneProcess()
    if reference:
        groups = grpo.with_reference_logps(reference, groups, args.micro_batch, accelerator)
    counts = grpo.count_batch(groups, args.max_new_tokens, accelerator)
    after, metrics = grpo.policy_gradient(policy, groups, counts, args, accelerator)
    grads = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return grads, metrics, after


def assert_same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and a

    def flat(grads):
        return torch.cat([grads[n].flatten() for n in sorted(grads)])

    assert (flat(a) - flat(b)).norm() <= tolerance * flat(a).norm() and flat(a).norm() > 0


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_the_gradient_does_not_depend_on_micro_batches_or_checkpointing(policy, groups, loss):
    whole, metrics, _ = gradient(policy, groups, loss=loss, micro_batch=6)
    sizes = ({"micro_batch": 1}, {"micro_batch": 6, "micro_group": 3}, {"micro_group": 1})
    for smaller in (*sizes, {"micro_group": 2, "gradient_checkpointing": True}):
        parts, again, _ = gradient(policy, groups, loss=loss, **smaller)
        assert_same(whole, parts)
        assert again == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_the_gradient_is_the_sum_over_processes(policy, groups, loss):
    whole, metrics, _ = gradient(policy, groups, loss=loss)
    rows = sum(len(g.texts) for g in groups)
    shares = [
        gradient(policy, groups[r::2], OneProcess([rows, metrics["tokens"]]), loss=loss)[0] for r in (0, 1)
    ]
    assert_same(whole, {n: shares[0][n] + shares[1][n] for n in whole})


def test_equal_rewards_move_nothing(policy, groups):
    same = [copy.copy(g) for g in groups]
    for g in same:
        g.advantages = grpo.compute_advantages(torch.full((1, 4), 0.7), "group")[0]
    grads, _, _ = gradient(policy, same)
    assert grads and all((g == 0).all() for g in grads.values())


def test_the_first_update_is_the_plain_policy_gradient_and_clips_nothing(policy, groups):
    grads, metrics, _ = gradient(policy, groups, kl=0.0)
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    policy.model.zero_grad()
    # -Σ Â/|y| ∇ log π, one sequence at a time through the model's own logits
    for g in groups:
        for k in range(4):
            prompt = encoding.encode_prompts(policy, [g.prompt.image], [g.prompt.text])
            ids = g.ids[k][g.mask[k].bool()][None]
            inputs = prompt | {
                "input_ids": torch.cat([prompt["input_ids"], ids], 1),
                "attention_mask": torch.ones(1, prompt["input_ids"].shape[1] + ids.shape[1]),
            }
            logits = policy.model(**inputs).logits[:, -ids.shape[1] - 1 : -1]
            # What is never sampled has no probability.
            logps = logits.index_fill(2, torch.tensor(policy.banned_ids), -torch.inf).log_softmax(-1)
            (-g.advantages[k] * logps.gather(2, ids[..., None]).mean() / 24).backward()
    want = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    assert_same(want, {n: grads[n] for n in want}, 1e-4)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize("kl, estimator", [(0.0, "k3_unbiased"), (0.1, "k3_unbiased"), (0.1, "k2")])
def test_a_later_update_is_grpo_loss_of_all_log_probs_at_once(policy, groups, loss, kl, estimator):
    """Off the policy that sampled. Two groups have no advantage, and without a reference no forward pass."""
    # in the order in which they are learned
    some = sorted((copy.copy(g) for g in groups), key=lambda g: -int(g.mask.sum(1).max()))
    some[1].advantages = some[4].advantages = torch.zeros(4)
    reference, (prompts, ids, mask) = loading.frozen_copy(policy), grpo.collate(policy, some)
    advantages = torch.cat([g.advantages for g in some])
    with torch.no_grad():
        reference.model.get_output_embeddings().weight.mul_(1.1)
        ref_logps, _ = vlm.token_logps(reference, prompts, ids, mask)
        draw = torch.Generator().manual_seed(0)
        # of tokens and of sequences
        noise = torch.randn(mask.shape, generator=draw) + torch.randn((len(mask), 1), generator=draw)
        old = (vlm.token_logps(policy, prompts, ids, mask)[0] + 0.3 * noise) * mask
    computed = mask.bool() & ((advantages != 0) | (kl > 0))[:, None]
    some = [replace(g, old_logps=own) for g, own in zip(some, old.split(4))]
    options = {"loss": loss, "kl": kl, "kl_estimator": estimator}
    grads, metrics, after = gradient(policy, some, reference=reference if kl else None, **options)
    policy.model.zero_grad()
    logps, entropy = vlm.token_logps(policy, prompts, ids, mask)
    want, sums = loss_of(logps, old, ref_logps, advantages, mask, (24, int(mask.sum()), 24), **options)
    want.backward()
    assert_same({n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}, grads)
    policy.model.zero_grad()
    assert metrics["loss"] == pytest.approx(want.item(), rel=1e-4, abs=1e-6)
    assert metrics["entropy"] == pytest.approx(entropy[computed].mean().item(), rel=1e-4)
    assert {k: metrics[k] for k in sums} == pytest.approx(
        {k: v.item() / metrics["tokens"] for k, v in sums.items()}, rel=1e-4, abs=1e-6
    )
    assert metrics["clip_low"] + metrics["clip_high"] > 0
    assert all(g.old_logps is before.old_logps for g, before in zip(after, some)), "kept over later updates"


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_first_update_keeps_the_log_probs_of_the_policy_that_sampled(policy, groups, kl):
    """On the group that they belong to, whatever the order in which groups are learned from."""
    some = [copy.copy(g) for g in groups]
    some[1].advantages = torch.zeros(4)
    reference = loading.frozen_copy(policy) if kl else None
    _, _, after = gradient(policy, some, reference=reference, kl=kl, micro_batch=2)
    for k, g in enumerate(after):
        if k == 1 and not kl:
            assert g.old_logps is None
            continue
        inputs = encoding.encode_prompts(policy, [g.prompt.image] * 4, [g.prompt.text] * 4)
        with torch.no_grad():
            logps, _ = vlm.token_logps(policy, inputs, g.ids, g.mask)
        width = min(logps.shape[1], g.old_logps.shape[1])
        assert torch.allclose(g.old_logps[:, :width], logps[:, :width], atol=1e-4)


def forwards(policy, groups, **over):
    """(shape, tokens) of the responses in each forward pass of an update, and its results."""
    seen, real = [], vlm.hidden_states

    def hidden_states(vlm_, prompts, ids, mask):
        seen.append((tuple(ids.shape), int(mask.sum())))
        return real(vlm_, prompts, ids, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm, "hidden_states", hidden_states)
        return seen, *gradient(policy, groups, **over)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_a_group_without_advantage_costs_no_forward_and_still_counts(policy, groups, loss):
    some = [copy.copy(g) for g in groups]
    for k in (0, 2, 3):
        some[k].advantages = torch.zeros(4)
    seen, grads, metrics, after = forwards(policy, some, loss=loss, micro_batch=2)
    assert [rows for (rows, _), _ in seen] == [8, 4]
    assert [g.old_logps is None for g in after] == [k in (0, 2, 3) for k in range(6)]
    assert sum(tokens for _, tokens in seen) == sum(int(some[k].mask.sum()) for k in (1, 4, 5))
    # as good as none, and computed
    for g in some:
        g.advantages = torch.where(g.advantages == 0, 1e-12, g.advantages)
    seen, computed, again, _ = forwards(policy, some, loss=loss, micro_batch=2)
    assert len(seen) == 3
    assert_same(computed, grads)
    assert (
        metrics["loss"] == pytest.approx(again["loss"], rel=1e-4, abs=1e-6)
        and metrics["tokens"] == again["tokens"]
    )


def test_with_a_kl_term_every_group_is_computed_and_without_any_advantage_one_is(policy, groups):
    flat = [copy.copy(g) for g in groups]
    for g in flat:
        g.advantages = torch.zeros(4)
    seen, grads, metrics, _ = forwards(policy, flat)
    assert len(seen) == 1 and seen[0][0][0] == 4, (
        "the gradient is zero and not missing: what every process adds up"
    )
    assert (
        grads
        and not any(g.any() for g in grads.values())
        and metrics["loss"] == 0
        and metrics["tokens"] == sum(int(g.mask.sum()) for g in groups)
    )
    seen, _, _, _ = forwards(policy, flat, reference=loading.frozen_copy(policy), kl=0.1)
    assert sum(rows for (rows, _), _ in seen) == 48, "the policy's and the reference's"


def test_micro_batches_hold_groups_of_one_length_whatever_order_they_come_in(policy, groups):
    some = [copy.copy(g) for g in groups]
    for g, longest in zip(some, (5, 20, 9, 24, 6, 21)):
        g.mask = g.loss_mask = g.mask * (torch.arange(g.mask.shape[1]) < longest)
        assert g.mask.sum(1).max() == longest
    seen, grads, _, _ = forwards(policy, some, micro_batch=2)
    assert [shape for shape, _ in seen] == [(8, 24), (8, 20), (8, 6)]
    assert_same(grads, gradient(policy, some[::-1], micro_batch=3)[0])


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_with_frozen_images_the_tower_encodes_each_image_once_for_samples_reference_and_updates(
    policy, groups, kl
):
    frozen = load_policy()
    loading.freeze_images(frozen)
    reference = loading.frozen_copy(frozen) if kl else None
    read = []
    for model in (frozen.model, reference and reference.model):
        if model:
            model.base_model.vision_tower.register_forward_pre_hook(
                lambda tower, args, kwargs: read.append(len(args[0])), with_kwargs=True
            )
    rows = [g.record for g in groups]
    made = grpo.sample_groups(frozen, batch_of(frozen, rows), 4, 24, 0)
    assert [g.texts for g in made] == [g.texts for g in groups]
    for new, g in zip(made, groups):
        new.advantages, new.loss_mask = g.advantages, g.loss_mask
    for _ in range(2):
        grads, metrics, _ = gradient(frozen, made, reference=reference, kl=kl, micro_batch=2)
    assert read == [6], "images at each pass of the tower"
    plain, again, _ = gradient(
        policy, groups, reference=loading.frozen_copy(policy) if kl else None, kl=kl, micro_batch=2
    )
    assert metrics == pytest.approx(again, rel=1e-4, abs=1e-6)
    assert_same({n: plain[n] for n in grads}, grads)
    assert {n for n in plain.keys() - grads.keys()} == {
        n for n in plain if n.startswith(("model.vision_tower.", "model.multi_modal_projector."))
    }


@pytest.mark.parametrize(
    "freeze, still",
    [
        ("images", ("model.vision_tower.", "model.multi_modal_projector.")),
        ("vision", ("model.vision_tower.",)),
        ("nothing", ()),
    ],
)
def test_what_is_frozen_stays_to_the_bit_and_all_else_moves(
    monkeypatch, folder, tmp_path, freeze, still, policy
):
    run_grpo(monkeypatch, folder, tmp_path / "run", "--freeze", freeze, "--min-spread", "-1")
    after = loading.load(str(tmp_path / "run")).model.state_dict()
    # LLaVA reads the layer before the last
    unused = "model.vision_tower.encoder.layers.3.", "model.vision_tower.post_layernorm."
    moved = {n for n, before in policy.model.state_dict().items() if not before.equal(after[n])}
    for name in policy.model.state_dict():
        assert (name in moved) == (not name.startswith((*still, *unused))) or name.endswith("position_ids"), (
            name
        )


def test_what_grpo_loss_says_is_what_is_learned(policy, groups, monkeypatch):
    base, _, _ = gradient(policy, groups)
    real = grpo.grpo_loss
    monkeypatch.setattr(
        grpo, "grpo_loss", lambda *a, **k: tuple(x if isinstance(x, dict) else 2 * x for x in real(*a, **k))
    )
    assert_same({n: 2 * g for n, g in base.items()}, gradient(policy, groups)[0])


def test_at_the_reference_the_kl_is_zero_and_away_from_it_positive(policy, groups):
    reference = loading.frozen_copy(policy)
    assert gradient(policy, groups, reference=reference, kl=0.1)[1]["kl"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        reference.model.get_output_embeddings().weight.mul_(1.1)
    assert gradient(policy, groups, reference=reference, kl=0.1)[1]["kl"] > 1e-4


def test_a_truncated_response_teaches_nothing_when_masked(policy, groups):
    cut = [copy.copy(g) for g in groups]
    for g in cut:
        g.truncated = torch.tensor([True, False, False, False])
    masked, metrics, _ = gradient(policy, with_advantages(cut, mask_truncated=True))
    muted = [copy.copy(g) for g in cut]
    for g in muted:
        # the same by hand: no advantage, and not counted
        g.advantages = g.advantages * ~g.truncated
    unmasked, _, _ = gradient(policy, muted)
    assert_same(masked, {n: v * 24 / 18 for n, v in unmasked.items()})
    assert metrics["tokens"] == sum(int(g.mask[1:].sum()) for g in groups)


def test_learning_leaves_the_groups_as_they_were(policy, groups):
    before = [(g.ids.clone(), g.mask.clone(), g.advantages.clone()) for g in groups]
    gradient(policy, with_advantages(groups, mask_truncated=True), micro_batch=2)
    assert all(
        torch.equal(a, b)
        for g, old in zip(groups, before)
        for a, b in zip((g.ids, g.mask, g.advantages), old)
    )


def test_the_hybrid_reward_by_hand_and_malformed_gets_the_least_there_is(groups):
    g = copy.copy(groups[0])
    formed = parse_response("<think>x</think><answer>a</answer>", ["a", "b"])
    g.parsed = [formed, formed, formed._replace(well_formed=False), formed]
    g.match, g.texts = [True, False, True, False], ["w"] * 4

    def model(encoded, texts):
        return {"overall": [10.0, 2.0, 10.0, -6.0]}

    args = argparse.Namespace(alpha=0.8, beta=0.2, reward_scale="unit", min_spread=0.1)
    (unit,) = grpo.score_groups(model, None, [g], args)
    assert unit.rewards.tolist() == pytest.approx([1.0, 0.4, 0.0, 0.0])
    unlabelled = replace(g, record={name: g.record[name] for name in g.record if name != "answer"})
    unlabelled.match = [None] * 4
    (unit,) = grpo.score_groups(model, None, [unlabelled], args)
    assert unit.rewards.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])
    args.reward_scale = "raw"
    (raw,) = grpo.score_groups(model, None, [g], args)
    assert raw.rewards.tolist() == pytest.approx([8.2, 1.6, -4.8, -4.8])
    (raw,) = grpo.score_groups(model, None, [unlabelled], args)
    assert raw.rewards.tolist() == pytest.approx([8.2, 1.7, -4.8, -4.8])


def test_a_group_is_informative_if_its_rewards_differ_by_more_than_noise(groups):
    g = copy.copy(groups[0])
    formed = parse_response("<think>x</think><answer>a</answer>", ["a", "b"])
    g.parsed, g.match, g.texts = [formed] * 4, [True] * 4, ["w"] * 4
    args = argparse.Namespace(alpha=0.8, beta=0.2, reward_scale="unit", min_spread=0.1)

    def is_informative(*R):
        (scored,) = grpo.score_groups(lambda *_: {"overall": list(R)}, None, [g], args)
        return scored.informative

    # In units of the reward the std of (9.9, 10, 9.8, 10) is 0.005, that of (10, 0, 10, 10) is 0.25.
    assert not is_informative(9.9, 10.0, 9.8, 10.0)
    # All answers match, and the reward model still tells them apart.
    assert is_informative(10.0, 0.0, 10.0, 10.0)


def test_the_watch_warns_when_reward_rises_while_accuracy_falls_and_only_then():

    def at(accuracy, reward):
        return {"watch_accuracy": accuracy, "watch_reward": reward}

    assert is_hacking(at(0.8, 5.0), at(0.7, 6.0), 100)
    # both fall
    assert not is_hacking(at(0.8, 5.0), at(0.7, 4.0), 100)
    # both rise
    assert not is_hacking(at(0.8, 5.0), at(0.9, 6.0), 100)
    # within one standard error, 0.04
    assert not is_hacking(at(0.8, 5.0), at(0.79, 6.0), 100)


# ---- the stage itself


def test_batches_are_prepared_in_another_thread_resume_from_their_cursor_and_are_shared_out(policy, groups):
    examples = [g.record for g in groups]

    def batches(cursor, k=0, n=1, size=None):
        args = argparse.Namespace(prompts=4, rollout_batch=size, seed=3, workers=0)
        process = argparse.Namespace(process_index=k, num_processes=n)
        return rollouts.prefetch_batches(policy, TEXTS_ALONE, examples, cursor, args, process)

    def ids(parts):
        return [r["id"] for batch in parts for r in batch.rows]

    threads, real = set(), rollouts.open_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rollouts, "open_images", lambda paths: (threads.add(threading.current_thread()), real(paths))[1]
        )
        coming = batches(5)
        whole = [next(coming) for _ in range(4)]
    assert threads and threading.current_thread() not in threads
    assert [batch.cursor for (batch,) in whole] == [6, 7, 8, 9]
    # Two epochs of six.
    assert sorted(ids(whole[1]) + ids(whole[2]) + ids(whole[3])) == sorted(2 * [r["id"] for r in examples])
    later = batches(7)
    assert [ids(next(later)) for _ in range(2)] == [ids(parts) for parts in whole[2:]]
    shares = [next(batches(5, k, 3)) for k in range(3)]
    assert [ids(s) for s in shares] == [ids(whole[0])[k::3] for k in range(3)]
    (batch,) = whole[0]
    assert [p.text for p in batch.inputs.prompts] == [policy_prompt(r) for r in batch.rows] == batch.scored
    in_parts = next(batches(5, size=3))
    assert ids(in_parts) == ids(whole[0]) and [len(part.rows) for part in in_parts] == [3, 1]


def test_what_is_sampled_does_not_depend_on_how_many_questions_are_sampled_at_a_time(policy, groups):
    def sampled(size):
        args = argparse.Namespace(prompts=5, rollout_batch=size, seed=3, workers=0)
        process = argparse.Namespace(process_index=0, num_processes=1)
        parts = next(
            rollouts.prefetch_batches(policy, TEXTS_ALONE, [g.record for g in groups], 2, args, process)
        )
        found = [grpo.sample_groups(policy, batch, 4, 24, 0) for batch in parts]
        return [(g.record["id"], g.texts) for part in found for g in part], len(found)

    whole, calls = sampled(None)
    assert calls == 1 and sampled(2) == (whole, 3) and len(set(whole[0][1])) > 1


def run_grpo(monkeypatch, folder, out, *extra):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "grpo.py",
            "--model",
            str(ROOT / "toy/policy"),
            "--reward",
            str(folder / "rm"),
            "--data",
            str(folder / "expert.jsonl"),
            "--val",
            str(folder / "val.jsonl"),
            "--steps",
            "3",
            "--prompts",
            "3",
            "--group",
            "4",
            "--watch-every",
            "2",
            "--save-every",
            "1",
            "--out",
            str(out),
            *extra,
        ],
    )
    grpo.main(grpo.parse_args())


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    """A small clinic and a reward model with untrained heads, which rewards at random but always the same."""
    out = tmp_path_factory.mktemp("grpo") / "clinic"
    clinic.write_clinic(str(out), (5, 1, 1, 4, 1), seed=8)
    torch.manual_seed(0)
    (out / "rm").mkdir()
    RewardModel(policy, Heads(30, 8), True).save(str(out / "rm"))
    return out


def test_questions_longer_than_the_reward_models_context_are_refused_before_the_first_step(
    monkeypatch, folder, tmp_path
):
    shutil.copytree(folder / "rm", tmp_path / "rm")
    config = tmp_path / "rm" / "backbone" / "config.json"
    found = json.loads(config.read_text())
    # The policy's is 1,024 tokens.
    found["text_config"]["max_position_embeddings"] = 64
    config.write_text(json.dumps(found))
    with pytest.raises(RecordError, match="records are too long, .* context of 64 "):
        run_grpo(monkeypatch, folder, tmp_path / "run", "--reward", str(tmp_path / "rm"))


@pytest.mark.parametrize(
    "extra",
    [
        (),
        (
            "--iterations",
            "2",
            "--loss",
            "gspo",
            "--min-spread",
            "0.01",
            "--scale-rewards",
            "batch",
            "--kl",
            "0",
        ),
    ],
)
def test_a_resumed_run_gives_the_same_rollouts_and_weights_bit_for_bit(monkeypatch, folder, tmp_path, extra):
    run_grpo(monkeypatch, folder, tmp_path / "whole", *extra)
    real, calls = grpo.update_policy, []

    def crash(*args):
        calls.append(1)
        if len(calls) > (3 if extra else 2):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(grpo, "update_policy", crash)
    with pytest.raises(KeyboardInterrupt):
        run_grpo(monkeypatch, folder, tmp_path / "cut", *extra)
    monkeypatch.setattr(grpo, "update_policy", real)
    run_grpo(monkeypatch, folder, tmp_path / "cut", *extra)
    for name in ("model.safetensors", "rollouts.jsonl", "metrics.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    lines = [json.loads(line) for line in open(tmp_path / "whole" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [0, 1, 2] and ["watch_accuracy" in line for line in lines] == [
        True,
        False,
        True,
    ]


def test_the_learning_rate_of_a_step_rises_then_falls_and_is_the_optimisers(monkeypatch, folder, tmp_path):
    stepped, real = [], torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        stepped.append(optimizer.param_groups[0]["lr"])
        return real(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run_grpo(monkeypatch, folder, tmp_path / "run", "--lr", "4e-4", "--warmup", "0.34")
    logged = [json.loads(line)["lr"] for line in open(tmp_path / "run" / "metrics.jsonl")]
    # One of three steps rises to the peak. Of half a cosine over two steps, the places 0 and 1/2 are left.
    assert stepped == pytest.approx([4e-4, 4e-4, 2e-4]) and logged == pytest.approx(stepped)


def test_a_policy_that_diverges_is_one_line_and_the_last_commit_is_kept(monkeypatch, folder, tmp_path):
    with pytest.raises(UserError, match="not finite; .*lower --lr"):
        run_grpo(monkeypatch, folder, tmp_path / "run", "--lr", "1e30", "--min-spread", "-1", "--steps", "2")
    assert not (tmp_path / "run").exists() and list((tmp_path / "run.part" / "state").glob("*.pt"))


def test_an_update_whose_gradient_is_not_finite_is_skipped_and_counted(monkeypatch, folder, tmp_path):
    real, calls = grpo.policy_gradient, []

    def policy_gradient(policy, *args):
        result = real(policy, *args)
        if not calls:
            next(p for p in policy.model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
        calls.append(1)
        return result

    monkeypatch.setattr(grpo, "policy_gradient", policy_gradient)
    run_grpo(monkeypatch, folder, tmp_path / "run", "--min-spread", "-1")
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [(line["skipped"], line["grad_norm"] is None) for line in lines] == [
        (1, True),
        (1, False),
        (1, False),
    ]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped"] == 1


@pytest.mark.parametrize("R, share", [(10.0, 1.0), (-6.0, 1.0), (9.9999, 0.0)])
def test_rewards_at_the_end_of_their_range_are_counted(groups, R, share):
    scored = [
        replace(g, scores={"overall": [R] * len(g.texts)}, rewards=torch.zeros(len(g.texts))) for g in groups
    ]
    assert rollouts.reward_metrics(scored)["saturated"] == share


def test_responses_to_a_question_that_is_drawn_twice_in_a_step_have_ids_of_their_own(groups):
    scored = []
    for g in groups[:1] * 2 + groups[1:2]:
        zeros = torch.zeros(len(g.texts))
        scores = {"overall": zeros.tolist()}
        scored.append(replace(g, scores=scores, rewards=zeros, advantages=zeros))
    ids = [row["id"] for step in (0, 1) for row in rollouts.rollout_rows(scored, step, ".")]
    assert len(set(ids)) == len(ids) == 2 * 3 * len(groups[0].texts)


def test_if_no_group_is_informative_one_fills_the_step_and_teaches_nothing(monkeypatch, folder, tmp_path):
    run_grpo(monkeypatch, folder, tmp_path / "run", "--min-spread", "9")
    before = loading.load(str(ROOT / "toy" / "policy")).model.state_dict()
    after = loading.load(str(tmp_path / "run")).model.state_dict()
    assert all(weight.equal(after[name]) for name, weight in before.items())
    rows = list(records.read_records(tmp_path / "run" / "rollouts.jsonl", ("image", "response"), folder))
    assert (
        len(rows) == 3 * 4
        and {r["advantage"] for r in rows} == {0.0}
        and len({r["rollout_reward"] for r in rows}) > 1
    )


def test_a_run_in_which_no_response_earns_anything_says_so_at_once_and_ends(
    monkeypatch, folder, tmp_path, capsys
):
    # No response is complete within two tokens.
    with pytest.raises(RunError, match="step 1: no response earned a reward .100% .*2 such steps in a row"):
        run_grpo(monkeypatch, folder, tmp_path / "run", "--max-new-tokens", "2", "--patience", "2")
    assert capsys.readouterr().out.count("step 0: no response earned a reward") == 1
    assert not (tmp_path / "run").exists()
    logged = [json.loads(line) for line in open(tmp_path / "run.part" / "metrics.jsonl")]
    assert all(line["reward"] == 0 and line["truncated"] == 1 for line in logged)


@pytest.mark.parametrize("steps, ends", [(2, 6), (3, None), (0, None)])
def test_patience_counts_steps_in_a_row_that_earn_nothing_or_are_mostly_cut(steps, ends, capsys):
    good, nothing = {"reward": -4.0, "truncated": 0.5}, {"reward": -4.8, "truncated": 0.0}
    cut = {"reward": 0.3, "truncated": 0.6}
    patience, said = rollouts.Patience(steps, -4.8, True), []
    groups = [argparse.Namespace(texts=["Well, "])]
    for step, metrics in enumerate([good, nothing, good, cut, good, nothing, cut, good]):
        try:
            patience.check(step, metrics | {"unparsed": 0.0}, groups)
        except RunError as error:
            assert step == ends and "most responses were cut" in str(error) and "'Well, '" in str(error)
            break
        said += [(step, line.split(" (")[0]) for line in capsys.readouterr().out.splitlines()]
    else:
        assert ends is None
    nothing, most = "no response earned a reward", "most responses were cut at --max-new-tokens"
    assert said == [(1, f"step 1: {nothing}"), (3, f"step 3: {most}"), (5, f"step 5: {nothing}")]


def test_rollouts_hold_what_was_said_and_rewarded(monkeypatch, folder, tmp_path):
    run_grpo(monkeypatch, folder, tmp_path / "run", "--min-spread", "-1")
    rows = list(records.read_records(tmp_path / "run" / "rollouts.jsonl", ("image", "response"), folder))
    assert len(rows) == 3 * 3 * 4
    for r in rows:
        parsed = parse_response(r["response"], r["options"])
        assert r["correct"] == is_match(parsed.prediction, r["answer"])
        unit = 0.8 * (r["rollout_scores"]["overall"] + 6) / 16 + 0.2 * r["correct"]
        assert r["rollout_reward"] == pytest.approx(unit if parsed.well_formed else 0.0, abs=2e-4)


def test_unlabelled_questions_teach_without_their_answers_and_those_of_data_are_not_taken_twice(
    monkeypatch, folder, tmp_path
):
    expert = (folder / "expert.jsonl").read_text().splitlines()
    labelled, bare = (json.loads(line) for line in expert[:2])
    # One has no answer, the other a wrong one; the third is in --data and keeps its answer there.
    other = json.loads(expert[2])
    other["answer"] = next(option for option in other["options"] if option != other["answer"])
    del bare["answer"]
    for name, rows in (("labelled", [labelled]), ("rest", [bare, other, labelled])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data", str(folder / "labelled.jsonl"), "--unlabelled", str(folder / "rest.jsonl")]
    run_grpo(monkeypatch, folder, tmp_path / "run", *files, "--min-spread", "-1")
    rows = list(records.read_records(tmp_path / "run" / "rollouts.jsonl", ("image", "response"), folder))
    # 3 steps of 3 questions: each question once per step.
    assert [sum(r["record"] == own["id"] for r in rows) for own in (labelled, bare, other)] == [12] * 3
    logged = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    for r in rows:
        assert r.get("answer") == (labelled["answer"] if r["record"] == labelled["id"] else None)
        assert (r["correct"] is None) == ("answer" not in r)
        match = r["correct"] if "answer" in r else (r["rollout_scores"]["overall"] + 6) / 16
        unit = 0.8 * (r["rollout_scores"]["overall"] + 6) / 16 + 0.2 * match
        formed = parse_response(r["response"], r["options"]).well_formed
        assert r["rollout_reward"] == pytest.approx(unit if formed else 0.0, abs=2e-4)
    for line in logged:
        own = [r["correct"] for r in rows if r["step"] == line["step"] and "answer" in r]
        assert line["match"] == pytest.approx(sum(own) / 4)
    with pytest.raises(RunError, match="leak from the training files"):
        leaky = ["--test", str(folder / "rest.jsonl"), "--data", str(folder / "val.jsonl"), *files[2:]]
        run_grpo(monkeypatch, folder, tmp_path / "leaky", *leaky)


def test_without_any_answer_a_step_has_no_match(groups):
    scored = [
        replace(g, match=[None] * len(g.texts), scores={"overall": [1.0] * len(g.texts)}) for g in groups
    ]
    scored = [replace(g, rewards=torch.zeros(len(g.texts))) for g in scored]
    assert "match" not in rollouts.reward_metrics(scored)


@pytest.mark.parametrize("process, processes", [(0, 1), (0, 2), (1, 2)])
def test_a_record_that_a_step_draws_twice_gets_other_responses(policy, groups, process, processes):
    """Eight places for six records."""
    rows = [g.record for g in groups]
    accelerator = argparse.Namespace(process_index=process, num_processes=processes)
    args = argparse.Namespace(prompts=8, seed=0, rollout_batch=2, workers=0)
    parts = next(rollouts.prefetch_batches(policy, TEXTS_ALONE, rows, 0, args, accelerator))
    drawn = [(r["id"], n) for batch in parts for r, n in zip(batch.rows, batch.copies)]
    ids = [r["id"] for r in training.shuffle([[row] for row in rows], 8, 0)(0)]
    assert drawn == [(name, ids[:i].count(name)) for i, name in enumerate(ids)][process::processes]
    batch = batch_of(policy, rows[:1] * 2)._replace(copies=[0, 1])
    first, second = grpo.sample_groups(policy, batch, 4, 24, 0)
    assert first.texts != second.texts
    alone = grpo.sample_groups(policy, batch_of(policy, rows[:1]), 8, 24, 0)[0]
    assert alone.texts == first.texts + second.texts


def test_the_frozen_reference_of_a_sharded_run_sees_the_images_that_the_policy_sees(policy, monkeypatch):
    monkeypatch.setattr(grpo.sharding, "load_frozen", loading.load)
    limited = replace(policy, pixels=(784, 1000))
    args = argparse.Namespace(shard=True, lora=None, model=str(ROOT / "toy" / "policy"))
    assert grpo.load_reference(limited, args).pixels == (784, 1000)


@pytest.mark.parametrize("process, processes", [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_each_process_measures_its_share_of_the_watched_records(policy, groups, process, processes):
    rows, asked = [g.record for g in groups][:3], []

    class Model(Texts):
        def __call__(self, texts, responses):
            asked.extend(texts)
            return {"overall": [1.0] * len(texts)}

    accelerator = argparse.Namespace(process_index=process, num_processes=processes, autocast=nullcontext)
    with pytest.MonkeyPatch.context() as patch:
        # The other processes' share is one score each.
        patch.setattr(watch, "gather_object", lambda own: own + [1.0] * (3 - len(own)))
        found = watch.measure_policy(policy, Model(), rows, 24, 2, accelerator)
    assert asked == [policy_prompt(r) for r in rows[process::processes]]
    assert found["watch_reward"] == 1.0


def test_with_two_processes_metrics_are_of_all_responses(folder, tmp_path):
    """Against means over rollouts.jsonl, which holds the responses of both; and against one process."""
    stage = f"grpo.py --model toy/policy --reward {folder}/rm --data {folder}/expert.jsonl"
    stage += f" --val {folder}/val.jsonl --steps 2 --prompts 3 --group 4 --watch-every 1 --min-spread -1"
    run_in_one_and_two(tmp_path, stage)
    one, two = ([json.loads(line) for line in open(tmp_path / f / "metrics.jsonl")] for f in ("one", "two"))
    rows = list(records.read_records(tmp_path / "two" / "rollouts.jsonl", ("image", "response"), folder))
    assert len(rows) == 2 * 3 * 4
    for line in two:
        mine = [r for r in rows if r["step"] == line["step"]]
        assert line["reward"] == pytest.approx(sum(r["rollout_reward"] for r in mine) / 12, abs=1e-4)
        assert line["match"] == pytest.approx(sum(r["correct"] for r in mine) / 12, abs=1e-6)
        assert line["unparsed"] == pytest.approx(sum(r["prediction"] is None for r in mine) / 12, abs=1e-6)
    for name in ("watch_accuracy", "watch_reward", "tokens", "length", "informative"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-6), name
    # Equal responses have rewards that differ by rounding alone, and the loss is then what rounding leaves.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-3)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=0.01) and one[0]["grad_norm"] > 0


def test_a_copy_of_the_script_beside_the_others_runs_under_its_own_name(folder, tmp_path):
    """What a fork for an ablation does."""
    for name in ("reward.py", "triton_ops.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "medgr2", tmp_path / "medgr2")
    shutil.copy(ROOT / "grpo.py", tmp_path / "my_grpo.py")
    flags = f"--model {ROOT}/toy/policy --reward {folder}/rm --data {folder}/expert.jsonl --out mine"
    command = [sys.executable, "my_grpo.py", *flags.split(), *"--steps 1 --prompts 2 --group 2".split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "mine" / "args.json").read_text())["script"] == "my_grpo.py"
