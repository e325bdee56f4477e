"""The files of examples/ are run as they stand, but for short runs, on the packaged nano model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

import rsim
from rsim.config import as_overrides

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "train": {"steps": 2, "questions": 8, "group": 4},
    "cold_start.episodes": 0,
    "data.eval_size": 8,
    "data.train_size": 100,
    "rollout.max_steps": 2,
}


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Runs of two steps and evaluations of eight questions, in a folder of their own."""
    load, evaluate = rsim.load_config, rsim.evaluate

    def load_short(source, settings):
        return load(source, [*as_overrides(settings), *as_overrides(SHORT)])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    monkeypatch.setattr(rsim, "load_config", load_short, raising=False)
    monkeypatch.setattr(rsim, "evaluate", lambda *where, limit, **how: evaluate(*where, limit=8, **how), raising=False)


def test_there_are_five_and_each_is_short():
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())
    assert files == ["notebook.ipynb", "own_data.py", "own_rewards.py", "own_strategies.py", "plug_in.py"]
    for name in files:
        assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 40, name


@pytest.mark.parametrize("name", ["own_data", "own_rewards", "own_strategies", "plug_in"])
def test_it_runs(short, name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    last = {
        "own_data": "Comparison(",
        "own_rewards": "report: runs/own-rewards/report.html",
        "own_strategies": "share of steps:",
        "plug_in": "termination",
    }
    assert last[name] in said.splitlines()[-1]
    assert "held-out accuracy" in said


def test_the_notebooks_cells_run_in_order(short, capsys):
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(cell["source"], names)
    assert len(names["curve"]) == 2
    assert Path("runs/notebook/report.html").is_file()
