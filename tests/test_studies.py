"""Studies of trainings: their statistics, their pages, and that a piece of work is done once."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import studies
import studies.workbench as workbench
from forked import FORKS
from rsim.errors import UserError
from rsim.evaluation.evaluate import bootstrap_interval
from rsim.evaluation.search import best_fixed
from rsim.lab.pretrain import SIZES
from rsim.runs.folder import sampled_tokens
from studies.checking import hostile_texts
from studies.ledger import read, titles
from studies.page import Page
from studies.servers import free_port, served
from studies.stats import crossed, difference, estimate
from studies.workbench import Measured, Measurement, Training, Workbench, checkpoint

SMALL = (
    "train.steps=1",
    "train.questions=2",
    "train.group=2",
    "cold_start.episodes=0",
    "data.eval_size=4",
    "data.train_size=8",
)


def source_of(name: str) -> str:
    return (Path(studies.__file__).parent / f"{name}.py").read_text(encoding="utf-8")


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


def test_few_seeds_that_differ_get_the_interval_of_students_t():
    """Two seeds: a bootstrap of two means is far too narrow."""
    rows = np.repeat([[0.4], [0.6]], 4000, axis=1)
    found = crossed(rows)
    assert (found.low, found.high) == pytest.approx((0.5 - 12.706 * 0.1, 0.5 + 12.706 * 0.1))
    ten = crossed(np.repeat(np.linspace(0.4, 0.6, 10)[:, None], 4000, axis=1))
    assert ten.high - ten.mean == pytest.approx(2.262 * np.std(np.linspace(0.4, 0.6, 10), ddof=1) / 10**0.5)


def test_differences_are_paired_and_one_evaluation_stands_for_every_seed():
    a = [measured([True, True, False]), measured([True, False, False])]
    b = [measured([True, False, False])]
    assert difference(a, b).seeds == pytest.approx((1 / 3, 0.0))
    assert difference(a, a) == crossed(np.zeros((2, 3)))


def test_the_best_fixed_strategy_is_found():
    def accuracy(spec: str) -> float:
        return float(spec == "fixed:b")

    assert best_fixed(("a", "b", "termination"), accuracy) == "fixed:b"


def test_a_page_holds_tables_figures_rows_and_limits(tmp_path):
    page = Page("tried", Workbench(tmp_path, seeds=(0, 1), questions=20, jobs=7, changes=("train.steps=1",)))
    arms = {"one": [measured([True, True, False]), measured([True, False, False])]}
    page.arms(arms)
    page.figure("dots", "A caption")[0].plot([0, 1], [1, 0])
    page.bars("Two groups.", {"left": arms, "right": arms})
    page.measured("one: accuracy", estimate(arms["one"]), goal="at least 90%", met=False)
    text = page.write("A title", "Nothing much.", tmp_path).read_text()
    assert text.startswith("# A title\n")
    assert "| one | 50.0% |" in text
    assert "66.7%, 33.3%" in text
    assert "## What this does not show\n\nNothing much." in text
    for name in ("dots", "bars"):
        assert f"(figures/tried-{name}.svg)" in text
        assert (tmp_path / f"docs/results/figures/tried-{name}.svg").read_text().count("<path") > 5
    (row,) = page.rows
    assert (row.value, row.met, row.seeds) == (0.5, False, [0, 1])
    assert row.command == "python -m studies tried --seeds 2 --questions 20 --set train.steps=1"


def test_work_is_done_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench.multiprocessing, "get_context", lambda kind: FORKS)  # rsim is imported once
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


def test_work_ends_with_the_study_that_was_killed(tmp_path):
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
    root = str(Path(studies.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, f"{root}/src", os.environ.get("PYTHONPATH"))))
    command = subprocess.Popen([sys.executable, "killed.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        assert command.poll() is None, "it ended before its worker began"
        time.sleep(0.1)
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    command.kill()
    command.wait()
    while (alive := worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def test_every_study_says_what_it_is_for_and_those_with_a_page_what_they_do_not_show():
    for name in titles():
        module = importlib.import_module(f"studies.{name}")
        assert module.ISSUE in range(1, 100), name
        if "page" in inspect.signature(module.run).parameters:
            assert len(module.LIMITS) > 80, name


def test_a_base_of_other_settings_is_not_taken_for_todays(tmp_path, monkeypatch):
    """nano-xs once read more documents, and lay on in the cache under its name."""
    monkeypatch.setenv("RSIM_CACHE", str(tmp_path))
    folder = tmp_path / "nano-xs"
    folder.mkdir()
    (folder / "config.json").touch()
    for steps in (2000, 3000):
        (folder / "pretrain.json").write_text(json.dumps({"size": asdict(SIZES["nano-xs"]) | {"steps": steps}}))
        if steps == SIZES["nano-xs"].steps:
            assert Workbench(tmp_path, quiet=True).base("nano-xs") == "nano-xs"
        else:
            with pytest.raises(UserError, match="of other settings"):
                Workbench(tmp_path, quiet=True).base("nano-xs")


class Rehearsal(Workbench):
    """Every training, search and evaluation is made up in no time, each other than the ones before it."""

    def train(self, trainings: list[Training]) -> list[Path]:
        return [self._run(f"run-{t.preset}-{t.seed}-{zlib.crc32(repr(t).encode())}") for t in trainings]

    def _run(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        cold = {"stage": "cold_start", "cold_start/format_rate": 0.5, "cold_start/kept": 3, "cold_start/sampled": 8}
        steps = [
            {"stage": "stage1", "step": n, "sampled_tokens": 100 * n, "reasoner/entropy": 1 / n, "eval/accuracy": 0.1 * n}
            for n in (1, 2, 3)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (cold, *steps)))
        return folder

    def measure(self, measurements: dict[str, Measurement]) -> dict[str, Measured]:
        return {key: self._measured(key) for key in measurements}

    def _measured(self, key: str) -> Measured:
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        folder = self.out / f"evaluation-{zlib.crc32(key.encode())}"
        folder.mkdir(parents=True, exist_ok=True)
        right = rng.random(self.questions) < 0.5
        same = {"strategies": ["decoding", "termination"], "flags": [], "predicted": None, "sampled_tokens": 9}
        played = [same | {"correct": bool(r), "index": i} for i, r in enumerate(right)]
        (folder / "episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in played))
        numbers = {"tokens_per_question": 10.0, "planner_tokens": 5.0, "tflops": 0.001, "steps": 2.0, "flexible": 0.5}
        usage = {"usage": {"decoding": 0.5, "termination": 0.5}, "flags": {"terminated": 0.5, "forced": 0.1}}
        return Measured(folder, numbers | usage, right)

    def search(self, kind: str, reasoners: list[str], preset: str = "nano", problems: int = 0, data: str = "") -> list[str]:
        return [kind] * len(reasoners)

    def base(self, name: str) -> str:
        return name


@pytest.mark.parametrize("name", [n for n in titles() if "def run(bench: Workbench, page: Page)" in source_of(n)])
def test_a_rehearsed_study_writes_the_rows_that_are_in_its_ledger(name, tmp_path, monkeypatch):
    """From end to end with made-up results: what the ledger holds under a study's name is what the study writes today. A study
    that was not run since the lab was replaced has no row that is not superseded."""
    sizes = {"nano-xs": 1, "nano-s": 5, "nano-m": 25}
    stub = SimpleNamespace
    monkeypatch.setattr("studies.sizes.load_reasoner", lambda n: stub(model=stub(num_parameters=lambda: sizes[n])))
    module = importlib.import_module(f"studies.{name}")
    bench = Rehearsal(tmp_path, seeds=(0, 1), questions=20, quiet=True)
    page = Page(name, bench)
    module.run(bench, page)
    assert page.write("A title", module.LIMITS, tmp_path).read_text().count("\n| ") > 3
    ledger = Path(__file__).parent.parent / "results" / f"{name}.json"
    recorded = {row.what for row in read(ledger) if not row.superseded} if ledger.is_file() else set()
    # which one it is hangs on the results
    best = re.compile(r"best control \(.*\)|(?<=ours minus )(?!planner alone|shuffled|prompted).*")
    written = {best.sub("", row.what) for row in page.rows}
    assert written
    assert written == {best.sub("", what) for what in recorded} or not recorded


def test_a_server_that_ends_by_itself_is_told_with_its_log():
    with (
        pytest.raises(SystemExit, match="no such thing"),
        served([sys.executable, "-c", "raise SystemExit('no such thing')"], free_port(), seconds=60),
    ):
        raise AssertionError("it never served")


def test_a_server_is_there_when_it_is_handed_out_and_gone_afterwards():
    port = free_port()
    with served([sys.executable, "-m", "studies.serve_upstream", str(port)], port) as child:
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"]
        assert child.poll() is None
    assert child.poll() is not None


def test_hostile_texts_are_as_many_as_asked_and_none_says_seven():
    texts = hostile_texts(200, seed=0)
    assert len(texts) == 200
    assert len(set(texts)) > 190
    assert texts == hostile_texts(200, seed=0)
    assert r"\boxed{7}\boxed{8}" in texts
