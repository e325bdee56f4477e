"""The ``--planner`` argument: a control by name, or a trained planner by path."""

from __future__ import annotations

from pathlib import Path

from rsim.data.problem import Problem
from rsim.errors import UserError
from rsim.lab.oracle import oracle_planner
from rsim.models import load_planner
from rsim.planner.planner import AnyPlanner
from rsim.planner.scripted import random_planner, sequence_planner
from rsim.strategies import StrategySet


def planner_from(spec: str, strategies: StrategySet, problems: list[Problem]) -> AnyPlanner | None:
    """``none``, ``random``, ``fixed:NAME``, ``sequence:a,b,c``, ``oracle`` (lab problems only) or a planner's folder.

    Raises:
        UserError: an unknown strategy, the oracle asked about problems that are not the lab's, or no such planner.
    """
    if spec == "none":
        return None
    if spec == "random":
        return random_planner(strategies)
    if spec.startswith("fixed:"):
        return sequence_planner(strategies, [spec.removeprefix("fixed:")])
    if spec.startswith("sequence:"):
        return sequence_planner(strategies, [n.strip() for n in spec.removeprefix("sequence:").split(",") if n.strip()])
    if spec == "oracle":
        if not all("expression" in p.meta for p in problems):
            raise UserError("--planner oracle", "the oracle knows lab problems only: use --data lab")
        return oracle_planner(strategies, problems)
    if not Path(spec).exists():
        raise UserError(f"no planner {spec!r}", "use none, random, fixed:NAME, sequence:a,b, oracle or a planner's folder")
    return load_planner(spec, strategies, device="auto", dtype="float32", seed=0)
