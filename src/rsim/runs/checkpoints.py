"""Checkpoints on disk: whole or not there, checked before they are trusted, old ones removed.

A checkpoint is written into a draft folder, its manifest (size and SHA-256 of every file) last; everything is flushed to the
disk before the draft takes its name. So what bears a checkpoint's name and holds a manifest was complete once, and the manifest
tells whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rsim.errors import UserError, first_line, of_a_disk

MANIFEST = "manifest.json"
_STEP = "step.txt"
Save = Callable[[Path], None]


class Checkpoints:
    """The folder ``path``: ``step-000010`` and the like to resume from (the ``keep`` newest), ``best`` and ``final``."""

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self.keep = path, keep

    def latest(self) -> Path | None:
        """The newest checkpoint to resume from, damaged or not."""
        found = sorted(self.path.glob("step-*"))
        return found[-1] if found else None

    def named(self, name: str) -> Path:
        """A checkpoint to resume from, by its name.

        Raises:
            UserError: there is none of that name.
        """
        found = sorted(p.name for p in self.path.glob("step-*"))
        if name not in found:
            raise UserError(f"no checkpoint {name!r} in {self.path}", f"there are {', '.join(found) or 'none'}")
        return self.path / name

    def intact(self, name: str = "") -> Path:
        """The newest checkpoint to resume from, or the one of that name.

        Raises:
            UserError: there is none, or it is damaged.
        """
        found = self.latest()
        if name or not found:
            found = self.named(name)
        verify(found)
        return found

    def save(self, name: str, step: int, models: dict[str, Save], state: dict[str, Any] | None) -> Path:
        """Writes ``{name}/{agent}`` for every model, ``state.pt``, the ``step`` that it is of, and the manifest.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are as they were.
        """
        target = self.path / name
        draft = target.with_name(f".{target.name}.draft")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            for agent, save in models.items():
                save(draft / agent)
            if state is not None:
                torch.save(state, draft / "state.pt")
            (draft / _STEP).write_text(f"{step}\n")
            _write_manifest(draft)
        except Exception as error:
            shutil.rmtree(draft, ignore_errors=True)
            if not of_a_disk(error):
                raise
            raise UserError(
                f"cannot write the checkpoint {target}: {first_line(error)}",
                "make room, then go on with --resume from the one before",
            ) from error
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
        flush(self.path)
        shutil.rmtree(old, ignore_errors=True)
        for old in sorted(self.path.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)
        return target

    def forget_after(self, checkpoint: Path) -> None:
        """Removes what a run wrote after ``checkpoint``, from which it goes on: newer checkpoints, and a best or final one of
        that time. A best or final one that a kill caught between two names gets its name back first."""
        for old in self.path.glob(".*.old"):
            target = self.path / old.name.removeprefix(".").removesuffix(".old")
            if not target.exists():
                os.replace(old, target)
        for path in self.path.glob("step-*"):
            if path.name > checkpoint.name:
                shutil.rmtree(path)
        for path in (self.path / "best", self.path / "final"):
            if path.is_dir() and step_of(path) > step_of(checkpoint):
                shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The training steps that led to a checkpoint; those of an earlier version's are not known, and more than any number."""
    file = checkpoint / _STEP
    if checkpoint.name.startswith("step-"):
        return int(checkpoint.name.removeprefix("step-"))
    return int(file.read_text()) if file.is_file() else sys.maxsize


def identity(checkpoint: Path) -> dict[str, str]:
    """What a table of results says of the ``checkpoint`` that it was measured with: its name and step for people, and a digest
    that only the same ``weights`` have (empty where there is no manifest)."""
    step, manifest = step_of(checkpoint), checkpoint / MANIFEST
    unnamed = step < sys.maxsize and not checkpoint.name.startswith("step-")
    name = f"{checkpoint.name} (step {step})" if unnamed else checkpoint.name
    if not manifest.is_file():
        return {"checkpoint": name, "weights": ""}
    files = json.loads(manifest.read_text(encoding="utf-8"))
    weights = [(file, known["sha256"]) for file, known in sorted(files.items()) if file.endswith(".safetensors")]
    return {"checkpoint": name, "weights": hashlib.sha256(repr(weights).encode()).hexdigest()}


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        flush(path)
        if not path.is_file():
            continue
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")
    flush(folder / MANIFEST)
    flush(folder)


def verify(checkpoint: Path, *, digests: bool = True) -> None:
    """Holds every file against the manifest; without ``digests`` only its presence and size, which takes no time.

    Raises:
        UserError: a file is missing, cut short or changed, or there is no manifest.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise _damaged(checkpoint, "it has no manifest (an earlier version wrote none)")
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(checkpoint, "its manifest cannot be read") from error
    for name, known in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(checkpoint, f"{name} is missing")
        if path.stat().st_size != known["bytes"]:
            raise _damaged(checkpoint, f"{name} has {path.stat().st_size} bytes in place of {known['bytes']}")
        if digests and _digest(path) != known["sha256"]:
            raise _damaged(checkpoint, f"{name} differs from its checksum")


def _damaged(checkpoint: Path, why: str) -> UserError:
    others = sorted(p.name for p in checkpoint.parent.glob("step-*") if p.name < checkpoint.name)
    remedy = f"go on from the one before with --resume-from {others[-1]}" if others else "there is none before it: start again"
    if not checkpoint.name.startswith("step-"):
        remedy = "use another checkpoint of the run"
    return UserError(f"checkpoint {checkpoint} is damaged: {why}", remedy)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Has a file or a folder's names written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
