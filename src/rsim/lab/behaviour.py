"""The stochastic writer of lab solutions: which kind of step comes next in the pre-training text.

The writer has habits, not a plan: its most likely step is often a poor one, so a model trained on its text knows all
nine kinds of step but not when each of them pays. Its choices depend on coarse features that a careless person would notice.
"""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

from rsim.lab.problems import LabProblem
from rsim.lab.steps import Rates, State, start, write_step

_HABITS: dict[str, dict[str, float]] = tomllib.loads(Path(__file__).with_name("habits.toml").read_text(encoding="utf-8"))
_IDLE = 3.0  # the tenth's weight where it does not help


def glance(state: State) -> str:
    """The coarse feature that the writer's next choice depends on."""
    if not state.read:
        return "unread"
    if any(term.is_bracket for term in state.expression):
        return "bracket"
    if any(term.is_product for term in state.expression):
        return "product"
    return {1: "finished", 2: "pair"}.get(len(state.expression), "long")


def choose(state: State, rng: random.Random, *, tenth: str = "") -> str:
    """``tenth``: a strategy that the writer knows beside the nine."""
    if tenth and state.problem.is_cipher and not state.read:
        weights = {tenth if name == "tenth" else name: weight for name, weight in _HABITS["outside"].items()}
    else:
        weights = _HABITS[glance(state)] | ({tenth: _IDLE} if tenth else {})
    return rng.choices(list(weights), list(weights.values()))[0]


def write_solution(
    problem: LabProblem, rng: random.Random, rates: Rates, max_steps: int = 12, *, tenth: str = ""
) -> list[tuple[str, str]]:
    """One worked solution: ``[(strategy, step text), ...]``, ending with a termination step."""
    state = start(problem)
    steps: list[tuple[str, str]] = []
    while not state.done:
        strategy = "termination" if len(steps) == max_steps else choose(state, rng, tenth=tenth)
        text, state = write_step(state, strategy, rng, rates)
        steps.append((strategy, text))
    return steps
