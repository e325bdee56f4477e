"""Rewards of the user's own, from Python files."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from pathlib import Path
from typing import SupportsFloat

from rsim.errors import UserError
from rsim.game.episode import Episode
from rsim.rewards.rewards import PARTS, RewardFunction


def load_custom(specs: tuple[str, ...]) -> dict[str, RewardFunction]:
    """Functions named ``path/to/file.py:function``, by function name. Several threads may call them at once.

    Raises:
        UserError: the file or the function is not there, or its name is taken.
    """
    functions: dict[str, RewardFunction] = {}
    for spec in specs:
        file, sep, name = spec.rpartition(":")
        if not sep or not Path(file).is_file():
            raise UserError(f"reward {spec!r}", "write file.py:function, with a file that exists")
        module_spec = importlib.util.spec_from_file_location(f"rsim_reward_{len(functions)}", file)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        function = vars(module).get(name)
        if not callable(function):
            raise UserError(f"reward {spec!r}", f"{file} has no function {name!r}")
        if name in functions or name in PARTS:
            raise UserError(f"reward {spec!r}", f"{name!r} is taken: give the function another name")
        functions[name] = partial(_checked, spec, function)
    return functions


def _checked(spec: str, function: RewardFunction, episode: Episode) -> float:
    """A reward that is no finite number would make every weight NaN."""
    reward = function(episode)
    if not isinstance(reward, SupportsFloat) or not math.isfinite(reward):
        remedy = "it must return a finite number for every episode"
        raise UserError(f"reward {spec!r} returned {reward!r}", remedy)
    return float(reward)
