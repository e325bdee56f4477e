"""Rewards of the user's own: functions given in Python, or in files that a config names."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, SupportsFloat, cast

from rsim.errors import UserError
from rsim.game.episode import Episode

Agents = Literal["both", "planner", "reasoner"]
RewardFunction = Callable[[Episode], float]
# Of a reward, beside functions of the user's own.
PARTS = ("accuracy", "format", "follow", "terminal", "penalty")
_SPEC = re.compile(r"(?P<file>.+):(?P<name>\w+)(?:@(?P<agent>planner|reasoner))?(?:\*(?P<weight>[-+.\de]+))?")
_WRITE = "write file.py:function, or file.py:function@planner*0.5 for one agent and with a weight"


@dataclass(frozen=True)
class Reward:
    """``weight`` times what ``function`` returns for an `Episode` is added to the return of ``agent``.

    The part is logged under the function's name, as ``reward/NAME``. Several threads may call it at once.

    Raises:
        UserError: it cannot be called with an episode, or the weight is not finite; when called, the function
            fails or returns anything but a finite number.
    """

    function: RewardFunction
    agent: Agents = "both"
    weight: float = 1.0
    file: str = "python"  # that it came from, if it came from one
    named: str = ""  # there

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.agent not in ("both", "planner", "reasoner"):
            raise UserError(
                f"reward {self.spec!r}", "its weight is a finite number, its agent both, planner or reasoner"
            )

        try:
            inspect.signature(self.function).bind(None)
        except TypeError as error:
            raise UserError(f"reward {self.spec!r}", "must be a function of one rsim.Episode") from error
        except ValueError:
            return  # one of C's says nothing of its arguments

    @property
    def name(self) -> str:
        return self.named or str(getattr(self.function, "__name__", type(self.function).__name__))

    @property
    def spec(self) -> str:
        """How a config names it."""
        weight = "" if self.weight == 1 else f"*{self.weight:g}"
        return f"{self.file}:{self.name}{'' if self.agent == 'both' else f'@{self.agent}'}{weight}"

    def __call__(self, episode: Episode) -> float:
        try:
            reward = self.function(episode)  # one that is no finite number would make every weight NaN
        except Exception as error:
            own = traceback.extract_tb(error.__traceback__)[:2][-1]  # the function, not a library it calls
            problem = f"reward {self.spec!r} failed: {type(error).__name__}: {error}"
            raise UserError(problem, f"{own.filename}, line {own.lineno}") from error
        try:  # float() refuses an array of several numbers, and an integer that is too large
            number = float(reward) if isinstance(reward, SupportsFloat) else math.nan
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"reward {self.spec!r} returned {reward!r}",
                "it must return a finite number for every episode",
            )
        return self.weight * number


def load_custom(specs: Sequence[str], given: Sequence[Reward] = ()) -> dict[str, Reward]:
    """The rewards that a config names, by function name: ``given`` in Python, else ``file.py:function``.

    Raises:
        UserError: the file or the function is not there, its name is taken, or a file cannot be run.
    """
    known = {reward.spec: reward for reward in given}
    rewards: dict[str, Reward] = {}
    for spec in specs:
        reward = known.get(spec) or _from_file(spec)
        if reward.name in rewards or reward.name in PARTS:
            raise UserError(f"reward {spec!r}", f"{reward.name!r} is taken: give the function another name")
        rewards[reward.name] = reward
    return rewards


def _from_file(spec: str) -> Reward:
    found = _SPEC.fullmatch(spec)
    if found is None or not Path(found["file"]).is_file():
        given = "it was given in Python: go on from there, with the same rewards"
        remedy = given if spec.startswith("python:") else f"{_WRITE}, with a file that exists"
        raise UserError(f"reward {spec!r}", remedy)
    try:
        weight = float(found["weight"] or 1)
    except ValueError as error:
        raise UserError(f"reward {spec!r}", _WRITE) from error
    module_spec = importlib.util.spec_from_file_location(
        f"rsim_reward_{Path(found['file']).stem}", found["file"]
    )
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"reward {spec!r}", _WRITE)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where a dataclass looks for its annotations
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"reward {spec!r}: {found['file']} does not run", f"{type(error).__name__}: {error}"
        ) from error
    function = vars(module).get(found["name"])
    if not callable(function):
        raise UserError(f"reward {spec!r}", f"{found['file']} has no function {found['name']!r}")
    return Reward(function, cast(Agents, found["agent"] or "both"), weight, found["file"], found["name"])
