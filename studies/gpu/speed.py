"""How fast one GPU samples."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rsim.policies.loading import load_reasoner
from studies.ledger import row
from studies.rollout import _generate, _native
from studies.workload import questions


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
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return [
        *(row(f"rollout, {label}: {side}", round(value), unit="tokens/s") for side, value in found.items()),
        row(f"rollout, {label}: native / generate", round(ratio, 2), unit="x"),
        row(f"rollout, {label}: peak memory", round(peak, 1), unit="GiB"),
    ]
