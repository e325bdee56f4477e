"""What `rsim plan` foretells for one and for two processes on this machine, against runs.

    python -m studies.plan [--ranks 1 2] [--steps 12] [--seed 0] [--record]

nano-s, 16 questions of 8 episodes, one thread for each process. Bytes are those that the loopback device counted (kernel:
/proc/net/dev), so nothing else may talk over it meanwhile. The plan is told the mean length of the episodes and of the
questions; what it times of the machine it times right after each run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from rsim.config import Config, load_config, to_toml
from rsim.policies.loading import quiet_models
from rsim.training.plan import Plan, plan, this_machine
from studies.ledger import record, row
from studies.workload import show

_GIB = 2**30
_QUESTION = 16  # tokens of a question of the lab with its prompt: 15.6 on average


@dataclass(frozen=True)
class Run:
    """A step's median seconds, mean sampled tokens of an episode, bytes on the loopback in all, largest process."""

    seconds: float
    tokens: float
    sent: int
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write results/plan.json and its page")
    args = parser.parse_args()
    quiet_models()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.ranks, args.steps, args.seed)
    show(rows)
    if args.record:
        record("plan", 7, "What rsim plan foretells, against runs", rows)


def measure(place: Path, counts: list[int], steps: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    foretold: dict[int, Plan] = {}
    found: dict[int, Run] = {}
    for count in counts:
        short, long = (_train(_config(place / f"{count}-{n}", n, seed), count) for n in (1, steps + 1))
        with this_machine(count, threads=1) as device:
            config = _config(place, steps, seed)
            foretold[count] = plan(config, device, count, tokens=round(long.tokens), question=_QUESTION)
        found[count] = long
        label = f"{count} process{'es' if count > 1 else ''}"
        rows += _rows(f"{label}: seconds of a step", foretold[count].step, long.seconds, "s", 1.5, seed)
        rows += _rows(f"{label}: memory of the largest", foretold[count].memory / _GIB, long.memory / _GIB, "GiB", 1.5, seed)
        if count > 1:
            sent = (long.sent - short.sent) / steps / count / 1e6
            rows += _rows(f"{label}: MB that each sends in a step", foretold[count].sent / 1e6, sent, "MB", 1.25, seed)
    if len(counts) > 1:
        first, last = counts[0], counts[-1]
        rows += _rows(f"{last} processes: times as fast as {first}", foretold[first].step / foretold[last].step,
                         found[first].seconds / found[last].seconds, "x", 1.25, seed)  # fmt: skip
    return rows


def _rows(what: str, foretold: float, measured: float, unit: str, within: float, seed: int) -> list[dict[str, Any]]:
    ratio = foretold / measured
    return [
        row(f"{what}, measured", round(measured, 2), unit=unit, seeds=[seed]),
        row(f"{what}, foretold over measured", round(ratio, 2), goal=f"within a factor of {within}",
            met=1 / within <= ratio <= within, seeds=[seed]),
    ]  # fmt: skip


def _config(folder: Path, steps: int, seed: int) -> Config:
    changes = [f"out={folder}", f"stages.stage1.steps={steps}", "stages.stage2.steps=0", "train.questions=16", "train.group=8",
               "train.eval_every=0", "train.save_every=1000", "data.eval_size=8", "train.trackers=[]", "cold_start.episodes=0",
               f"seed={seed}"]  # fmt: skip
    return load_config("nano", changes)


def _train(config: Config, ranks: int) -> Run:
    file = config.folder.with_suffix(".toml")
    file.write_text(to_toml(config))
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m", "rsim"]
    command = [*(launch if ranks > 1 else [sys.executable, "-m", "rsim"]), "train", str(file)]
    before, largest = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, 0
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            largest = max(largest, *(p.memory_info().rss for p in [watched, *watched.children(recursive=True)]))
        except psutil.NoSuchProcess:  # it ended between the two lines
            continue
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    if process.returncode:
        raise SystemExit(f"training failed: {' '.join(command)}")
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in lines if "seconds" in r]
    seconds = statistics.median(r["seconds"] for r in steps[1:] or steps)
    return Run(seconds, statistics.mean(r["length/sampled"] for r in steps), sent, largest)


if __name__ == "__main__":
    main()
