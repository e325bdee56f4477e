"""What the name of a run, a checkpoint or a preset stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rsim.config import Config, load_config, presets
from rsim.errors import UserError
from rsim.runs.checkpoints import MANIFEST, step_of, verify


def locate(run: str, overrides: list[str]) -> tuple[Config, Path | None]:
    """The config and checkpoint that a run folder, a checkpoint folder or a preset names.

    A run folder means its final checkpoint, or the newest one while it is still training. Strategies from a file of the
    user's own, which may be gone or say something else by now, are read as the planner keeps them.

    Raises:
        UserError: there is none of that name; an override of a model has no effect, since the checkpoint's is taken.
    """
    stated = {override.partition("=")[0].strip() for override in overrides}
    if "models.planner" in stated:
        raise UserError("--set models.planner", "has no effect here: --planner names another one")
    path = Path(run)
    if (path / "config.toml").is_file():
        final = path / "checkpoints" / "final"
        found = sorted((path / "checkpoints").glob("step-*"))
        gone_on = found and final.is_dir() and step_of(found[-1]) > step_of(final)  # with more steps, since it was written
        checkpoint = final if final.is_dir() and not gone_on else found[-1] if found else None
        if checkpoint is None:
            raise UserError(f"{run} has no checkpoint yet", "train it first")
        return _config_of(path, checkpoint, overrides, stated), checkpoint
    if ((path / "reasoner").is_dir() or (path / "planner").is_dir()) and (path.parent.parent / "config.toml").is_file():
        return _config_of(path.parent.parent, path, overrides, stated), path
    if run in presets() or path.suffix == ".toml":
        return load_config(run, overrides), None
    raise UserError(f"no run, checkpoint or preset {run!r}", f"train one first, or use a preset: {', '.join(presets())}")


def _config_of(run: Path, checkpoint: Path, overrides: list[str], stated: set[str]) -> Config:
    _check_whole(checkpoint)
    config, kept = load_config(str(run / "config.toml"), overrides), checkpoint / "planner" / "strategies.toml"
    if "models.reasoner" in stated and (checkpoint / "reasoner").is_dir():
        raise UserError(
            "--set models.reasoner", f"has no effect on {checkpoint}, which has its own: --reasoner names another one"
        )
    if "models.strategies" in stated or not config.models.strategies.endswith(".toml") or not kept.is_file():
        return config
    return replace(config, models=replace(config.models, strategies=str(kept)))


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
