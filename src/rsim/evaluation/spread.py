"""An evaluation spread over a Ray cluster: each replica loads the models once and plays some questions at a time.

What comes out does not depend on who played what (`play_scored`), so it is the evaluation of one process. A replica that dies
is started again, with the questions that it had; questions are handed back in order, so that a stopped evaluation goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rsim.distributed.ray_cluster import connect
from rsim.errors import UserError
from rsim.evaluation.evaluate import Record
from rsim.evaluation.loading import EvalSettings, load_game, play_part
from rsim.game.problem import Problem
from rsim.policies.loading import quiet_models
from rsim.runs.locate import locate

_RESTARTS = 3  # of a replica, and of the questions that it had


@dataclass(frozen=True)
class Replica:
    """What a replica told of its game: `rsim.evaluation.evaluate.Players`."""

    names: tuple[str, ...]
    parameters: dict[str, int]
    planner_share: float


class _Player:
    """Inside the cluster: the game of an evaluation."""

    def __init__(self, folder: str, settings: EvalSettings, problems: list[Problem]) -> None:
        os.chdir(folder)
        quiet_models()
        self.settings, self.problems = settings, problems
        self.config, checkpoint = locate(settings.run, list(settings.overrides))
        self.game = load_game(
            self.config, checkpoint, settings.planner, settings.reasoner, problems, settings.seed, settings.overrides
        )

    def play(self, first: int, count: int) -> tuple[list[Record], Replica]:
        part = self.problems[first : first + count]
        records = play_part(self.game, part, first, self.settings, self.config)
        return records, Replica(self.game.names, self.game.parameters, self.game.planner_share)


def spread(
    settings: EvalSettings, problems: list[Problem], starts: list[int], count: int, workers: int
) -> Iterator[tuple[list[Record], Replica]]:
    """The records of ``count`` questions from each of ``starts`` on, in order, played by ``workers`` replicas on the cluster
    that ``RAY_ADDRESS`` names, or on this machine alone. Each has a GPU where the cluster has any, else a CPU.

    Raises:
        UserError: Ray is not installed, or has too few of them; a replica failed, or died time after time.
    """
    ray = connect()
    from ray.exceptions import RayError
    from ray.util import ActorPool

    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU", 0) else "CPU"
    if resources.get(kind, 0) < workers:
        raise UserError(f"--workers {workers}", f"the cluster has {resources.get(kind, 0):.0f} {kind}s")
    gpus = int(kind == "GPU")
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(_Player)
    shared = ray.put(problems)
    players = [remote.remote(str(Path.cwd()), settings, shared) for _ in range(min(workers, max(1, len(starts))))]
    try:
        yield from ActorPool(players).map(lambda player, first: player.play.remote(first, count), starts)
    except RayError as error:
        raise UserError(f"a replica failed: {str(error).strip().splitlines()[-1]}") from error
    finally:
        for player in players:
            ray.kill(player)
