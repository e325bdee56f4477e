"""A planner that has become sure is made to choose again, so that it can learn another task.

Policy gradients of what is never sampled are zero: a planner that says *continuation* with probability 0.999
stays with it, whatever the new task would need (docs/models.md has such a run).
"""

from __future__ import annotations

import math

import torch

from rsim.config import Config
from rsim.distributed.world import World
from rsim.errors import UserError
from rsim.evaluation.evaluate import Players
from rsim.game.problem import Problem
from rsim.policies.planner import Planner

_HIGHEST = 1e6  # a temperature


@torch.no_grad()
def reset_entropy(
    config: Config, game: Players, planner: Planner, problems: list[Problem], world: World
) -> tuple[dict[str, float], int]:
    """A planner that is surer in ``problems`` than ``train.entropy_reset`` allows begins less sure.

    Returns:
        a report (``entropy_reset/temperature``, ``entropy``, ``opened``) and the number of tokens sampled.
    """
    mine = world.block(len(problems))
    keys = [f"entropy_reset:{i}" for i in mine]
    episodes = world.all_gather(game.play([problems[i] for i in mine], seed=config.seed, keys=keys))
    states = planner.states([(e.planner_ids, [d.position for d in e.decisions]) for e in episodes])
    logits = planner.logits(states) / config.rollout.planner_temperature
    temperature = reset_temperature(logits, config.train.entropy_reset)
    flatten(planner, temperature)
    report = {
        "entropy_reset/temperature": temperature,
        "entropy_reset/entropy": mean_entropy(logits),
        "entropy_reset/opened": mean_entropy(logits / temperature),
    }
    return report, sum(e.sampled_tokens for e in episodes)


def reset_temperature(logits: torch.Tensor, entropy: float) -> float:
    """The temperature (at least 1) at which the mean entropy of ``logits [N, strategies]`` is ``entropy``
    nats or more.

    >>> round(reset_temperature(torch.tensor([[8.0, 0.0]]), 0.5), 2)
    5.76

    Raises:
        UserError: so many strategies cannot have this entropy, or there is no decision.
    """
    most = math.log(logits.shape[-1])
    if entropy >= most:
        raise UserError(
            f"train.entropy_reset = {entropy:g}",
            f"{logits.shape[-1]} strategies have less than {most:.2f} nats",
        )
    if not len(logits):
        raise UserError(
            "train.entropy_reset: the planner decided nothing in the episodes it was tried in", "set it to 0"
        )
    low, high = 1.0, _HIGHEST if mean_entropy(logits) < entropy else 1.0
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_entropy(logits / middle) < entropy else (low, middle)
    return high


@torch.no_grad()
def flatten(planner: Planner, temperature: float) -> None:
    """Divides the planner's logits by ``temperature`` for good: the weights of its head become smaller. The
    order of the strategies stays what it is, in every state."""
    for parameter in planner.model.score.parameters():
        parameter.div_(temperature)


def mean_entropy(logits: torch.Tensor) -> float:
    """Nats; of ``logits [N, strategies]``."""
    logprobs = logits.double().log_softmax(-1)
    return float(-(logprobs.exp() * logprobs).sum(-1).mean())
