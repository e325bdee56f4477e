"""Measures a nano base against the lab window, before any reinforcement learning.

    python -m studies.lab_window [--model nano-s] [--questions 500] [--record]

Problems come from the dev split; controls are picked on other dev problems than those they are measured on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from rsim.config import load_config
from rsim.data.load import load_problems
from rsim.evaluation.evaluate import Evaluation, evaluate
from rsim.evaluation.planners import planner_from
from rsim.evaluation.search import best_fixed, best_sequence
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.loading import load_reasoner
from rsim.policies.strategies import load_strategies
from studies.ledger import record, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="nano-s")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write results/lab_window.json and its page")
    args = parser.parse_args()
    rows = measure(args.model, args.questions, args.seed)
    for r in rows:
        print(f"{r['what']:<48} {r['value']:6.1%}   {r['goal']}  {'' if r['met'] is None else 'met' if r['met'] else 'MISSED'}")
    if args.record:
        record("lab_window", 1, "The lab window: nano-s before any reinforcement learning", rows)


def measure(model: str, questions: int, seed: int) -> list[dict[str, object]]:
    config = load_config("nano")
    reasoner, strategies = load_reasoner(model), load_strategies("lab")
    picking = load_problems("lab", "dev", limit=300, seed=seed + 1000)
    problems = load_problems("lab", "dev", limit=questions, seed=seed)

    def run(spec: str, on: list[Problem] = problems, greedy: bool = True) -> Evaluation:
        game = Game(reasoner, planner_from(spec, strategies, on), replace(config.rollout, batch=512))
        return evaluate(spec, game, on, config.rewards, seed=seed, greedy=greedy)[0]

    began = time.perf_counter()
    cot, oracle, random = run("none"), run("oracle"), run("random", greedy=False)
    fixed = run(best_fixed(strategies.names, lambda spec: run(spec, picking).accuracy))
    sequence = run(best_sequence(strategies.names, lambda spec: run(spec, picking).accuracy))
    print(f"measured in {time.perf_counter() - began:.0f} s")

    def share(what: str, e: Evaluation, goal: str, met: bool | None) -> dict[str, object]:
        return row(what, e.accuracy, unit="share", goal=goal, met=met, seeds=[seed], interval=(e.low, e.high))

    gap = oracle.accuracy - max(fixed.accuracy, sequence.accuracy)
    return [
        share("greedy CoT", cot, "30 to 60%", 0.3 <= cot.accuracy <= 0.6),
        share("CoT sampled at temperature 1", run("none", greedy=False), "", None),
        share("random planner, sampled at temperature 1", random, "10 to 30%", 0.1 <= random.accuracy <= 0.3),
        share("random planner, greedy reasoner", run("random"), "", None),
        share("oracle planner", oracle, "at least 80%", oracle.accuracy >= 0.8),
        share("oracle planner, sampled at temperature 1", run("oracle", greedy=False), "", None),
        share(f"best fixed strategy ({fixed.name.partition(':')[2]})", fixed, "", None),
        share(f"best fixed sequence ({sequence.name.partition(':')[2].replace(',', ', ')})", sequence, "", None),
        row("oracle above the best fixed strategy or sequence", gap, unit="share", goal="at least 10 points",
            met=gap >= 0.1, seeds=[seed]),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
