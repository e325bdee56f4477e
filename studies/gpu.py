"""One GPU, no internet: how fast it samples and trains.

*speed*: rollout of the native engine against transformers' ``generate``. *steps*: seconds, tokens and memory of training
steps: a planner (an adapter) for the frozen reasoner, and adapters for both.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from rsim.cli.options import Set
from rsim.errors import UserError
from rsim.policies.loading import load_reasoner, quiet_models
from studies import rollout
from studies.ledger import Row
from studies.workload import questions, steps_of, trained, training

ISSUE = 6
_LARGE = ("train.questions=16", "train.group=16", "rollout.batch=256", "train.micro_tokens=16384", "train.steps=4")
_SHORT = ("rollout.max_tokens=448", "rollout.temperature=0.7", "train.eval_every=0", "train.trackers=[]")
_JOBS = {
    "planner": ("plugin-qwen2.5-coder", ("models.planner_lora=32",)),
    "both": ("qwen2.5-coder-1.5b-gsm8k", ()),
}


def run(
    only: Literal["speed", "steps"] | None = None,
    reasoner: str = "qwen2.5-coder-1.5b",
    planner: str = "smollm2-135m",
    overrides: Set = None,
) -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU", "run this where there is one")
    quiet_models()
    if only != "steps":
        for model, dtype in ((reasoner, "bfloat16"), (planner, "float32")):
            yield from speed(model, dtype, rows=256, tokens=64, rounds=3)
    if only != "speed":
        models = (f"models.reasoner={json.dumps(reasoner)}", f"models.planner={json.dumps(planner)}")
        for name, (preset, changes) in _JOBS.items():
            yield from steps(name, preset, (*_LARGE, *_SHORT, *changes, *models, *(overrides or ())))


def speed(model: str, dtype: str, rows: int, tokens: int, rounds: int) -> Iterator[Row]:
    """The native engine against transformers' ``generate`` (dynamic cache, eager), all sequences of one length, in turn."""
    reasoner = load_reasoner(model, dtype=dtype)
    sides: dict[str, rollout.Side] = {
        "generate": partial(rollout.generated, copy.deepcopy(reasoner), rows, None),
        "native": partial(rollout.native, reasoner, rows),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):  # the first round warms up
        for side, sample in sides.items():
            rates[side].append(rollout.timed(sample, questions(1) * rows, [tokens if number else 4] * rows))
    ratio = statistics.median(a / b for a, b in zip(rates["native"][1:], rates["generate"][1:], strict=True))
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    label = f"rollout, {Path(model).name}, {dtype}, {rows} sequences of {tokens} tokens"
    for side, values in rates.items():
        yield Row(f"{label}: {side}", round(statistics.median(values[1:])), "tokens/s")
    yield Row(f"{label}: native / generate", round(ratio, 2), "x")
    yield Row(f"{label}: peak memory", round(peak, 1), "GiB")


def steps(name: str, preset: str, changes: tuple[str, ...]) -> Iterator[Row]:
    """A few steps of training on GSM8K; the first warms up."""
    with tempfile.TemporaryDirectory() as folder:
        trained(training(preset, (*changes, f"out={folder}/run")))
        warm = steps_of(Path(folder) / "run")[1:]
    label = f"steps, {name}"
    yield Row(f"{label}: seconds a step", round(statistics.median(s["seconds"] for s in warm), 1), "s")
    yield Row(f"{label}: seconds of rollout a step", round(statistics.median(s["seconds_rollout"] for s in warm), 1), "s")
    yield Row(f"{label}: sampled", round(statistics.median(s["tokens_per_second"] for s in warm)), "tokens/s")
    yield Row(f"{label}: peak memory", round(warm[-1]["gpu_memory_gib"], 1), "GiB")
