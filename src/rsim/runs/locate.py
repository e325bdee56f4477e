"""What the name of a run, a checkpoint or a preset stands for."""

from __future__ import annotations

from pathlib import Path

from rsim.config import Config, load_config, presets
from rsim.errors import UserError
from rsim.runs.checkpoints import MANIFEST, verify


def locate(run: str, overrides: list[str]) -> tuple[Config, Path | None]:
    """The config and checkpoint that a run folder, a checkpoint folder or a preset names.

    A run folder means its final checkpoint, or the newest one while it is still training.
    """
    path = Path(run)
    if (path / "config.toml").is_file():
        final = path / "checkpoints" / "final"
        found = sorted((path / "checkpoints").glob("step-*"))
        checkpoint = final if final.is_dir() else found[-1] if found else None
        if checkpoint is None:
            raise UserError(f"{run} has no checkpoint yet", "train it first")
        _check_whole(checkpoint)
        return load_config(str(path / "config.toml"), overrides), checkpoint
    if ((path / "reasoner").is_dir() or (path / "planner").is_dir()) and (path.parent.parent / "config.toml").is_file():
        _check_whole(path)
        return load_config(str(path.parent.parent / "config.toml"), overrides), path
    if run in presets() or path.suffix == ".toml":
        return load_config(run, overrides), None
    raise UserError(f"no run, checkpoint or preset {run!r}", f"train one first, or use a preset: {', '.join(presets())}")


def evaluation_folder(run: str) -> Path:
    """Where an evaluation of ``run``, as `locate` has it, is kept unless it is told otherwise: never in a checkpoint, whose
    folder another one replaces."""
    path = Path(run)
    if not path.is_dir():
        return Path("runs/eval")
    return path / "eval" if (path / "config.toml").is_file() else path.parent.parent / f"eval-{path.name}"


def _check_whole(checkpoint: Path) -> None:
    """A checkpoint that lacks a file would be taken for one of a planner or a reasoner alone."""
    if (checkpoint / MANIFEST).is_file():
        verify(checkpoint, digests=False)
