"""The ``--planner`` argument: a control by name, or a trained planner by path."""

from __future__ import annotations

from pathlib import Path

from rsim.config import RolloutConfig
from rsim.errors import UserError
from rsim.evaluation.controls import PromptedPlanner, shuffled_planner, wait_planner
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.oracle import oracle_planner
from rsim.policies.loading import load_planner
from rsim.policies.protocol import AnyPlanner
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner, sequence_planner
from rsim.policies.strategies import StrategySet

CHOICES = "none, random, fixed:NAME, sequence:a,b, shuffled[:PATH], prompted[:bare], wait[:TIMES], oracle or a planner's folder"


def planner_from(
    spec: str, strategies: StrategySet, problems: list[Problem], *, reasoner: Reasoner | None = None,
    rules: RolloutConfig | None = None, trained: Path | None = None, seed: int = 0,
) -> AnyPlanner | None:  # fmt: skip
    """``none``, ``random``, ``fixed:NAME``, ``sequence:a,b,c``, ``shuffled`` (the trained planner's decisions, given to other
    questions), ``prompted`` (the reasoner itself is asked; ``prompted:bare``: without being told what the strategies are),
    ``wait:TIMES``, ``oracle`` (lab problems only) or a planner's folder.

    Args:
        reasoner, rules: of the game, for the controls that play or ask (``shuffled``, ``prompted``).
        trained: the run's own planner, which ``shuffled`` without a path means.

    Raises:
        UserError: an unknown strategy, the oracle asked about problems that are not the lab's, or no such planner.
    """
    kind, _, rest = spec.partition(":")
    if kind == "none":
        return None
    if kind == "random":
        return random_planner(strategies)
    if kind == "fixed":
        return sequence_planner(strategies, [rest])
    if kind == "sequence":
        return sequence_planner(strategies, [n.strip() for n in rest.split(",") if n.strip()])
    if kind == "wait":
        if rest and not (rest.isdigit() and int(rest)):
            raise UserError(f"--planner {spec}", "write wait:TIMES with a whole number from 1, e.g. wait:2")
        return wait_planner(strategies, int(rest or 1))
    if kind == "prompted":
        assert reasoner is not None
        if reasoner.model.device.type == "meta":
            raise UserError("--planner prompted", "the reasoner's weights are on a server: use rollout.engine = native")
        if rest not in ("", "bare"):
            raise UserError(f"--planner {spec}", "write prompted or prompted:bare")
        return PromptedPlanner(reasoner, strategies, bare=rest == "bare")
    if kind == "shuffled":
        assert reasoner is not None
        assert rules is not None
        if rules.gate:
            raise UserError(
                f"--planner {spec}", "has decisions without probabilities, which no gate can stop: leave rollout.gate at 0"
            )
        folder = Path(rest) if rest else trained
        if folder is None or not folder.is_dir():
            raise UserError(f"--planner {spec}", "evaluate a run with a trained planner, or write shuffled:PLANNER_FOLDER")
        own = load_planner(str(folder), strategies, device="auto", dtype="float32", seed=0)
        if len(problems) < 2:
            raise UserError(f"--planner {spec}", "shuffling takes two questions at least")
        return shuffled_planner(strategies, Game(reasoner, own, rules).play(problems, seed=seed, greedy=True), seed)
    if kind == "oracle":
        if not all("expression" in p.meta for p in problems):
            raise UserError("--planner oracle", "the oracle knows lab problems only: use --data lab")
        return oracle_planner(strategies, problems)
    if not Path(spec).exists():
        raise UserError(f"no planner {spec!r}", f"use {CHOICES}")
    return load_planner(spec, strategies, device="auto", dtype="float32", seed=0)
