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
from rsim.objective.joint import Evaluated, agent_objective, lambda_factors
from rsim.objective.losses import action_weights, clip_range, kl_estimate, surrogate, truncated_importance

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "ppo")
NORMALISERS = ("token", "sequence", "constant", "paper")
LENGTHS = [5, 1, 3, 4]  # actions of each episode
JOINT = [9.0, 3.0, 6.0, 7.0]
CONSTANT = 8
PLAYED = 6  # episodes, two of which are not trained on
CLIPS = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # else 0.2 on both sides


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
    """Value, gradient with respect to the log-probs and clipped actions, one action at a time, derivatives by hand."""
    low, high = CLIPS.get(loss, (0.2, 0.2))
    value, gradient, cut = 0.0, torch.zeros_like(c["logprobs"]), 0
    total = sum(LENGTHS)
    for b, length in enumerate(LENGTHS):
        lp, old, ref = (c[k][b].tolist() for k in ("logprobs", "old", "reference"))
        adv, entropy = c["advantages"][b].tolist(), c["entropy"][b].tolist()
        mean_difference = sum(lp[k] - old[k] for k in range(length)) / length
        for k in range(length):
            weight = {
                "token": 1 / total,
                "sequence": 1 / length / len(LENGTHS),
                "constant": 1 / CONSTANT / PLAYED,
                "paper": 1 / JOINT[b] / len(LENGTHS),
            }[normaliser]
            ratio = math.exp(mean_difference if loss == "gspo" else lp[k] - old[k])
            if loss == "cispo":
                capped = min(ratio, 1 + high)
                value += weight * capped * adv[k] * lp[k]
                gradient[b, k] += weight * capped * adv[k]
                cut += ratio > 1 + high
            else:
                clipped = min(max(ratio, 1 - low), 1 + high)
                value += weight * min(ratio * adv[k], clipped * adv[k])
                if ratio * adv[k] <= clipped * adv[k]:
                    touched = range(length) if loss == "gspo" else [k]
                    for j in touched:
                        gradient[b, j] += weight * adv[k] * ratio / (length if loss == "gspo" else 1)
                else:
                    cut += 1
            r = lp[k] - ref[k]
            value -= weight * beta * {"k1": r, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}[kl]
            gradient[b, k] -= weight * beta * {"k1": r, "k2": r, "k3": 1 - math.exp(-r)}[kl]
            value += weight * bonus * entropy[k]
    return value, gradient, cut


@pytest.mark.parametrize(("loss", "normaliser"), itertools.product(LOSSES, NORMALISERS))
@pytest.mark.parametrize(("kl", "beta", "bonus"), [("k3", 0.0, 0.0), ("k1", 0.1, 0.0), ("k2", 0.1, 0.02), ("k3", 0.1, 0.02)])
def test_objective_equals_the_reference(loss, normaliser, kl, beta, bonus):
    for seed in range(3):
        c = case(seed)
        sizes = {"actions": sum(LENGTHS), "episodes": len(LENGTHS), "constant": CONSTANT * PLAYED}
        weights = action_weights(normaliser, c["mask"], **sizes, joint_lengths=torch.tensor(JOINT, dtype=torch.float64))
        value, sums = agent_objective(
            Evaluated(c["logprobs"], c["entropy"], reference=c["reference"]), c["old"], c["advantages"], c["mask"], weights,
            ObjectiveConfig(loss=loss, kl=kl), entropy_bonus=bonus, beta=beta,
        )  # fmt: skip
        value.backward()
        expected, gradient, cut = reference(loss, normaliser, c, kl, beta, bonus)
        assert value.item() == pytest.approx(expected, abs=1e-12)
        assert torch.allclose(c["logprobs"].grad, gradient, atol=1e-12)
        assert (c["logprobs"].grad[c["mask"] == 0] == 0).all(), "padding must have exactly zero gradient"
        assert float(sums["clipped"]) == cut > 0


def test_each_loss_clips_as_published_unless_told_otherwise():
    for loss in LOSSES:
        assert clip_range(loss, 0.0, 0.0) == CLIPS.get(loss, (0.2, 0.2))
        assert clip_range(loss, 0.1, 0.4) == (0.1, 0.4)
    assert clip_range("dapo", 0.1, 0.0) == (0.1, 0.28)
    assert clip_range("grpo", 0.1, 0.0) == (0.1, 0.1)


