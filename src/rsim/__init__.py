"""rsim: reinforced strategy injection. A planner chooses a strategy before each step of a reasoner's chain of thought.

`train`, `evaluate`, `solve`, `compare`, `collect`, `fit`, `report`, `push` and `check` are the Python side of the commands;
`Planner` is a trained planner for any LLM. Importing rsim loads nothing: what is asked for is imported then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rsim.api import check, collect, evaluate, fit, push, report, solve, train
    from rsim.config import Config, load_config
    from rsim.errors import UserError
    from rsim.evaluation.compare import compare
    from rsim.game.episode import Episode
    from rsim.game.problem import Problem
    from rsim.policies.planner import Planner
    from rsim.policies.strategies import Strategy, StrategySet
    from rsim.rewards.custom import Reward
    from rsim.rules import PlayRules

__all__ = [
    "Config",
    "Episode",
    "Planner",
    "PlayRules",
    "Problem",
    "Reward",
    "Strategy",
    "StrategySet",
    "UserError",
    "check",
    "collect",
    "compare",
    "evaluate",
    "fit",
    "load_config",
    "push",
    "report",
    "solve",
    "train",
]
__version__ = "0.1.0"

if not TYPE_CHECKING:  # so that a type checker knows the names above and no others
    _OTHERS = {
        "rsim.config": ("Config", "load_config"),
        "rsim.errors": ("UserError",),
        "rsim.evaluation.compare": ("compare",),
        "rsim.game.episode": ("Episode",),
        "rsim.game.problem": ("Problem",),
        "rsim.policies.planner": ("Planner",),
        "rsim.policies.strategies": ("Strategy", "StrategySet"),
        "rsim.rewards.custom": ("Reward",),
        "rsim.rules": ("PlayRules",),
    }

    def __getattr__(name):
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module 'rsim' has no attribute {name!r}")
        module = next((module for module, names in _OTHERS.items() if name in names), "rsim.api")
        return getattr(import_module(module), name)

    def __dir__():
        return [*globals(), *__all__]
