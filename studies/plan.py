"""What the cost model foretells for one and for two processes on this machine, against runs.

nano-s, 16 questions of 8 episodes, one thread for each process. Bytes are those that the loopback device counted (kernel:
/proc/net/dev), so nothing else may talk over it meanwhile. The plan is told the mean length of the episodes and of the
questions; this machine's speed is timed right after each run.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from rsim.config import Config, load_config, to_toml
from rsim.policies.loading import quiet_models
from rsim.training.cost import Cost, plan, this_machine
from studies.ledger import Row
from studies.workload import ONE_THREAD, SHORT, steps_of, training

ISSUE = 7
_GIB = 2**30
_QUESTION = 16  # tokens of a question of the lab with its prompt: 15.6 on average


@dataclass(frozen=True)
class Found:
    """A step's median seconds, mean sampled tokens of an episode, bytes on the loopback in all, largest process."""

    seconds: float
    tokens: float
    sent: int
    memory: int


def run(ranks: tuple[int, int] = (1, 2), steps: int = 12, seed: int = 0) -> Iterator[Row]:
    quiet_models()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        yield from measure(Path(folder), ranks, steps, seed)


def measure(place: Path, counts: tuple[int, int], steps: int, seed: int) -> Iterator[Row]:
    foretold: dict[int, Cost] = {}
    found: dict[int, Found] = {}
    for count in counts:
        short, long = (_train(_config(place / f"{count}-{n}", n, seed), count) for n in (1, steps + 1))
        config, device = _config(place, steps, seed), replace(this_machine(Config()), per_machine=count)
        said = plan(config, device, count, tokens=round(long.tokens), question=_QUESTION)
        foretold[count], found[count] = said, long
        label = f"{count} process{'es' if count > 1 else ''}"
        yield from _rows(f"{label}: seconds of a step", said.step, long.seconds, "s", 1.5, seed)
        yield from _rows(f"{label}: memory of the largest", said.memory / _GIB, long.memory / _GIB, "GiB", 1.5, seed)
        if count > 1:
            sent = (long.sent - short.sent) / steps / count / 1e6
            yield from _rows(f"{label}: MB that each sends in a step", said.sent / 1e6, sent, "MB", 1.25, seed)
    first, last = counts
    faster, measured = foretold[first].step / foretold[last].step, found[first].seconds / found[last].seconds
    yield from _rows(f"{last} processes: times as fast as {first}", faster, measured, "x", 1.25, seed)


def _rows(what: str, foretold: float, measured: float, unit: str, within: float, seed: int) -> Iterator[Row]:
    ratio, goal = foretold / measured, f"within a factor of {within}"
    yield Row(f"{what}, measured", round(measured, 2), unit, seeds=[seed])
    met = 1 / within <= ratio <= within
    yield Row(f"{what}, foretold over measured", round(ratio, 2), goal=goal, met=met, seeds=[seed])


def _config(folder: Path, steps: int, seed: int) -> Config:
    stages = (f"stages.stage1.steps={steps}", "stages.stage2.steps=0", "cold_start.episodes=0", f"seed={seed}")
    return load_config("nano", [f"out={folder}", *stages, *SHORT, "train.eval_every=0", "checkpoint.save_every=1000"])


def _train(config: Config, ranks: int) -> Found:
    file = config.folder.with_suffix(".toml")
    file.write_text(to_toml(config))
    command, quiet = training(str(file), (), processes=ranks), subprocess.DEVNULL
    before, largest = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, 0
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=os.environ | ONE_THREAD)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            largest = max(largest, *(p.memory_info().rss for p in [watched, *watched.children(recursive=True)]))
            process.wait(0.2)
        except (psutil.NoSuchProcess, subprocess.TimeoutExpired):  # one has just ended; it goes on
            continue
    if process.returncode:
        raise SystemExit(f"training failed: {' '.join(command)}")
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
    steps = steps_of(config.folder)
    seconds = statistics.median(r["seconds"] for r in steps[1:] or steps)
    return Found(seconds, statistics.mean(r["length/sampled"] for r in steps), sent, largest)
