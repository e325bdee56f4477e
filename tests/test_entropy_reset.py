"""A sure planner is made to choose again, and learns where it would have stayed as it was."""

from __future__ import annotations

import json
import math

import pytest
import torch

import rsim
from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.planner import Planner
from rsim.training.entropy_reset import flatten, mean_entropy, reset_temperature
from tiny import RULES

PROBLEMS = [Problem(f"{a}*17+{b}=?", "1") for a in range(2, 6) for b in range(30, 40)]


def streams(episodes):
    return [(e.planner_ids, [d.position for d in e.decisions]) for e in episodes]


def test_the_mean_entropy_is_met_and_every_order_stays(reasoner, planner):
    with torch.no_grad():
        planner.model.score.weight *= 3000
    states = planner.states(streams(Game(reasoner, planner, RULES).play(PROBLEMS, seed=0)))
    with torch.no_grad():
        before = planner.logits(states)
        temperature = reset_temperature(before, 1.0)
        flatten(planner, temperature)
        after = planner.logits(states)
    assert mean_entropy(before) < 0.1
    assert mean_entropy(after) == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(before.argsort(-1), after.argsort(-1))
    torch.testing.assert_close(after * temperature, before, rtol=1e-3, atol=1e-3)


def test_states_are_those_that_were_decided_in(reasoner, planner):
    episodes = Game(reasoner, planner, RULES).play(PROBLEMS[:6], seed=0)
    with torch.no_grad():
        probabilities = planner.logits(planner.states(streams(episodes))).softmax(-1)
    torch.testing.assert_close(
        probabilities, torch.tensor([d.probabilities for e in episodes for d in e.decisions]), atol=1e-4, rtol=1e-3
    )


def test_an_open_planner_is_left_alone():
    assert reset_temperature(torch.tensor([[0.3, 0.1, 0.0], [0.0, 0.1, 0.0]]), 0.5) == 1


def test_more_entropy_than_there_is_and_no_planner_are_refused(small):
    with pytest.raises(UserError, match=r"9 strategies have less than 2\.20 nats"):
        reset_temperature(torch.zeros(1, 9), 2.2)
    with pytest.raises(UserError, match="decided nothing"):
        reset_temperature(torch.zeros(0, 9), 1.0)
    with pytest.raises(UserError, match="no planner"):
        small("alone", 'models.planner="none"', "train.entropy_reset=1.0")


def test_a_run_begins_with_the_planner_reset_and_says_so(small):
    first = small("first", "train.steps=1")
    rsim.train(first)
    folder = first.folder / "checkpoints" / "final" / "planner"
    sure = Planner.from_pretrained(folder)
    with torch.no_grad():
        sure.model.score.weight *= 1000
    sure.save_pretrained(folder)
    begun = {}
    for name, more in (("as it is", ()), ("reset", ("train.entropy_reset=1.5",))):
        config = small(name, f"models.planner={json.dumps(str(folder))}", *more)
        rsim.train(config)
        lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
        begun[name] = next(r["planner/entropy"] for r in lines if r["step"] == 1 and "planner/entropy" in r)
        told = [r for r in lines if r.get("stage") == "entropy_reset"]
        assert len(told) == len(more)
    assert begun["as it is"] < 0.3
    assert 1.0 < begun["reset"] < math.log(9)
    assert told[0]["entropy_reset/opened"] == pytest.approx(1.5, abs=1e-3)
