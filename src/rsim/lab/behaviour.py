"""The stochastic writer of lab solutions: which kind of step comes next in the pre-training text.

The writer has habits, not a plan: its most likely step is often a poor one, so a model trained on its text knows all
nine kinds of step but not when each of them pays. Its choices depend on coarse features that a careless person would notice.
"""

from __future__ import annotations

import random

from rsim.lab.problems import LabProblem
from rsim.lab.steps import Rates, State, start, write_step

# Weight of each strategy, by what the state looks like at a glance. The first is what greedy decoding follows: sensible
# while there is a bracket or a product to work out, hasty where a long sum would need care.
_HABITS: dict[str, dict[str, float]] = {
    "unread": {"sub-planning": 42, "continuation": 24, "summarization": 6, "decomposition": 6, "deliberation": 6,
               "prioritization": 5, "self-reflection": 4, "validation": 3, "termination": 4},
    "bracket": {"prioritization": 34, "continuation": 28, "decomposition": 9, "deliberation": 6, "summarization": 6,
                "sub-planning": 4, "self-reflection": 4, "validation": 4, "termination": 5},
    "product": {"decomposition": 38, "continuation": 26, "deliberation": 7, "prioritization": 6, "summarization": 6,
                "sub-planning": 4, "self-reflection": 4, "validation": 4, "termination": 5},
    "long": {"summarization": 40, "continuation": 18, "deliberation": 16, "decomposition": 4, "prioritization": 4,
             "sub-planning": 4, "self-reflection": 4, "validation": 5, "termination": 5},
    "pair": {"deliberation": 38, "continuation": 22, "summarization": 14, "decomposition": 3, "prioritization": 3,
             "sub-planning": 3, "self-reflection": 4, "validation": 5, "termination": 8},
    "finished": {"termination": 70, "validation": 12, "self-reflection": 6, "summarization": 3, "continuation": 2,
                 "sub-planning": 2, "decomposition": 2, "deliberation": 2, "prioritization": 1},
}  # fmt: skip
# Of a writer that knows a tenth as well, where that is the only one that helps.
_OUTSIDE: dict[str, float] = {
    "continuation": 34, "tenth": 16, "summarization": 10, "sub-planning": 10, "decomposition": 6, "deliberation": 6,
    "prioritization": 6, "self-reflection": 4, "validation": 4, "termination": 4,
}  # fmt: skip
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
    at = "outside" if state.problem.is_cipher and not state.read else glance(state)
    return choose_at(at, rng, tenth=tenth)


def choose_at(at: str, rng: random.Random, *, tenth: str = "") -> str:
    """The writer's choice by what the state looks like: a name that `glance` gives, or *outside*."""
    if at == "outside" and tenth:
        weights = {tenth if name == "tenth" else name: weight for name, weight in _OUTSIDE.items()}
    else:
        weights = _HABITS["unread" if at == "outside" else at] | ({tenth: _IDLE} if tenth else {})
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