@pytest.mark.parametrize("kind", ["k1", "k2"])
def test_a_kl_terms_gradient_is_that_of_the_kl_itself(kind):
    """Averaged over all actions with their probabilities; k1 differentiated as it stands would give nothing at all."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    frozen = torch.log_softmax(torch.randn(7, dtype=torch.float64), -1)
    logprobs = torch.log_softmax(logits, -1)
    kl = (logprobs.exp() * (logprobs - frozen)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    estimates = kl_estimate(kind, logprobs, frozen)
    (found,) = torch.autograd.grad((logprobs.exp().detach() * estimates).sum(), logits)
    assert torch.allclose(found, expected, atol=1e-12)
    if kind == "k1":
        assert float((logprobs.exp() * estimates).sum()) == pytest.approx(float(kl)), "and it is logged as what it is"


def test_truncated_importance_of_actions_and_of_sequences():
    """By hand: the trainer's probabilities over the sampler's, each action's or their product, at most the cap."""
    trainer = torch.log(torch.tensor([[0.5, 0.9, 0.1], [0.8, 0.6, 0.1]], dtype=torch.float64))
    sampler = torch.log(torch.tensor([[0.25, 0.6, 0.9], [0.4, 0.8, 0.9]], dtype=torch.float64))
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    tokens = truncated_importance(trainer, sampler, mask, 1.8, "token")
    assert tokens[:, :2].tolist() == [pytest.approx([1.8, 1.5]), pytest.approx([1.8, 0.75])]
    assert truncated_importance(trainer, sampler, mask, 1.8, "sequence").tolist() == [
        [pytest.approx(1.8)],
        [pytest.approx(1.5)],
    ]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", ["grpo", "cispo"])
def test_the_importance_correction_weighs_the_surrogate_alone(loss, level):
    """Of the trainer to the sampler, not the other way round; KL and entropy are averages under the trainer's own policy."""
    c = case(1)
    sampler = c["old"] + 0.3 * torch.sin(torch.arange(20.0, dtype=torch.float64)).reshape(4, 5)
    weights = c["mask"] / sum(LENGTHS)

    def gradient(cap: float, beta: float) -> torch.Tensor:
        c["logprobs"].grad = None
        now = Evaluated(c["logprobs"], c["entropy"], reference=c["reference"])
        config = ObjectiveConfig(loss=loss, importance_cap=cap, importance_level=level)
        agent_objective(
            now, c["old"], c["advantages"], c["mask"], weights, config, beta=beta, sampler_logprobs=sampler
        )[0].backward()  # fmt: skip
        return c["logprobs"].grad.clone()

    plain, kl = gradient(0.0, 0.0), gradient(0.0, 0.1) - gradient(0.0, 0.0)
    factors = ((c["old"] - sampler) * c["mask"]).detach()
    factors = (factors.sum(1, keepdim=True).expand_as(factors) if level == "sequence" else factors).exp().clamp(max=1.2)
    assert (factors == 1.2).any()
    assert (factors[c["mask"] == 1] < 1).any()
    assert torch.allclose(gradient(1.2, 0.1), plain * factors + kl, atol=1e-12)


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
        spread = max(group) - min(group)
        alike = 1e-6 * max(1.0, *map(abs, group))
        scatter = math.sqrt(sum((r - mean) ** 2 for r in group) / max(len(group) - 1, 1))
        for r in group:
            if abs(spread - alike) > 1e-9:
                assert bool(informative[place]) == (spread > alike)
            if informative[place]:
                expected = (r - mean) / (scatter + 1e-4) if scale else r - mean
                assert float(advantages[place]) == pytest.approx(expected, abs=1e-9)
            else:
                assert float(advantages[place]) == 0
            place += 1


def test_equal_returns_are_alike_whatever_their_size():
    """The mean of eight times 1000.1 in float32 is another number."""
    for value in (1000.1, -0.3, 1e-3):
        advantages, informative = group_advantages(torch.full((8,), value), torch.zeros(8, dtype=torch.int64))
        assert not informative.any()
        assert not advantages.any()
    assert group_advantages(torch.tensor([1000.1, 1000.2]), torch.zeros(2, dtype=torch.int64))[1].all()


def test_lambda_factors():
    """On the objective and on the learning rate."""
    assert lambda_factors("planner", 0.7, "lr", alone=False) == pytest.approx((1.0, 1.4))
    assert lambda_factors("reasoner", 0.7, "lr", alone=False) == pytest.approx((1.0, 0.6))
    assert lambda_factors("planner", 0.7, "loss", alone=False) == pytest.approx((0.7, 1.0))
    assert lambda_factors("reasoner", 0.7, "loss", alone=False) == pytest.approx((0.3, 1.0))
    for mode in ("lr", "loss"):
        assert lambda_factors("reasoner", 0.7, mode, alone=True) == (1, 1)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "ppo"])
def test_the_clip_cuts_only_what_would_go_further_out(loss):
    """A good action that has become likely, a bad one that has become rare; small advantages are no others."""
    logprobs = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    advantages = torch.tensor([[0.5, 0.5, -0.5, -0.5]])
    gain, cut = surrogate(loss, logprobs, torch.zeros(1, 4), advantages, torch.ones(1, 4), (0.2, 0.2))
    assert cut.tolist() == [[True, False, False, True]]
    assert gain.tolist() == [pytest.approx([0.6, 0.25, -0.75, -0.4])]


def test_no_entropy_bonus_and_no_reference_unless_asked():
    config, ones = ObjectiveConfig(), torch.ones(1, 2)
    now = Evaluated(torch.full((1, 2), -1.0), torch.full((1, 2), 3.0), None, None)
    objective, _ = agent_objective(now, now.logprobs, ones, ones, ones, config)
    assert objective.item() == pytest.approx(2.0), "ratio 1, advantage 1, two actions"
