"""Plays every arm on every question and keeps the log.

Over a server each slot takes one question after another and plays its arms in turn, so that what they have in common is
read once; slots do not wait for each other. Questions on one text (all but the last paragraph) follow each other in a slot.
The native engine plays one arm of a piece after another, each in one batch.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

from rsim.collecting.arms import Arms, load_arms
from rsim.collecting.log import Log
from rsim.collecting.questions import questions
from rsim.config import Config, load_config
from rsim.engine.llama import LlamaServers
from rsim.engine.vllm import VllmServers
from rsim.errors import UserError
from rsim.evaluation.evaluate import Record
from rsim.evaluation.loading import EvalSettings, load_game, play_part
from rsim.evaluation.upstream import ServedGame, ServedModel
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.models.weights import origin
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import to_toml
from rsim.rules_file import RULE_FIELDS
from rsim.runs.lock import locked

_GREEDY = EvalSettings(run="")  # what `play_part` reads of it: greedy or not, one sample, a seed
Servers = LlamaServers | VllmServers | None
OnProgress = Callable[[int, int], None]  # episodes that the log has, of how many in all


@dataclass(frozen=True)
class Collection:
    """What is to be collected: see `rsim collect`. ``limit`` 0: all questions; ``piece``: questions in a file."""

    arms: str
    data: str
    split: str = "train"
    limit: int = 0
    model: str = ""
    piece: int = 50
    exclude: str = ""
    overrides: tuple[str, ...] = ()
    served: ServedModel | None = None


def collect(wanted: Collection, folder: Path, on_progress: OnProgress = lambda done, of: None) -> Log:
    """Plays what the log in ``folder`` lacks.

    Raises:
        UserError: wrong arms, settings or questions; the log was begun with others, or is another process's; a server fails
            (what was written stays).
    """
    arms = load_arms(wanted.arms)
    own = ["stages=[]"] + [f'models.reasoner="{wanted.model}"'] * bool(wanted.model)  # nothing is trained: any engine will do
    if not (wanted.model or wanted.served or any(o.partition("=")[0].strip() == "models.reasoner" for o in wanted.overrides)):
        raise UserError("no reasoner", "give --model, or --upstream URL")
    config = load_config(None, [*own, *arms.overrides, *wanted.overrides])
    problems = questions(wanted.data, wanted.split, limit=wanted.limit, exclude=wanted.exclude, config=config)
    with locked(folder):
        log, players = Log(folder), _players(arms, config, wanted.served)
        first = players[arms.arms[0].name]
        log.begin(_settings(wanted, config, arms, first), arms)
        lanes = _Lanes(_views(first, wanted, config), players, arms, config, wanted, log, on_progress)
        pieces = [problems[i : i + wanted.piece] for i in range(0, len(problems), wanted.piece)]
        for number in lanes.play(pieces):
            log.finish(number, [problem.id for problem in pieces[number]])
        return log


class _Lanes:
    """Plays side by side; each lane sees the servers in its own way and plays a question's arms one after the other."""

    def __init__(
        self,
        views: list[Servers],
        players: dict[str, Game | ServedGame],
        arms: Arms,
        config: Config,
        wanted: Collection,
        log: Log,
        on_progress: OnProgress,
    ) -> None:
        self.on_progress, self.of, self.left, self.lock = on_progress, 0, 0, Lock()
        self.players, self.config, self.wanted, self.log = players, config, wanted, log
        self.how = {a.name: replace(_GREEDY, greedy=not a.temperature, seed=a.seed) for a in arms.arms}
        self.done = {(record["id"], record["arm"]) for record in [*log.records(), *log.unfinished]}
        self.whole = views == [None]  # one engine plays a piece at a time
        self.count, self.stopped = len(views), Event()
        self.free: SimpleQueue[Servers] = SimpleQueue()
        for view in views:
            self.free.put(view)

    def play(self, pieces: list[list[Problem]]) -> Iterator[int]:
        """The numbers of the pieces, as they are complete."""
        asked = {(problem.id, arm) for piece in pieces for problem in piece for arm in self.players}
        self.of, self.left = len(asked), len(asked - self.done)
        self._progress(0)
        with ThreadPoolExecutor(self.count) as threads:
            left: dict[int, list[Future[None]]] = {number: [] for number in range(len(pieces))}
            for unit in self._units(pieces):
                future = threads.submit(self._unit, unit)
                for number in {number for number, _ in unit}:
                    left[number].append(future)
            try:
                for future in as_completed([future for futures in left.values() for future in futures]):
                    future.result()
                    for number in [n for n, futures in left.items() if all(f.done() and not f.exception() for f in futures)]:
                        del left[number]
                        yield number
            finally:  # where one has failed, or Ctrl-C came: the others end with the arm that they are playing
                self.stopped.set()
                threads.shutdown(wait=False, cancel_futures=True)

    def _units(self, pieces: list[list[Problem]]) -> list[list[tuple[int, list[Problem]]]]:
        """What a lane plays one after the other, each with the number of its piece: a piece, or questions on one text; of these
        so few that all lanes have work to the end."""
        if self.whole:
            return [[(number, piece)] for number, piece in enumerate(pieces)]
        most = max(sum(map(len, pieces)) // (4 * self.count), 1)
        units: dict[tuple[str, int], list[tuple[int, list[Problem]]]] = {}
        seen: Counter[str] = Counter()
        for number, piece in enumerate(pieces):
            for problem in piece:
                text = problem.question.rpartition("\n\n")[0] or problem.id
                units.setdefault((text, seen[text] // most), []).append((number, [problem]))
                seen[text] += 1
        return list(units.values())

    def _unit(self, unit: list[tuple[int, list[Problem]]]) -> None:
        view = self.free.get()
        try:
            for _, problems in unit:
                self._play(problems, view)
        finally:
            self.free.put(view)

    def _play(self, problems: list[Problem], view: Servers) -> None:
        for arm, player in self.players.items():
            missing = [problem for problem in problems if (problem.id, arm) not in self.done]
            if missing and not self.stopped.is_set():
                records = _play(player, view, missing, self.how[arm], self.config)
                about = {"data": self.wanted.data, "split": self.wanted.split, "arm": arm}
                self.log.keep([r | about | {"id": p.id} for p, r in zip(missing, records, strict=True)])
                self._progress(len(missing))

    def _progress(self, played: int) -> None:
        with self.lock:
            self.left -= played
            self.on_progress(self.of - self.left, self.of)


def _players(arms: Arms, config: Config, served: ServedModel | None) -> dict[str, Game | ServedGame]:
    """A game for each arm: one reasoner and its servers; system prompt and planner are the arm's own."""
    planners = {arm.name: sequence_planner(arms.strategies, list(arm.sequence)) for arm in arms.arms}
    players: dict[str, Game | ServedGame] = {}
    if served:
        for arm in arms.arms:
            rollout = replace(config.rollout, temperature=arm.temperature or config.rollout.temperature)
            own = replace(config, models=replace(config.models, system_prompt=arm.system_prompt), rollout=rollout)
            players[arm.name] = ServedGame(replace(served, at_once=1), planners[arm.name], own)
        return players
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "strategies.toml"
        file.write_text(to_toml(arms.strategies), encoding="utf-8")
        own = replace(config, models=replace(config.models, strategies=str(file)))
        first = load_game(own, None, "random", "", [])
    vocabulary = first.vocabulary  # made once: a copy of a game has what the game has
    for arm in arms.arms:
        reasoner = replace(first.reasoner, system_prompt=arm.system_prompt)
        rules = replace(first.rules, temperature=arm.temperature or first.rules.temperature)
        game = replace(first, reasoner=reasoner, planner=planners[arm.name], rules=rules)
        game.vocabulary = vocabulary
        players[arm.name] = game
    return players


def _views(player: Game | ServedGame, wanted: Collection, config: Config) -> list[Servers]:
    """The servers as each of the lanes that run side by side sees them; without servers there is one lane."""
    if isinstance(player, ServedGame):
        return [None] * (wanted.served.at_once if wanted.served else 1)
    if isinstance(player.servers, LlamaServers):
        return [*player.servers.single()[: config.rollout.batch]]
    if player.servers is None:
        return [None]
    views: list[Servers] = []
    for lane in range(config.rollout.batch):
        view = copy.copy(player.servers)
        view.servers = [view.servers[lane % len(view.servers)]]
        views.append(view)
    return views


def _play(player: Game | ServedGame, view: Servers, problems: list[Problem], how: EvalSettings, config: Config) -> list[Record]:
    if isinstance(player, Game) and view is not None:
        player = copy.copy(player)
        player.servers, player.rules = view, replace(player.rules, batch=1)
    return play_part(player, problems, 0, how, config, [problem.id for problem in problems])


def _settings(wanted: Collection, config: Config, arms: Arms, player: Game | ServedGame) -> dict[str, Any]:
    """What the answers depend on, beside an arm's own sequence and system prompt."""
    if isinstance(player, ServedGame):
        model = {"model": player.model, "weights": {}, "quantisation": "unknown", "template": "unknown"}
        model["mode"], engine = player.served.mode, player.served.url
    else:
        template = hashlib.sha256(str(player.reasoner.tokenizer.chat_template).encode()).hexdigest()
        engine = config.rollout.engine
        precision = "4 bits" if config.models.quantised else str(player.reasoner.model.dtype).removeprefix("torch.")
        at_server = player.servers.quantisation if isinstance(player.servers, LlamaServers) else "unknown"
        model = {
            "model": _shown(config.models.reasoner),
            "weights": origin(config.models.reasoner),
            "quantisation": precision if player.servers is None else at_server,
            "template": template,
        }
    excluded = hashlib.sha256(Path(wanted.exclude).read_bytes()).hexdigest() if wanted.exclude else ""
    return model | {
        "engine": engine,
        "data": wanted.data,
        "split": wanted.split,
        "excluded": excluded,
        "piece": wanted.piece,
        "checker": config.rewards.checker,
        "strategies": hashlib.sha256(to_toml(arms.strategies).encode()).hexdigest(),
        **{f"rules.{name}": getattr(config.rollout, name) for name in RULE_FIELDS},
    }


def _shown(model: str) -> str:
    """A model's name as a log has it: of a file or folder its last part, so that the log can go to another machine."""
    return Path(model).name if Path(model).exists() else model
