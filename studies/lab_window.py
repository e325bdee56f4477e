"""A nano base against the lab window, before any reinforcement learning.

Problems come from the dev split; controls are picked on other dev problems than those they are measured on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rsim.config import load_config
from rsim.data.load import load_problems
from rsim.evaluation.evaluate import Evaluation, evaluate
from rsim.evaluation.planners import planner_from
from rsim.evaluation.search import SequenceSearch, best_fixed
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.loading import load_reasoner
from rsim.policies.strategies import load_strategies
from studies.ledger import Row

ISSUE = 1
_BY_HAND = "sub-planning,prioritization,decomposition,decomposition,deliberation,deliberation,deliberation"


def run(model: str = "nano-s", questions: int = 500, seed: int = 1) -> Iterator[Row]:
    config = load_config("nano")
    reasoner, strategies = load_reasoner(model), load_strategies("lab")
    picking = load_problems("lab", "dev", limit=500, seed=seed + 1000)
    problems = load_problems("lab", "dev", limit=questions, seed=seed)

    def played(spec: str, on: list[Problem] = problems, greedy: bool = True) -> Evaluation:
        game = Game(reasoner, planner_from(spec, strategies, on), replace(config.rollout, batch=512))
        return evaluate(spec, game, on, config.rewards, seed=seed, greedy=greedy)[0]

    def share(what: str, e: Evaluation, goal: str = "", met: bool | None = None) -> Row:
        return Row(what, e.accuracy, "share", goal, met, seeds=[seed], interval=[e.low, e.high])

    cot, random, oracle = played("none"), played("random", greedy=False), played("oracle")
    yield share("greedy CoT", cot, "30 to 60%", 0.3 <= cot.accuracy <= 0.6)
    yield share("CoT sampled at temperature 1", played("none", greedy=False))
    yield share("random planner, sampled at temperature 1", random, "10 to 30%", 0.1 <= random.accuracy <= 0.3)
    yield share("random planner, greedy reasoner", played("random"))
    yield share("oracle planner", oracle, "at least 80%", oracle.accuracy >= 0.8)
    yield share("oracle planner, sampled at temperature 1", played("oracle", greedy=False))
    fixed = played(best_fixed(strategies.names, lambda spec: played(spec, picking).accuracy))
    yield share(f"best fixed strategy ({fixed.name.partition(':')[2]})", fixed)
    by_hand = played(f"sequence:{_BY_HAND}")
    yield share(f"a sequence written by hand ({_BY_HAND.replace(',', ', ')})", by_hand)
    gap = oracle.accuracy - by_hand.accuracy
    yield Row("oracle above the sequence written by hand", gap, "share", "at least 10 points", gap >= 0.1, seeds=[seed])
    search = SequenceSearch(
        strategies.names,
        lambda specs, count: [played(spec, picking[:count]).accuracy for spec in specs],
        longest=config.rollout.max_steps,
    )
    sequence = played(search.best())
    yield share(f"best fixed sequence ({sequence.name.partition(':')[2].replace(',', ', ')})", sequence)
    gap = oracle.accuracy - max(fixed.accuracy, sequence.accuracy)
    what = "oracle above the best fixed strategy or sequence"
    yield Row(what, gap, "share", "at least 10 points", gap >= 0.1, seeds=[seed])
