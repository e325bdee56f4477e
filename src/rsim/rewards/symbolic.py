"""Symbolic comparison of answers, and reasoning-gym's verifiers, in sandboxed worker processes.

Third-party libraries read what a model wrote, and some hand it to ``eval``. Each library has workers of its
own, in the sandbox of `rsim.rewards.sandbox`: no network, nothing to write to, no privileges; every answer is
judged in a fork with limits on processor time, memory and system calls (`rsim.rewards.guest.verifier`). An
answer that hangs, crashes or grows ends its fork, counts as wrong, and the failure is counted. Usable from
threads, async handlers (through a thread) and forked processes: a fork starts workers of its own.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import logging
import os
import pickle
import queue
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsim.errors import UserError
from rsim.rewards import sandbox

_log = logging.getLogger(__name__)
_START_SECONDS = 120.0  # importing a library on a busy machine
_PATIENCE = 15  # wall clock to processor time; the worker itself gives up a little earlier
_LIBRARIES = {"math_verify": "rsim-rl[train]", "reasoning_gym": "rsim-rl[data]"}  # and what installs them
_MAIN = """
import sys
sys.path += sys.argv[1].split(":")
from rsim.rewards.guest.verifier import main
main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
"""
LONGEST = 20_000  # characters; longer texts are refused, not cut


@dataclass(frozen=True)
class Outcome:
    """``failure`` is empty, or says why the checker gave up (``same`` is then False)."""

    same: bool
    failure: str = ""


class SymbolicPool:
    """Up to ``workers`` processes for each library, started when first needed.

    Args:
        workers: comparisons at once.
        seconds: processor time of one comparison; on the wall clock it may take fifteen times as long.
        memory_mb: address space of a worker.
    """

    def __init__(self, workers: int = 2, seconds: float = 5.0, memory_mb: int = 2048) -> None:
        self.workers, self.seconds, self.memory_mb = workers, seconds, memory_mb
        self.failures: Counter[str] = Counter()
        self._reset()
        atexit.register(self.close)

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._idle: dict[str, queue.LifoQueue[_Worker | None]] = {
            name: queue.LifoQueue() for name in _LIBRARIES
        }
        for places in self._idle.values():
            for _ in range(self.workers):
                places.put(None)  # a place without a process yet

    def same(self, gold: str, answer: str, *, decimals: int = 6, set_relations: bool = False) -> Outcome:
        """Whether ``answer`` (a bare answer or a whole text) says the same as ``gold``; never raises on any
        text.

        Args:
            decimals: floats are compared when rounded so.
            set_relations: ``x in [1, 2]`` may answer ``1 <= x <= 2``.
        """
        options = {"float_rounding": decimals, "allow_set_relation_comp": set_relations}
        return self._ask("math_verify", {"gold": gold, "answer": answer, "options": options})

    def gym_mark(self, task: str, entry: dict[str, Any], answer: str, *, unsafe: bool = False) -> Outcome:
        """Whether the verifier of a reasoning-gym ``task`` gives ``answer`` full marks for its ``entry``.

        Raises:
            UserError: no sandbox can be built here and ``unsafe`` is off.
        """
        if not unsafe and not sandbox.sandbox_works():
            raise UserError(
                "reasoning-gym's verifiers evaluate answers, and no sandbox can be built here",
                "allow user namespaces, or set rewards.unsafe_code (--unsafe) to judge with limits alone",
            )
        return self._ask("reasoning_gym", {"gold": "", "task": task, "entry": entry, "answer": answer})

    def _ask(self, library: str, request: dict[str, Any]) -> Outcome:
        if max(len(request["gold"]), len(request["answer"])) > LONGEST:
            return self._count(Outcome(False, "too long"), request)
        if self._owner != os.getpid():
            self._reset()
        if importlib.util.find_spec(library) is None:
            raise UserError(f"grading this answer needs {library}", f"pip install '{_LIBRARIES[library]}'")
        idle = self._idle[library]
        worker, usable = idle.get(), False
        try:
            if worker is None or worker.process.poll() is not None:
                if worker is not None:
                    worker.kill()
                worker = _Worker(library, self.memory_mb, self.seconds)
            verdict = worker.ask(request, _PATIENCE * self.seconds)
            if verdict is None:
                outcome = Outcome(False, "timeout" if worker.process.poll() is None else "crash")
            else:
                outcome = Outcome(verdict == "same", "" if verdict in ("same", "different") else verdict)
                usable = True
        finally:
            # One that was interrupted would give its answer to the next question.
            if worker is not None and not usable:
                worker.kill()
            idle.put(worker if usable else None)
        return self._count(outcome, request)

    def _count(self, outcome: Outcome, request: dict[str, Any]) -> Outcome:
        if outcome.failure:
            _log.warning(
                "gave up (%s) on the answer %.200r for gold %.200r",
                outcome.failure,
                request["answer"],
                request["gold"],
            )
            with self._lock:
                self.failures[outcome.failure] += 1
        return outcome

    def close(self) -> None:
        """Ends the workers; the pool can be used again afterwards."""
        if self._owner != os.getpid():
            return
        for idle in self._idle.values():
            for _ in range(self.workers):
                worker = idle.get()
                if worker is not None:
                    worker.kill()
                idle.put(None)


class _Worker:
    """One process of `rsim.rewards.guest.verifier`, sandboxed where that is possible.

    Raises:
        UserError: the library cannot be loaded.
    """

    def __init__(self, library: str, memory_mb: int, seconds: float) -> None:
        folders = [*_package_folders(library), str(Path(__file__).parents[2])]
        jobs, replies = os.pipe(), os.pipe()
        arguments = [":".join(folders), library, jobs[0], replies[1], memory_mb, seconds]
        command = [sandbox.interpreter(), "-I", "-c", _MAIN, *map(str, arguments)]
        guest = str(Path(__file__).parent / "guest")
        with tempfile.TemporaryDirectory(prefix="rsim-") as root, tempfile.TemporaryFile() as errors:
            if sandbox.sandbox_works():
                command = sandbox.sandboxed(command, root, (*folders[:-1], guest))
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(jobs[0], replies[1]),
                env=sandbox.ENVIRONMENT | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
            os.close(jobs[0])
            os.close(replies[1])
            self._jobs, self._replies, self._rest = jobs[1], replies[0], b""
            if self._read_line(_START_SECONDS) != b"ready":
                self.kill()
                errors.seek(0)
                said = errors.read()[-500:].decode("utf-8", "replace").strip().splitlines()
                raise UserError(
                    f"the answer checker cannot load {library}", "; ".join(said[-1:]) or "it took too long"
                )

    def ask(self, request: dict[str, Any], seconds: float) -> str | None:
        """The verdict, or None when there was none in time or the worker is dead."""
        nonce = secrets.token_hex(16)
        job = pickle.dumps(request)
        unsent = f"{nonce} {len(job)}\n".encode() + job
        try:
            while unsent:
                unsent = unsent[os.write(self._jobs, unsent) :]
        except BrokenPipeError:
            self.process.wait()
            return None
        said, _, verdict = (self._read_line(seconds) or b"").decode().partition(" ")
        return verdict if said == nonce else None

    def _read_line(self, seconds: float) -> bytes | None:
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(self._replies, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(self._replies, 65536)
                if not part:
                    self.process.wait()
                    return None
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._jobs)
        os.close(self._replies)


@functools.cache
def _package_folders(library: str) -> list[str]:
    """Where installed packages lie, ``library`` among them.

    Raises:
        UserError: it is not installed.
    """
    found = importlib.util.find_spec(library)
    if found is None or found.origin is None:
        raise UserError(f"the answer checker needs {library}", "is it installed?")
    usual = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([str(Path(found.origin).parents[1]), *usual]))


_shared: SymbolicPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> SymbolicPool:
    """The process-wide pool that rewards and commands use."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = SymbolicPool(workers=max(2, os.cpu_count() or 2))
        return _shared
