"""Runs that are killed at random moments and go on end as one that was left alone; a damaged checkpoint is refused.

The run (nano-s, a checkpoint after each step) is started, killed with SIGKILL after a random time, resumed, killed again, and
so on until it ends; then another is begun, until enough kills have hit. Every third kill waits, from its moment on, until a
checkpoint is being written. After a kill before the first checkpoint it starts afresh, as rsim tells its user to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.ledger import Row
from studies.workload import training

ISSUE = 7
_TIMED = {"seconds", "seconds_rollout", "tokens_per_second"}


def run(kills: int = 30, steps: int = 12, seed: int = 0) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), kills, steps, random.Random(seed))


def measure(place: Path, kills: int, steps: int, rng: random.Random) -> list[Row]:
    whole, began = place / "whole", time.monotonic()
    _started(_command(whole, steps)).wait()
    killer = _Killer(steps, kills, time.monotonic() - began, rng)
    expected, weights = _metrics(whole), _weights(whole)
    runs, equal, apart = 0, 0, 0.0
    while killer.hits < kills:
        killed = place / f"killed-{runs}"
        killer.run(killed)
        runs, equal = runs + 1, equal + (_weights(killed) == weights)
        apart = max(apart, _apart(_metrics(killed), expected))
    refused = [_refused(whole, place / "damaged", damage) for damage in (_cut, _flip)]
    hits, in_save = killer.hits, killer.during_save
    random_kills = "kills with SIGKILL at random moments, every third while a checkpoint is written"
    bit_for_bit = "of these, final weights of both agents bit for bit those of a run left alone"
    far, damaged = (
        "largest difference of a metric from that of a run left alone",
        "damaged checkpoints (cut short, one bit flipped)",
    )
    return [
        Row(random_kills, hits, goal=f"{kills}", met=hits >= kills),
        Row("of these, while a checkpoint was being written", in_save, goal="some", met=in_save > 0),
        Row("runs that were killed again and again", runs),
        Row(bit_for_bit, equal, goal=f"all {runs}", met=equal == runs),
        Row(far, apart, goal="at most 1e-08", met=apart <= 1e-8),
        Row(f"{damaged} refused by name", sum(refused), goal="2", met=all(refused)),
    ]


def _command(folder: Path, steps: int, *more: str) -> list[str]:
    length = ("train.questions=16", "train.group=8", f"stages.stage1.steps={steps}", "stages.stage2.steps=0")
    saved = ("checkpoint.save_every=1", "train.eval_every=4", "data.eval_size=32", "train.trackers=[]")
    return training("nano", (f"out={folder}", *length, *saved), *more)


def _started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@dataclass
class _Killer:
    """Kills runs until there were ``kills``; a run that is left alone takes ``once`` seconds."""

    steps: int
    kills: int
    once: float
    rng: random.Random
    hits: int = 0
    during_save: int = 0

    def run(self, folder: Path) -> None:
        """Starts or resumes a run until it ends."""
        while True:
            resumed = any((folder / "checkpoints").glob("step-*"))
            began = time.time()
            process = _started(_command(folder, self.steps, *(["--resume"] if resumed else [])))
            if self.hits < self.kills:
                self._wait(process, folder, began)
            if process.poll() is None and self.hits < self.kills:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                self.hits += 1
                self.during_save += bool(_drafts(folder, began))
                continue
            _, err = process.communicate()
            if process.returncode != 0:
                raise SystemExit(f"the run did not go on: {err}")
            return

    def _wait(self, process: subprocess.Popen[str], folder: Path, began: float) -> None:
        moment, in_save = time.monotonic() + self.rng.uniform(0, self.once), self.hits % 3 == 2
        while process.poll() is None and (time.monotonic() < moment or (in_save and not _drafts(folder, began))):
            time.sleep(0.001)
        time.sleep(self.rng.uniform(0, 0.02) if in_save else 0.0)


def _drafts(folder: Path, began: float) -> list[Path]:
    """Checkpoints whose writing has begun since then and has not ended."""
    found = []
    for draft in (folder / "checkpoints").glob(".*.draft"):
        try:
            written = draft.stat().st_mtime
        except FileNotFoundError:  # it has just been given its name
            continue
        if written > began:
            found.append(draft)
    return found


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in _TIMED} for r in lines]


def _weights(folder: Path) -> list[bytes]:
    final = folder / "checkpoints" / "final"
    return [(final / agent / "model.safetensors").read_bytes() for agent in ("reasoner", "planner")]


def _apart(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """The largest difference; infinite where other lines, keys or words were written. (The sampler's log-probs, of which
    ``sampler_kl`` is made and nothing else, are equal in float32's last digits only.)"""
    if [r.keys() for r in lines] != [r.keys() for r in others]:
        return float("inf")
    pairs = [(a[k], b[k]) for a, b in zip(lines, others, strict=True) for k in a]
    return max((abs(x - y) if isinstance(x, (int, float)) else float("inf")) if x != y else 0.0 for x, y in pairs)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _refused(run: Path, copy: Path, damage: Callable[[Path], None]) -> bool:
    """Whether resuming from a damaged copy exits with 2 and one line that names the checkpoint."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1]
    damage(newest / "planner" / "model.safetensors")
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(run), str(copy)))
    done = subprocess.run(training(str(config), (), "--resume"), capture_output=True, text=True, check=False)
    return done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and f"{newest.name} is damaged" in done.stderr
