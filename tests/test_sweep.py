"""Random search over a config: what is drawn, what is run once, what wins, and going on after a stop."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

import rsim.training.sweep as sweeping
from conftest import SMALL
from rsim.cli.main import main
from rsim.errors import UserError
from rsim.training.sweep import Range, load_sweep, run_sweep, write_table

FILE = """
config = "nano-grpo"
set = ["train.eval_every=1"]
trials = 8
seeds = [100, 101, 102]
budgets = [100, 200]
[search]
"train.reasoner_lr" = {low = 1e-5, high = 1e-2, log = true}
"train.group" = [4, 8, 16]
"""


def written(tmp_path, text=FILE):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return path


@pytest.fixture
def runs(monkeypatch):
    """In place of runs: held-out accuracy is the learning rate's third of the range, a little off by seed; group 16 fails."""
    begun = []

    def fake(settings, folder, overrides):
        values = dict(o.split("=", 1) for o in overrides)
        begun.append((folder.parent.name, values["seed"]))
        if values["train.group"] == "16":
            return "rsim: out of memory"
        folder.mkdir(parents=True, exist_ok=True)
        rate, seed = float(values["train.reasoner_lr"]), int(values["seed"]) - 100
        lines = [{"step": 0, "eval/accuracy": 0.0}]
        for step, tokens in enumerate((90, 150, 260), 1):
            lines += [{"step": step, "sampled_tokens": tokens}, {"step": step, "eval/accuracy": step * rate * 10 - seed * 1e-9}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return ""

    monkeypatch.setattr(sweeping, "_run", fake)
    return begun


def test_the_best_quarter_is_run_on_the_other_seeds_and_the_best_mean_wins(tmp_path, runs):
    sweep = load_sweep(written(tmp_path))
    trials = run_sweep(sweep, tmp_path / "out")
    assert sorted(t.number for t in trials) == list(range(8))
    alive = [t for t in trials if t.chosen["train.group"] != 16]
    assert 2 < len(alive) < 8, "the draw is of no use for this test"
    best = max(alive, key=lambda t: t.chosen["train.reasoner_lr"])
    assert trials[0].number == best.number
    assert [len(t.scores.get(200, [])) for t in trials] == [3, 3] + [1] * (len(alive) - 2) + [0] * (8 - len(alive))
    assert trials[0].scores[100][0] == pytest.approx(10 * best.chosen["train.reasoner_lr"])  # one run is read at both budgets
    assert trials[0].mean(200) == pytest.approx(20 * best.chosen["train.reasoner_lr"] - 1e-9)
    assert trials[-1].error == "rsim: out of memory"
    table = write_table(sweep, trials, tmp_path / "out").read_text()
    assert table.count("\n") == 10
    assert "out of memory" in table
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000


def test_the_best_quarter_is_run_anew_with_what_confirms_it(tmp_path, runs):
    text = FILE.replace("seeds = [100, 101, 102]", 'seeds = [100]\nconfirm = ["train.reasoner_lr=0.002"]')
    trials = run_sweep(load_sweep(written(tmp_path, text)), tmp_path / "out")
    assert [t.confirmed for t in trials] == [True, True] + [False] * 6
    assert trials[0].mean(200) == pytest.approx(0.04), "the cheap search's score was kept"
    assert {(tmp_path / "out" / f"trial-{t.number:03d}" / "confirmed-100").is_dir() for t in trials[:2]} == {True}
    with pytest.raises(UserError, match="nothing"):
        load_sweep(written(tmp_path, FILE.replace("budgets", 'confirm = ["train.nothing=1"]\nbudgets')))


def test_a_run_is_read_where_it_ends_a_little_above_its_budget(tmp_path):
    lines = [{"sampled_tokens": 101}, {"eval/accuracy": 0.5}, {"sampled_tokens": 203}, {"eval/accuracy": 0.7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [sweeping._score(tmp_path, budget) for budget in (90, 100, 200, 0)] == [None, 0.5, 0.7, 0.7]


def test_a_trial_without_an_evaluation_in_its_budget_has_no_score(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(sweeping, "_score", lambda folder, budget: None if budget == 100 else 0.5)
    trials = run_sweep(load_sweep(written(tmp_path)), tmp_path / "out")
    assert not any(trial.scores for trial in trials)
    assert "no evaluation within 100 tokens" in trials[0].error


def test_a_stopped_sweep_goes_on_with_the_same_draws(tmp_path, runs, monkeypatch):
    sweep = load_sweep(written(tmp_path))
    whole = run_sweep(sweep, tmp_path / "whole")
    fake = sweeping._run

    def stopping(settings, folder, overrides):
        if folder.parent.name == "trial-003":
            raise KeyboardInterrupt
        return fake(settings, folder, overrides)

    monkeypatch.setattr(sweeping, "_run", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path / "cut")
    monkeypatch.setattr(sweeping, "_run", fake)
    assert run_sweep(sweep, tmp_path / "cut") == whole
    other = load_sweep(written(tmp_path, FILE.replace("1e-2", "1e-3")))
    with pytest.raises(UserError, match="another sweep"):
        run_sweep(other, tmp_path / "cut")
    base = tmp_path / "base.toml"
    for steps in (1, 2):
        base.write_text(f"train.steps = {steps}\n")
        changed = load_sweep(written(tmp_path, FILE.replace("nano-grpo", str(base))))
        if steps == 1:
            run_sweep(changed, tmp_path / "of-a-file")
    with pytest.raises(UserError, match="another sweep"):
        run_sweep(changed, tmp_path / "of-a-file")


def test_settings_that_are_known_are_tried_too(tmp_path, runs):
    known = '[[known]]\n"train.group" = 8\n"train.reasoner_lr" = 0.05\n[search]'
    trials = run_sweep(load_sweep(written(tmp_path, FILE.replace("[search]", known))), tmp_path / "out")
    assert [trials[0].number, trials[0].chosen["train.reasoner_lr"], len(trials)] == [8, 0.05, 9]


def test_a_winner_on_the_edge_is_told():
    """A grid's best value at its end says that a better one may lie beyond."""
    rate = Range("lr", low=1e-5, high=1e-1, log=True)
    assert [rate.on_edge(x) for x in (1.2e-5, 3e-5, 1e-3, 9e-2)] == [True, False, False, True]
    assert [Range("group", values=(4, 8, 16)).on_edge(x) for x in (4, 8, 16)] == [True, False, True]
    assert rate.on_edge(0.0), "one that is known may lie beyond, where there is no logarithm"
    assert not Range("loss", values=("grpo", "cispo")).on_edge("grpo")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[search]", "[found]"), "no table"),
        (('"train.group"', '"train.groups"'), "unknown key 'train.groups'"),
        (("[4, 8, 16]", "[4, -8]"), "train.group = -8"),
        (("trials = 8", "trials = 1"), "trials = 1"),
        (("low = 1e-5", "low = 0.0"), "above 0 where log"),
        (("low = 1e-5", "low = 1"), "low below high"),
        (('config = "nano-grpo"', ""), "names no config"),
        (("trials = 8", "trails = 8"), "unknown key"),
        (("seeds = [100, 101, 102]", "seeds = []"), "seeds is empty"),
        (("[4, 8, 16]", "[]"), "give a list"),
        (("[4, 8, 16]", "{low = 4, high = 16}"), "train.group must be int"),
        (("[4, 8, 16]", "[2026-11-30]"), "train.group"),
        (('"train.group"', '"seed"'), "a sweep gives each run its own"),
        (("set = [", 'set = ["seed=5", '), "seed: a sweep gives each run its own"),
        (("[search]", '[[known]]\n"train.group" = 4\n[search]'), "a value to each key"),
        (("[search]", '[[known]]\n"train.group" = 1\n"train.reasoner_lr" = 1e-3\n[search]'), "train.group = 1"),
    ],
)
def test_a_doubtful_file_is_refused_before_anything_runs(tmp_path, capsys, change, said):
    path = written(tmp_path, FILE.replace(*change))
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def program(tmp_path):
    """A maker of programs that take Python's place: what guards a run is Python's, the run itself is ``text``."""

    def make(text):
        path = tmp_path / "program"
        path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n{text}\n')
        path.chmod(0o755)
        return str(path)

    return make


_SWEEP = """
import sys
from pathlib import Path
from rsim.training.sweep import Settings, _run

sys.executable = sys.argv[1]
_run(Settings(config="nano"), Path("nowhere"), [])
"""


def test_a_run_ends_with_its_sweep(program):
    """It went on alone, and held the folder of the trial with which the sweep had to go on."""
    heard, said = os.pipe()
    with subprocess.Popen([sys.executable, "-c", _SWEEP, program("echo begun >&0\nexec sleep 100")], stdin=said) as sweep:
        os.close(said)
        assert os.read(heard, 100) == b"begun\n"
        sweep.terminate()
    assert select.select([heard], [], [], 20)[0], "the run is still there"
    assert os.read(heard, 100) == b""
    os.close(heard)


def test_a_run_that_was_told_to_stop_stops_its_sweep_and_one_that_was_killed_has_failed(tmp_path, program, monkeypatch):
    """A run ends with 0 after SIGTERM, when it has saved; it was read as if it had been trained to its end."""
    settings = sweeping.Settings(config="nano")
    for text in ("exit 0", "exit 130", "kill -TERM $$"):
        monkeypatch.setattr(sys, "executable", program(text))
        with pytest.raises(KeyboardInterrupt):
            sweeping._run(settings, tmp_path / "run", [])
        monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", program("kill -KILL $$"))
    assert sweeping._run(settings, tmp_path / "run", []) == "it said nothing and ended with -9"


def test_real_runs_from_the_command_line(tmp_path, capsys, base_folder):
    shared = [
        *(o for o in SMALL if "rewards.custom" not in o),
        f'models.reasoner="{base_folder}"',
        f'models.planner="{base_folder}"',
        "stages.stage2.steps=1",
    ]
    text = f"""
config = "nano"
set = {json.dumps(shared)}
trials = 2
seeds = [1]
[search]
"train.planner_lr" = [1e-4, 1e-3]
"""
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(written(tmp_path, text)), "--out", str(tmp_path / "out"), "--json"])
    out = capsys.readouterr()
    assert not stopped.value.code, out.err
    record = json.loads(out.out)
    assert [line.split(":")[0] for line in out.err.splitlines()] == ["trial-000, of 2", "trial-001, of 2"]
    assert len(record["trials"]) == 2
    assert 0 <= record["best"]["scores"]["0"][0] <= 1
    assert Path(tmp_path / "out/trial-001/seed-1/config.toml").is_file()


def test_a_sweep_that_was_stopped_while_it_drew_draws_the_rest(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    sweep, ask, asked = load_sweep(written(tmp_path)), optuna.Study.ask, []

    def stopped(self, *args):
        asked.append(self)
        if len(asked) == 4:
            ask(self)  # a trial that has no values yet
            raise KeyboardInterrupt
        return ask(self, *args)

    monkeypatch.setattr(optuna.Study, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweeping._study(sweep, tmp_path / "out")
    monkeypatch.undo()
    drawn = sweeping._study(sweep, tmp_path / "out")
    assert len(drawn) == 8
    assert drawn == sweeping._study(sweep, tmp_path / "out") == sweeping._study(sweep, tmp_path / "other")


def test_a_run_that_never_came_to_a_budget_is_not_read_at_it(tmp_path, runs):
    trials = run_sweep(load_sweep(written(tmp_path, FILE.replace("[100, 200]", "[100, 300]"))), tmp_path / "out")
    assert not any(trial.scores for trial in trials)
    assert "it ended at 260 tokens, not at the budget of 300" in trials[0].error
