"""A trained planner over another strategy set: what it knows is kept, what is new begins where nothing changes."""

from __future__ import annotations

import torch

from rsim.adapters import base_of
from rsim.errors import UserError
from rsim.planner.planner import Planner
from rsim.strategies import StrategySet


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


def load(folder: str) -> Planner:
    """A planner to be adapted, on the CPU.

    Raises:
        UserError: it is an adapter, whose folder does not hold the weights that would have to change.
    """
    if base_of(folder) is not None:
        raise UserError(f"{folder} is an adapter", "merge it first: rsim push RUN NAME --to FOLDER writes an ordinary planner")
    return Planner.from_pretrained(folder)
