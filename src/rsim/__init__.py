"""rsim: reinforced strategy injection. A planner chooses a strategy before each step of a reasoner's chain of thought.

``rsim.train(config)`` and ``rsim.load_config(...)`` are the Python side of the commands, ``rsim.Planner`` is a
trained planner for any LLM. Importing rsim loads nothing: what is asked for is imported then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rsim.errors import UserError

if TYPE_CHECKING:
    from rsim.config import Config, load_config
    from rsim.policies.planner import Planner

__all__ = ["Config", "Planner", "UserError", "load_config", "train"]
__version__ = "0.1.0"


_LATER = {"Config": "rsim.config", "load_config": "rsim.config", "Planner": "rsim.policies.planner"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'rsim' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def train(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Trains as ``config`` says and returns the last held-out evaluation (see `rsim.training.trainer.train`)."""
    from rsim.training.trainer import train as run

    return run(config, resume=resume)
