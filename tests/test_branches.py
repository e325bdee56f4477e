"""Step-level credit: branched episodes go on exactly where they were, and only what is new is an action."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import rsim
from rsim.config import Config, ObjectiveConfig, StageConfig, TrainConfig, load_config
from rsim.data.problem import Problem
from rsim.errors import UserError
from rsim.objective.advantages import group_advantages
from rsim.rewards.rewards import Score
from rsim.rollout.episode import Decision
from rsim.rollout.game import Game
from rsim.training.agent import Agent
from rsim.training.batch import planner_batch, reasoner_batch
from rsim.training.branches import _place, continuations
from rsim.training.trainer import Trainer
from rsim.training.update import Update
from tiny import RULES, metrics_of, stopped_after

QUESTIONS = ["4*17+38=?", "7=?", "Ann has 3 boxes of 17, finds 12 pens. how many?", "x-38=4*17, x=?", "12+13+14+15-9=?"]
PROBLEMS = [Problem(q, "1") for q in QUESTIONS]


@pytest.fixture
def game(reasoner, planner):
    reasoner.model.double()
    planner.model.double()
    return Game(reasoner, planner, replace(RULES, paraphrase="first"))


def test_greedily_a_branch_goes_on_as_the_episode_did(game):
    """From every state of every episode, also behind steps that a cap has cut."""
    played = game.play(PROBLEMS, seed=3, greedy=True)
    cut = [e for e in played for step, after in zip(e.steps, e.steps[1:], strict=False) if after.start > step.end]
    assert cut, "some step was cut and closed"
    states = [(e, d) for e in played for d in range(len(e.decisions))]
    assert len(states) > len(played)
    again = game.go_on([e.branch(d, 0) for e, d in states], [str(i) for i in range(len(states))], seed=4, greedy=True)
    for (episode, decision), new in zip(states, again, strict=True):
        start = episode.steps[decision].start
        assert (new.token_ids, new.planner_ids, new.steps) == (episode.token_ids, episode.planner_ids, episode.steps)
        assert new.reasoner_mask == episode.reasoner_mask
        assert new.logprobs == pytest.approx(episode.logprobs, abs=1e-9)
        assert new.own_tokens == sum(episode.reasoner_mask[start:])
        assert new.own_decisions == new.decisions[decision:]
        for ours, theirs in zip(new.decisions, episode.decisions, strict=True):
            assert (ours.position, ours.action) == (theirs.position, theirs.action)
        assert (new.forced, new.truncated, new.terminated) == (episode.forced, episode.truncated, episode.terminated)


def test_an_episode_is_split_in_a_state_and_every_token_is_an_action_once(game):
    train = TrainConfig(branches=3)
    played = game.play(PROBLEMS[:3], seed=5, group_size=2)
    before = [replace(e) for e in played]
    found = continuations(game, played, train, seed=5, key="0:a", first=4, group=9)
    assert {e.group for e in found} == {9 + 4 + i for i, e in enumerate(played) if len(e.decisions) > 1}
    for group in {e.group for e in found}:
        rest, *others = [e for e in found if e.group == group]
        trunk, whole = played[group - 13], before[group - 13]
        state = trunk.until
        assert trunk.state == group
        assert state in [step.start for step in whole.steps[1:]]
        assert replace(trunk, until=None, state=None) == whole == replace(rest, group=whole.group, inherited=0)
        assert trunk.own_tokens + rest.own_tokens == whole.own_tokens
        assert trunk.own_decisions + rest.own_decisions == whole.decisions
        assert trunk.own_decisions
        assert rest.own_decisions
        assert len(others) == 3
        for e in (rest, *others):
            assert e.inherited == state
            assert e.token_ids[:state] == trunk.token_ids[:state]
            assert 0 < e.own_tokens < len(e.token_ids) - state
            assert e.sampled_tokens == e.own_tokens + trunk.own_tokens
    everything = [*played, *found]
    batch, decided = (build(everything, torch.device("cpu")) for build in (reasoner_batch, planner_batch))
    assert batch.prefixes.tolist() == [e.inherited or e.prompt_length for e in everything]
    continued = [e for earlier, e in pairwise(found) if e.group == earlier.group]
    assert len(continued) == len(found) * 3 // 4
    assert batch.mask.sum() == sum(e.own_tokens for e in (*before, *continued))
    assert decided.mask.sum() == sum(len(e.own_decisions) for e in everything)
    assert batch.joint_lengths.tolist() == [len(e.own_decisions) + e.own_tokens for e in everything]


@pytest.mark.parametrize("by", ["sampled", "distinct"])
def test_credit_before_a_state_is_its_value_and_after_it_what_became_of_it(game, by):
    """The gradient with branches, against one that is made by hand."""
    played = game.play(PROBLEMS[:1], seed=5, group_size=2)
    found = continuations(game, played[:1], TrainConfig(branches=3, branch_by=by), seed=5, key="0:a", first=0, group=1)
    assert {e.weight for e in found} == {1.0} or by == "distinct"
    returns = [1.0, 0.0, 0.5, 0.0]  # of the episode itself, then of the continuations of its state
    everything = [*played, *found]
    scores = [Score(None, False, planner=r, reasoner=r, parts={}) for r in (1.0, 0.25, *returns)]
    agent = Agent("planner", game.planner.model, game.planner.logits, temperature=1.0, learning_rate=0.0, weight_decay=0.0)
    taken = []
    agent.step = lambda rate, clip: taken.append(game.planner.model.score.weight.grad.clone()) or 0.0
    config = Config(rollout=RULES, objective=ObjectiveConfig(normaliser="token"))
    metrics = Update(config, StageConfig("s", 1, 0.5), 0, alone=False).agent(agent, everything, scores)
    assert metrics["planner/return"] == 0.625, "of the episodes that began with the question, as they ended"
    assert metrics["planner/skipped_groups"] == 0
    game.planner.model.zero_grad()
    weights = [e.weight for e in found]
    value = sum(w * r for w, r in zip(weights, returns, strict=True)) / 4
    question = (value + 0.25) / 2
    advantages = [value - question, 0.25 - question, *(w * (r - value) for w, r in zip(weights, returns, strict=True))]
    total, count = torch.zeros((), dtype=torch.float64), sum(len(e.own_decisions) for e in everything)
    assert count == sum(len(e.decisions) for e in played) + sum(len(e.own_decisions) for e in found[1:])
    for episode, advantage in zip(everything, advantages, strict=True):
        hidden = game.planner.model.base_model(torch.tensor([episode.planner_ids])).last_hidden_state[0]
        for d in episode.own_decisions:
            total = total + advantage * torch.log_softmax(game.planner.logits(hidden[d.position]), -1)[d.action] / count
    (-total).backward()
    assert torch.allclose(taken[0], game.planner.model.score.weight.grad, atol=1e-6)


def test_distinct_continuations_differ_and_weigh_what_the_planner_would_give_them(game):
    """The estimate is the expectation over all strategies once all of them were tried."""
    played = game.play(PROBLEMS[:2], seed=5, group_size=2)
    train = TrainConfig(branches=20, branch_by="distinct")
    places = {i: [replace(d) for d in e.decisions] for i, e in enumerate(played)}
    found = continuations(game, played, train, seed=5, key="0:a", first=0, group=2)
    assert found
    for group in {e.group for e in found}:
        members = [e for e in found if e.group == group]
        decided = [e.own_decisions[0] for e in members]
        assert sorted(d.action for d in decided) == list(range(9)), "its own and all eight others"
        there = places[group - 2][len(played[group - 2].own_decisions)]
        assert decided[0].action == there.action
        for episode, decision in zip(members, decided, strict=True):
            assert decision.probabilities == pytest.approx(there.probabilities, abs=1e-6)
            assert decision.logprob == pytest.approx(math.log(decision.probabilities[decision.action]), abs=1e-6)
            assert episode.weight == pytest.approx(9 * there.probabilities[decision.action], rel=1e-4)
            assert episode.steps[len(episode.decisions) - len(episode.own_decisions)].strategy == decision.action
            assert episode.first is None
    few = continuations(game, game.play(PROBLEMS[:2], seed=5, group_size=2), replace(train, branches=3), seed=5, key="0:a", first=0,
                        group=2)  # fmt: skip
    for group in {e.group for e in few}:
        members = [e for e in few if e.group == group]
        assert len({e.own_decisions[0].action for e in members}) == 4
        assert sum(e.weight for e in members) == pytest.approx(4)


def test_an_episode_whose_planner_is_sure_stays_whole(game, planner):
    """No other strategy can be tried there; what follows the state is trained on as ever."""
    with torch.no_grad():
        planner.model.score.weight.mul_(1e6)
    played = game.play(PROBLEMS, seed=3, group_size=2)
    assert any(len(e.decisions) > 1 for e in played)
    train = TrainConfig(branches=2, branch_by="distinct")
    assert continuations(game, played, train, seed=0, key="a", first=0, group=len(PROBLEMS)) == []
    assert all(e.until is None and e.own_tokens == e.sampled_tokens for e in played)


def test_a_weighted_group_has_a_weighted_mean_and_weighted_advantages():
    returns, groups = torch.tensor([1.0, 0.0, 0.0, 2.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    weights = torch.tensor([2.0, 0.5, 0.5, 1.0, 1.0])
    advantages, _ = group_advantages(returns, groups, weights=weights)
    mean = 2 / 3
    assert advantages.tolist() == pytest.approx([2 * (1 - mean), -0.5 * mean, -0.5 * mean, 0.5, -0.5])
    assert float(advantages[:3].sum()) == pytest.approx(0, abs=1e-6)
    assert torch.equal(group_advantages(returns, groups, weights=torch.ones(5))[0], group_advantages(returns, groups)[0])


def test_what_is_branched_does_not_depend_on_who_plays_it(game):
    """Two ranks, each with half of the questions, against one."""
    train = TrainConfig(branches=2)

    def rank(mine):
        keys = [str(i) for i in mine]
        played = game.play([PROBLEMS[i] for i in mine], seed=5, group_size=2, keys=keys)
        return continuations(game, played, train, seed=5, key="0:a", first=2 * mine[0], group=4)

    together, apart = rank(range(4)), rank(range(2)) + rank(range(2, 4))
    assert [(e.group, e.token_ids) for e in together] == [(e.group, e.token_ids) for e in apart]


def test_the_least_sure_state_is_found():
    def decision(*probabilities):
        return Decision(0, 0, 0.0, list(probabilities))

    decisions = [decision(0.5, 0.5), decision(0.9, 0.1), decision(0.6, 0.4), decision(1.0, 0.0)]
    assert _place(decisions, "entropy", random.Random(0)) == 2
    assert {_place(decisions, "uniform", random.Random(i)) for i in range(40)} == {1, 2, 3}
    assert _place(decisions[:1], "uniform", random.Random(0)) is None


def test_training_with_branches_counts_their_tokens_and_resumes(small):
    plain, whole, parts = small("plain"), small("whole", "train.branches=2"), small("parts", "train.branches=2")
    rsim.train(plain)
    rsim.train(whole)
    first, second = metrics_of(plain)[1], metrics_of(whole)[1]
    assert second["accuracy"] == first["accuracy"]
    assert second["length/sampled"] == first["length/sampled"], "metrics are of episodes that began with the question"
    assert second["sampled_tokens"] > first["sampled_tokens"]
    stopped_after(parts, 2)
    Trainer(parts, resume=True).run()
    assert json.dumps(metrics_of(parts)) == json.dumps(metrics_of(whole))


@pytest.mark.parametrize(
    ("change", "named"),
    [("train.branches=-1", "train.branches"), ("rewards.token_price=-3", "token_price"),
     ("objective.entropy_target=1.0", "planner_entropy"), ("objective.usage_weight=-2", "usage_weight")],
)  # fmt: skip
def test_settings_without_sense_are_refused(change, named):
    with pytest.raises(UserError, match=named):
        load_config("nano", [change])
    with pytest.raises(UserError, match="loss = ppo"):
        load_config("nano", ["train.branches=2", "objective.loss=ppo"])


def test_branches_without_a_planner_are_refused():
    with pytest.raises(UserError, match=r"train\.branches"):
        load_config("nano-grpo", ["train.branches=2"])
    assert replace(load_config("nano", ["train.branches=2"]), stages=(StageConfig(),)).train.branches == 2
