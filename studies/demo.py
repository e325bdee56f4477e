"""What `rsim demo` shows: its table, time and memory; with several runs, whether they repeat."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from studies.ledger import Row

ISSUE = 1


def run(seed: int = 0, runs: int = 2, questions: int = 500) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        done = [_demo(f"{folder}/{i}", seed, questions) for i in range(runs)]
    first, seeds = done[0][0], [seed]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    by_name = {r["name"]: r["accuracy"] for r in first["rows"]}
    gain = by_name["trained + trained planner (rSIM)"] - by_name["base, CoT"]
    slowest = round(max(seconds for _, seconds in done) / 60, 2)
    same = all(table["rows"] == first["rows"] for table, _ in done)
    found, repeated = "equal" if same else "different", "demo: the same table when repeated with the same seed"
    tokens = first["reasoner_tokens"]
    return [
        Row(
            "demo: gain over the untrained reasoner's greedy CoT",
            gain,
            "share",
            "at least 15 points",
            gain >= 0.15,
            seeds=seeds,
        ),
        Row("demo: slowest run, packages installed", slowest, "min", "at most 8 min", slowest <= 8, seeds=seeds),
        Row("demo: the same, against the goal of the speed work", slowest, "min", "at most 5 min", slowest <= 5, seeds=seeds),
        Row("demo: peak memory", round(peak, 2), "GiB", "at most 3 GB (2.79 GiB)", peak <= 3e9 / 2**30, seeds=seeds),
        *([Row(repeated, found, goal="equal", met=same, seeds=seeds)] if runs > 1 else []),
        Row("demo: reasoner tokens sampled, rSIM", tokens["rsim"], "tokens", seeds=seeds),
        Row("demo: reasoner tokens sampled, GRPO alone", tokens["grpo"], "tokens", seeds=seeds),
        *(
            Row(f"demo: {r['name']}", r["accuracy"], "share", seeds=seeds, interval=[r["low"], r["high"]])
            for r in first["rows"]
        ),
    ]


def _demo(out: str, seed: int, questions: int) -> tuple[dict[str, Any], float]:
    """The demo's JSON and its seconds; its other output passes through."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "rsim", "demo", "--out", out, "--seed", str(seed), "--questions", str(questions), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    table: dict[str, Any] = json.loads(done.stdout)
    return table, time.perf_counter() - began
