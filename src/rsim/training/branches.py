"""Step-level credit: what a decision is worth, told by several continuations from the very state in which it was taken.

With outcome-only credit every decision of an episode gets the same advantage, the episode's return against its group's.
Here, after a question's group was played, one state of each episode is played on anew a few times. The episode is split there.
What comes after the state, as it went and as it went anew, is a group of its own: the advantage is the return against the mean
of all that began in this state, an estimate of its value (as in VinePPO, arXiv 2410.01679, section 4). What comes before it is
credited with that value in place of its own outcome, in the question's group. Only what is new costs tokens.

The continuations begin with what the planner samples, or (``train.branch_by = "distinct"``) each with another strategy, drawn
without replacement by the planner's probabilities. Then the state's value is the mean by these probabilities over the
strategies that were tried, and an advantage has its strategy's share of them as a factor, so that the gradient estimates the
same expectation over the planner's choice (Mean Actor Critic's sum over actions, arXiv 1709.00503, over those that were tried).
"""

from __future__ import annotations

import math
import random

from rsim.config import TrainConfig
from rsim.rollout.episode import Decision, Episode
from rsim.rollout.game import Game

_NEVER = 1e-6  # a probability: what is less likely is not tried


def continuations(
    game: Game, episodes: list[Episode], train: TrainConfig, *, seed: int, key: str, first: int, group: int
) -> list[Episode]:  # fmt: skip
    """Plays ``train.branches`` continuations from one state of each episode that has a state after its first step, and splits
    the episode there.

    Args:
        seed: with ``key``, all that sampling and the choice of states depend on.
        first: the number of the first of ``episodes`` among those of all ranks.
        group: the number of the first state's group; the state of episode ``first + i`` is ``group + first + i``.

    Returns:
        for each state the rest of the episode it is taken from (`Episode.split`), and its continuations.
    """
    found: list[Episode] = []
    open_: list[Episode] = []
    keys: list[str] = []
    for number, episode in enumerate(episodes, first):
        place = _place(episode.decisions, train.branch_at, random.Random(f"{seed}:{key}:{number}:state"))
        if place is None:
            continue
        decision = episode.decisions[place]
        if train.branch_by == "distinct":
            others = _others(decision, train.branches, random.Random(f"{seed}:{key}:{number}:strategies"))
            if not others:  # a planner that is sure here: the episode stays whole
                continue
            begun = [episode.branch(place, group + number, other) for other in others]
            together = [episode.split(place, group + number), *begun]
            _weigh(together, [decision.probabilities[action] for action in (decision.action, *others)])
        else:
            begun = [episode.branch(place, group + number) for _ in range(train.branches)]
            together = [episode.split(place, group + number), *begun]
        found += together
        open_ += begun
        keys += [f"{key}:{number}:branch:{i}" for i in range(len(begun))]
    if open_:
        game.go_on(open_, keys, seed=seed)
    return found


def _place(decisions: list[Decision], how: str, rng: random.Random) -> int | None:
    """The number of a decision after the first, whose states the question's own group compares already."""
    if len(decisions) < 2:
        return None
    if how == "uniform":
        return rng.randrange(1, len(decisions))
    return max(range(1, len(decisions)), key=lambda i: _entropy(decisions[i].probabilities))


def _others(decision: Decision, count: int, rng: random.Random) -> list[int]:
    """At most ``count`` strategies beside the one that was chosen, drawn without replacement by their probabilities."""
    left = {action: p for action, p in enumerate(decision.probabilities) if action != decision.action and p > _NEVER}
    drawn: list[int] = []
    while left and len(drawn) < count:
        drawn += rng.choices(list(left), list(left.values()))
        del left[drawn[-1]]
    return drawn


def _weigh(together: list[Episode], shares: list[float]) -> None:
    """Gives a state's episodes their weights, 1 on average; ``shares``: the probabilities of what they begin with."""
    for episode, share in zip(together, shares, strict=True):
        episode.weight = len(shares) * share / sum(shares)


def _entropy(probabilities: list[float]) -> float:
    """In nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)
