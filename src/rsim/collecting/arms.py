"""The arms file: which short sequences of strategies are played on every question, and by which rules.

::

    strategies = "instruct"          # a packaged set or a file; [[strategy]] entries below extend a packaged one
    system_prompt = "Reason ..."     # of all arms, unless an arm has its own
    cascade = [["program", "cot"]]   # reported: the first arm's answer, and where it has none the second's

    [rules]                          # of `rsim.rules.PlayRules`, where they are not the defaults
    max_tokens = 768

    [[strategy]]                     # the null action
    name = "alone"
    prompts = [""]
    unlimited = true

    [[arm]]
    name = "cot"
    sequence = ["alone"]

    [[arm]]                          # a sampled one, to vote with; no planner is fitted to it
    name = "cot-1"
    sequence = ["alone"]
    temperature = 0.7
    seed = 1
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsim import rules_file
from rsim.errors import UserError
from rsim.policies.strategies import StrategySet, from_table, load_strategies
from rsim.settings import read_toml

PACKAGED = Path(__file__).with_name("arms.toml")  # what the name "default" means
_KEYS = ("strategies", "system_prompt", "cascade", "rules", "strategy", "arm")
_ARM = ("name", "sequence", "system_prompt", "temperature", "seed")


@dataclass(frozen=True)
class Arm:
    """Strategies that are played one after the other, the last one until the episode ends; greedily, or sampled at a
    ``temperature`` above 0."""

    name: str
    sequence: tuple[str, ...]
    system_prompt: str
    temperature: float = 0.0
    seed: int = 0

    @property
    def header(self) -> dict[str, Any]:
        """What a log keeps of it."""
        how = {"sequence": list(self.sequence), "system_prompt": self.system_prompt}
        return how | ({"temperature": self.temperature, "seed": self.seed} if self.temperature else {})


@dataclass(frozen=True)
class Arms:
    """What an arms file says; ``rules`` are those that it states."""

    strategies: StrategySet
    arms: tuple[Arm, ...]
    rules: dict[str, object]
    cascades: tuple[tuple[str, str], ...]

    @property
    def overrides(self) -> list[str]:
        """The rules as ``--set`` has them."""
        return [f"rollout.{name}={json.dumps(value)}" for name, value in self.rules.items()]


def load_arms(source: str) -> Arms:
    """The arms of a TOML file, or the packaged ones (``default``).

    Raises:
        UserError: the file is missing or malformed, has no arm, two of one name, or an unknown key, rule or strategy.
    """
    path = PACKAGED if source == "default" else Path(source)
    if not path.is_file():
        raise UserError(f"arms file not found: {source}", 'give a TOML file, or "default"')
    table = read_toml(path)
    _known(table, _KEYS, str(path))
    base = str(table.get("strategies", "instruct"))
    own = table.get("strategy")
    strategies = from_table({"extends": base, "strategy": own}, path) if own else load_strategies(base)
    rules_file.from_table(table.get("rules", {}), f"{path}: rules")
    entries = table.get("arm", [])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: no arms", "write each under [[arm]]")
    arms = tuple(_arm(path, entry, strategies, table.get("system_prompt", "")) for entry in entries)
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: arm {name!r} is given twice", "give each name once")
    cascades = table.get("cascade", [])
    if not isinstance(cascades, list) or any(not isinstance(c, list) or len(c) != 2 or set(c) - set(names) for c in cascades):
        raise UserError(f"{path}: cascade = {cascades!r}", 'give pairs of arms: cascade = [["first", "second"]]')
    return Arms(strategies, arms, table.get("rules", {}), tuple((first, second) for first, second in cascades))


def _arm(path: Path, entry: dict[str, Any], strategies: StrategySet, system_prompt: object) -> Arm:
    name, sequence = entry.get("name"), entry.get("sequence")
    _known(entry, _ARM, f"{path}: arm {name!r}")
    prompt = entry.get("system_prompt", system_prompt)
    if not isinstance(name, str) or not name or not isinstance(prompt, str):
        raise UserError(f"{path}: arm {name!r}", "name and system_prompt must be text, and the name not empty")
    if not isinstance(sequence, list) or not sequence:
        raise UserError(f"{path}: arm {name!r} has no sequence", 'add e.g. sequence = ["alone"]')
    for strategy in sequence:
        strategies.index(strategy)
    temperature, seed = entry.get("temperature", 0.0), entry.get("seed", 0)
    if type(temperature) not in (int, float) or not 0 <= temperature < math.inf or type(seed) is not int or seed < 0:
        raise UserError(f"{path}: arm {name!r}", "temperature must be a number and seed a whole one, neither below 0")
    return Arm(name, tuple(sequence), prompt, float(temperature), seed)


def _known(table: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}", f"known: {', '.join(keys)}")
