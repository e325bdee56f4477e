"""Rule-based rewards of both agents; every part is returned on its own so that it can be logged."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

from rsim.answers.extract import boxed
from rsim.config import RewardsConfig
from rsim.game.episode import Episode
from rsim.game.problem import Kind, Problem
from rsim.policies.strategies import TERMINATION, StrategySet
from rsim.rewards.custom import Reward
from rsim.rewards.grade import Verdict, grade, read_answer


@dataclass(frozen=True)
class Score:
    """The returns of one episode. ``parts`` holds each weighted part; ``correct`` is strict (one box, final
    step); ``failure`` says why the checker gave up on the answer, if it did."""

    predicted: str | None
    correct: bool
    planner: float
    reasoner: float
    parts: dict[str, float]
    failure: str = ""


def score(
    episode: Episode,
    strategies: StrategySet | None,
    config: RewardsConfig,
    custom: dict[str, Reward] | None = None,
) -> Score:
    """Scores a finished episode.

    Reasoner: ``accuracy + format + follow``; planner: ``accuracy + terminal - penalty``; a custom part
    is added to its agent's, or to both. Answers and evidence come from sampled tokens only; a prompt may have
    opened the box or code block that the answer is written into (`Step.answer`). Without an answer,
    ``format``, ``follow`` and ``terminal`` are 0.
    """
    problem = checked_as(episode.problem, config.checker)
    episode = replace(episode, problem=problem)
    predicted = None if episode.truncated else read_answer(episode.final_text, "strict", problem.kind)
    verdict = Verdict(False) if predicted is None else grade(problem, predicted, unsafe=config.unsafe_code)
    correct = verdict.right
    answered = predicted is not None
    repeated = repeats(episode, strategies, config.repeat_allowance) if strategies else 0
    parts = {
        "accuracy": config.accuracy * correct,
        "format": config.format * (answered and well_formatted(episode)),
        "follow": config.follow * follow_share(episode, strategies) * answered if strategies else 0.0,
        "terminal": config.terminal * (episode.terminated and answered),
        "penalty": -min(config.penalty * repeated, config.penalty_cap) if strategies else 0.0,
    }
    own = custom or {}
    extra = {name: reward(episode) for name, reward in own.items()}
    planner, reasoner = (
        sum(extra[name] for name, reward in own.items() if reward.agent in ("both", agent))
        for agent in ("planner", "reasoner")
    )
    return Score(
        predicted,
        correct,
        planner=parts["accuracy"] + parts["terminal"] + parts["penalty"] + planner,
        reasoner=parts["accuracy"] + parts["format"] + parts["follow"] + reasoner,
        parts=parts | extra,
        failure=verdict.failure,
    )


def score_all(
    episodes: list[Episode],
    strategies: StrategySet | None,
    config: RewardsConfig,
    custom: dict[str, Reward] | None = None,
) -> list[Score]:
    """`score` of every episode; where answers are checked in other processes, several at once."""
    if all(checked_as(e.problem, config.checker).kind == "numeric" for e in episodes):
        return [score(e, strategies, config, custom) for e in episodes]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda e: score(e, strategies, config, custom), episodes))


def checked_as(problem: Problem, checker: str) -> Problem:
    """The problem, checked by its own kind (``auto``) or by the kind that the config names."""
    return problem if checker == "auto" else replace(problem, kind=cast(Kind, checker))


def well_formatted(episode: Episode) -> bool:
    """Every step says something, exactly one box closes the last one, and nothing was cut off."""
    return (
        not episode.truncated
        and bool(episode.steps)
        and all(step.text.strip() for step in episode.steps)
        and read_answer(episode.final_text, "strict", episode.problem.kind) is not None
        and not any(boxed(step.text) for step in episode.steps[:-1])
    )


def follow_share(episode: Episode, strategies: StrategySet) -> float:
    """Share of steps that show evidence of their strategy; repeat-free ones (*continuation*) are left out."""
    seen = []
    for step in episode.steps:
        if step.strategy < 0 or strategies[step.strategy].repeat_free:
            continue
        strategy = strategies[step.strategy]
        if strategy.name == TERMINATION:
            seen.append(read_answer(step.answer, "strict", episode.problem.kind) is not None)
        else:
            seen.append(strategy.shows_evidence(step.text))
    return sum(seen) / len(seen) if seen else 0.0


def repeats(episode: Episode, strategies: StrategySet, allowance: int) -> int:
    """Decisions that repeat a strategy beyond ``allowance`` uses in the episode.

    With an allowance of 2, ``[validation] * 5`` counts 3; *continuation* never counts.
    """
    counts = Counter(d.action for d in episode.decisions if not strategies[d.action].repeat_free)
    return sum(max(0, n - allowance) for n in counts.values())
