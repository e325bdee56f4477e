"""The joint objective: J = lambda * J_planner + (1 - lambda) * J_reasoner."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rsim.config import ObjectiveConfig
from rsim.objective.losses import clip_range, kl_estimate, surrogate, truncated_importance


@dataclass
class Evaluated:
    """What the current weights say of recorded actions, ``[B, K]``."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None = None
    reference: torch.Tensor | None = None


def agent_objective(
    now: Evaluated,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    config: ObjectiveConfig,
    *,
    entropy_bonus: float = 0.0,
    beta: float = 0.0,
    value_targets: torch.Tensor | None = None,
    sampler_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One agent's objective on a (micro-)batch, to be maximised, and sums for the metrics.

    ``J = sum w * (surrogate - beta * KL + bonus * entropy - value_coefficient * (V - target)^2)`` with
    the weights of `rsim.objective.losses.action_weights`.

    Args:
        old_logprobs: ``[B, K]`` under the weights that the batch was taken with.
        sampler_logprobs: ``[B, K]`` as the engine reported them, for the truncated importance correction.
    """
    clip = clip_range(config.loss, config.clip_low, config.clip_high)
    gain, clipped = surrogate(config.loss, now.logprobs, old_logprobs, advantages, mask, clip)
    if config.importance_cap > 0 and sampler_logprobs is not None:
        cap, level = config.importance_cap, config.importance_level
        gain = gain * truncated_importance(old_logprobs, sampler_logprobs, mask, cap, level)
    sums = {
        "clipped": (clipped * mask).sum().detach(),
        "entropy": (now.entropy * mask).sum().detach(),
        "actions": mask.sum(),
    }
    if beta > 0 and now.reference is not None:
        kl = kl_estimate(config.kl, now.logprobs, now.reference)
        gain = gain - beta * kl
        sums["kl"] = (kl * mask).sum().detach()
    if entropy_bonus > 0:
        gain = gain + entropy_bonus * now.entropy
    objective = (weights * gain).sum()
    if now.values is not None and value_targets is not None:
        error = (weights * (now.values - value_targets) ** 2).sum()
        objective = objective - config.value_coefficient * error
        sums["value_loss"] = error.detach()
    return objective, sums


def lambda_factors(agent: str, lam: float, mode: str, *, alone: bool) -> tuple[float, float]:
    """The factors on an agent's objective and on its learning rate.

    Mode ``loss`` is the literal form. Adam and per-agent gradient clipping cancel a constant factor on a
    loss, so in mode ``lr`` lambda scales rates. A reasoner trained without planner is left as it is.

    >>> lambda_factors("planner", 0.75, "lr", alone=False)
    (1.0, 1.5)
    """
    share = lam if agent == "planner" else 1 - lam
    if alone:
        return 1.0, 1.0
    return (1.0, 2 * share) if mode == "lr" else (share, 1.0)
