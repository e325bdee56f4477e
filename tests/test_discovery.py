"""A growing strategy set: planners over another set, and what is new tried in training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import rsim
import rsim.discovery.grow as module
from rsim.cli.main import app
from rsim.discovery.adapt import adapted, lift, load
from rsim.errors import UserError
from rsim.evaluation.compare import Comparison
from rsim.evaluation.saved import evaluate_into
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.planner import Planner
from rsim.policies.strategies import StrategySet, load_strategies, to_toml
from tiny import RULES


def test_a_planner_over_a_larger_set_chooses_as_before_until_it_is_trained(reasoner, planner, lab_strategies, tmp_path):
    planner.save_pretrained(tmp_path / "old")
    extra = StrategySet((*lab_strategies.strategies, replace(lab_strategies[0], name="unit-check", prompts=("Check:",))))
    adapted(load(str(tmp_path / "old")), extra).save_pretrained(tmp_path / "new")
    grown = Planner.from_pretrained(tmp_path / "new")
    assert grown.strategies == extra
    hidden = torch.randn(40, planner.model.config.hidden_size)
    old, new = planner.logits(hidden), grown.logits(hidden)
    assert torch.allclose(new[:, :9], old, atol=1e-6)
    assert torch.allclose(new[:, 9], old.mean(-1), atol=1e-6)
    assert torch.equal(new.argmax(-1), old.argmax(-1))
    (episode,) = Game(reasoner, grown, RULES).play([Problem("4*17+38=?", "106")], seed=0)
    assert len(episode.decisions[0].probabilities) == 10
    back = adapted(grown, StrategySet(tuple(s for s in extra.strategies if s.name not in ("unit-check", "validation"))))
    assert back.logits(hidden).shape[-1] == 8
    assert "validation" not in back.strategies.names
    with pytest.raises(UserError, match="fewer than two"):
        adapted(back, StrategySet((replace(lab_strategies[0], name="a"), replace(lab_strategies[0], name="b"))))


def test_a_lifted_strategy_is_tried_a_tenth_of_the_time_and_the_others_keep_their_odds(reasoner, planner, lab_strategies):
    with torch.no_grad():
        planner.model.score.weight *= 300  # a planner that is sure
    extra = StrategySet((*lab_strategies.strategies, replace(lab_strategies[0], name="unit-check")))
    problems = [Problem(f"{a}*17+{b}=?", "1") for a in range(2, 8) for b in range(30, 40)]
    episodes = Game(reasoner, planner, RULES).play(problems, seed=0)
    adapted(planner, extra)
    ids = [torch.tensor([e.planner_ids]) for e in episodes]

    @torch.no_grad()
    def logits():
        hidden = [planner.model.base_model(i).last_hidden_state[0][[d.position for d in e.decisions]]
                  for i, e in zip(ids, episodes, strict=True)]  # fmt: skip
        return planner.logits(torch.cat(hidden))

    before = logits()
    lift(planner, "unit-check", episodes)
    after = logits()
    assert torch.equal(after[:, :9], before[:, :9])
    shares = after.softmax(-1)[:, 9]
    assert before.softmax(-1)[:, 9].median() < 0.01
    assert shares.mean() == pytest.approx(0.1, abs=0.01)
    lift(planner, "unit-check", episodes, share=0.5)
    assert logits().softmax(-1)[:, 9].mean() == pytest.approx(0.5, abs=0.01)


def test_from_a_run_to_training_with_a_new_strategy(small, lab_strategies, tmp_path):
    """adapt, train: the way a user goes."""
    rsim.train(small("first"))
    new = replace(lab_strategies[0], name="unit-check", prompts=("Units:",))
    (tmp_path / "grown.toml").write_text(to_toml(StrategySet((*lab_strategies.strategies, new))))
    runner, planner = CliRunner(), "first/checkpoints/final/planner"
    done = runner.invoke(app, ["strategies", "adapt", planner, "grown.toml", "--out", "grown", "--json"])
    assert json.loads(done.output) == {"added": ["unit-check"], "dropped": [], "folder": "grown"}
    rsim.train(small("second", 'models.planner="grown"', 'models.strategies="grown.toml"'))
    trained = Planner.from_pretrained("second/checkpoints/final/planner")
    assert trained.strategies.names[-1] == "unit-check"
    assert "unit-check" in runner.invoke(app, ["strategies", "show", "grown.toml"]).output


def test_candidates_that_win_their_test_stay_and_others_go(small, lab_strategies, tmp_path, monkeypatch):
    """Each begins with the planner as it is; what comes after a winner begins with the winner's."""
    rsim.train(small("first"))
    nine = lab_strategies.strategies
    new = [replace(nine[0], name=name) for name in ("useless", "useful", "late")]
    (tmp_path / "candidates.toml").write_text(to_toml(StrategySet((*nine, *new))))
    pairs = []

    def used(folder, settings):
        """The third gains as well, but by chance: it is not used."""
        return replace(evaluate_into(folder, settings), usage={"useless": 0.5, "useful": 0.5, "late": 0.001})

    def judged(first, second):
        pairs.append((first.parent.name, second.parent.name))
        low = -0.01 if first.parent.name == "trial-1" else 0.01
        return Comparison(0.5, 0.4, 0.1, low, 0.2, 8, 2, 1, 0.5)

    monkeypatch.setattr(module, "compare", judged)
    monkeypatch.setattr(module, "evaluate_into", used)
    command = ["strategies", "grow", "first", "candidates.toml", "--out", "grown", "--steps", "1", "--questions", "4"]
    runner = CliRunner()
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [line.split(" ")[0] for line in done.output.splitlines()[:3]] == ["useless:", "useful:", "late:"]
    assert pairs == [("trial-1", "as-it-was"), ("trial-2", "as-it-was"), ("trial-3", "after-trial-2")]
    assert load_strategies("grown/strategies.toml").names == (*lab_strategies.names, "useful")
    planner = Planner.from_pretrained("grown/after-trial-2/checkpoints/best/planner")
    assert planner.strategies.names == (*lab_strategies.names, "useful")
    frozen = [load_file(f"{run}/checkpoints/final/reasoner/model.safetensors") for run in ("first", "grown/trial-1")]
    assert all(torch.equal(frozen[0][key], frozen[1][key]) for key in frozen[0])

    monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("trained again"))
    again = json.loads(runner.invoke(app, [*command, "--json"]).output)
    assert [t["kept"] for t in again["trials"]] == [False, True, False]
    assert again["strategies"][-1] == "useful"
    other = runner.invoke(app, [*command[:-3], "2", *command[-2:]])
    assert "other settings: stages" in str(other.exception)
    (tmp_path / "candidates.toml").write_text(to_toml(StrategySet((*nine, replace(new[0], prompts=("Else:",)), *new[1:]))))
    assert "other strategies" in str(runner.invoke(app, command).exception)
    (tmp_path / "same.toml").write_text(to_toml(lab_strategies))
    assert "no new strategy" in str(runner.invoke(app, [*command[:3], "same.toml", *command[4:]]).exception)
