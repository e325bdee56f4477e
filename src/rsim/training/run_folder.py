"""A run's folder: config, provenance, metrics, sampled episodes, checkpoints and trackers."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from rsim.config import Config, load_config, to_toml
from rsim.errors import UserError

_VERSIONED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_KEEP = 2  # newest checkpoints that are kept, beside the best and the final one


class RunFolder:
    """Everything that a run writes; checkpoints appear whole or not at all."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoints"

    @classmethod
    def open(cls, config: Config, *, resume: bool) -> RunFolder:
        """The folder to start in or to go on with; nothing is written yet.

        Raises:
            UserError: the folder has a run already and ``resume`` is off; or ``resume`` is on and there is no run there,
                it has no checkpoint yet, or it was made with another config.
        """
        folder = cls(config.folder, config)
        known = folder.path / "config.toml"
        if folder.latest() and not resume:
            raise UserError(f"{folder.path} already holds a run", "pass --resume to go on, or --set out=another/folder")
        if resume and not known.is_file():
            raise UserError(f"--resume: no run in {folder.path}", "start it without --resume")
        if resume and load_config(str(known)) != config:
            raise UserError(f"--resume: the config differs from {known}", "resume with the same settings")
        if resume and not folder.latest():
            raise UserError(f"--resume: the run in {folder.path} has no checkpoint yet", "start it again without --resume")
        return folder

    def begin(self, step: int | None) -> None:
        """Makes the folder ready to go on after ``step``, or afresh (None); a start that never got to its first
        checkpoint leaves nothing behind."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}", error.strerror or str(error)) from error
        if step is None:
            provenance = {
                "name": self.config.name,
                "seed": self.config.seed,
                "versions": {"python": platform.python_version()}
                | {name: importlib.metadata.version(name) for name in _VERSIONED},
                "git_commit": git_commit(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            (self.path / "run.json").write_text(json.dumps(provenance, indent=2) + "\n")
            (self.path / "config.toml").write_text(to_toml(self.config))
        self._forget_after(-1 if step is None else step)

    def append(self, name: str, record: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _forget_after(self, step: int) -> None:
        """Drops records of steps that will be done again."""
        for name in ("metrics.jsonl", "episodes.jsonl"):
            path = self.path / name
            if path.is_file():
                lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
                path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def latest(self) -> Path | None:
        found = sorted(self.checkpoints.glob("step-*/state.pt"))
        return found[-1].parent if found else None

    def save(self, name: str, models: dict[str, Any], state: dict[str, Any] | None) -> Path:
        """Writes ``{name}/{agent}`` for every model in Hugging Face layout, and ``state.pt`` last."""
        target, draft = self.checkpoints / name, self.checkpoints / f".{name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for agent, save in models.items():
            save(draft / agent)
        if state is not None:
            torch.save(state, draft / "state.pt")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(draft, target)
        for old in sorted(self.checkpoints.glob("step-*"))[:-_KEEP]:
            shutil.rmtree(old)
        return target


def records(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, in the order in which they were logged."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def sampled_tokens(run: Path) -> int:
    """Reasoner tokens that a run sampled in training, cold start included."""
    return int([r["sampled_tokens"] for r in records(run) if "sampled_tokens" in r][-1])


def git_commit() -> str:
    """The commit of the working directory, or of the source tree that rsim runs from, or "unknown"."""
    for place in (Path.cwd(), Path(__file__).parent):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


class Trackers:
    """Scalars to the trackers that the config names, beside ``metrics.jsonl``."""

    def __init__(self, names: tuple[str, ...], folder: Path, config: Config) -> None:
        self.writer: Any = None
        self.loggers: list[Any] = []
        for name in names:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder / "tensorboard"))
            elif name in ("wandb", "trackio"):
                try:
                    tracker = importlib.import_module(name)
                except ImportError as error:
                    raise UserError(f"tracker {name!r} is not installed", f"pip install {name}") from error
                tracker.init(project="rsim", name=config.name)
                self.loggers.append(tracker)
            else:
                raise UserError(f"unknown tracker {name!r}", "use tensorboard, wandb or trackio")

    def log(self, record: dict[str, Any]) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, record["step"])
        for logger in self.loggers:
            logger.log({"step": record["step"], **numbers})

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        for logger in self.loggers:
            logger.finish()
