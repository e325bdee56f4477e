"""One folder, one process: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rsim.errors import UserError

log = logging.getLogger("rsim")

_held: dict[Path, TextIO] = {}  # by this process; a second file of one path would let go of the lock when it is closed


def lock(folder: Path) -> None:
    """Takes ``folder`` for this process until `unlock`, or its end. The file ``.lock`` names it; a name that a killed process
    left there is replaced, with a warning.

    Raises:
        UserError: another process has it, or it cannot be written to.
    """
    path = folder.resolve() / ".lock"
    if path in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write to {folder}", error.strerror or str(error)) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = _read(file)
        file.close()
        raise UserError(
            f"{folder}: another process, {owner}, is writing there", "wait for it, or take another folder"
        ) from error
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): let one process at a time write there", folder, error.strerror)
    else:
        if owner := _read(file):
            log.warning("%s was left locked by process %s, which is gone: it is taken over", folder, owner)
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file
    atexit.register(unlock, path.parent)


def unlock(folder: Path) -> None:
    """Gives ``folder`` free, if this process has it. The file stays, empty: who waits for it may have it open."""
    file = _held.pop(folder.resolve() / ".lock", None)
    if file is not None:
        file.truncate(0)
        file.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """``folder`` is this process's alone; raises as `lock` does."""
    lock(folder)
    try:
        yield
    finally:
        unlock(folder)


def _read(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip()
