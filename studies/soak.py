"""Hours of training on the nano lab: memory and open files must not grow.

`rsim train nano`, 16 questions of 8 episodes a step, evaluations and checkpoints as often as in the demo, until the time is up;
then SIGTERM, which must end it with 0. Once a second the resident memory and the open files of the run's processes are read.
Memory moves with the lengths of the episodes, so medians are compared: the second fifth of the time with the last.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from studies.ledger import Row
from studies.workload import training

ISSUE = 7
_MIB = 2**20
_STALLED = 300  # seconds without a step; one takes some four


def run(minutes: float = 120, seed: int = 0) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder) / "run", minutes, seed)


def measure(folder: Path, minutes: float, seed: int) -> list[Row]:
    endless = ("stages.stage1.steps=10000", "stages.stage2.steps=10000", "train.questions=16")
    told = folder.with_name("stderr")  # a pipe that no one reads would stop the run once it is full
    with told.open("w") as errors:
        command = training("nano", (f"out={folder}", *endless, f"seed={seed}"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    seen: list[tuple[int, int, int]] = []  # bytes of the process that trains and of its workers, open files of all
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself: {told.read_text()[-1000:]}")
        seen.append(_looked_at(process.pid))
        if len(seen) > _STALLED and time.time() - (folder / "metrics.jsonl").stat().st_mtime > _STALLED:
            raise SystemExit(f"no step within {_STALLED} s: the run stands still")
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=600)
    ended = process.returncode == 0 and "Traceback" not in told.read_text()
    steps = sum("reward/accuracy" in line for line in (folder / "metrics.jsonl").read_text().splitlines())
    fifth = len(seen) // 5
    parts = [seen[i * fifth : (i + 1) * fifth] for i in range(5)]
    medians = [statistics.median(own + workers for own, workers, _ in part) for part in parts]
    of_workers = [statistics.median(workers for _, workers, _ in part) for part in parts]
    files, files_after = (max(count for *_, count in part) for part in (parts[1], parts[-1]))
    growth, more = 100 * (medians[-1] / medians[1] - 1), files_after - files
    label, seeds = f"{minutes:g} minutes", [seed]
    grown = f"{label}: growth of memory to the last fifth"
    return [
        Row(f"{label}: steps", steps, seeds=seeds),
        Row(f"{label}: memory, medians of the fifths", _in_mib(medians), "MiB", seeds=seeds),
        Row(f"{label}: of it the processes that check answers", _in_mib(of_workers), "MiB", seeds=seeds),
        Row(grown, round(growth, 2), "%", "within 2%", abs(growth) <= 2, seeds=seeds),
        Row(f"{label}: more open files than in the second fifth", more, goal="0", met=more <= 0, seeds=seeds),
        Row(f"{label}: exit code after SIGTERM", process.returncode, goal="0", met=ended, seeds=seeds),
    ]


def _in_mib(sizes: list[float]) -> str:
    return ", ".join(f"{size / _MIB:.1f}" for size in sizes)


def _looked_at(pid: int) -> tuple[int, int, int]:
    own = psutil.Process(pid)
    memory, workers, files = own.memory_info().rss, 0, own.num_fds()
    for process in own.children(recursive=True):
        try:
            workers, files = workers + process.memory_info().rss, files + process.num_fds()
        except psutil.NoSuchProcess:  # a checker that has just ended
            continue
    return memory, workers, files
