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
from rsim.evaluation.search import SequenceSearch, accuracies, best_fixed
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.oracle import foreseeing_planner
from rsim.policies.loading import load_reasoner
from rsim.policies.protocol import AnyPlanner
from rsim.policies.strategies import load_strategies
from studies.ledger import Row

ISSUE = 10
_BY_HAND = (
    "sub-planning,continuation,deliberation,continuation,deliberation",
    "sub-planning,prioritization,continuation,deliberation,summarization",
    "sub-planning,continuation,decomposition,deliberation,continuation",
    "continuation,decomposition,deliberation,continuation,deliberation",
)


def run(model: str = "nano-s", questions: int = 500, seed: int = 1, search: bool = True, found: str = "") -> Iterator[Row]:
    """``found``: what an earlier search with these settings came to, in place of a search."""
    config = load_config("nano")
    reasoner, strategies = load_reasoner(model), load_strategies("lab")
    picking = load_problems("lab", "dev", limit=500, seed=seed + 1000)
    problems = load_problems("lab", "dev", limit=questions, seed=seed)

    def by(planner: AnyPlanner | None, name: str, on: list[Problem] = problems, greedy: bool = True) -> Evaluation:
        game = Game(reasoner, planner, replace(config.rollout, batch=512))
        return evaluate(name, game, on, config.rewards, seed=seed, greedy=greedy)[0]

    def played(spec: str, on: list[Problem] = problems, greedy: bool = True) -> Evaluation:
        return by(planner_from(spec, strategies, on), spec, on, greedy)

    def share(what: str, e: Evaluation, goal: str = "", met: bool | None = None) -> Row:
        return Row(what, e.accuracy, "share", goal, met, seeds=[seed], interval=[e.low, e.high])

    def above(what: str, gap: float, goal: float) -> Row:
        return Row(what, gap, "share", f"at least {100 * goal:.0f} points", gap >= goal, seeds=[seed])

    cot, random, oracle = played("none"), played("random", greedy=False), played("oracle")
    yield share("greedy CoT", cot, "30 to 60%", 0.3 <= cot.accuracy <= 0.6)
    yield share("CoT sampled at temperature 1", played("none", greedy=False))
    yield share("random planner, sampled at temperature 1", random, "5 to 30%", 0.05 <= random.accuracy <= 0.3)
    yield share("random planner, greedy reasoner", played("random"))
    yield share("oracle planner", oracle, "80 to 95%", 0.8 <= oracle.accuracy <= 0.95)
    yield share("oracle planner, sampled at temperature 1", played("oracle", greedy=False))
    foreseen = [by(foreseeing_planner(strategies, problems, slips=slips), "foreseeing") for slips in (False, True)]
    for how, e in zip(("no join slips", "every join slips"), foreseen, strict=True):
        yield share(f"the question worked out beforehand, as if {how}", e)
    gap = oracle.accuracy - max(e.accuracy for e in foreseen)
    yield above("oracle above the better of these, which see the question alone", gap, 0.1)
    fixed = played(best_fixed(strategies.names, lambda spec: played(spec, picking).accuracy))
    yield share(f"best fixed strategy ({fixed.name.partition(':')[2]})", fixed)
    by_hand = [played(f"sequence:{sequence},termination") for sequence in _BY_HAND]
    for sequence, e in zip(_BY_HAND, by_hand, strict=True):
        yield share(f"a sequence written by hand ({sequence.replace(',', ', ')})", e)
    if not (search or found):
        return
    many = replace(config, rollout=replace(config.rollout, batch=512))
    searching = SequenceSearch(
        strategies.names,
        lambda specs, count: accuracies(reasoner, strategies, specs, picking[:count], many),
        longest=config.rollout.max_steps,
    )
    best = played(found or searching.best())
    yield share(f"best fixed sequence ({best.name.partition(':')[2].replace(',', ', ')})", best)
    gap = oracle.accuracy - max(e.accuracy for e in (fixed, best, *by_hand))
    yield above("oracle above the best fixed strategy or sequence, searched or written by hand", gap, 0.2)
