"""What an evaluation plays: from the name of a run, checkpoint or preset to models, planner and game."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsim.config import Config
from rsim.engine.vllm import VllmServers
from rsim.errors import UserError
from rsim.evaluation.evaluate import Record, episode_record, play_scored
from rsim.evaluation.obeyed import rules_for
from rsim.evaluation.planners import planner_from
from rsim.evaluation.upstream import ServedEpisode, ServedGame
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.models.device import allow_tf32, choose_device
from rsim.policies.loading import load_planner, load_reasoner
from rsim.policies.planner import Planner
from rsim.policies.protocol import AnyPlanner
from rsim.policies.strategies import load_strategies
from rsim.rewards.programs import runner_for


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation depends on, beside the run: kept in its folder, so that it can go on where it was stopped."""

    run: str
    planner: str = ""  # "": the run's
    reasoner: str = ""  # "": the run's
    data: str = ""  # "": the run's
    split: str = "test"
    limit: int = 200
    seed: int = 0
    greedy: bool = True
    samples: int = 1
    overrides: tuple[str, ...] = ()


def load_game(
    config: Config,
    checkpoint: Path | None,
    planner: str,
    reasoner: str,
    problems: list[Problem],
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Game:
    """The game of a run's ``checkpoint``; ``planner`` and ``reasoner``, unless empty, take the place of its own.

    A planner plays by the rules that it was trained under, but for ``overrides`` (``rollout.max_steps=4``).

    Raises:
        UserError: a model cannot be loaded, or there is no such planner (see `planner_from`).
    """
    models, device = config.models, choose_device(config)
    allow_tf32(device)
    trained = part_of(checkpoint, "reasoner")  # there is none where only the planner was trained
    source = reasoner or (str(trained) if trained else config.reasoner)
    strategies = load_strategies(models.strategies)
    served = config.rollout.engine != "native"
    # Else the server has the model that is meant; llama.cpp's takes no other.
    handed_over = config.rollout.engine == "vllm" and (bool(reasoner) or source != models.reasoner)
    loaded = load_reasoner(
        source,
        device=device.name,
        dtype=device.dtype,
        system_prompt=models.system_prompt,
        weights=not served or handed_over,
        quantised=models.quantised,
    )
    own = part_of(checkpoint, "planner")
    chosen: AnyPlanner | None = None
    place: dict[str, Any] = {"device": device.name, "dtype": device.dtype, "quantised": models.quantised}
    if planner:
        chosen = planner_from(
            planner,
            strategies,
            problems,
            reasoner=loaded,
            rules=config.rollout,
            trained=own,
            seed=seed,
            rewards=config.rewards,
            overrides=overrides,
            place=place,
        )
    elif own:
        chosen = load_planner(str(own), strategies, seed=0, **place)
    if isinstance(chosen, Planner):
        chosen.check_model(reasoner or models.reasoner, models.system_prompt)
    runner = runner_for(chosen, config.rewards)
    game = Game(loaded, chosen, rules_for(config.rollout, chosen, overrides), runner)
    if isinstance(game.servers, VllmServers) and handed_over:
        with tempfile.TemporaryDirectory() as folder:
            game.servers.check_updates(loaded.model, Path(folder) / "reasoner")
    return game


def part_of(checkpoint: Path | None, agent: str) -> Path | None:
    """The folder of the ``planner`` or ``reasoner`` in a checkpoint that has one."""
    folder = checkpoint / agent if checkpoint else None
    return folder if folder and folder.is_dir() else None


def planner_of_served(config: Config, checkpoint: Path | None, planner: str, problems: list[Problem]) -> AnyPlanner | None:
    """The planner that `load_game` would take, for a reasoner that is out of its reach."""
    strategies, device = load_strategies(config.models.strategies), choose_device(config)
    place: dict[str, Any] = {"device": device.name, "dtype": device.dtype, "quantised": config.models.quantised}
    if planner.partition(":")[0] in ("shuffled", "prompted"):
        raise UserError(f"--planner {planner}", "needs a reasoner in this process: leave --upstream out")
    if planner:
        return planner_from(planner, strategies, problems, place=place)
    own = part_of(checkpoint, "planner")
    return load_planner(str(own), strategies, seed=0, **place) if own else None


def play_part(
    game: Game | ServedGame,
    problems: list[Problem],
    first: int,
    settings: EvalSettings,
    config: Config,
    keys: list[str] | None = None,
) -> list[Record]:
    """The records of problems number ``first``, ``first + 1``, ..., as they are kept; ``keys`` as `play_scored` has them."""
    seed, greedy, samples = settings.seed, settings.greedy, settings.samples
    done, episodes, scores = play_scored(
        game, problems, config.rewards, seed=seed, greedy=greedy, samples=samples, first=first, keys=keys
    )
    records = []
    for numbers, episode, score in zip(done, episodes, scores, strict=True):
        counted = {"estimated": episode.usage.estimated} if isinstance(episode, ServedEpisode) else {}
        text = episode_record(episode, score, game.names)
        records.append({"step": 0} | text | numbers | counted | {"group": numbers["index"]})
    return records
