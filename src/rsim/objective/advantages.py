"""Group-relative advantages (GRPO, arXiv 2402.03300, 4.1.2) and GAE (arXiv 1506.02438, eq. 16)."""

from __future__ import annotations

import torch


def group_advantages(
    returns: torch.Tensor,
    groups: torch.Tensor,
    *,
    scale_by_std: bool = False,
    eps: float = 1e-4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres each return in its group.

    Args:
        returns: ``[B]``, one scalar per episode.
        groups: ``[B]`` integers; episodes with the same number answer the same question.
        scale_by_std: also divide by the group's sample deviation plus ``eps``. Off by default: it would blow
            a difference of 0.05 of shaping up to the size of a right answer.

    Returns:
        advantages ``[B]`` and ``informative`` ``[B]`` (bool): False where the group's returns are all alike,
        to 1e-6, so that the surrogate has nothing to say of the episode.

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    (tensor([ 0.5000, -0.5000,  0.0000,  0.0000]), tensor([ True,  True, False, False]))
    """
    index = torch.unique(groups, return_inverse=True)[1]
    count = torch.bincount(index).to(returns.dtype)
    mean = torch.zeros_like(count).index_add_(0, index, returns) / count
    centred = returns - mean[index]
    most, least = (
        torch.zeros_like(count).scatter_reduce_(0, index, returns, end, include_self=False)
        for end in ("amax", "amin")
    )
    informative = (most - least > 1e-6 * torch.maximum(most.abs(), least.abs()).clamp(min=1))[index]
    if scale_by_std:
        squares = torch.zeros_like(count).index_add_(0, index, centred**2)
        deviation = (squares / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (deviation[index] + eps)
    return torch.where(informative, centred, torch.zeros_like(centred)), informative


def gae(returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, lam: float) -> torch.Tensor:
    """Generalised advantage estimates with discount 1 and the whole reward at the last action.

    Args:
        returns: ``[B]``.
        values: ``[B, K]`` predicted before each action.
        mask: ``[B, K]``, 1 on actions; each row's actions come first.
        lam: the trade-off between bias (0) and variance (1).

    Returns:
        ``[B, K]``, zero where the mask is.
    """
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(returns)  # value after the action
    running = torch.zeros_like(returns)
    last = mask.sum(1) - 1
    for k in reversed(range(values.shape[1])):
        reward = torch.where(last == k, returns, torch.zeros_like(returns))
        running = (reward + following - values[:, k] + lam * running) * mask[:, k]
        advantages[:, k] = running
        following = values[:, k] * mask[:, k]
    return advantages
