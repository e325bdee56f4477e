"""Losses, normalisers, KL and advantages against loops over plain Python floats, written from the equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsim.config import ObjectiveConfig
from rsim.objective.advantages import gae, group_advantages
from rsim.objective.joint import Evaluated, agent_objective, learning_rate_factor, objective_factor, usage_pull
from rsim.objective.losses import action_weights, clip_range

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "ppo")
NORMALISERS = ("token", "sequence", "constant", "paper")
LENGTHS = [5, 1, 3, 4]  # actions of each episode
JOINT = [9.0, 3.0, 6.0, 7.0]
CONSTANT = 8


def case(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.zeros(shape, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    logprobs = (-1 + noise(0.4)).requires_grad_()
    return {
        "logprobs": logprobs, "old": logprobs.detach() + noise(0.4), "advantages": noise(1.0), "mask": mask,
        "entropy": noise(1.0).abs(), "reference": logprobs.detach() + noise(0.5),
    }  # fmt: skip


def reference(loss: str, normaliser: str, c: dict[str, torch.Tensor], kl: str, beta: float, bonus: float):
    """Value and gradient with respect to the log-probs, one action at a time, derivatives by hand."""
    low, high = 0.2, 0.28 if loss == "dapo" else 0.2
    value, gradient = 0.0, torch.zeros_like(c["logprobs"])
    total = sum(LENGTHS)
    for b, length in enumerate(LENGTHS):
        lp, old, ref = (c[k][b].tolist() for k in ("logprobs", "old", "reference"))
        adv, entropy = c["advantages"][b].tolist(), c["entropy"][b].tolist()
        mean_difference = sum(lp[k] - old[k] for k in range(length)) / length
        for k in range(length):
            weight = {
                "token": 1 / total,
                "sequence": 1 / length / len(LENGTHS),
                "constant": 1 / CONSTANT / len(LENGTHS),
                "paper": 1 / JOINT[b] / len(LENGTHS),
            }[normaliser]
            ratio = math.exp(mean_difference if loss == "gspo" else lp[k] - old[k])
            if loss == "cispo":
                capped = min(ratio, 1 + high)
                value += weight * capped * adv[k] * lp[k]
                gradient[b, k] += weight * capped * adv[k]
            else:
                clipped = min(max(ratio, 1 - low), 1 + high)
                value += weight * min(ratio * adv[k], clipped * adv[k])
                if ratio * adv[k] <= clipped * adv[k]:
                    touched = range(length) if loss == "gspo" else [k]
                    for j in touched:
                        gradient[b, j] += weight * adv[k] * ratio / (length if loss == "gspo" else 1)
            r = lp[k] - ref[k]
            value -= weight * beta * {"k1": r, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}[kl]
            gradient[b, k] -= weight * beta * {"k1": 1.0, "k2": r, "k3": 1 - math.exp(-r)}[kl]
            value += weight * bonus * entropy[k]
    return value, gradient


@pytest.mark.parametrize(("loss", "normaliser"), itertools.product(LOSSES, NORMALISERS))
@pytest.mark.parametrize(("kl", "beta", "bonus"), [("k3", 0.0, 0.0), ("k1", 0.1, 0.0), ("k2", 0.1, 0.02), ("k3", 0.1, 0.02)])
def test_objective_equals_the_reference(loss, normaliser, kl, beta, bonus):
    for seed in range(3):
        c = case(seed)
        sizes = {"actions": sum(LENGTHS), "episodes": len(LENGTHS), "constant": CONSTANT}
        weights = action_weights(normaliser, c["mask"], **sizes, joint_lengths=torch.tensor(JOINT, dtype=torch.float64))
        value, _ = agent_objective(
            Evaluated(c["logprobs"], c["entropy"], reference=c["reference"]), c["old"], c["advantages"], c["mask"], weights,
            ObjectiveConfig(loss=loss, kl=kl), entropy_bonus=bonus, beta=beta,
        )  # fmt: skip
        value.backward()
        expected, gradient = reference(loss, normaliser, c, kl, beta, bonus)
        assert value.item() == pytest.approx(expected, abs=1e-12)
        assert torch.allclose(c["logprobs"].grad, gradient, atol=1e-12)
        assert (c["logprobs"].grad[c["mask"] == 0] == 0).all(), "padding must have exactly zero gradient"


def test_the_clip_acts_in_the_reference_cases():
    c = case(0)
    _, sums = agent_objective(
        Evaluated(c["logprobs"], c["entropy"]), c["old"], c["advantages"], c["mask"], c["mask"], ObjectiveConfig()
    )
    assert 0 < float(sums["clipped"]) < sum(LENGTHS)


def test_dapo_clips_higher_unless_told_otherwise():
    assert clip_range("dapo", 0.2, 0.0) == (0.2, 0.28)
    assert clip_range("dapo", 0.2, 0.4) == (0.2, 0.4)
    assert clip_range("grpo", 0.1, 0.0) == (0.1, 0.1)


def test_ppo_value_loss_and_gae():
    """Worked by hand: two actions, values 0.5 and 0.25, return 1, lambda 0.95."""
    values = torch.tensor([[0.5, 0.25, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    last = 1 - 0.25
    first = (0.25 - 0.5) + 0.95 * last
    advantages = gae(torch.tensor([1.0], dtype=torch.float64), values, mask, 0.95)
    assert advantages.tolist()[0] == pytest.approx([first, last, 0.0])


@given(st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=6), min_size=1, max_size=5), st.booleans())
@settings(deadline=None, max_examples=60)
def test_group_advantages(groups, scale):
    returns = torch.tensor([r for g in groups for r in g], dtype=torch.float64)
    index = torch.tensor([10 + i for i, g in enumerate(groups) for _ in g])
    advantages, informative = group_advantages(returns, index, scale_by_std=scale)
    place = 0
    for group in groups:
        mean = sum(group) / len(group)
        spread = max(abs(r - mean) for r in group)
        scatter = math.sqrt(sum((r - mean) ** 2 for r in group) / max(len(group) - 1, 1))
        for r in group:
            if abs(spread - 1e-6) > 1e-9:
                assert bool(informative[place]) == (spread > 1e-6)
            if informative[place]:
                expected = (r - mean) / (scatter + 1e-4) if scale else r - mean
                assert float(advantages[place]) == pytest.approx(expected, abs=1e-9)
            else:
                assert float(advantages[place]) == 0
            place += 1


def test_lambda_factors():
    assert learning_rate_factor("planner", 0.7, "lr", alone=False) == pytest.approx(1.4)
    assert learning_rate_factor("reasoner", 0.7, "lr", alone=False) == pytest.approx(0.6)
    assert objective_factor("planner", 0.7, "lr", alone=False) == 1
    assert learning_rate_factor("planner", 0.7, "loss", alone=False) == 1
    assert objective_factor("reasoner", 0.7, "loss", alone=False) == pytest.approx(0.3)
    for mode in ("lr", "loss"):
        assert (
            learning_rate_factor("reasoner", 0.7, mode, alone=True) == objective_factor("reasoner", 0.7, mode, alone=True) == 1
        )


def test_the_usage_pull_has_the_gradient_of_how_far_even_use_is_from_the_mean_policy():
    """Against autograd through the mean itself; a strategy that is hardly ever used is pulled up the most."""
    torch.manual_seed(0)
    logits = torch.randn(6, 9, dtype=torch.float64)
    logits[:, 4] -= 4
    logits.requires_grad_(True)
    policies = torch.softmax(logits, -1)
    mean = policies.mean(0)
    (expected,) = torch.autograd.grad(-0.3 * (1 / 9 * (1 / 9 / mean).log()).sum(), logits)
    (found,) = torch.autograd.grad(usage_pull(torch.softmax(logits, -1), mean.detach(), 0.3).mean(), logits)
    assert torch.allclose(found, expected, atol=1e-12)
    assert found.sum(0).argmax() == 4


def test_the_pull_fades_for_what_is_almost_never_used():
    """At a state's policy of a thousandth and less, no pull is stronger than that of a thousandth."""
    pulls = []
    for rare in (1e-2, 1e-3, 1e-5):
        logits = torch.tensor([[0.0, math.log(rare)]], dtype=torch.float64, requires_grad=True)
        policy = torch.softmax(logits, -1)
        (gradient,) = torch.autograd.grad(usage_pull(policy, policy.detach()[0], 1.0).sum(), logits)
        pulls.append(float(gradient[0, 1]))
    assert pulls[0] == pytest.approx(0.5, abs=0.02)
    assert pulls[1] == pytest.approx(0.5, abs=0.02)
    assert pulls[2] == pytest.approx(0.005, abs=0.001)


def test_even_use_is_not_pulled_at():
    logits = torch.zeros(5, 3, requires_grad=True)
    pull = usage_pull(torch.softmax(logits, -1), torch.full((3,), 1 / 3), 1.0)
    (gradient,) = torch.autograd.grad(pull.sum(), logits)
    assert gradient.abs().max() < 1e-6
