"""Symbolic comparison of answers in killable worker processes.

math-verify guards itself with ``signal.alarm``, which works in a main thread only and cannot stop a long integer power. Here
each comparison runs in a worker with a wall-clock, processor and memory limit; one that hangs, crashes or grows is killed and
replaced, the answer counts as wrong, and the failure is counted. Usable from threads, async handlers (through a thread) and
forked processes: a fork starts workers of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)
_START_SECONDS = 120.0  # importing sympy on a busy machine
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
        if max(len(gold), len(answer)) > LONGEST:
            return self._count(Outcome(False, "too long"))
        if self._owner != os.getpid():
            self._reset()
        worker = self._idle.get()
        try:
            if worker is None or worker.process.poll() is not None:
                worker = _Worker(self.memory_mb, self.seconds)
            options = {"float_rounding": decimals, "allow_set_relation_comp": set_relations}
            reply = worker.ask({"gold": gold, "answer": answer, "options": options}, self.seconds)
            if reply is None:
                outcome = Outcome(False, "timeout" if worker.process.poll() is None else "crash")
                worker.kill()
                worker = None
            else:
                outcome = Outcome(reply["same"], reply["failure"])
                if outcome.failure == "memory":
                    worker.kill()
                    worker = None
        except BaseException:
            if worker is not None:
                worker.kill()  # interrupted in the middle: its reply would be taken for the next one's
            worker = None
            raise
        finally:
            self._idle.put(worker)
        if outcome.failure:
            _log.warning("gave up (%s) on the answer %.200r for gold %.200r", outcome.failure, answer, gold)
        return self._count(outcome)

    def _count(self, outcome: Outcome) -> Outcome:
        if outcome.failure:
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
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._rest = b""
        if self._read_line(_START_SECONDS) != b"ready":
            self.kill()
            raise RuntimeError("the symbolic checker does not start: is math-verify installed?")

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply, or None when there was none in time."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


_shared: SymbolicPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> SymbolicPool:
    """The process-wide pool that rewards and commands use."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = SymbolicPool(workers=max(2, os.cpu_count() or 2))
        return _shared
