"""How fast one GPU samples and trains, one thing at a time, nothing beside it."""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.rollout import _generate, _native
from bench.workload import questions
from rsim.models import load_reasoner
from rsim.report.ledger import row

_STEPS = 4  # of training; the first warms up


def rollout(model: str, dtype: str, rows: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """The native engine against transformers' ``generate`` (dynamic cache, eager), all sequences of one length, in turn."""
    reasoner = load_reasoner(model, dtype=dtype)
    sides: dict[str, Callable[..., None]] = {
        "generate": partial(_generate, copy.deepcopy(reasoner), rows, None),
        "native": partial(_native, reasoner, rows),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        length = tokens if number else 4
        for side, run in sides.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            run(questions(1) * rows, [length] * rows)
            torch.cuda.synchronize()
            rates[side].append(rows * length / (time.perf_counter() - began))
    found = {side: statistics.median(values[1:]) for side, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["native"][1:], rates["generate"][1:], strict=True))
    label = f"{Path(model).name}, {dtype}, {rows} sequences of {tokens} tokens"
    return [
        *(row(f"rollout, {label}: {side}", round(value), unit="tokens/s") for side, value in found.items()),
        row(f"rollout, {label}: native / generate", round(ratio, 2), unit="x"),
        row(f"rollout, {label}: peak memory", round(torch.cuda.max_memory_allocated() / 2**30, 1), unit="GiB"),
    ]


def step(name: str, preset: str, changes: list[str], out: Path) -> list[dict[str, Any]]:
    """Seconds, sampled tokens a second and peak memory of whole training steps, in a process of their own."""
    folder = out / f"speed-{name}"
    mine = [
        *changes,
        f"train.steps={_STEPS}",
        "train.eval_every=0",
        "cold_start.episodes=0",
        "train.save_every=1000",
        f"out={folder}",
    ]
    command = [sys.executable, "-m", "rsim", "train", preset, *(part for c in mine for part in ("--set", c))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [s for s in steps if "seconds" in s][1:]
    return [
        row(f"step, {name}: seconds", round(statistics.median(s["seconds"] for s in steps), 2), unit="s"),
        row(f"step, {name}: sampled tokens", round(statistics.median(s["tokens_per_second"] for s in steps)), unit="tokens/s"),
        row(f"step, {name}: peak memory", round(steps[-1]["gpu_memory_gib"], 1), unit="GiB"),
    ]
