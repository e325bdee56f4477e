"""A run in several processes, whole, with its layers cut (FSDP2) and by DeepSpeed (ZeRO 1 and 2), against the same run in one.

Losses of both agents step by step, and the final weights. nano-s, 16 questions of 8 episodes a step, in micro-batches of 2,048
tokens. Processes talk by gloo, one thread each; torchrun starts them. DeepSpeed has to be installed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file

from studies.ledger import Row
from studies.workload import SHORT, steps_of, trained, training

ISSUE = 7
_AGENTS = ("planner", "reasoner")


def run(ranks: int = 2, steps: int = 20, seed: int = 0) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield from measure(Path(folder), ranks, steps, seed)


def measure(place: Path, count: int, steps: int, seed: int) -> Iterator[Row]:
    alone, together, cut = place / "alone", place / "together", place / "cut"
    once = _train(alone, 1, steps, seed)
    several: list[tuple[Path, str, tuple[str, ...]]] = [(together, "", ()), (cut, ", layers cut", ("parallel.shard=true",))]
    for stage in (1, 2):
        config = place / f"zero-{stage}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        several.append((place / f"zero-{stage}", f", ZeRO {stage}", (f"parallel.deepspeed={config}",)))
    for folder, what, more in several:
        seconds = _train(folder, count, steps, seed, *more)
        label = f"{count} processes{what} against 1, {steps} steps"
        yield from differences(label, alone, folder, steps, seed)
        ratio = round(seconds / once, 2)
        yield Row(f"{label}: time of the whole run, {count} over 1, one thread each", ratio, "x", seeds=[seed])
    yield from differences(f"{count} processes, layers cut against whole, {steps} steps", together, cut, steps, seed)


def differences(label: str, one: Path, other: Path, steps: int, seed: int) -> Iterator[Row]:
    """Two runs of the same steps: losses, episodes and final weights."""
    before, after = steps_of(one), steps_of(other)
    for agent in _AGENTS:
        name = f"{agent}/loss"
        apart = max(abs(a[name] - b[name]) for a, b in zip(before, after, strict=True) if name in a)
        what = f"{label}: largest difference of the {agent}'s loss"
        yield Row(what, apart, goal="at most 1e-05", met=apart <= 1e-5, seeds=[seed])
    played = [k for k in before[0] if k.startswith(("accuracy", "reward/", "length/", "flags/", "strategy/"))]
    same = sum(all(a[k] == b[k] for k in played) for a, b in zip(before, after, strict=True))
    yield Row(f"{label}: steps whose episodes are the same", same, goal=f"{steps}", met=same == steps, seeds=[seed])
    for agent in _AGENTS:
        final = Path("checkpoints", "final", agent, "model.safetensors")
        weights, others = load_file(one / final), load_file(other / final)
        apart = max(float((weights[k] - others[k]).abs().max()) for k in weights)
        yield Row(f"{label}: largest difference of a weight of the {agent}", apart, seeds=[seed])


def _train(folder: Path, ranks: int, steps: int, seed: int, *more: str) -> float:
    """Seconds of a whole run."""
    stages = (f"stages.stage1.steps={steps // 2}", f"stages.stage2.steps={steps - steps // 2}", f"seed={seed}")
    changes = (f"out={folder}", *stages, *SHORT, "train.micro_tokens=2048", "train.eval_every=0", *more)
    began = time.perf_counter()
    trained(training("nano", changes, processes=ranks))
    return time.perf_counter() - began
