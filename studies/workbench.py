"""What a study of trainings is made of: trainings, searches and evaluations, each done once and kept.

Every piece of work lies in a folder whose name holds a hash of its settings. Asked for again, by the same study or by
another one, it is there already; stopped in the middle, it goes on. Pieces that do not depend on each other run side by side in
processes of their own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rsim.config import Config, load_config
from rsim.data.load import load_problems
from rsim.errors import UserError
from rsim.evaluation.evaluate import evaluate, vote
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.planners import planner_from
from rsim.evaluation.saved import evaluate_into
from rsim.evaluation.search import SequenceSearch, accuracies, best_fixed
from rsim.game.rollout import Game
from rsim.lab.oracle import state_blind
from rsim.lab.pretrain import SIZES, PretrainConfig, pretrain
from rsim.models.weights import cache_folder
from rsim.policies.loading import load_reasoner, quiet_models
from rsim.policies.strategies import load_strategies
from rsim.settings import to_table
from rsim.training.trainer import Trainer

SEARCHED = {"fixed": 200, "sequence": 100, "climb": 200, "wait": 200}  # dev problems on which a control is picked
TEST_SEED = 4000  # of the problems that claims are measured on (docs/protocol.md); the demo's are others
_DEV_SEED = 1000  # of those problems: not the trainer's held-out ones


@dataclass(frozen=True)
class Training:
    """A preset, what is changed in it, and a seed; ``after``: a finished run that it goes on from."""

    preset: str
    changes: tuple[str, ...]
    seed: int
    after: Path | None = None


@dataclass(frozen=True)
class Measurement:
    """An evaluation: of a run's checkpoint or a preset, as `EvalSettings` has it."""

    run: str
    planner: str = ""
    reasoner: str = ""
    data: str = "lab"
    samples: int = 1
    match_tokens: str = ""  # the key of another measurement
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A finished evaluation: its summary, and for each question whether it was answered right (by majority)."""

    folder: Path
    summary: dict[str, Any]
    right: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


@dataclass
class Workbench:
    """``questions`` unseen problems are asked in every measurement, always the same ones."""

    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    questions: int = 1000
    test_seed: int = TEST_SEED
    jobs: int = 2
    changes: tuple[str, ...] = ()  # in every training, e.g. "train.steps=2" to try an experiment out
    quiet: bool = False

    def __post_init__(self) -> None:
        self.console = Console(stderr=True, quiet=self.quiet)

    def train(self, trainings: list[Training]) -> list[Path]:
        """The folders of the finished runs, in order."""
        configs = [self._config(t) for t in trainings]
        self._all(_train, [(c, t.after) for c, t in zip(configs, trainings, strict=True)], [c.folder for c in configs])
        return [c.folder for c in configs]

    def _config(self, training: Training) -> Config:
        config = load_config(training.preset, [*training.changes, *self.changes, f"seed={training.seed}", "train.trackers=[]"])
        return replace(config, out=str(self.out / "runs" / f"{config.name}-{training.seed}-{_digest(_changed(config))}"))

    def measure(self, measurements: dict[str, Measurement]) -> dict[str, Measured]:
        """Finished evaluations by the same keys; those that match another's tokens come after it."""
        folders: dict[str, Path] = {}
        for matching in (False, True):
            now = {k: m for k, m in measurements.items() if bool(m.match_tokens) == matching}
            for key, m in now.items():
                matched = str(folders[m.match_tokens]) if m.match_tokens else ""
                folders[key] = self._evaluation(replace(m, match_tokens=matched))
            arguments = [
                (folders[k], self._settings(m), str(folders[m.match_tokens]) if m.match_tokens else "") for k, m in now.items()
            ]
            self._all(_measure, arguments, [folders[k] for k in now])
        return {key: _measured(folders[key]) for key in measurements}

    def _evaluation(self, m: Measurement) -> Path:
        asked = {"questions": self.questions} | ({"test_seed": self.test_seed} if self.test_seed != TEST_SEED else {})
        digest = _digest(asdict(m) | asked)
        return self.out / "evaluations" / f"{Path(m.run).parent.parent.name or 'base'}-{digest}"

    def _settings(self, m: Measurement) -> EvalSettings:
        greedy = m.samples == 1
        return EvalSettings(
            m.run, m.planner, m.reasoner, m.data, "test", self.questions, self.test_seed, greedy, m.samples, m.changes
        )

    def search(self, kind: str, reasoners: list[str], preset: str = "nano", problems: int = 0, data: str = "") -> list[str]:
        """The best control of a kind (``fixed``, ``sequence``, ``climb``: by single changes from the sequences that are known,
        ``wait``) for each reasoner, on dev problems of ``data`` (default: the preset's)."""
        asked = problems or SEARCHED[kind]
        settings = [[preset, reasoner, asked, *filter(None, [data])] for reasoner in reasoners]
        files = [self.out / "searches" / f"{kind}-{_digest(s)}.json" for s in settings]
        self._all(_search, [(f, kind, r, preset, asked, data) for f, r in zip(files, reasoners, strict=True)], files)
        return [json.loads(f.read_text())["best"] for f in files]

    def base(self, name: str) -> str:
        """A lab base by name; pre-trained now if it is not there yet."""
        if name != "nano-s" and not (cache_folder() / name / "config.json").is_file():
            self.console.print(f"pre-training {name}: {SIZES[name].steps} steps")
            pretrain(PretrainConfig(size=name), cache_folder() / name, quiet=self.quiet)
        if name != "nano-s":
            made = json.loads((cache_folder() / name / "pretrain.json").read_text())["size"]
            if made != asdict(SIZES[name]):
                raise UserError(f"{cache_folder() / name} is of other settings: {made}", "remove it, and it is made anew")
        return name

    def _all(self, work: Callable[..., None], arguments: list[tuple[Any, ...]], targets: list[Path]) -> None:
        """Does each different piece of work that was not done yet."""
        todo = {target: given for target, given in zip(targets, arguments, strict=True) if not _done(target)}
        if not todo:
            return
        asked = os.environ.get("OMP_NUM_THREADS")  # for those who run something else beside it
        threads = int(asked) if asked else max(1, (os.cpu_count() or 1) // min(self.jobs, len(todo)))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(self.jobs, len(todo)), context, _begin, (threads,)) as pool:
            pending = {pool.submit(work, *given): target for target, given in todo.items()}
            for number, future in enumerate(as_completed(pending), 1):
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)  # what has not begun would be done before it is told
                future.result()
                self.console.print(f"  {number}/{len(pending)} {pending[future].name}")


