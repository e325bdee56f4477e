"""The stochastic writer of lab solutions: which kind of step comes next in the pre-training text.

The writer has habits, not a plan: its most likely step is often a poor one, so a model trained on its text knows all
nine kinds of step but not when each of them pays. Its choices depend on coarse features that a careless person would notice.
"""

from __future__ import annotations

import random

from rsim.lab.problems import LabProblem
from rsim.lab.steps import Rates, State, start, write_step

# Weight of each strategy, by what the state looks like at a glance.
_HABITS: dict[str, dict[str, float]] = {
    "unread": {"continuation": 40, "sub-planning": 20, "summarization": 8, "decomposition": 7, "deliberation": 7,
               "prioritization": 7, "self-reflection": 4, "validation": 3, "termination": 4},
    "long": {"continuation": 52, "summarization": 8, "decomposition": 7, "deliberation": 8, "prioritization": 6,
             "sub-planning": 4, "self-reflection": 4, "validation": 5, "termination": 6},
    "pair": {"continuation": 44, "summarization": 12, "decomposition": 6, "deliberation": 8, "prioritization": 4,
             "sub-planning": 3, "self-reflection": 4, "validation": 5, "termination": 14},
    "finished": {"termination": 70, "validation": 10, "self-reflection": 6, "summarization": 4, "continuation": 3,
                 "sub-planning": 2, "decomposition": 2, "deliberation": 2, "prioritization": 1},
}  # fmt: skip


def choose(state: State, rng: random.Random) -> str:
    if not state.read:
        habit = "unread"
    elif len(state.expression) > 2:
        habit = "long"
    elif len(state.expression) == 2 or not state.expression[0].is_number:
        habit = "pair"
    else:
        habit = "finished"
    weights = _HABITS[habit]
    return rng.choices(list(weights), list(weights.values()))[0]


def write_solution(
    problem: LabProblem, rng: random.Random, rates: Rates, max_steps: int = 12
) -> list[tuple[str, str]]:
    """One worked solution: ``[(strategy, step text), ...]``, ending with a termination step."""
    state, steps = start(problem), []
    while not state.done:
        strategy = "termination" if len(steps) == max_steps else choose(state, rng)
        text, state = write_step(state, strategy, rng, rates)
        steps.append((strategy, text))
    return steps
