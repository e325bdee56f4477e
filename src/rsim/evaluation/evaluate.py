"""Accuracy of a reasoner, alone or planned, with bootstrap intervals and token counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsim.config import RewardsConfig
from rsim.data.problem import Problem
from rsim.rewards.check import check
from rsim.rewards.rewards import Score, checked_as, score_all
from rsim.rollout.episode import Episode
from rsim.rollout.game import Game, OnStep


@dataclass
class Evaluation:
    """``accuracy`` is strict (exactly one box, in the final step), ``flexible`` takes the last answer; ``low`` and ``high``
    bound the 95% bootstrap interval of the strict one. Tokens are means per question."""

    name: str
    accuracy: float
    low: float
    high: float
    flexible: float
    questions: int
    sampled_tokens: float
    injected_tokens: float
    usage: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_question(self) -> float:
        return self.sampled_tokens + self.injected_tokens

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "tokens_per_question": self.tokens_per_question}


def evaluate(
    name: str, game: Game, problems: list[Problem], rewards: RewardsConfig, *, seed: int, greedy: bool = True,
    on_step: OnStep | None = None,
) -> tuple[Evaluation, list[Episode], list[Score]]:  # fmt: skip
    """Plays every problem once and scores it."""
    episodes = game.play(problems, seed=seed, greedy=greedy, on_step=on_step)
    strategies = game.planner.strategies if game.planner else None
    scores = score_all(episodes, strategies, rewards)
    return summarise(name, episodes, scores, strategies.names if strategies else (), rewards), episodes, scores


def summarise(
    name: str, episodes: list[Episode], scores: list[Score], names: tuple[str, ...], rewards: RewardsConfig
) -> Evaluation:
    strict = [s.correct for s in scores]
    low, high = bootstrap_interval(strict)
    loose = [_flexible(e, s, rewards) for e, s in zip(episodes, scores, strict=True)]
    used = Counter(names[s.strategy] for e in episodes for s in e.steps if s.strategy >= 0)
    return Evaluation(
        name,
        accuracy=float(np.mean(strict)),
        low=low,
        high=high,
        flexible=float(np.mean(loose)),
        questions=len(episodes),
        sampled_tokens=float(np.mean([e.sampled_tokens for e in episodes])),
        injected_tokens=float(np.mean([e.injected_tokens for e in episodes])),
        usage={n: used[n] / max(sum(used.values()), 1) for n in names},
    )


def _flexible(episode: Episode, scored: Score, rewards: RewardsConfig) -> bool:
    """What strict reading found, flexible reading finds as well."""
    if scored.predicted is not None:
        return scored.correct
    problem = checked_as(episode.problem, rewards.checker)
    return check(problem, episode.final_text, "flexible", unsafe=rewards.unsafe_code)[1].right


def bootstrap_interval(outcomes: list[bool], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a mean.

    >>> bootstrap_interval([True] * 10)
    (1.0, 1.0)
    """
    values = np.asarray(outcomes, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)
