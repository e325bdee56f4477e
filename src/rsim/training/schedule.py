"""How learning rates rise and fall over a run: by config and step alone, so that resuming needs no state."""

from __future__ import annotations

import math

from rsim.config import Config


def rate_factor(config: Config, step: int) -> float:
    """The factor on every learning rate at ``step`` (from 0): up to 1 in ``train.warmup`` steps, then as
    ``train.schedule`` says down to 0 behind the last of ``config.total_steps``.

    *linear* falls evenly, *cosine* along half a wave (arXiv 1608.03983 eq. 5, without restarts). A token
    budget that ends the run sooner cuts the schedule off.
    """
    train = config.train
    if step < train.warmup:
        return (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, config.total_steps - train.warmup)
    if train.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1.0
