"""Scripted planners of the lab: the oracle, which is the ceiling in every table, and one that sees the question alone.

Neither is ever a teacher. The oracle reads what the last step left, as anyone can, and picks the strategy that is good at
it. The other works the whole question out in its head beforehand, better than any model of this size could.
"""

from __future__ import annotations

import random
import re
import tomllib
from pathlib import Path

from rsim.game.problem import Problem
from rsim.lab.problems import LabProblem, Terms, parse, round_tail
from rsim.lab.steps import Rates, start, write_step
from rsim.policies.scripted import ScriptedPlanner, one_hot
from rsim.policies.strategies import StrategySet

_STATE = re.compile(r"(?P<doubt>\??)(?P<lost>~?)(?P<total>\d+(?::-?\d+)?)(?P<rest>(?:[+-].+)?)")


def oracle_planner(strategies: StrategySet, problems: list[Problem]) -> ScriptedPlanner:
    """An oracle for lab ``problems``: of the question it knows only whether it is told in words."""
    worded = {p.question: p.meta["family"] != "arithmetic" for p in problems}

    def rule(question: str, steps: list[tuple[str, str]], uniform: float) -> list[float]:
        if steps:
            name = needed(steps[-1][1].strip().rpartition(" so ")[2])
        else:
            name = "sub-planning" if worded[question] else needed(question.removesuffix("=?"))
        return one_hot(strategies.index(name), len(strategies))

    return ScriptedPlanner(strategies, rule)


def needed(left: str) -> str:
    """The strategy that is good at what is ``left``, e.g. ``"7:15-26"``; termination where nothing is."""
    found = _STATE.fullmatch(left)
    if found is None:
        return "termination"
    try:
        rest: Terms = parse(found["rest"]) if found["rest"] else ()
    except ValueError:
        return "termination"
    if found["doubt"]:
        return "validation"
    if ":" in found["total"]:
        return "decomposition" if ":-" in found["total"] else "deliberation"
    if found["lost"]:
        return "self-reflection"
    if round_tail(rest):
        return "summarization"
    if rest and rest[0].is_bracket:
        return "prioritization"
    return "continuation" if rest else "termination"


def foreseeing_planner(strategies: StrategySet, problems: list[Problem], *, slips: bool) -> ScriptedPlanner:
    """What can be planned from the question alone: the steps that are needed if no join slips, or if every one does."""
    plans: dict[str, list[str]] = {}
    for problem in problems:
        told = LabProblem(problem.meta["family"], problem.question, parse(problem.meta["terms"]))
        state, plan = start(told), []
        while not state.done:
            plan.append(needed(str(state)) if state.read else "sub-planning")
            _, state = write_step(state, plan[-1], random.Random(0), Rates(slip=float(slips)))
        plans[problem.question] = plan

    def rule(question: str, steps: list[tuple[str, str]], uniform: float) -> list[float]:
        left = plans[question][len(steps) :]
        return one_hot(strategies.index(left[0] if left else "termination"), len(strategies))

    return ScriptedPlanner(strategies, rule)


def state_blind() -> dict[str, list[str]]:
    """Sequences for the demo to compare with: the best that is known on dev problems, and a trained blind planner's choices."""
    return tomllib.loads(Path(__file__).with_name("controls.toml").read_text(encoding="utf-8"))
