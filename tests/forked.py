"""Commands in processes of their own that begin with rsim imported: forked from one that imported it once (seconds each)."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rsim.cli.train", "rsim.api", "rsim.training.trainer"])


class Forked:
    """``rsim`` with the given words, or a program's text; as a `subprocess.Popen` with pipes for what it says."""

    def __init__(self, command: list[str] | str, environment: Mapping[str, str]) -> None:
        self.said = [Path(tempfile.mkstemp()[1]) for _ in ("stdout", "stderr")]
        self.process = FORKS.Process(target=_run, args=(command, dict(environment), self.said))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise TimeoutError(self.said[1].read_text())
        out, err = (file.read_text() for file in self.said)
        return out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()


def _run(command: list[str] | str, environment: dict[str, str], said: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)

    import torch

    from rsim.cli.main import main

    torch.set_num_threads(1)
    if isinstance(command, str):
        exec(command, {"__name__": "__main__"})
    else:
        main(command)
