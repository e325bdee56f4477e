"""Hours of training on the nano lab: memory and open files must not grow.

    python -m studies.soak [--minutes 120] [--seed 0] [--record]

`rsim train nano`, 16 questions of 8 episodes a step, evaluations and checkpoints as often as in the demo, until the time is up;
then SIGTERM, which must end it with 0. Once a second the resident memory and the open files of the run's processes are read.
Memory moves with the lengths of the episodes, so medians are compared: the second fifth of the time with the last.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from studies.ledger import record, row
from studies.workload import show

_MIB = 2**20
_STALLED = 300  # seconds without a step; one takes some four


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write results/soak.json and its page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder) / "run", args.minutes, args.seed)
    show(rows)
    if args.record:
        record("soak", 7, "Hours of training", rows)


def measure(folder: Path, minutes: float, seed: int) -> list[dict[str, Any]]:
    changes = [f"out={folder}", "stages.stage1.steps=10000", "stages.stage2.steps=10000", "train.questions=16", f"seed={seed}"]
    command = [sys.executable, "-m", "rsim", "train", "nano", *(part for c in changes for part in ("--set", c))]
    told = folder.with_name("stderr")  # a pipe that no one reads would stop the run once it is full
    with told.open("w") as errors:
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
    err = "Traceback" in told.read_text()
    steps = sum("reward/accuracy" in line for line in (folder / "metrics.jsonl").read_text().splitlines())
    fifth = len(seen) // 5
    parts = [seen[i * fifth : (i + 1) * fifth] for i in range(5)]
    medians = [statistics.median(own + workers for own, workers, _ in part) for part in parts]
    of_workers = [statistics.median(workers for _, workers, _ in part) for part in parts]
    before, after = medians[1], medians[-1]
    files, files_after = (max(count for *_, count in part) for part in (parts[1], parts[-1]))
    growth = 100 * (after / before - 1)
    label = f"{minutes:g} minutes"
    return [
        row(f"{label}: steps", steps, seeds=[seed]),
        row(f"{label}: memory, medians of the fifths", _in_mib(medians), unit="MiB", seeds=[seed]),
        row(f"{label}: of it the processes that check answers", _in_mib(of_workers), unit="MiB", seeds=[seed]),
        row(f"{label}: growth of memory to the last fifth", round(growth, 2), unit="%", goal="within 2%", met=abs(growth) <= 2,
            seeds=[seed]),
        row(f"{label}: more open files than in the second fifth", files_after - files, goal="0", met=files_after <= files,
            seeds=[seed]),
        row(f"{label}: exit code after SIGTERM", process.returncode, goal="0", met=process.returncode == 0 and not err,
            seeds=[seed]),
    ]  # fmt: skip


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


if __name__ == "__main__":
    main()
