"""A run's folder: config, provenance, metrics, sampled episodes, checkpoints and trackers."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsim.config import Config, load_config, to_toml
from rsim.errors import UserError, first_line
from rsim.runs.checkpoints import Checkpoints, flush
from rsim.runs.lock import lock
from rsim.settings import flat, to_table

_RECORDS = ("metrics.jsonl", "episodes.jsonl")
_VERSIONED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """Everything that a run writes."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.changed: list[str] = []  # keys of the config, since the run was last begun or gone on with
        self.checkpoints = Checkpoints(path / "checkpoints", config.checkpoint.keep)

    @classmethod
    def open(cls, config: Config, *, resume: bool, force: bool = False, hold: bool = False) -> RunFolder:
        """The folder to start in or to go on with; nothing of the run is written yet.

        Args:
            force: go on also with a config that has changed.
            hold: lock it for this process (`rsim.runs.lock`).

        Raises:
            UserError: the folder has a run or an evaluation already and ``resume`` is off; or ``resume`` is on and there is no
                run there, it has no checkpoint yet, or it was made with another config; or another process holds it.
        """
        folder = cls(config.folder, config)
        known = folder.path / "config.toml"
        if not resume and (folder.checkpoints.latest() or (folder.checkpoints.path / "final").is_dir()):
            raise UserError(f"{folder.path} already holds a run", "pass --resume to go on, or --set out=another/folder")
        if not resume and not known.is_file() and any((folder.path / name).is_file() for name in _RECORDS):
            raise UserError(f"{folder.path} holds an evaluation", "give --out another folder")  # a start would empty its files
        if resume and not known.is_file():
            raise UserError(f"--resume: no run in {folder.path}", "start it without --resume")
        if resume and not folder.checkpoints.latest():
            raise UserError(f"--resume: the run in {folder.path} has no checkpoint yet", "start it again without --resume")
        # Where a run lies is no setting of it: a moved folder, or its path spelt another way, goes on.
        before = replace(load_config(str(known)), out=config.out) if resume else config
        changed = folder.changed = differences(before, config)
        fixed = [change for change in changed if change.startswith(_FIXED)]
        if before.trains_reasoner != config.trains_reasoner:
            fixed.append("stages: whether the reasoner is trained")
        if fixed:
            raise UserError(f"--resume: {'; '.join(fixed)}", "that cannot be changed in mid-run: begin another one")
        if not force and any(not change.startswith(_FREE) or change.endswith(" -> 0") for change in changed):
            raise UserError(
                f"--resume: the config differs from {known}: {'; '.join(changed)}",
                "resume with the same settings, or pass --force to go on with the new ones",
            )
        if hold:
            lock(folder.path)
        return folder

    def begin(self, step: int, checkpoint: Path | None) -> None:
        """Makes the folder ready to go on after ``step`` from ``checkpoint``, or afresh (None); a start that never got to its
        first checkpoint leaves nothing behind."""
        try:
            self.checkpoints.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}", error.strerror or str(error)) from error
        kept = self._kept(-1 if checkpoint is None else step)
        provenance: dict[str, Any]
        if checkpoint is None:
            provenance = {
                "name": self.config.name,
                "seed": self.config.seed,
                "versions": {"python": platform.python_version()}
                | {name: importlib.metadata.version(name) for name in _VERSIONED},
                "git_commit": git_commit(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
        else:
            self.checkpoints.forget_after(checkpoint)
            provenance = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            if self.changed:
                provenance.setdefault("changed", []).append({"step": step, "keys": self.changed})
        write_whole(self.path / "run.json", json.dumps(provenance, indent=2) + "\n")
        write_whole(self.path / "config.toml", to_toml(self.config))
        for path, text in kept.items():
            write_whole(path, text)

    def flush(self) -> None:
        """Has the records written to the disk, before a checkpoint that comes after them."""
        for name in _RECORDS:
            if (self.path / name).is_file():
                flush(self.path / name)

    def append(self, name: str, record: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _kept(self, step: int) -> dict[Path, str]:
        """The files of records without those of steps that will be done again."""
        files = [self.path / name for name in _RECORDS if (self.path / name).is_file()]
        known = {path: json_lines(path) if step >= 0 else [] for path in files}
        return {path: "".join(json.dumps(r) + "\n" for r in lines if r["step"] <= step) for path, lines in known.items()}


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or, where there is no room for it (`OSError`), leaves it as it was."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        flush(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Of rsim and of what decides what models say."""
    own = {"rsim": str(importlib.import_module("rsim").__version__)}
    return own | {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def records(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, in the order in which they were logged."""
    return json_lines(run / "metrics.jsonl")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The records in a file; a last line that was cut is none.

    Raises:
        UserError: another line is damaged.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is damaged", first_line(error).partition(": line ")[0]) from error
    return found


def sampled_tokens(run: Path) -> int:
    """Reasoner tokens that a run sampled in training, cold start included."""
    return int([r["sampled_tokens"] for r in records(run) if "sampled_tokens" in r][-1])


# What the weights and optimisers of a checkpoint are made for.
_FIXED = (
    *("models.reasoner", "models.planner", "models.shared_base", "models.quantised", "models.strategies"),
    *("objective.loss", "objective.beta: 0.0"),
)


# What a run goes on with as it is told, without --force: how much may be spent (but not a limit that is left out).
_FREE = ("upstream.connections:", "upstream.max_requests:", "upstream.price_")


def differences(old: Config, new: Config) -> list[str]:
    """The keys in which two configs differ, each as ``key: old -> new``."""
    before, after = (flat(to_table(config)) for config in (old, new))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys]


def git_commit() -> str:
    """The commit of the working directory, or of the source tree that rsim runs from, or "unknown"."""
    if shutil.which("git") is None:
        return "unknown"
    for place in (Path.cwd(), Path(__file__).parent):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises `UserError` for a tracker that is not known, or not installed."""
    remedies = {"tensorboard": "pip install 'rsim-rl[train]', or --set 'train.trackers=[]'"}
    for name in names:
        if name not in ("tensorboard", "wandb", "trackio"):
            raise UserError(f"unknown tracker {name!r}", "use tensorboard, wandb or trackio")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker {name!r} is not installed", remedies.get(name, f"pip install {name}"))


class Trackers:
    """Scalars to the trackers that the config names, beside ``metrics.jsonl``."""

    def __init__(self, names: tuple[str, ...], folder: Path, config: Config, step: int = 0) -> None:
        """``step``: what was logged after it is to be logged again.

        Raises:
            UserError: an unknown tracker, one that is not installed, or one that cannot be reached.
        """
        self.writer: Any = None
        self.loggers: dict[str, Any] = {}
        check_trackers(names)
        for name in names:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
                continue
            tracker = importlib.import_module(name)
            with _naming(name):
                tracker.init(project=config.train.project, name=config.name, config=to_table(config))
            self.loggers[name] = tracker

    def log(self, record: dict[str, Any]) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, record["step"])
        for name, logger in self.loggers.items():
            with _naming(name):
                logger.log({"step": record["step"], **numbers})

    def table(self, name: str, step: int, columns: tuple[str, ...], rows: list[list[Any]]) -> None:
        """A table of texts, for those trackers that show one."""
        for tracker, logger in self.loggers.items():
            with _naming(tracker):
                logger.log({"step": step, name: logger.Table(columns=list(columns), data=rows)})

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        for name, logger in self.loggers.items():
            with _naming(name):
                logger.finish()


@contextmanager
def _naming(tracker: str) -> Iterator[None]:
    """Whatever a tracker's library raises becomes one line that names it; ``metrics.jsonl`` has all that it was to be told."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"tracker {tracker!r} failed: {first_line(error)}",
            "go on with --resume once it answers, or without it: --resume --force --set train.trackers=[]",
        ) from error
