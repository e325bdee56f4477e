"""Experiments: their statistics, their pages, and that a piece of work is done once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import studies.workbench as workbench
from hypothesis import given
from hypothesis import strategies as st
from studies.page import Page
from studies.run import EXPERIMENTS, module_of, run_experiment
from studies.stats import crossed, difference, estimate
from studies.workbench import Measured, Measurement, Training, Workbench, checkpoint

from rsim.errors import UserError
from rsim.evaluation.evaluate import bootstrap_interval
from rsim.evaluation.search import best_fixed, best_sequence
from rsim.runs.folder import sampled_tokens

SMALL = (
    "train.steps=1",
    "train.questions=2",
    "train.group=2",
    "cold_start.episodes=0",
    "data.eval_size=4",
    "data.train_size=8",
)


def measured(right: list[bool]) -> Measured:
    summary = {"tokens_per_question": 10.0, "planner_tokens": 5.0, "tflops": 0.001}
    return Measured(Path("nowhere"), summary, np.array(right))


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_an_interval_holds_the_mean_and_each_seed_is_shown(outcomes):
    e = crossed(np.array(outcomes, dtype=float), resamples=200)
    assert e.low - 1e-9 <= e.mean <= e.high + 1e-9
    assert e.seeds == tuple(np.array(outcomes).mean(1))


def test_one_seed_is_the_plain_bootstrap_and_seeds_that_differ_widen_it():
    rng = np.random.default_rng(0)
    one = rng.random(400) < 0.7
    alone = crossed(one[None].astype(float))
    low, high = bootstrap_interval(list(one))
    assert alone.low == pytest.approx(low, abs=0.01)
    assert alone.high == pytest.approx(high, abs=0.01)
    spread = crossed(np.stack([rng.random(400) < p for p in (0.5, 0.7, 0.9)]).astype(float))
    assert spread.high - spread.low > 2 * (alone.high - alone.low)


def test_differences_are_paired_and_one_evaluation_stands_for_every_seed():
    a = [measured([True, True, False]), measured([True, False, False])]
    b = [measured([True, False, False])]
    assert difference(a, b).seeds == pytest.approx((1 / 3, 0.0))
    assert difference(a, a) == crossed(np.zeros((2, 3)))


def test_searches_find_what_is_best():
    def accuracy(spec: str) -> float:
        kind, _, names = spec.partition(":")
        if kind == "fixed":
            return float(names == "b")
        aim = ["b", "a", "termination"]
        return sum(x == y for x, y in zip(names.split(","), aim, strict=False)) - 0.1 * len(names.split(","))

    assert best_fixed(("a", "b", "termination"), accuracy) == "fixed:b"
    assert best_sequence(("a", "b", "termination"), accuracy, width=2, longest=3) == "sequence:b,a,termination"


def test_a_page_holds_tables_figures_ledger_and_limits(tmp_path):
    page = Page("tried", "A title", Workbench(tmp_path, seeds=(0, 1), questions=3, changes=("train.steps=1",)))
    arms = {"one": [measured([True, True, False]), measured([True, False, False])]}
    page.arms(arms)
    page.figure("dots", "A caption")[0].plot([0, 1], [1, 0])
    page.measured("one: accuracy", estimate(arms["one"]), goal="at least 90%", met=False)
    text = page.publish(tmp_path, "Nothing much.").read_text()
    assert "| one | 50.0% |" in text
    assert "66.7%, 33.3%" in text
    assert "## What this does not show\n\nNothing much." in text
    assert (tmp_path / "docs/results/figures/tried-dots.svg").is_file()
    ledger = json.loads((tmp_path / "results/tried.json").read_text())
    assert ledger["issue"] == 4
    (row,) = ledger["rows"]
    assert (row["value"], row["met"], row["seeds"]) == (0.5, False, [0, 1])
    assert row["command"] == "python -m studies tried --seeds 2 --questions 3 --set train.steps=1"


def test_work_is_done_once_and_found_again(tmp_path, monkeypatch):
    bench = Workbench(tmp_path, seeds=(0,), questions=6, jobs=1, changes=SMALL, quiet=True)
    (run,) = bench.train([Training("nano", (), 0)])
    wanted = {"planned": Measurement(checkpoint(run)), "votes": Measurement(checkpoint(run), "none", match_tokens="planned")}
    first = bench.measure(wanted)
    assert sampled_tokens(run) > 0
    assert first["planned"].summary["questions"] == len(first["planned"].right) == 6
    assert first["votes"].summary["samples"] > 1
    assert os.listdir(run / "checkpoints")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(workbench, "ProcessPoolExecutor", refuse)
    assert bench.train([Training("nano", (), 0)]) == [run]
    again = bench.measure(wanted)
    assert {k: m.accuracy for k, m in again.items()} == {k: m.accuracy for k, m in first.items()}
    with pytest.raises(AssertionError, match="done already"):
        bench.train([Training("nano", ("train.planner_lr=1e-4",), 0)])


def test_work_ends_with_the_experiment_that_was_killed(tmp_path):
    """A ``kill`` of the command reaches none of the processes that it began."""
    (tmp_path / "killed.py").write_text(
        "import multiprocessing, os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from studies.workbench import _begin\n"
        "def work():\n"
        "    open('pid.draft', 'w').write(str(os.getpid()))\n"
        "    os.replace('pid.draft', 'pid')\n"
        "    time.sleep(200)\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _begin, (1,))\n"
        "    pool.submit(work).result()\n"
    )
    command = subprocess.Popen([sys.executable, "killed.py"], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    command.kill()
    command.wait()
    while (alive := worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def test_every_experiment_can_be_loaded_and_unknown_ones_are_one_line():
    for name in EXPERIMENTS:
        module = module_of(name)
        assert callable(module.run)
        assert len(module.LIMITS) > 80
    with pytest.raises(UserError, match="no experiment 'fig9'"):
        run_experiment("fig9", [0], 1, 1, Path("x"), Path("."), [], quiet=True)
