"""How long things take to begin: ``rsim --help``, the first step of ``rsim solve`` with the nano pair; and the tests to end."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rsim.policies.loading import load_planner, quiet_models
from rsim.policies.strategies import load_strategies
from studies.ledger import Row

ISSUE = 16


def run(rounds: int = 5, tests: bool = False) -> Iterator[Row]:
    """``tests``: also those of ``make test``, which must pass."""
    if tests:  # before a row of this command is kept, which the pages do not show yet
        began = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal"]  # as the Makefile has it
        subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        minutes = (time.perf_counter() - began) / 60
        yield Row("make test, its environment made", round(minutes, 1), "min", "under 8 min on 2 cores", minutes < 8)
    with tempfile.TemporaryDirectory() as planner:
        quiet_models()
        load_planner("nano-s", load_strategies("lab"), seed=0).save_pretrained(planner)
        solve = ("solve", "85-(12+5)+26=?", "--run", "nano", "--planner", planner, "--set", 'models.reasoner="nano-s"')
        helps, firsts = (_median(rounds, *words) for words in (("--help",), solve))
    yield Row("rsim --help", round(helps, 2), "s", "under 0.3 s", helps < 0.3)
    yield Row("rsim solve, first step, nano pair", round(firsts, 2), "s", "under 4 s", firsts < 4)


def _median(rounds: int, *words: str) -> float:
    """Seconds until the first line of a command's output; one more, before, leaves its bytecode and its files in memory."""
    return statistics.median([_first_line(*words) for _ in range(rounds + 1)][1:])


def _first_line(*words: str) -> float:
    """Raises `SystemExit` where the command fails."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    command = [sys.executable, "-u", "-m", "rsim", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=kept) as child:
        assert child.stdout is not None
        child.stdout.readline()
        seconds = time.perf_counter() - began
        child.communicate()
    if child.returncode:
        raise SystemExit(f"rsim {words[0]} failed")
    return seconds
