"""One folder, one process: a run, an evaluation, a log."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rsim.cli.main import app
from rsim.collecting.play import Collection, collect
from rsim.errors import UserError
from rsim.runs.lock import lock, locked, unlock
from rsim.training.sweep import load_sweep, run_sweep
from rsim.training.trainer import Trainer
from tiny import metrics_of, stopped_after

_HOLD = """
import sys
from pathlib import Path
from rsim.runs.lock import lock

lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


class Holder:
    """Another process that has ``folder``."""

    def __init__(self, folder):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], **pipes)
        assert self.process.stdout.readline() == "held\n"

    def end(self, *, killed: bool = False):
        if killed:
            self.process.kill()
        self.process.communicate("\n", timeout=20)


def test_a_folder_that_another_process_writes_is_refused_by_its_name(tmp_path):
    holder = Holder(tmp_path / "run")
    with pytest.raises(UserError, match=rf"another process, {holder.process.pid} on \S+, is writing there"):
        lock(tmp_path / "run")
    holder.end()
    with locked(tmp_path / "run"):
        lock(tmp_path / "run")  # this process's own
        said = subprocess.run([sys.executable, "-c", _HOLD, str(tmp_path / "run")], capture_output=True, text=True, check=False)
        assert "is writing there" in said.stderr
    Holder(tmp_path / "run").end()


def test_what_a_killed_process_left_locked_is_taken_over_with_a_warning(tmp_path, caplog):
    holder = Holder(tmp_path)
    holder.end(killed=True)
    with caplog.at_level(logging.WARNING):
        lock(tmp_path)
    assert f"process {holder.process.pid} on" in caplog.text
    assert "taken over" in caplog.text
    unlock(tmp_path)
    caplog.clear()
    with locked(tmp_path):
        assert not caplog.text, "nothing is left behind by a process that ended well"


def test_a_run_that_is_being_trained_is_neither_gone_on_with_nor_begun_by_another_process(small, tmp_path):
    """A second process that resumed removed newer checkpoints under the first, and both appended to metrics.jsonl; two fresh
    starts that met before the first checkpoint did the same."""
    config = small("run", "train.steps=2")
    holder = Holder(config.folder)
    with pytest.raises(UserError, match="another process"):
        Trainer(config)
    assert [path.name for path in config.folder.iterdir()] == [".lock"], "nothing was written"
    holder.end()
    stopped_after(config, 1)
    holder, before = Holder(config.folder), metrics_of(config)
    with pytest.raises(UserError, match="another process"):
        Trainer(config, resume=True)
    assert metrics_of(config) == before
    evaluated = CliRunner().invoke(app, ["eval", str(config.folder), "--limit", "1", "--out", str(tmp_path / "e")])
    assert evaluated.exit_code == 0, "a run that is being trained can be evaluated"
    holder.end()
    Trainer(config, resume=True).run()
    steps = [record["step"] for record in metrics_of(config) if "accuracy" in record and "eval/accuracy" not in record]
    assert steps == [1, 2]


def test_an_evaluation_and_a_log_have_one_writer_too(tmp_path):
    holder = Holder(tmp_path / "e")
    arguments = ["eval", "nano", "--planner", "none", "--limit", "1", "--out", str(tmp_path / "e")]
    assert "another process" in str(CliRunner().invoke(app, arguments).exception)
    holder.end()
    holder = Holder(tmp_path / "log")
    (tmp_path / "d.jsonl").write_text('{"question": "3+4=?", "answer": 7}\n')
    with pytest.raises(UserError, match="another process"):
        collect(Collection("default", str(tmp_path / "d.jsonl"), model="nano-s"), tmp_path / "log")
    holder.end()


def test_a_sweep_that_runs_is_not_gone_on_with_by_another_process(tmp_path):
    """Both took the next trial's run, and each the other's for one that had failed."""
    file = tmp_path / "sweep.toml"
    file.write_text('config = "nano-grpo"\ntrials = 2\n[search]\n"train.group" = [4, 8]\n')
    holder = Holder(tmp_path / "sweep")
    with pytest.raises(UserError, match="is writing there"):
        run_sweep(load_sweep(file), tmp_path / "sweep")
    holder.end()
