"""rsim: reinforced strategy injection. A planner chooses a strategy before each step of a reasoner's chain of thought.

``rsim.train(config)`` and ``rsim.load_config(...)`` are the Python side of the commands. Importing rsim does not load torch.
"""

from __future__ import annotations

from typing import Any

from rsim.config import Config, load_config
from rsim.errors import UserError

__all__ = ["Config", "UserError", "load_config", "train"]
__version__ = "0.1.0"


def train(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Trains as ``config`` says and returns the last held-out evaluation (see `rsim.training.trainer.train`)."""
    from rsim.training.trainer import train as run

    return run(config, resume=resume)
