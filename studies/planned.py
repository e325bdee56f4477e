"""What planning costs: the time of an episode of the same sampled tokens in 1, 2, 4, 8 and 16 planned steps.

    python -m studies.planned [--reasoner smollm2-135m] [--rows 8] [--tokens 512] [--rounds 1] [--record]

Two planners: one of the reasoner's size, and one of at most a tenth of it (a small Llama with random weights: time does not
depend on what they are). Every step is ended by its cap, every strategy is drawn uniformly and carries its prompt; end of turn
is ignored.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from unittest.mock import patch

import numpy as np
from transformers import LlamaConfig, LlamaForSequenceClassification

from rsim.config import RolloutConfig
from rsim.engine.sampling import StepEnds
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.loading import load_planner, load_reasoner
from rsim.policies.planner import LearnedSession, Planner
from rsim.policies.reasoner import Reasoner
from rsim.policies.strategies import StrategySet, load_strategies
from studies.ledger import record, row
from studies.workload import questions, show

_STEPS = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--reasoner", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="sampled in an episode, whatever its number of steps")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write results/planned.json and its page")
    args = parser.parse_args()
    reasoner, strategies = load_reasoner(args.reasoner), load_strategies("default")
    planners = {
        "a tenth": (small_planner(reasoner, strategies), 1.25),
        "the same size": (load_planner(args.reasoner, strategies, seed=0), 2.2),
    }
    rows = []
    for name, (planner, goal) in planners.items():
        rows += measure(name, reasoner, planner, goal, args.rows, args.tokens, args.rounds)
    show(rows)
    if args.record:
        record("planned", 3, f"The cost of planning: {args.reasoner}, {args.rows} episodes of {args.tokens} tokens", rows)


def small_planner(reasoner: Reasoner, strategies: StrategySet) -> Planner:
    """A Llama of at most a tenth of the reasoner's size, with its tokenizer."""
    names = dict(enumerate(strategies.names))
    config = LlamaConfig(
        vocab_size=reasoner.model.config.get_text_config().vocab_size, hidden_size=160, intermediate_size=480,
        num_hidden_layers=8, num_attention_heads=5, num_key_value_heads=5, id2label=names, pad_token_id=0,
        max_position_embeddings=8192, label2id={n: i for i, n in names.items()},
    )  # fmt: skip
    planner = Planner(LlamaForSequenceClassification(config).eval(), reasoner.tokenizer, strategies)
    size, tenth = planner.model.num_parameters(), reasoner.model.num_parameters() / 10
    if size > tenth:
        raise SystemExit(f"the small planner has {size} parameters, more than a tenth of the reasoner's ({tenth:.0f})")
    return planner


def measure(
    name: str, reasoner: Reasoner, planner: Planner, goal: float, rows: int, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    seconds: dict[int, list[float]] = {steps: [] for steps in _STEPS}
    shares: dict[int, list[float]] = {steps: [] for steps in _STEPS}
    play(reasoner, planner, rows, 32, 2)  # warm up
    for _ in range(rounds):
        for steps in _STEPS:
            whole, planning = play(reasoner, planner, rows, tokens, steps)
            seconds[steps].append(whole)
            shares[steps].append(planning / whole)
            print(f"planner of {name}, {steps} steps: {whole:.1f} s, planner {planning / whole:.0%}", flush=True)
    times = {steps: statistics.median(values) for steps, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds[16], seconds[1], strict=True))
    # Linear in the number of steps: no step costs much more than the line through all of them says.
    slope, base = np.polyfit(_STEPS, [times[s] for s in _STEPS], 1)
    off = max(abs(times[s] / float(base + slope * s) - 1) for s in _STEPS)
    size = planner.model.num_parameters() / 1e6
    return [
        row(f"planner of {name} ({size:.0f}M): 16 steps / the same tokens in one", round(ratio, 2), unit="x",
            goal=f"at most {goal}", met=ratio <= goal),
        row(f"planner of {name}: largest deviation from a line in the steps", off, unit="share", goal="at most 10%",
            met=off <= 0.1),
        *(row(f"planner of {name}: {s} steps", round(times[s], 2), unit="s") for s in _STEPS),
        *(row(f"planner of {name}: planner's share of the time, {s} steps", statistics.median(shares[s]), unit="share")
          for s in _STEPS),
    ]  # fmt: skip


def play(reasoner: Reasoner, planner: Planner, rows: int, tokens: int, steps: int) -> tuple[float, float]:
    """Seconds of ``rows`` episodes of ``tokens`` sampled tokens in ``steps`` steps, and the planner's part of them.

    Every step takes one decision of the planner; the last one is termination.
    """
    planning = 0.0

    def timed(method: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal planning
            began = time.perf_counter()
            result = method(*args, **kwargs)
            planning += time.perf_counter() - began
            return result

        return wrapper

    rules = RolloutConfig(max_steps=steps + 1, step_tokens=tokens // steps, answer_tokens=1,
                          max_tokens=tokens + 64 * (steps + 2), batch=rows)  # fmt: skip
    termination = planner.strategies.termination
    others = [i for i in range(len(planner.strategies)) if i != termination]
    taken = dict.fromkeys(range(rows), 0)
    decide = LearnedSession.decide

    def as_planned(session: LearnedSession, slots: list[int], uniforms: list[float], temperature: float) -> Any:
        decisions = decide(session, slots, uniforms, temperature)
        for slot, decision, uniform in zip(slots, decisions, uniforms, strict=True):
            taken[slot] += 1
            decision.action = termination if taken[slot] == steps else others[int(uniform * len(others))]
        return decisions

    with (
        patch.object(Reasoner, "end_ids", frozenset()),
        patch.object(StepEnds, "ended", lambda ends, ids: False),
        patch.object(LearnedSession, "decide", timed(as_planned)),
        patch.object(LearnedSession, "start", timed(LearnedSession.start)),
        patch.object(LearnedSession, "observe", timed(LearnedSession.observe)),
    ):
        game = Game(reasoner, planner, rules)
        problems = [Problem(q, "1") for q in questions(rows)]
        began = time.perf_counter()
        episodes = game.play(problems, seed=0)
        whole = time.perf_counter() - began
    assert all(len(e.decisions) == steps and e.sampled_tokens == tokens for e in episodes)
    return whole, planning


if __name__ == "__main__":
    main()
