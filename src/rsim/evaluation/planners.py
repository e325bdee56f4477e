"""The ``--planner`` argument: a control by name, or a trained planner by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rsim.config import RewardsConfig, RolloutConfig
from rsim.errors import UserError
from rsim.evaluation.controls import PromptedPlanner, shuffled_planner, wait_planner
from rsim.evaluation.obeyed import rules_for
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.oracle import oracle_planner
from rsim.policies.loading import found_planner, load_planner
from rsim.policies.protocol import AnyPlanner
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner, sequence_planner
from rsim.policies.strategies import StrategySet
from rsim.rewards.programs import runner_for

CHOICES = "none, random, fixed:NAME, sequence:a,b, shuffled[:PATH], prompted[:bare], wait[:TIMES], oracle or a planner's folder"


def planner_from(
    spec: str,
    strategies: StrategySet,
    problems: list[Problem],
    *,
    reasoner: Reasoner | None = None,
    rules: RolloutConfig | None = None,
    trained: Path | None = None,
    seed: int = 0,
    rewards: RewardsConfig | None = None,
    overrides: Sequence[str] = (),
    place: Mapping[str, Any] = MappingProxyType({}),
) -> AnyPlanner | None:
    """``none``, ``random``, ``fixed:NAME``, ``sequence:a,b,c``, ``shuffled`` (the trained planner's decisions, given to other
    questions), ``prompted`` (the reasoner itself is asked; ``prompted:bare``: without being told what the strategies are),
    ``wait:TIMES``, ``oracle`` (lab problems only) or a planner's folder.

    Args:
        reasoner, rules: of the game, for the controls that play or ask (``shuffled``, ``prompted``).
        rewards: say whether programs that these write may run without a sandbox.
        overrides: rules that were stated, before a trained planner's own (see `rules_for`).
        place: ``device``, ``dtype`` and ``quantised``, as `load_planner` has them.
        trained: the run's own planner, which ``shuffled`` without a path means.

    Raises:
        UserError: an unknown strategy, the oracle asked about problems that are not the lab's, or no such planner.
    """
    kind, _, detail = spec.partition(":")
    if detail and kind in ("none", "random", "oracle"):
        raise UserError(f"--planner {spec}", f"write {kind} alone")
    if kind == "none":
        return None
    if kind == "random":
        return random_planner(strategies)
    if kind == "fixed":
        return sequence_planner(strategies, [detail])
    if kind == "sequence":
        return sequence_planner(strategies, [n.strip() for n in detail.split(",") if n.strip()])
    if kind == "wait":
        times = detail or "1"
        if not (times.isdigit() and int(times)):
            raise UserError(f"--planner {spec}", "write wait:TIMES with a whole number from 1, e.g. wait:2")
        return wait_planner(strategies, int(times))
    if kind == "oracle":
        if not all("terms" in problem.meta for problem in problems):
            raise UserError("--planner oracle", "the oracle knows lab problems only: use --data lab")
        return oracle_planner(strategies, problems)
    if kind == "prompted":
        assert reasoner is not None
        if reasoner.model.device.type == "meta":
            raise UserError("--planner prompted", "the reasoner's weights are on a server: use rollout.engine = native")
        if detail not in ("", "bare"):
            raise UserError(f"--planner {spec}", "write prompted or prompted:bare")
        return PromptedPlanner(reasoner, strategies, bare=detail == "bare")
    if kind == "shuffled":
        assert reasoner is not None
        assert rules is not None
        if rules.gate:
            remedy = "has decisions without probabilities, which no gate can stop: leave rollout.gate at 0"
            raise UserError(f"--planner {spec}", remedy)
        folder = Path(detail) if detail else trained
        if folder is None or not folder.is_dir():
            raise UserError(f"--planner {spec}", "evaluate a run with a trained planner, or write shuffled:PLANNER_FOLDER")
        if len(problems) < 2:
            raise UserError(f"--planner {spec}", "shuffling takes two questions at least")
        own = load_planner(str(folder), strategies, seed=0, **place)
        game = Game(reasoner, own, rules_for(rules, own, overrides), runner_for(own, rewards or RewardsConfig()))
        return replace(shuffled_planner(strategies, game.play(problems, seed=seed, greedy=True), seed), rules=own.rules)
    if not Path(spec).exists():
        raise UserError(f"no planner {spec!r}", f"use {CHOICES}")
    if getattr(found_planner(spec)[1], "rsim_template", None) is None:
        raise UserError(f"--planner {spec}", "this folder holds no trained planner")
    return load_planner(spec, strategies, seed=0, **place)
