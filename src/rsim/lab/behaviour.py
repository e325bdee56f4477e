"""The stochastic writer of lab solutions: which kind of step comes next in the pre-training text.

The writer has habits, not a plan: its most likely step is often a poor one, and the step that would help is seldom taken. Some
solutions are drills instead, in which the steps are drawn at random, as exercise books have them. So a model trained on the
text can do all nine kinds of step when it is told to, and by itself keeps to the habits. The choices depend on what a
careless person sees at a glance.
"""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

from rsim.lab.problems import LabProblem, round_tail
from rsim.lab.steps import Rates, State, start, write_step

_HABITS: dict[str, dict[str, float]] = tomllib.loads(Path(__file__).with_name("habits.toml").read_text(encoding="utf-8"))


def glance(state: State) -> str:
    """The coarse feature that the writer's next choice depends on."""
    if not state.read:
        return "unread"
    if state.doubted or state.lost:
        return "doubtful" if state.doubted else "lost"
    if state.carries or state.borrows:
        return "carry" if state.carries else "broken"
    if not state.rest:
        return "finished"
    if state.rest[0].is_bracket:
        return "bracket"
    return "round" if round_tail(state.rest) else "number"


def choose(state: State, rng: random.Random, *, drill: bool = False) -> str:
    weights = _HABITS["drill" if drill else glance(state)]
    return rng.choices(list(weights), list(weights.values()))[0]


def write_solution(
    problem: LabProblem, rng: random.Random, rates: Rates, max_steps: int = 9, *, drill: bool = False
) -> list[tuple[str, str]]:
    """One worked solution: ``[(strategy, step text), ...]``, ending with a termination step."""
    state = start(problem)
    steps: list[tuple[str, str]] = []
    while not state.done:
        strategy = "termination" if len(steps) == max_steps else choose(state, rng, drill=drill)
        text, state = write_step(state, strategy, rng, rates)
        steps.append((strategy, text))
    return steps
