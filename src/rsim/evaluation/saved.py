"""Evaluations that are kept in a folder: what they depend on, every episode, a summary; and that go on after a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from rsim.config import Config
from rsim.data.load import load_problems, mixed
from rsim.errors import UserError
from rsim.evaluation.evaluate import Evaluation, Record, summarise
from rsim.evaluation.loading import EvalSettings, load_game, planner_of_served, play_part
from rsim.evaluation.upstream import ServedGame, ServedModel
from rsim.game.problem import Problem
from rsim.game.progress import OnEpisode, heard_by
from rsim.game.rollout import Game
from rsim.policies.strategies import load_strategies, to_toml
from rsim.rules import PlayRules
from rsim.runs.checkpoints import MANIFEST, identity
from rsim.runs.folder import json_lines, write_whole
from rsim.runs.locate import locate
from rsim.runs.lock import locked
from rsim.settings import to_table


def evaluate_into(
    folder: Path,
    settings: EvalSettings,
    *,
    served: ServedModel | None = None,
    match_tokens: str = "",
    overwrite: bool = False,
    on_episode: OnEpisode = lambda done, of: None,
) -> Evaluation:
    """Evaluates and writes ``settings.json``, ``episodes.jsonl`` (as questions are done) and ``summary.json``.

    An evaluation that was stopped goes on when it is asked for again.

    Args:
        served: the reasoner is a model on a server.
        match_tokens: the folder of another evaluation, whose tokens per question the number of samples is to reach.
        on_episode: called with ``(done, of)`` as episodes end.

    Raises:
        UserError: the folder holds an evaluation with other settings, or a run, or is another process's.
    """
    evaluation = _prepared(settings, served, match_tokens)
    settings = evaluation.settings
    wanted = json.loads(json.dumps(evaluation.depends_on()))
    with locked(folder):
        records = _begin_or_resume(folder, wanted, settings.samples, overwrite)
        total = len(evaluation.problems) * settings.samples
        rounds = evaluation.rounds(len(records) // settings.samples)
        while done := _round(rounds, len(records), total, on_episode):
            with (folder / "episodes.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in done))
            records += done
    finished = folder / "summary.json"
    result = summarise(evaluation.name, records, evaluation.game)
    if finished.is_file():  # asked for again: nothing was played, and the planner's share of the time is what it was
        result.planner_share = json.loads(finished.read_text())["planner_share"]
    summary = evaluation.summary(result, estimated=any(r.get("estimated", False) for r in records))
    write_whole(finished, json.dumps(summary, indent=2) + "\n")
    return result


def _round(rounds: Iterator[list[Record]], begun: int, total: int, on_episode: OnEpisode) -> list[Record]:
    with heard_by(lambda done, of: on_episode(begun + done, total)):
        return next(rounds, [])


@dataclass(frozen=True)
class _Prepared:
    """An evaluation that can begin. ``data`` is the data set's name, ``models`` the folders that weights come from, ``source``
    what `rsim.runs.checkpoints.identity` says of the run's."""

    settings: EvalSettings
    config: Config
    data: str
    problems: list[Problem]
    game: Game | ServedGame
    models: list[Path]
    source: dict[str, str]

    @property
    def name(self) -> str:
        return self.settings.planner or ("trained planner" if self.game.names else "no planner")

    def depends_on(self) -> dict[str, Any]:
        """What ``settings.json`` keeps: an evaluation goes on only if nothing of this has changed."""
        models = {str(folder): _newest(folder) for folder in self.models}
        wanted = asdict(self.settings) | {"models": models, "means": _meaning(self.config, self.data)}
        if isinstance(self.game, ServedGame):
            wanted["served"] = {"url": self.game.served.url, "model": self.game.model, "mode": self.game.served.mode}
        return wanted

    def rounds(self, begun: int) -> Iterator[list[Record]]:
        """The records of the questions from number ``begun`` on, some at a time, in order."""
        at_once = self.game.served.at_once if isinstance(self.game, ServedGame) else self.config.rollout.batch
        count = max(1, 2 * at_once // self.settings.samples)  # questions between two writes
        for i in range(begun, len(self.problems), count):
            yield play_part(self.game, self.problems[i : i + count], i, self.settings, self.config)

    def summary(self, result: Evaluation, *, estimated: bool) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        served = self.game if isinstance(self.game, ServedGame) else None
        about = {key: getattr(self.settings, key) for key in ("run", "split", "seed", "greedy")}
        return {
            **result.to_json(),
            **about,
            **self.source,
            "data": self.data,
            "engine": served.served.url if served else self.config.rollout.engine,
            "estimated_tokens": estimated,
            **({"model": served.model} if served else {}),
        }


def _prepared(settings: EvalSettings, served: ServedModel | None, match_tokens: str) -> _Prepared:
    """Loads problems and models; ``match_tokens`` decides the number of samples (see `evaluate_into`)."""
    config, checkpoint = locate(settings.run, list(settings.overrides))
    data, rules = settings.data or config.data.eval, config.data
    problems = load_problems(
        data, settings.split, data_dir=rules.data_dir, limit=settings.limit, seed=settings.seed, columns=rules.columns
    )
    game: Game | ServedGame
    if served:
        planner = planner_of_served(config, checkpoint, settings.planner, problems)
        game = ServedGame(served, planner, config, settings.overrides)
    else:
        s = settings
        game = load_game(config, checkpoint, s.planner, s.reasoner, problems, s.seed, s.overrides)
    if match_tokens:
        if isinstance(game, ServedGame):
            raise UserError("--match-tokens", "is not there for a model on a server: give --samples")
        settings = replace(settings, greedy=False, samples=_samples_for(match_tokens, game, problems, settings.seed))
    played = (checkpoint, settings.planner.removeprefix("shuffled:"), settings.reasoner or config.models.reasoner)
    models = [Path(p) for p in played if p and Path(p).exists()]
    return _Prepared(settings, config, data, problems, game, models, identity(checkpoint) if checkpoint else {})


def _meaning(config: Config, data: str) -> dict[str, Any]:
    """What the names in the settings stand for: the part of the config that matters here, the strategies, the data."""
    table = to_table(config)
    del table["rollout"]["cuda_graphs"]  # how, not what
    for name in ("gate", "day"):  # which evaluations of earlier versions do not name
        if table["rollout"][name] == getattr(PlayRules, name):
            del table["rollout"][name]
    files = [Path(source) for source in mixed(data) if Path(source).is_file()]
    return {
        **{key: table[key] for key in ("models", "data", "rollout", "rewards")},
        "strategies": to_toml(load_strategies(config.models.strategies)),
        "data_written": sum(file.stat().st_mtime_ns for file in files),
    }


def _newest(folder: Path) -> int:
    """When a model's file, or one of its folder, was last written, in nanoseconds: changed weights are another evaluation. Of
    a checkpoint those that its manifest, the last of them, names: what else lies there (an evaluation) is none of its own."""
    manifest = folder / MANIFEST
    own = [manifest, *map(folder.joinpath, json.loads(manifest.read_text()))] if manifest.is_file() else folder.rglob("*")
    return max(path.stat().st_mtime_ns for path in ([folder] if folder.is_file() else own))


def _begin_or_resume(folder: Path, wanted: dict[str, Any], samples: int, overwrite: bool) -> list[dict[str, Any]]:
    """The records of whole questions that are there already; half-written ones are dropped."""
    known, episodes = folder / "settings.json", folder / "episodes.jsonl"
    held = ("config.toml", MANIFEST) if known.is_file() else ("config.toml", MANIFEST, "metrics.jsonl")
    if any((folder / name).is_file() for name in held):
        raise UserError(f"{folder} holds a run or a checkpoint", "give --out another folder")
    whole = json_lines(episodes) if episodes.is_file() else []
    if known.is_file() and not overwrite and json.loads(known.read_text()) == wanted:
        whole = whole[: len(whole) // samples * samples]
        write_whole(episodes, "".join(json.dumps(record) + "\n" for record in whole))
        return whole
    if known.is_file() and whole and not overwrite:  # else its first question failed: a wrong model's name, say
        raise UserError(
            f"{folder} holds an evaluation with other settings or weights", "give --out another folder, or --overwrite"
        )
    for name in ("summary.json", "episodes.jsonl", "table.json", "metrics.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)
    write_whole(known, json.dumps(wanted, indent=2) + "\n")
    return []


def _samples_for(summary: str, game: Game, problems: list[Problem], seed: int) -> int:
    """How many samples a question cost as many tokens as the evaluation ``summary`` did, rounded up."""
    path = Path(summary) / "summary.json" if Path(summary).is_dir() else Path(summary)
    try:
        budget = float(json.loads(path.read_text())["tokens_per_question"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--match-tokens {summary}", "give a folder that rsim eval wrote") from error
    trial = problems[: min(len(problems), 50)]
    episodes = game.play(trial, seed=seed, keys=[f"cost:{i}" for i in range(len(trial))])
    one = sum(e.sampled_tokens + e.injected_tokens for e in episodes) / len(episodes)
    return max(1, ceil(budget / one))
