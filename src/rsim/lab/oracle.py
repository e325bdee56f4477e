"""The scripted oracle planner of the lab: the ceiling in every table, never a teacher.

It reads the expression off the last step, knows what the question asks, and picks the strategy that is good at what is
left; a slip sends it to validation once, an overlooked part to self-reflection once.
"""

from __future__ import annotations

from rsim.game.problem import Problem
from rsim.lab.expressions import Expression, parse, value_of
from rsim.policies.scripted import ScriptedPlanner, one_hot
from rsim.policies.strategies import StrategySet


def oracle_planner(strategies: StrategySet, problems: list[Problem]) -> ScriptedPlanner:
    """An oracle for lab ``problems`` (their ``meta["expression"]`` is what it knows)."""
    known = {p.question: p for p in problems}

    def rule(question: str, steps: list[tuple[str, str]], uniform: float) -> list[float]:
        problem = known[question]
        name = _pick(problem.meta["expression"], problem.meta["family"], steps)
        return one_hot(strategies.index(name), len(strategies))

    return ScriptedPlanner(strategies, rule)


def _pick(asked: str, family: str, steps: list[tuple[str, str]]) -> str:
    if family == "cipher" and all(expression_after(text) is None for _, text in steps):
        return "decoding"
    if family not in ("arithmetic", "cipher") and not steps:
        return "sub-planning"
    truth = parse(asked)
    assert truth is not None
    current = truth
    for _, text in steps:
        current = expression_after(text) or current
    if steps and value_of(current) != value_of(truth):
        last = steps[-1][0]
        if steps[-1][0] == "sub-planning" or (len(steps) > 1 and last == "validation"):
            if last != "self-reflection" and not any(name == "self-reflection" for name, _ in steps):
                return "self-reflection"
        elif last not in ("validation", "self-reflection"):
            return "validation"
    if any(term.is_bracket for term in current):
        return "prioritization"
    if any(term.is_product for term in current):
        return "decomposition"
    return "deliberation" if len(current) > 1 else "termination"


def expression_after(step_text: str) -> Expression | None:
    """The expression that a step ends with (`` ... so 68-38``), or None."""
    _, found, rest = step_text.strip().rpartition(" so ")
    return parse(rest) if found else None
