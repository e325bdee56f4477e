"""Rotary factors that depend on how long a text is (longrope), in packed passes.

Such a model has two sets of factors, for texts within the range of its first training and for longer ones, and transformers
takes one for a whole pass, by the longest position in it: an answer would depend on its neighbours. Here each sequence goes
by its own length, as by itself in `generate`: up to the range it has the short ones, and once it outgrows it the whole is
read again by the long ones. So each token is predicted as the model's plain forward pass over what lies before it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from rsim.models.shape import first_range


@contextmanager
def factors(model: PreTrainedModel, long: torch.Tensor | None) -> Iterator[None]:
    """Passes of ``model`` in which the tokens ``long [N]`` (bool) are read by the long factors, and no other; None: as
    transformers has it."""
    if long is None or first_range(model.config) is None:
        yield
        return
    modules = [m for m in model.modules() if "longrope" in str(getattr(m, "rope_type", ""))]
    for module in modules:
        kind: Any = type(module)
        module.__class__ = kind if issubclass(kind, _BySequence) else _by_sequence(kind)
        module.long = long[None]
    try:
        yield
    finally:
        for module in modules:
            module.long = None


class _BySequence:
    """A family's own module; ``long [1, N]``: which tokens are of long sequences."""

    long: torch.Tensor | None = None


@cache
def _by_sequence(kind: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **how: Any) -> Any:
        if self.long is None:
            return kind.forward(self, x, position_ids, *args, **how)
        beyond = position_ids.new_full((1, 1), first_range(self.config) or 0)
        short = kind.forward(self, x, position_ids.masked_fill(self.long, 0), *args, **how)
        far = kind.forward(self, x, torch.cat([position_ids, beyond], 1), *args, **how)
        picked = [torch.where(self.long[..., None], f[:, :-1], s) for f, s in zip(far, short, strict=True)]
        return tuple(picked)

    return type(kind.__name__, (_BySequence, kind), {"forward": forward})
