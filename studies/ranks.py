"""A run in several processes, whole, with its layers cut (FSDP2) and by DeepSpeed (ZeRO stages 1 and 2), against the same run
in one: losses of both agents step by step, and the final weights.

    python -m studies.ranks [--ranks 2] [--steps 20] [--seed 0] [--record]

DeepSpeed has to be installed.

nano-s, 16 questions of 8 episodes a step, in micro-batches of 2,048 tokens. Processes talk by gloo, one thread each; torchrun
starts them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from studies.ledger import record, row
from studies.workload import show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write results/ranks.json and its page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.ranks, args.steps, args.seed)
    show(rows)
    if args.record:
        record("ranks", 7, "Several processes against one", rows)


def measure(place: Path, count: int, steps: int, seed: int) -> list[dict[str, Any]]:
    alone, together, cut = place / "alone", place / "together", place / "cut"
    once = _train(alone, 1, steps, seed)
    rows = []
    several: list[tuple[Path, str, str]] = [(together, "", ""), (cut, ", layers cut", "train.shard=true")]
    for stage in (1, 2):
        config = place / f"zero-{stage}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        several.append((place / f"zero-{stage}", f", ZeRO {stage}", f"train.deepspeed={config}"))
    for folder, what, more in several:
        seconds = _train(folder, count, steps, seed, *([more] if more else []))
        label = f"{count} processes{what} against 1, {steps} steps"
        rows += _differences(label, alone, folder, steps, seed)
        rows.append(row(f"{label}: time of the whole run, {count} over 1, one thread each", round(seconds / once, 2), unit="x",
                        seeds=[seed]))  # fmt: skip
    return rows + _differences(f"{count} processes, layers cut against whole, {steps} steps", together, cut, steps, seed)


def _differences(label: str, one: Path, other: Path, steps: int, seed: int) -> list[dict[str, Any]]:
    before, after = _records(one), _records(other)
    rows = []
    for agent in ("planner", "reasoner"):
        name = f"{agent}/loss"
        apart = max(abs(a[name] - b[name]) for a, b in zip(before, after, strict=True) if name in a)
        rows.append(row(f"{label}: largest difference of the {agent}'s loss", apart, goal="at most 1e-05", met=apart <= 1e-5,
                        seeds=[seed]))  # fmt: skip
    played = [k for k in before[0] if k.startswith(("accuracy", "reward/", "length/", "flags/", "strategy/"))]
    same = sum(all(a[k] == b[k] for k in played) for a, b in zip(before, after, strict=True))
    rows.append(row(f"{label}: steps whose episodes are the same", same, goal=f"{steps}", met=same == steps, seeds=[seed]))
    for agent in ("planner", "reasoner"):
        final = Path("checkpoints", "final", agent, "model.safetensors")
        weights, others = load_file(one / final), load_file(other / final)
        apart = max(float((weights[k] - others[k]).abs().max()) for k in weights)
        rows.append(row(f"{label}: largest difference of a weight of the {agent}", apart, seeds=[seed]))
    return rows


def _train(folder: Path, ranks: int, steps: int, seed: int, *more: str) -> float:
    first, second = steps // 2, steps - steps // 2
    changes = [f"out={folder}", f"stages.stage1.steps={first}", f"stages.stage2.steps={second}", "train.questions=16",
               "train.group=8", "train.micro_tokens=2048", "train.eval_every=0", "data.eval_size=8", "train.trackers=[]",
               f"seed={seed}", *more]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m", "rsim"]
    command = [*(launch if ranks > 1 else [sys.executable, "-m", "rsim"]), "train", "nano"]
    began = time.perf_counter()
    done = subprocess.run([*command, *(part for c in changes for part in ("--set", c))], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if "accuracy" in r]


if __name__ == "__main__":
    main()
