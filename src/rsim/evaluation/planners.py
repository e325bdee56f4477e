"""The ``--planner`` argument: a control by name, or a trained planner by path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rsim.config import RewardsConfig, RolloutConfig
from rsim.errors import UserError
from rsim.evaluation.controls import PromptedPlanner, shuffled_planner, wait_planner
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.oracle import oracle_planner
from rsim.policies.loading import load_planner
from rsim.policies.planner import planner_config
from rsim.policies.protocol import AnyPlanner
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import random_planner, sequence_planner
from rsim.policies.strategies import StrategySet
from rsim.rewards.programs import runner_for

CHOICES = "none, random, fixed:NAME, sequence:a,b, shuffled[:PATH], prompted[:bare], wait[:TIMES], oracle or a planner's folder"


@dataclass(frozen=True)
class Needs:
    """What planners are made of; ``detail`` is what follows the colon of ``spec``. See `planner_from`."""

    spec: str
    detail: str
    strategies: StrategySet
    problems: list[Problem]
    reasoner: Reasoner | None
    rules: RolloutConfig | None
    trained: Path | None
    seed: int
    rewards: RewardsConfig

    def wrong(self, remedy: str) -> UserError:
        return UserError(f"--planner {self.spec}", remedy)


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
) -> AnyPlanner | None:
    """``none``, ``random``, ``fixed:NAME``, ``sequence:a,b,c``, ``shuffled`` (the trained planner's decisions, given to other
    questions), ``prompted`` (the reasoner itself is asked; ``prompted:bare``: without being told what the strategies are),
    ``wait:TIMES``, ``oracle`` (lab problems only) or a planner's folder.

    Args:
        reasoner, rules: of the game, for the controls that play or ask (``shuffled``, ``prompted``).
        rewards: say whether programs that these write may run without a sandbox.
        trained: the run's own planner, which ``shuffled`` without a path means.

    Raises:
        UserError: an unknown strategy, the oracle asked about problems that are not the lab's, or no such planner.
    """
    kind, _, detail = spec.partition(":")
    needs = Needs(spec, detail, strategies, problems, reasoner, rules, trained, seed, rewards or RewardsConfig())
    if kind == "none":
        return None
    if kind in _CONTROLS:
        return _CONTROLS[kind](needs)
    if not Path(spec).exists():
        raise UserError(f"no planner {spec!r}", f"use {CHOICES}")
    if getattr(planner_config(spec), "rsim_template", None) is None:
        raise UserError(f"--planner {spec}", "this folder holds no trained planner")
    return load_planner(spec, strategies, seed=0)


def _wait(needs: Needs) -> AnyPlanner:
    times = needs.detail or "1"
    if not (times.isdigit() and int(times)):
        raise needs.wrong("write wait:TIMES with a whole number from 1, e.g. wait:2")
    return wait_planner(needs.strategies, int(times))


def _prompted(needs: Needs) -> AnyPlanner:
    assert needs.reasoner is not None
    if needs.reasoner.model.device.type == "meta":
        raise UserError("--planner prompted", "the reasoner's weights are on a server: use rollout.engine = native")
    if needs.detail not in ("", "bare"):
        raise needs.wrong("write prompted or prompted:bare")
    return PromptedPlanner(needs.reasoner, needs.strategies, bare=needs.detail == "bare")


def _shuffled(needs: Needs) -> AnyPlanner:
    assert needs.reasoner is not None
    assert needs.rules is not None
    if needs.rules.gate:
        raise needs.wrong("has decisions without probabilities, which no gate can stop: leave rollout.gate at 0")
    folder = Path(needs.detail) if needs.detail else needs.trained
    if folder is None or not folder.is_dir():
        raise needs.wrong("evaluate a run with a trained planner, or write shuffled:PLANNER_FOLDER")
    if len(needs.problems) < 2:
        raise needs.wrong("shuffling takes two questions at least")
    own = load_planner(str(folder), needs.strategies, seed=0)
    runner = runner_for(own, needs.rewards)
    played = Game(needs.reasoner, own, needs.rules, runner).play(needs.problems, seed=needs.seed, greedy=True)
    return shuffled_planner(needs.strategies, played, needs.seed)


def _oracle(needs: Needs) -> AnyPlanner:
    if not all("terms" in problem.meta for problem in needs.problems):
        raise UserError("--planner oracle", "the oracle knows lab problems only: use --data lab")
    return oracle_planner(needs.strategies, needs.problems)


_CONTROLS: dict[str, Callable[[Needs], AnyPlanner]] = {
    "random": lambda needs: random_planner(needs.strategies),
    "fixed": lambda needs: sequence_planner(needs.strategies, [needs.detail]),
    "sequence": lambda needs: sequence_planner(needs.strategies, [n.strip() for n in needs.detail.split(",") if n.strip()]),
    "wait": _wait,
    "prompted": _prompted,
    "shuffled": _shuffled,
    "oracle": _oracle,
}
