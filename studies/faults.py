"""A run that is killed at random moments and goes on ends as one that was left alone; a damaged checkpoint is refused.

    python -m studies.faults [--kills 30] [--steps 12] [--seed 0] [--record]

The run (nano-s, 12 steps, a checkpoint after each) is started, killed with SIGKILL after a random time, resumed, killed again,
and so on until it ends; then another is begun, until enough kills have hit. Every third kill waits, from its moment on, until a
checkpoint is being written. After a kill before the first checkpoint it starts
afresh, as rsim tells its user to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from studies.ledger import record, row
from studies.workload import show

_TIMED = {"seconds", "seconds_rollout", "tokens_per_second"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", action="store_true", help="write results/faults.json and its page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.kills, args.steps, random.Random(args.seed))
    show(rows)
    if args.record:
        record("faults", 7, "Runs that die and go on", rows)


def measure(place: Path, kills: int, steps: int, rng: random.Random) -> list[dict[str, Any]]:
    whole = place / "whole"
    began = time.monotonic()
    _run(_command(whole, steps)).wait()
    once = time.monotonic() - began
    expected = _outcome(whole)
    hits, in_save, runs, equal, apart = 0, 0, 0, 0, 0.0
    while hits < kills:
        killed = place / f"killed-{runs}"
        found = _kill_until_done(killed, steps, once, hits, kills, rng)
        hits, in_save = hits + found["kills"], in_save + found["during_save"]
        lines, *weights = _outcome(killed)
        runs, equal = runs + 1, equal + (weights == [*expected[1:]])
        apart = max(apart, _apart(lines, expected[0]))
    refused = [_refused(whole, place / "damaged", damage) for damage in (_cut, _flip)]
    return [
        row("kills with SIGKILL at random moments, every third while a checkpoint is written", hits, goal=f"{kills}",
            met=hits >= kills),
        row("of these, while a checkpoint was being written", in_save, goal="some", met=in_save > 0),
        row("runs that were killed again and again", runs),
        row("of these, final weights of both agents bit for bit those of a run left alone", equal, goal=f"all {runs}",
            met=equal == runs),
        row("largest difference of a metric from that of a run left alone", apart, goal="at most 1e-08", met=apart <= 1e-8),
        row("damaged checkpoints (cut short, one bit flipped) refused by name", sum(refused), goal="2", met=all(refused)),
    ]  # fmt: skip


def _command(folder: Path, steps: int, *more: str) -> list[str]:
    changes = [f"out={folder}", f"stages.stage1.steps={steps}", "stages.stage2.steps=0", "train.questions=16", "train.group=8",
               "train.save_every=1", "train.eval_every=4", "data.eval_size=32", "train.trackers=[]"]  # fmt: skip
    return [sys.executable, "-m", "rsim", "train", "nano", *(part for c in changes for part in ("--set", c)), *more]


def _run(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _kill_until_done(folder: Path, steps: int, once: float, before: int, kills: int, rng: random.Random) -> dict[str, int]:
    """Starts or resumes the run until it ends, and kills it until there were ``kills``, with those ``before`` this run."""
    budget = kills - before
    found = {"kills": 0, "during_save": 0}
    while True:
        resumed = any((folder / "checkpoints").glob("step-*"))
        began = time.time()
        process = _run(_command(folder, steps, *(["--resume"] if resumed else [])))
        if found["kills"] < budget:
            moment = time.monotonic() + rng.uniform(0, once)
            in_save = (before + found["kills"]) % 3 == 2
            while process.poll() is None and (time.monotonic() < moment or (in_save and not _drafts(folder, began))):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02) if in_save else 0.0)
        if process.poll() is None and found["kills"] < budget:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            found["kills"] += 1
            found["during_save"] += bool(_drafts(folder, began))
            continue
        _, err = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"the run did not go on: {err}")
        return found


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


def _outcome(folder: Path) -> tuple[list[dict[str, Any]], bytes, bytes]:
    """Metrics without times, and the weights of both agents."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    final = folder / "checkpoints" / "final"
    weights = [(final / agent / "model.safetensors").read_bytes() for agent in ("reasoner", "planner")]
    return [{k: v for k, v in r.items() if k not in _TIMED} for r in lines], weights[0], weights[1]


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


def _refused(run: Path, copy: Path, damage: Any) -> bool:
    """Whether resuming from a damaged copy exits with 2 and one line that names the checkpoint."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1]
    damage(newest / "planner" / "model.safetensors")
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(run), str(copy)))
    done = subprocess.run([sys.executable, "-m", "rsim", "train", str(config), "--resume"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    return done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and f"{newest.name} is damaged" in done.stderr


if __name__ == "__main__":
    main()
