"""The Python side of the commands as people use it: what there is, configs from dicts, own rewards, callbacks, lines in place of bars."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import rsim
from rsim.cli.main import main
from rsim.errors import UserError
from rsim.rewards.custom import load_custom
from rsim.settings import to_table


def test_everything_that_is_promised_is_there():
    promised = "train evaluate solve compare collect fit report push load_config Config Planner StrategySet Episode Problem PlayRules check"
    for name in (*promised.split(), *rsim.__all__):
        assert getattr(rsim, name).__doc__, name
        assert name in dir(rsim)
    importlib.import_module("rsim.reporting.report")
    assert callable(rsim.report), "a room of this name would hide the function"


def test_configs_from_dicts_are_those_from_options(tmp_path):
    stages = [{"name": "one", "steps": 3, "lambda": 0.5, "train_planner": False}]
    given = {
        "models": {"planner": "none", "strategies": tmp_path / "s.toml"},
        "train.trackers": (),
        "rollout": {"delimiter": '"\n'},
    }
    config = rsim.load_config(given | {"stages": stages, "data.train": "85% lab, 15% gym:gcd"}, {"stages.one.steps": 4})
    assert (config.models.planner, config.models.strategies, config.train.trackers) == ("none", str(tmp_path / "s.toml"), ())
    assert (config.rollout.delimiter, config.stages[0].steps, config.data.train) == ('"\n', 4, "85% lab, 15% gym:gcd")
    assert stages[0]["steps"] == 3, "what was given is not changed"
    assert rsim.load_config({"train.planner_lr": np.float64(0.001)}).train.planner_lr == 0.001
    assert rsim.load_config(to_table(config)) == config
    for wrong, said in (
        ({"train.stesp": 3}, "did you mean 'steps'"),
        ({"trian": {"steps": 3}}, "did you mean 'train'"),
        ({"train": {"steps": "3"}}, "train.steps must be int"),
        ({"train": 3}, "must be a table"),
        ({"train": 3, "train.steps": 3}, "is a value, not a table"),
        ({"train.steps": None}, "train.steps must be int"),
    ):
        with pytest.raises(UserError, match=said):
            rsim.load_config(wrong)


def steps_of(config):
    return [r for r in map(json.loads, (config.folder / "metrics.jsonl").read_text().splitlines()) if "lambda" in r]


def longer(episode):
    return float(len(episode.steps))


def test_rewards_are_callables_of_an_agent_with_a_weight(small, capsys):
    """What the record says is the sum of its parts, each with its own agent's; a weight scales; a file's reward is the same one."""
    others = [
        "rewards.accuracy=0",
        "rewards.format=0",
        "rewards.follow=0",
        "rewards.terminal=0",
        "rewards.penalty=0",
        "rewards.custom=[]",
    ]
    Path("own.py").write_text("def length(episode):\n    return (episode.sampled_tokens % 7) / 7\n")

    def length(episode: rsim.Episode) -> float:
        return (episode.sampled_tokens % 7) / 7

    config = small("run", "train.steps=1", *others)
    rsim.train(config, rewards=[longer, rsim.Reward(length, agent="planner", weight=0.5)])
    (record,) = steps_of(config)
    steps, half = record["reward/longer"], record["reward/length"]
    assert record["reasoner/return"] == pytest.approx(steps)
    assert record["planner/return"] == pytest.approx(steps + half)
    again = small("again", "train.steps=1", *others, 'rewards.custom=["own.py:length@planner*0.5"]')
    rsim.train(again, rewards=[longer])
    assert steps_of(again)[0]["reward/length"] == half > 0
    said = capsys.readouterr()
    assert "step    1  stage2  reward" in said.out
    assert "it/s" not in said.err, "no bars of libraries"
    assert 'custom = ["python:longer", "python:length@planner*0.5"]' in (config.folder / "config.toml").read_text()
    with pytest.raises(UserError, match="was given in Python"):
        rsim.train(rsim.load_config(config.folder / "config.toml"), resume=True)


@pytest.mark.parametrize("spec", ["own.py:f@both", "own.py:f*", "own.py:f*x", "own.py:f*inf", "own.py:broken"])
def test_a_spec_that_is_none_is_refused(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def f(episode):\n    return 1.0\n")
    with pytest.raises(UserError, match=r"own\.py"):
        load_custom((spec,))
    Path("own.py").write_text("import nothing_like_this\n")
    with pytest.raises(UserError, match="does not run: ModuleNotFoundError"):
        load_custom(("own.py:f",))


def test_callbacks_see_everything_and_may_stop_the_run(small, capsys):
    seen = []
    config = small("run", "checkpoint.save_every=1")

    def stop_at_two(record):
        seen.append(("step", record["step"]))
        return record["step"] == 2

    result = rsim.train(
        config,
        on_step_end=stop_at_two,
        on_evaluate=lambda record: seen.append(("evaluated", record["step"])),
        on_save=lambda folder: seen.append(folder.name),
        quiet=True,
    )
    assert capsys.readouterr().out == ""
    steps = [("step", 1), "step-000001", ("step", 2), ("evaluated", 2), "step-000002"]
    assert seen == [("evaluated", 0), "best", "step-000000", *steps]
    assert set(result) >= {"accuracy", "low", "high"}
    assert rsim.train(config, resume=True, quiet=True)["accuracy"] >= 0
    again = rsim.train(config, resume=True, quiet=True)  # nothing is left to do: the last evaluation holds
    assert 0 <= again["low"] <= again["accuracy"] <= again["high"]
    assert [r["step"] for r in steps_of(config)] == [1, 2, 3, 4]
    for which in ("on_evaluate", "on_save"):
        other = small(which, "train.eval_every=2")
        rsim.train(other, quiet=True, **{which: lambda told: True})
        assert not (other.folder / "checkpoints" / "final").exists(), which


def test_the_functions_do_what_the_commands_do(small, capsys):
    config = small("run", "train.steps=1")
    rsim.train(config, quiet=True)
    summary = rsim.evaluate(config.folder, "e", limit=4, data="lab", overrides={"rollout.max_steps": 1})
    with pytest.raises(SystemExit):
        main(
            [
                "eval",
                str(config.folder),
                "--limit",
                "4",
                "--data",
                "lab",
                "--out",
                "c",
                "--set",
                "rollout.max_steps=1",
                "--json",
            ]
        )
    own = {"planner_share", "folder", "report"}
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {k: v for k, v in said.items() if k not in own} == {k: v for k, v in summary.items() if k not in own}
    assert Path(summary["report"]).is_file()
    assert rsim.compare("e", "c").difference == 0
    Path("q.jsonl").write_text('{"question": "1+1=?", "answer": 2}\n')
    own_planner = config.folder / "checkpoints/final/planner"
    assert rsim.evaluate(config.folder, "paths", data=Path("q.jsonl"), planner=own_planner)["questions"] == 1
    steps = []
    answer = rsim.solve("1+1=?", config.folder, on_step=steps.append)
    assert steps == answer["steps"]
    assert rsim.report(config.folder, "page.html").is_file()
    assert Path(rsim.push(config.folder, "me/planner", to="hub"), "README.md").is_file()
    assert rsim.check("so \\boxed{0.5}", "1/2", kind="numeric")["strict"]["right"]


def test_strategies_are_made_and_saved_in_python(tmp_path):
    own = rsim.StrategySet(
        (*rsim.StrategySet.load("lab").strategies, rsim.Strategy("analogy", "a like problem", ("Like:",), ("like",)))
    )
    own.save(tmp_path / "own.toml")
    assert rsim.StrategySet.load(tmp_path / "own.toml") == own
    with pytest.raises(UserError, match="termination"):
        rsim.StrategySet(own.strategies[:2]).save(tmp_path / "short.toml")
    assert not (tmp_path / "short.toml").exists()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rsim.evaluate("nano", limit=0), "limit = 0"),
        (lambda: rsim.evaluate("nano", samples=0), "samples = 0"),
        (lambda: rsim.collect("default", "q.jsonl", "log", limit=-1), "limit = -1"),
        (lambda: rsim.collect("default", "q.jsonl", "log", piece=0), "piece = 0"),
        (lambda: rsim.fit([], "planner"), "logs = 0"),
        (lambda: rsim.report([]), "runs = 0"),
        (lambda: rsim.check("1", "1", tolerance=-1), "tolerance = -1"),
    ],
)
def test_numbers_have_the_bounds_that_the_commands_give_them(call, said):
    with pytest.raises(rsim.UserError, match=f"{said}: must be at least"):
        call()
