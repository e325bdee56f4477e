"""Planners that follow a rule instead of a model: baselines and controls."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from rsim.errors import UserError
from rsim.policies.protocol import Decision
from rsim.policies.strategies import StrategySet
from rsim.rules import PlayRules

# (question, steps so far as (strategy, text), uniform number in [0, 1)) -> probabilities in label order
Rule = Callable[[str, list[tuple[str, str]], float], list[float]]


@dataclass
class ScriptedPlanner:
    """Draws each strategy from the probabilities that ``rule`` gives."""

    strategies: StrategySet
    rule: Rule
    parameters: int = 0
    context: int = sys.maxsize  # a rule reads no tokens
    rules: PlayRules | None = None

    def begin(self, slots: int) -> ScriptedSession:
        return ScriptedSession(self, slots)


class ScriptedSession:
    def __init__(self, planner: ScriptedPlanner, slots: int) -> None:
        self.planner = planner
        self.questions = [""] * slots
        self.steps: list[list[tuple[str, str]]] = [[] for _ in range(slots)]

    def start(self, slots: list[int], questions: list[str], openings: list[list[int] | None] | None = None) -> None:
        for slot, question in zip(slots, questions, strict=True):
            self.questions[slot], self.steps[slot] = question, []

    def decide(self, slots: list[int], uniforms: list[float], temperature: float) -> list[Decision]:
        decisions = []
        for slot, uniform in zip(slots, uniforms, strict=True):
            probabilities = self.planner.rule(self.questions[slot], self.steps[slot], uniform)
            action = _draw(probabilities, uniform)
            decisions.append(Decision(-1, action, math.log(probabilities[action]), probabilities))
        return decisions

    def observe(self, slot: int, strategy: str, text: str) -> None:
        self.steps[slot].append((strategy, text))

    def ids(self, slot: int) -> list[int]:
        return []

    def length(self, slot: int) -> int:
        return 0

    def reads(self, slot: int) -> bool:
        return True


def _draw(probabilities: list[float], uniform: float) -> int:
    total = 0.0
    for index, probability in enumerate(probabilities):
        total += probability
        if uniform < total:
            return index
    return max(i for i, p in enumerate(probabilities) if p > 0)


def random_planner(strategies: StrategySet) -> ScriptedPlanner:
    share = 1 / len(strategies)
    return ScriptedPlanner(strategies, lambda question, steps, uniform: [share] * len(strategies))


def sequence_planner(strategies: StrategySet, names: list[str]) -> ScriptedPlanner:
    """The given strategies one after the other; the last one is repeated until the game forces termination.

    A single name is the *fixed strategy* control.
    """
    if not names:
        raise UserError("an empty strategy sequence", "name at least one strategy")
    indices = [strategies.index(name) for name in names]

    def rule(question: str, steps: list[tuple[str, str]], uniform: float) -> list[float]:
        return one_hot(indices[min(len(steps), len(indices) - 1)], len(strategies))

    return ScriptedPlanner(strategies, rule)


def one_hot(index: int, size: int) -> list[float]:
    return [float(i == index) for i in range(size)]
