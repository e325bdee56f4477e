"""Policy-gradient surrogates and normalisers as free functions on tensors and masks.

A loss is a surrogate (what is averaged) and a normaliser (how). Both agents use the same functions: an
*action* is a sampled token for the reasoner and a strategy for the planner. ``B`` episodes, ``K`` actions.

=========  =========  ==========  =====================================================
loss       surrogate  normaliser  source
=========  =========  ==========  =====================================================
grpo       clip       token       arXiv 2402.03300 eq. 3 (there normalised per sequence)
dr_grpo    clip       constant    arXiv 2503.20783
dapo       clip       token       arXiv 2503.14476 eq. 8, clips 0.2 and 0.28
gspo       gspo       sequence    arXiv 2507.18071 eq. 5, clips 3e-4 and 4e-4 (5.1)
cispo      cispo      token       arXiv 2506.13585 eq. 4
ppo        clip       token       arXiv 1707.06347 eq. 7, with GAE advantages
=========  =========  ==========  =====================================================
"""

from __future__ import annotations

import torch

PRESET_NORMALISER = {
    "grpo": "token",
    "dr_grpo": "constant",
    "dapo": "token",
    "gspo": "sequence",
    "cispo": "token",
    "ppo": "token",
}
_OWN_CLIP = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}


def clip_range(loss: str, clip_low: float, clip_high: float) -> tuple[float, float]:
    """The lower and upper clip of ``loss``; 0 means the loss's own (else 0.2, and as high as low)."""
    low, high = _OWN_CLIP.get(loss, (0.2, clip_low or 0.2))
    return clip_low or low, clip_high or high


def surrogate(
    loss: str,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of each action (to be maximised), and whether the clip cuts its gradient, ``[B, K]``;
    ignore what lies outside the mask.

    Args:
        logprobs, old_logprobs: ``[B, K]`` under the trained and the sampling policy.
        advantages: ``[B, K]`` (a scalar return's advantage broadcast over its actions).
        mask: ``[B, K]`` of 0 and 1.

    Worked example: ratio ``exp(logprob - old) = 1.5`` with advantage 1 and clip 0.2 gives 1.2 for *clip*;
    *cispo* gives ``1.2 * logprob`` with the 1.2 held constant, so the gradient does not vanish.
    """
    low, high = clip
    difference = (logprobs - old_logprobs) * mask
    if loss == "gspo":
        # One ratio per episode: the geometric mean of its actions' ratios.
        difference = (difference.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(logprobs)
    ratio = difference.exp()
    if loss == "cispo":
        return ratio.clamp(max=1 + high).detach() * advantages * logprobs, ratio > 1 + high
    cut = torch.where(advantages > 0, ratio > 1 + high, (ratio < 1 - low) & (advantages < 0))
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages), cut


def action_weights(
    normaliser: str,
    mask: torch.Tensor,
    *,
    actions: int,
    episodes: int,
    constant: float,
    joint_lengths: torch.Tensor,
) -> torch.Tensor:
    """The weight of every action, ``[B, K]``, such that the objective is ``(weights * surrogate).sum()``.

    The totals are the whole batch's, over all micro-batches and ranks, so that sums of parts equal the whole.

    Args:
        normaliser: ``token`` (mean over all actions), ``sequence`` (mean over an episode's actions, then over
            episodes), ``constant`` (divide by a fixed number) or ``paper`` (1 / (decisions + sampled tokens)
            of each episode, for both agents alike).
        mask: ``[B, K]`` of 0 and 1.
        actions: of this agent in the whole batch.
        episodes: in the whole batch.
        constant: what ``constant`` divides by, whatever was sampled.
        joint_lengths: ``[B]`` decisions + sampled tokens.

    >>> mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    >>> sizes = dict(actions=3, episodes=2, constant=4, joint_lengths=torch.tensor([10.0, 5.0]))
    >>> action_weights("sequence", mask, **sizes)
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    >>> action_weights("paper", mask, **sizes)
    tensor([[0.0500, 0.0500],
            [0.1000, 0.0000]])
    """
    if normaliser == "token":
        return mask / actions
    if normaliser == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / episodes
    if normaliser == "constant":
        return mask / constant
    if normaliser == "paper":
        return mask / joint_lengths[:, None] / episodes
    raise ValueError(f"unknown normaliser {normaliser!r}")


def kl_estimate(kind: str, logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per-action estimates of KL(policy || reference), ``[B, K]`` (joschu.net/blog/kl-approx.html).

    k1 is the log ratio, k2 half its square, k3 ``exp(-r) - 1 + r``, which is never negative. The gradient
    of a log-prob is 0 on average, so k1 takes k2's, which is that of k1 in the return (arXiv 2510.01555).
    """
    ratio = logprobs - reference
    if kind == "k3":
        return torch.exp(-ratio) - 1 + ratio
    k2 = 0.5 * ratio**2
    return k2 + (ratio - k2).detach() if kind == "k1" else k2


def truncated_importance(
    trainer: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, cap: float, level: str
) -> torch.Tensor:
    """``min(exp(trainer - sampler), cap)``, held constant: for a sampler whose numerics differ. Of each
    action ``[B, K]`` or, where ``level`` is *sequence*, of an episode's actions together ``[B, 1]``."""
    difference = (trainer - sampler) * mask
    if level == "sequence":
        difference = difference.sum(1, keepdim=True)
    return difference.exp().clamp(max=cap).detach()
