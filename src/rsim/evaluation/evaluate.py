"""Accuracy of a reasoner, alone or planned, with bootstrap intervals, token counts and compute."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import comb
from typing import Any, Protocol

import numpy as np

from rsim.answers.extract import parse_number, plain_latex
from rsim.config import RewardsConfig
from rsim.game.episode import FLAGS, Episode
from rsim.game.problem import Problem
from rsim.game.record import episode_json
from rsim.game.rollout import OnStep
from rsim.policies.protocol import AnyPlanner
from rsim.rewards.grade import check
from rsim.rewards.rewards import Score, checked_as, score_all

Record = dict[str, Any]
_Z = 1.96  # standard deviations on both sides of 95%


class Players(Protocol):
    """Who plays: a `Game`, or a planner and a model on a server (`upstream.ServedGame`), of which no size is known: 0."""

    planner: AnyPlanner | None

    def play(
        self,
        problems: list[Problem],
        *,
        seed: int,
        group_size: int = 1,
        keys: list[str] | None = None,
        greedy: bool = False,
        on_step: OnStep | None = None,
    ) -> list[Episode]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def parameters(self) -> dict[str, int]: ...
    @property
    def planner_share(self) -> float: ...


@dataclass
class Evaluation:
    """``accuracy`` is strict (exactly one box, in the final step), ``flexible`` takes the last answer; ``low`` and ``high``
    bound the 95% bootstrap interval of the strict one. With several samples a question, ``accuracy`` is the majority vote's,
    ``mean_accuracy`` a single sample's, and ``pass_at`` the chance that one of k is right.

    Tokens are per question, over all its samples; ``tflops`` count 2 per parameter and token read (arXiv 2001.08361, section
    2.1), both models, a question's prompt once. ``usage`` is each strategy's share of the steps, ``accuracy_with`` the
    accuracy of the episodes that used it, ``flags`` the share of episodes with each flag; ``planner_share`` is the
    planner's part of the time.
    """

    name: str
    accuracy: float
    low: float
    high: float
    flexible: float
    questions: int
    sampled_tokens: float
    injected_tokens: float
    usage: dict[str, float] = field(default_factory=dict)
    samples: int = 1
    mean_accuracy: float = 0.0
    pass_at: dict[str, float] = field(default_factory=dict)
    planner_tokens: float = 0.0
    tflops: float = 0.0
    planner_share: float = 0.0
    accuracy_with: dict[str, float] = field(default_factory=dict)
    steps: float = 0.0
    flags: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_question(self) -> float:
        return self.sampled_tokens + self.injected_tokens

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "tokens_per_question": self.tokens_per_question}


def evaluate(
    name: str,
    game: Players,
    problems: list[Problem],
    rewards: RewardsConfig,
    *,
    seed: int,
    greedy: bool = True,
    on_step: OnStep | None = None,
) -> tuple[Evaluation, list[Episode], list[Score]]:
    """Plays every problem once and scores it."""
    records, episodes, scores = play_scored(game, problems, rewards, seed=seed, greedy=greedy, on_step=on_step)
    return summarise(name, records, game), episodes, scores


def play_scored(
    game: Players,
    problems: list[Problem],
    rewards: RewardsConfig,
    *,
    seed: int,
    greedy: bool,
    samples: int = 1,
    first: int = 0,
    keys: list[str] | None = None,
    on_step: OnStep | None = None,
) -> tuple[list[Record], list[Episode], list[Score]]:
    """Plays and scores problems number ``first``, ``first + 1``, ...: what comes out does not depend on how a set is cut.

    ``keys`` name their random streams, by default their numbers.
    """
    keys = keys or [str(first + i) for i in range(len(problems))]
    episodes = game.play(problems, seed=seed, group_size=samples, keys=keys, greedy=greedy, on_step=on_step)
    scores = score_all(episodes, game.planner.strategies if game.planner else None, rewards)
    records = [
        outcome(episode, scored, first, number, samples, game.names, rewards)
        for number, (episode, scored) in enumerate(zip(episodes, scores, strict=True))
    ]
    return records, episodes, scores


def outcome(
    episode: Episode, scored: Score, first: int, number: int, samples: int, names: tuple[str, ...], rewards: RewardsConfig
) -> Record:
    """What `summarise` reads of the ``number``-th episode of problems number ``first``, ``first + 1``, ..."""
    return {
        "index": first + number // samples,
        "sample": number % samples,
        "kind": episode.problem.kind,
        "predicted": scored.predicted,
        "correct": scored.correct,
        "flexible": _flexible(episode, scored, rewards),
        "prompt_tokens": episode.prompt_length,
        "sampled_tokens": episode.sampled_tokens,
        "injected_tokens": episode.injected_tokens,
        "planner_tokens": len(episode.planner_ids),
        "step_count": len(episode.steps),
        "flags": [f for f in FLAGS if getattr(episode, f)],
        "strategies": [names[s.strategy] for s in episode.steps] if names else [],
    }


def episode_record(episode: Episode, score: Score, names: tuple[str, ...]) -> Record:
    """An episode as it is written to ``episodes.jsonl``."""
    return episode_json(episode, names) | {
        "predicted": score.predicted,
        "correct": score.correct,
        "rewards": {"planner": score.planner, "reasoner": score.reasoner},
        "names": list(names),
    }


def summarise(name: str, records: list[Record], players: Players) -> Evaluation:
    """The numbers of an evaluation from its records, ordered by question and sample."""
    by_question: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_question[record["index"]].append(record)
    groups = list(by_question.values())
    samples = len(groups[0])
    strict = [vote(group)["correct"] for group in groups]
    low, high = bootstrap_interval(strict)
    names, parameters = players.names, players.parameters
    used = Counter(s for r in records for s in r["strategies"])
    used_by: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        for strategy in set(record["strategies"]):
            used_by[strategy].append(record["correct"])
    right = [sum(r["correct"] for r in group) for group in groups]
    ks = [k for k in (2**i for i in range(20)) if k <= samples]

    def total(key: str) -> float:
        return float(sum(r[key] for r in records)) / len(groups)

    read = total("sampled_tokens") + total("injected_tokens") + total("prompt_tokens") / samples
    return Evaluation(
        name,
        accuracy=float(np.mean(strict)),
        low=low,
        high=high,
        flexible=float(np.mean([vote(group)["flexible"] for group in groups])),
        questions=len(groups),
        sampled_tokens=total("sampled_tokens"),
        injected_tokens=total("injected_tokens"),
        usage={n: used[n] / max(sum(used.values()), 1) for n in names},
        samples=samples,
        mean_accuracy=float(np.mean([r["correct"] for r in records])),
        pass_at={str(k): float(np.mean([pass_at_k(samples, c, k) for c in right])) for k in ks},
        planner_tokens=total("planner_tokens"),
        tflops=2e-12 * (parameters["reasoner"] * read + parameters["planner"] * total("planner_tokens")),
        planner_share=players.planner_share,
        steps=total("step_count"),
        flags={f: float(np.mean([f in r["flags"] for r in records])) for f in FLAGS},
        accuracy_with={n: float(np.mean(used_by[n])) for n in names if n in used_by},
    )


def vote(samples: list[Record]) -> Record:
    """The sample whose answer most samples share (self-consistency, arXiv 2203.11171); the earliest of equals.

    Answers are compared as numbers, else as plain LaTeX; samples without an answer have no vote.
    """
    answers = [canonical(r["predicted"]) for r in samples]
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return samples[0]
    best = max(counts.values())
    return next(r for r, a in zip(samples, answers, strict=True) if a is not None and counts[a] == best)


def canonical(answer: str | None) -> str | None:
    """An answer in the form that equal answers share: a number, else plain LaTeX."""
    if answer is None:
        return None
    number = parse_number(answer)
    return str(number) if number is not None else plain_latex(answer)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of ``k`` of the samples, drawn without replacement, is right (arXiv 2107.03374, equation 1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 0, 2)
    (0.25, 1.0, 0.0)
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def _flexible(episode: Episode, scored: Score, rewards: RewardsConfig) -> bool:
    """What strict reading found, flexible reading finds as well."""
    if scored.predicted is not None:
        return scored.correct
    problem = checked_as(episode.problem, rewards.checker)
    return check(problem, episode.final_text, "flexible", unsafe=rewards.unsafe_code)[1].right


def bootstrap_interval(outcomes: list[bool] | list[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a mean. Of a proportion (outcomes are bools) where all or none are right, which
    a bootstrap has no spread for, Wilson's.

    >>> bootstrap_interval([True] * 10)
    (0.722..., 1.0)
    """
    if len(set(outcomes)) == 1 and isinstance(outcomes[0], bool):
        beyond = _Z**2 / (len(outcomes) + _Z**2)
        return (1 - beyond, 1.0) if outcomes[0] else (0.0, beyond)
    values = np.asarray(outcomes, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)
