"""A trained planner over another strategy set: what it knows is kept, what is new begins where nothing changes, or is lifted
so that training tries it."""

from __future__ import annotations

import math

import torch

from rsim.errors import UserError
from rsim.game.episode import Episode
from rsim.models.adapters import base_of
from rsim.policies.planner import Planner
from rsim.policies.strategies import StrategySet


@torch.no_grad()
def adapted(planner: Planner, strategies: StrategySet) -> Planner:
    """``planner`` over ``strategies``, in place: its head's rows are kept by name, those of dropped strategies go.

    A new strategy's row is the mean of the known ones: its logit is the mean logit, so that the planner's greedy choice stays
    what it was, while sampling tries the new strategy from the start. Ratios of the known ones' probabilities do not change.

    Raises:
        UserError: the sets have nothing in common.
    """
    old = planner.strategies
    kept = [old.index(name) for name in strategies.names if name in old.names]
    if len(kept) < 2:
        raise UserError("the new set has fewer than two of the planner's strategies", f"it knows {', '.join(old.names)}")
    rows = planner.model.score.weight
    mean = rows[kept].mean(0)
    new = torch.stack([rows[old.index(name)] if name in old.names else mean for name in strategies.names])
    head = torch.nn.Linear(new.shape[1], new.shape[0], bias=False, device=new.device, dtype=new.dtype)
    head.weight.copy_(new)
    planner.model.score = head
    planner.model.num_labels = len(strategies)
    names = dict(enumerate(strategies.names))
    planner.model.config.id2label = names
    planner.model.config.label2id = {name: i for i, name in names.items()}
    planner.strategies = strategies
    return planner


@torch.no_grad()
def lift(planner: Planner, name: str, episodes: list[Episode], share: float = 0.1) -> None:
    """Sets the row of strategy ``name`` so that its mean probability is ``share`` where the planner decided in ``episodes``.

    A planner that is sure gives a new row no chance, and policy gradients of what is never sampled are zero. The row is the
    ridge regression, over the final hidden states, of the log-sum-exp of the other logits (as near as it comes to the same
    odds everywhere), moved along the regression of a constant until the mean is met. The other rows, and so the ratios of
    their probabilities, stay.

    Args:
        episodes: played by this planner over any set; only their ids and the places of their decisions are read.
    """
    hidden = planner.states([(e.planner_ids, [d.position for d in e.decisions]) for e in episodes]).double()
    own = planner.strategies.index(name)
    logits = hidden @ planner.model.score.weight.double().T
    logits[:, own] = -math.inf
    others = logits.logsumexp(-1)
    gram = hidden.T @ hidden
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    targets = torch.stack([others, torch.ones_like(others)], 1)
    row, constant = torch.linalg.solve(gram + ridge, hidden.T @ targets).T
    low, high = -100.0, 100.0
    for _ in range(50):
        shift = (low + high) / 2
        too_high = torch.sigmoid(hidden @ (row + shift * constant) - others).mean() > share
        low, high = (low, shift) if too_high else (shift, high)
    planner.model.score.weight[own] = (row + shift * constant).to(planner.model.score.weight.dtype)


def load(folder: str) -> Planner:
    """A planner to be adapted, on the CPU.

    Raises:
        UserError: it is an adapter, whose folder does not hold the weights that would have to change.
    """
    if base_of(folder) is not None:
        raise UserError(f"{folder} is an adapter", "merge it first: rsim push RUN NAME --to FOLDER writes an ordinary planner")
    return Planner.from_pretrained(folder)
