"""The time of the demo, which is the nano lab's whole main job: ``python -m bench.demo [--rounds 1] [--record]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

from bench.ledger import record, row
from bench.workload import show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write results/demo.json and its page")
    args = parser.parse_args()
    minutes = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            command = [sys.executable, "-m", "rsim", "demo", "--out", f"{folder}/demo", "--json"]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            minutes.append((time.perf_counter() - began) / 60)
    slowest = max(minutes)
    rows = [row("make demo, packages installed (slowest round)", round(slowest, 2), unit="min", goal="at most 5 min",
                met=slowest <= 5)]  # fmt: skip
    show(rows)
    if args.record:
        record("demo", 3, "The time of the demo", rows)


if __name__ == "__main__":
    main()