def checkpoint(run: Path, agent: str = "", *, which: str = "best") -> str:
    """A run's checkpoint, ``best`` by held-out accuracy or ``final``, or one agent of it."""
    return str(run / "checkpoints" / which / agent)


def episodes(evaluation: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (evaluation / "episodes.jsonl").read_text(encoding="utf-8").splitlines()]


def _changed(config: Config) -> dict[str, Any]:
    """What differs from the defaults: a key that rsim gains later does not make a run another one."""
    usual = to_table(Config())
    flat = {key: value for key, value in to_table(config).items() if value != usual[key]}
    return {
        key: {k: v for k, v in value.items() if v != usual[key][k]} if isinstance(value, dict) else value
        for key, value in flat.items()
    }


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def _done(target: Path) -> bool:
    """A run's last checkpoint, an evaluation's summary or a search's file: each is written last, and whole."""
    return target.is_file() or (target / "summary.json").is_file() or (target / "checkpoints" / "final").is_dir()


def _measured(folder: Path) -> Measured:
    by_question: dict[int, list[dict[str, Any]]] = {}
    for record in episodes(folder):
        by_question.setdefault(record["index"], []).append(record)
    right = np.array([vote(group)["correct"] for _, group in sorted(by_question.items())])
    return Measured(folder, json.loads((folder / "summary.json").read_text()), right)


# --- what the processes do ---


def _begin(threads: int) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    quiet_models()


def _end_with(parent: int) -> None:
    """Nobody waits for what this process does once the one that began it was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _train(config: Config, after: Path | None) -> None:
    started = any((config.folder / "checkpoints").glob("step-*/manifest.json"))
    if not started:
        shutil.rmtree(config.folder, ignore_errors=True)
        if after:
            draft = config.folder.with_name(config.folder.name + ".draft")
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(after, draft, ignore=shutil.ignore_patterns("final"))
            draft.rename(config.folder)
    Trainer(config, resume=started or after is not None, force=after is not None).run()


def _measure(folder: Path, settings: EvalSettings, match_tokens: str) -> None:
    evaluate_into(folder, settings, match_tokens=match_tokens)


def _search(file: Path, kind: str, source: str, preset: str, asked: int, data: str) -> None:
    config = load_config(preset)
    rules, rewards, strategies = config.rollout, config.rewards, load_strategies(config.models.strategies)
    reasoner = load_reasoner(source, system_prompt=config.models.system_prompt)
    problems = load_problems(data or config.data.eval, "dev", data_dir=config.data.data_dir, limit=asked, seed=_DEV_SEED)
    tried: dict[str, float] = {}

    def accuracy(spec: str, count: int = asked) -> float:
        key = f"{spec} ({count})"
        if key not in tried:
            game = Game(reasoner, planner_from(spec, strategies, problems, reasoner=reasoner, rules=rules), rules)
            tried[key] = evaluate(spec, game, problems[:count], rewards, seed=0)[0].accuracy
        return tried[key]

    if kind == "fixed":
        best = best_fixed(strategies.names, accuracy)
    elif kind == "sequence":
        best = SequenceSearch(
            strategies.names, lambda specs, count: [accuracy(s, count) for s in specs], rules.max_steps
        ).best()
    elif kind == "climb":  # from the sequences that are known
        best = SequenceSearch(
            strategies.names,
            lambda specs, count: accuracies(reasoner, strategies, specs, problems[:count], config),
            rules.max_steps,
            starts=2,
            many=asked,
        ).climb([tuple(known[:-1]) for known in state_blind().values()])
    else:
        best = max((f"wait:{times}" for times in (1, 2, 3)), key=accuracy)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps({"best": best, "accuracy": tried}, indent=2) + "\n")
    draft.replace(file)
