"""What the measurements share: questions made on the spot, training as a command, processes of their own."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

_NAMES = ("Tom", "Ann", "Mia", "Leo", "Zoe", "Max")
_THINGS = ("hens", "boxes of pens", "rows of chairs", "bags of rice", "shelves of books")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# A short run of the preset nano that nothing else disturbs: 16 questions of 8 episodes a step.
SHORT = ("train.questions=16", "train.group=8", "train.trackers=[]", "data.eval_size=8")


def questions(count: int, seed: int = 0) -> list[str]:
    """Grade-school word problems of some 40 to 60 tokens."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        name, other = rng.sample(_NAMES, 2)
        a, b, c = (rng.randint(2, 30) for _ in range(3))
        made.append(
            f"{name} has {a} {rng.choice(_THINGS)}, each worth {b} dollars. {other} gives {name} {c} more of them and then "
            f"takes away half of what {name} has. How many dollars is what {name} has left worth?"
        )
    return made


def in_child(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs ``python -m MODULE JSON`` and returns the JSON of its last line: its memory is its own."""
    done = subprocess.run([sys.executable, "-m", module, json.dumps(settings)], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def training(preset: str, changes: tuple[str, ...], *more: str, processes: int = 1) -> list[str]:
    """The command line of ``rsim train``, by torchrun where there are several processes."""
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    flags = [part for change in changes for part in ("--set", change)]
    return [sys.executable, *launch, "-m", "rsim", "train", preset, *flags, *more]


def trained(command: list[str]) -> None:
    """Runs a training to its end, one thread a process.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD, check=False)
    if done.returncode:
        raise SystemExit(f"training failed: {done.stderr[-2000:]}")


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The records of a run's steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "seconds" in line]


def peak_gib() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
