"""Step-level credit: what a decision is worth, told by several continuations from the very state in which it was taken.

With outcome-only credit every decision of an episode gets the same advantage, the episode's return against its group's.
Here, after a question's group was played, one state of each episode is played on anew a few times. The episode is split there.
What comes after the state, as it went and as it went anew, is a group of its own: the advantage is the return against the mean
of all that began in this state, an estimate of its value (as in VinePPO, arXiv 2410.01679, section 4). What comes before it is
credited with that value in place of its own outcome, in the question's group. Only what is new costs tokens.
"""

from __future__ import annotations

import math
import random

from rsim.config import TrainConfig
from rsim.rollout.episode import Decision, Episode
from rsim.rollout.game import Game


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
        begun = [episode.branch(place, group + number) for _ in range(train.branches)]
        found += [episode.split(place, group + number), *begun]
        open_ += begun
        keys += [f"{key}:{number}:branch:{i}" for i in range(train.branches)]
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


def _entropy(probabilities: list[float]) -> float:
    """In nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)
