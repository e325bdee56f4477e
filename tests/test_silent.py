"""What used to be silent nonsense is refused or told: numbers that are none, folders that are no planner, cards that claim."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import rsim
from rsim.cli.main import app
from rsim.config import load_config
from rsim.errors import UserError
from rsim.evaluation.planners import planner_from
from rsim.rewards.custom import load_custom
from rsim.serving.card import hub_folder
from rsim.training.agent import Agent


def steps_of(config):
    records = map(json.loads, (config.folder / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if "lambda" in r]


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_settings_are_finite_numbers(value):
    with pytest.raises(UserError, match=r"train\.planner_lr"):
        load_config("nano", [f"train.planner_lr={value}"])


@pytest.mark.parametrize("returned", ["float('nan')", "float('inf')", "None", "'1'", "10**400", "__import__('numpy').ones(2)"])
def test_a_custom_reward_must_be_a_finite_number(tmp_path, returned):
    file = tmp_path / "mine.py"
    file.write_text(f"def own(episode):\n    return {returned}\n")
    with pytest.raises(UserError, match="own"):
        load_custom((f"{file}:own",))["own"](None)


def test_a_custom_reward_that_fails_is_named_with_its_line(tmp_path):
    """One that cannot be called with an episode (as TRL's are) is found before anything is loaded."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import json\ndef trl(prompts, completions):\n    return [0.0]\n\n\ndef own(episode):\n    return json.loads('x')\n"
    )
    with pytest.raises(UserError, match="must be a function of one"):
        load_custom((f"{file}:trl",))
    with pytest.raises(UserError, match="must be a function of one"):
        rsim.Reward(5)
    with pytest.raises(UserError, match=r"own' failed: JSONDecodeError: .*mine\.py, line 7"):
        load_custom((f"{file}:own",))["own"](None)


@pytest.mark.parametrize(
    "returned", ["1", "True", "0.5", "__import__('numpy').float32(0.5)", "__import__('torch').tensor(1.0)"]
)
def test_whatever_is_a_number_is_taken(tmp_path, returned):
    file = tmp_path / "mine.py"
    file.write_text(f"def own(episode):\n    return {returned}\n")
    assert isinstance(load_custom((f"{file}:own",))["own"](None), float)


def test_a_run_whose_numbers_break_stops_before_it_saves_them(small, monkeypatch):
    """The planner's gradient in the third step is NaN: the weights after it are never written, and the error names what was."""
    config, really, taken = small("run", "train.eval_every=0", "checkpoint.save_every=1"), Agent.step, []

    def step(agent, *args):
        taken.append(agent.name)
        norm = really(agent, *args)
        return float("nan") if taken.count("planner") == 3 else norm

    monkeypatch.setattr(Agent, "step", step)
    with pytest.raises(UserError, match=r"step 3: planner/grad_norm is nan: the last good checkpoint is step-000002"):
        rsim.train(config)
    assert [r["step"] for r in steps_of(config)] == [1, 2]
    saved = sorted(p.name for p in (config.folder / "checkpoints").glob("step-*"))
    assert saved[-1] == "step-000002"
    assert torch.load(config.folder / "checkpoints" / saved[-1] / "state.pt", weights_only=True)["step"] == 2


def test_a_folder_without_a_planner_is_no_planner(base_folder, lab_strategies):
    with pytest.raises(UserError, match="holds no trained planner"):
        planner_from(str(base_folder), lab_strategies, [])


@pytest.mark.parametrize(("asked", "taken"), [(0, [2, 2]), (1, [0, 1]), (2, [1, 1]), (3, [2, 1]), (10, [5, 5])])
def test_train_steps_are_shared_by_the_stages(small, asked, taken):
    config = small("run", f"train.steps={asked}")
    assert config.total_steps == sum(taken) == (asked or 4)
    assert config.stage_steps == taken
    named = [config.stage_at(step).name for step in range(config.total_steps)]
    assert named == ["stage1"] * taken[0] + ["stage2"] * taken[1]


def test_a_card_tells_the_steps_that_were_taken_and_every_reward(small, tmp_path):
    config = small("run", "train.token_budget=1", "train.eval_every=0")
    rsim.train(config)
    hub_folder(str(config.folder), tmp_path / "hub", repo="me/planner", licence="mit")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "; 1 steps at lambda 0.7;" in card
    assert "lambda 0.3" not in card
    assert "custom `length`" in card


def test_a_card_says_which_weights_its_results_are_of(small, tmp_path):
    config = small("run", "train.steps=2", "train.eval_every=1", "checkpoint.save_every=1")
    rsim.train(config)

    def card(of: str) -> str:
        folder = hub_folder(
            str(config.folder / of), tmp_path / f"hub-{len(list(tmp_path.iterdir()))}", repo="me/planner", licence="mit"
        )
        return (folder / "README.md").read_text()

    assert re.search(r"% after step 0, \S+% after step 1 \(greedy\)", card("checkpoints/step-000001"))
    rsim.evaluate(config.folder, limit=2)
    assert "2 questions. Results of these weights." in card("")
    assert "Results of these weights." in card("checkpoints/step-000002"), "the last step's are the final ones"
    assert "Results of final (step 2), not of these weights (step-000001)." in card("checkpoints/step-000001")


def test_without_a_gold_answer_nothing_is_called_wrong(small):
    config = small("run", "train.steps=1")
    rsim.train(config)
    record = json.loads(CliRunner().invoke(app, ["solve", "1+1=?", "--run", str(config.folder), "--json"]).stdout)
    assert record["steps"]
    assert not {"correct", "rewards", "answer"} & set(record)
