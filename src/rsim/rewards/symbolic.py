"""Symbolic comparison of answers, and reasoning-gym's verifiers, in killable worker processes.

math-verify guards itself with ``signal.alarm``, which works in a main thread only and cannot stop a long integer power. Here
each comparison runs in a worker with a wall-clock, processor and memory limit; one that hangs, crashes or grows is killed and
replaced, the answer counts as wrong, and the failure is counted. Usable from threads, async handlers (through a thread) and
forked processes: a fork starts workers of its own.
"""

from __future__ import annotations

import atexit
import base64
import json
import logging
import os
import pickle
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rsim.errors import UserError

_log = logging.getLogger(__name__)
_START_SECONDS = 120.0  # importing a library on a busy machine
LONGEST = 20_000  # characters; longer texts are refused, not cut


@dataclass(frozen=True)
class Outcome:
    """``failure`` is empty, or says why the checker gave up (``same`` is then False)."""

    same: bool
    failure: str = ""


class SymbolicPool:
    """Up to ``workers`` processes, started when first needed.

    Args:
        workers: comparisons at once.
        seconds: wall-clock limit of one comparison.
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
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)  # a place without a process yet

    def same(self, gold: str, answer: str, *, decimals: int = 6, set_relations: bool = False) -> Outcome:
        """Whether ``answer`` (a bare answer or a whole text) says the same as ``gold``; never raises on any text.

        Args:
            decimals: floats are compared when rounded so.
            set_relations: ``x in [1, 2]`` may answer ``1 <= x <= 2``.
        """
        options = {"float_rounding": decimals, "allow_set_relation_comp": set_relations}
        return self._ask({"library": "math_verify", "gold": gold, "answer": answer, "options": options})

    def gym_mark(self, task: str, entry: dict[str, Any], answer: str) -> Outcome:
        """Whether the verifier of a reasoning-gym ``task`` gives ``answer`` full marks for its ``entry``."""
        packed = base64.b64encode(pickle.dumps(entry)).decode()
        return self._ask({"library": "reasoning_gym", "gold": "", "task": task, "entry": packed, "answer": answer})

    def _ask(self, request: dict[str, Any]) -> Outcome:
        if max(len(request["gold"]), len(request["answer"])) > LONGEST:
            return self._count(Outcome(False, "too long"), request)
        if self._owner != os.getpid():
            self._reset()
        worker, usable = self._idle.get(), False
        try:
            if worker is None or worker.process.poll() is not None:
                worker = _Worker(self.memory_mb, self.seconds)
            worker.load(request["library"])
            reply = worker.ask(request, self.seconds)
            if reply is None:
                outcome = Outcome(False, "timeout" if worker.process.poll() is None else "crash")
            else:
                outcome = Outcome(reply["same"], reply["failure"])
                usable = outcome.failure != "memory"
        finally:
            # One that was interrupted would give its answer to the next question.
            if worker is not None and not usable:
                worker.kill()
            self._idle.put(worker if usable else None)
        return self._count(outcome, request)

    def _count(self, outcome: Outcome, request: dict[str, Any]) -> Outcome:
        if outcome.failure:
            _log.warning(
                "gave up (%s) on the answer %.200r for gold %.200r", outcome.failure, request["answer"], request["gold"]
            )
            with self._lock:
                self.failures[outcome.failure] += 1
        return outcome

    def close(self) -> None:
        """Ends the workers; the pool can be used again afterwards."""
        if self._owner != os.getpid():
            return
        for _ in range(self.workers):
            worker = self._idle.get()
            if worker is not None:
                worker.kill()
            self._idle.put(None)


class _Worker:
    def __init__(self, memory_mb: int, seconds: float) -> None:
        command = [sys.executable, "-m", "rsim.rewards.symbolic_worker", str(memory_mb), str(seconds)]
        self.process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._rest = b""
        self._loaded: set[str] = set()

    def load(self, library: str) -> None:
        """Imports ``library`` in the worker, outside the time limit of an answer."""
        if library not in self._loaded and self.ask({"import": library}, _START_SECONDS) != {"loaded": library}:
            raise UserError(f"the answer checker cannot load {library}", "is it installed?")
        self._loaded.add(library)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply, or None when there was none in time or the worker is dead."""
        assert self.process.stdin is not None
        unsent = json.dumps(request).encode() + b"\n"
        try:
            while unsent:
                unsent = unsent[self.process.stdin.write(unsent) :]
        except BrokenPipeError:
            self.process.wait()
            return None
        line = self._read_line(seconds)
        if line is None:
            return None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _read_line(self, seconds: float) -> bytes | None:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(self.process.stdout.fileno(), 65536)
                if not part:
                    self.process.wait()
                    return None
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


_shared: SymbolicPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> SymbolicPool:
    """The process-wide pool that rewards and commands use."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = SymbolicPool(workers=max(2, os.cpu_count() or 2))
        return _shared
