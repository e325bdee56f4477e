"""Evaluations: votes, counts, controls, going on after a stop, and comparisons."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsim.config import RewardsConfig
from rsim.errors import UserError
from rsim.evaluation import controls, saved
from rsim.evaluation.compare import compare, mcnemar
from rsim.evaluation.controls import PromptedPlanner, shuffled_planner, wait_planner
from rsim.evaluation.evaluate import bootstrap_interval, pass_at_k, play_scored, summarise, vote
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.planners import planner_from
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies import template
from rsim.policies.loading import load_reasoner
from rsim.policies.strategies import load_strategies
from rsim.rules import PlayRules
from tiny import RULES

QUESTIONS = ["4*17+38=?", "7=?", "Ann has 3 boxes of 17, finds 12 pens. how many?", "x-38=4*17, x=?", "12+13+14+15-9=?"]
PROBLEMS = [Problem(q, "1") for q in QUESTIONS]


def record(predicted, correct=False):
    return {"predicted": predicted, "correct": correct, "flexible": correct}


def test_vote_counts_equal_numbers_together_and_takes_the_earliest_of_equals():
    assert vote([record("8"), record("7.0"), record("7", True)])["predicted"] == "7.0"
    assert vote([record("8"), record("7", True)])["predicted"] == "8"
    assert vote([record(None), record(None), record("9")])["predicted"] == "9"
    assert vote([record(None), record(None)])["predicted"] is None
    assert vote([record("x+1"), record(r"\\frac{1}{2}"), record(r"\\dfrac{1}{2}")])["predicted"] == r"\\frac{1}{2}"


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case):
    from itertools import combinations

    n, right, k = case
    samples = [i < right for i in range(n)]
    expected = sum(any(c) for c in combinations(samples, k)) / comb(n, k)
    assert pass_at_k(n, right, k) == pytest.approx(expected)


def test_mcnemar_is_the_binomial_tail():
    assert mcnemar(10, 0) == pytest.approx(2 / 2**10)
    assert mcnemar(3, 5) == mcnemar(5, 3) == pytest.approx(2 * sum(comb(8, k) for k in range(4)) / 2**8)
    assert mcnemar(4, 4) == 1.0


def test_cutting_a_set_changes_nothing(reasoner, planner):
    reasoner.model.double()
    planner.model.double()
    game = Game(reasoner, planner, RULES)
    settings = {"seed": 3, "greedy": False, "samples": 3}
    whole, _, _ = play_scored(game, PROBLEMS, RewardsConfig(), **settings)
    parts = []
    for first in (0, 2, 4):
        parts += play_scored(game, PROBLEMS[first : first + 2], RewardsConfig(), first=first, **settings)[0]
    assert parts == whole
    assert [(r["index"], r["sample"]) for r in whole] == [(i, s) for i in range(5) for s in range(3)]


def test_counts_of_tokens_and_compute(reasoner, planner):
    game = Game(reasoner, planner, RULES)
    records, episodes, _ = play_scored(game, PROBLEMS, RewardsConfig(), seed=0, greedy=False, samples=2)
    result = summarise("x", records, game)
    assert result.sampled_tokens == sum(e.sampled_tokens for e in episodes) / 5
    assert result.injected_tokens == sum(e.injected_tokens for e in episodes) / 5
    read = sum(len(e.token_ids) for e in episodes) - sum(e.prompt_length for e in episodes[::2])
    planned = sum(len(e.planner_ids) for e in episodes)
    sizes = reasoner.model.num_parameters(), planner.model.num_parameters()
    assert result.tflops == pytest.approx(2e-12 * (sizes[0] * read + sizes[1] * planned) / 5)
    assert result.planner_tokens == planned / 5
    assert 0 < result.planner_share < 1
    assert sum(result.usage.values()) == pytest.approx(1)
    assert set(result.pass_at) == {"1", "2"}


def test_prompted_planner_scores_the_names_after_the_marker(reasoner, lab_strategies):
    prompted = PromptedPlanner(reasoner, lab_strategies)
    reasoner.model.config.max_position_embeddings = 2048  # the descriptions, spelled, are longer than the tiny model's context
    opening = prompted.tokenizer.decode(prompted.opening("7=?"))
    assert all(s.description in opening for s in lab_strategies.strategies)
    assert opening.endswith("Question: 7=?" + template.MARKER)
    for e in Game(reasoner, prompted, replace(RULES, max_tokens=64)).play(PROBLEMS[:3], seed=0):
        for d in e.decisions:
            logits = reasoner.model(torch.tensor([e.planner_ids[: d.position + 1]])).logits[0, -1]
            names = [prompted.chunk(template.strategy_chunk(n))[0] for n in lab_strategies.names]
            assert torch.allclose(torch.softmax(logits[names], -1), torch.tensor(d.probabilities), atol=1e-5)


def test_wait_planner_injects_wait_and_then_asks(reasoner):
    default = load_strategies("default")
    for strategies in (default, load_strategies("lab")):
        waiting = wait_planner(strategies, 2)
        game = Game(reasoner, waiting, replace(RULES, max_steps=6, max_tokens=200))
        ended = [e for e in game.play(PROBLEMS, seed=0) if not e.reasoner_ended]
        assert ended
        for e in ended:
            assert [waiting.strategies.names[s.strategy] for s in e.steps] == ["continuation", "wait", "wait", "termination"]
            step = e.steps[1]
            assert e.token_ids[step.start : step.body] == reasoner.injected_ids("Wait,")


def test_shuffled_planner_gives_each_question_the_decisions_of_another(reasoner, planner, lab_strategies):
    rules = replace(RULES, max_steps=5, max_tokens=120)
    own = Game(reasoner, planner, rules).play(PROBLEMS, seed=0, greedy=True)
    own = [replace(e, decisions=[replace(d, action=(i + k) % 8) for k, d in enumerate(e.decisions)]) for i, e in enumerate(own)]
    plans = {e.problem.question: [d.action for d in e.decisions] for e in own}
    shuffled = Game(reasoner, shuffled_planner(lab_strategies, own, seed=1), rules).play(PROBLEMS, seed=0, greedy=True)
    used = []
    for e in shuffled:
        taken = [d.action for d in e.decisions]
        donors = [q for q, plan in plans.items() if taken == [*plan, *[lab_strategies.termination] * 9][: len(taken)]]
        assert e.problem.question not in donors
        assert donors
        used += donors
    assert len(set(used)) >= 4, "a permutation, not one plan for all"


def test_a_folder_is_loaded_and_shuffled_as_it_was_trained(reasoner, planner, lab_strategies, tmp_path, monkeypatch):
    """The donors of ``shuffled:FOLDER``, and who gets their decisions, play by the planner's own rules, as the folder itself does."""
    folder = tmp_path / "planner"
    own_rules = PlayRules(max_steps=2, step_tokens=4, max_tokens=120, answer_tokens=6, delimiter=RULES.delimiter)
    monkeypatch.setattr(planner, "rules", own_rules)
    planner.save_pretrained(folder)
    place = {"device": "cpu", "dtype": "float64", "quantised": False}
    assert planner_from(str(folder), lab_strategies, PROBLEMS, place=place).model.dtype == torch.float64
    played = []
    monkeypatch.setattr(
        Game, "play", lambda game, *how, _play=Game.play, **more: played.append(game.rules) or _play(game, *how, **more)
    )
    shuffled = planner_from(
        f"shuffled:{folder}", lab_strategies, PROBLEMS, reasoner=reasoner, rules=replace(RULES, max_steps=5)
    )
    assert played[0].max_steps == 2
    assert shuffled.rules == own_rules
    overrides = ("rollout.max_steps=3",)
    how = {"reasoner": reasoner, "rules": replace(RULES, max_steps=3), "overrides": overrides}
    planner_from(f"shuffled:{folder}", lab_strategies, PROBLEMS, **how)
    assert played[1].max_steps == 3


def test_a_bare_prompt_begins_as_the_tokenizer_begins_a_text(reasoner, lab_strategies, monkeypatch):
    prompted = PromptedPlanner(reasoner, lab_strategies, bare=True)
    monkeypatch.setattr(controls, "begin_ids", lambda tokenizer, text: [9, *reasoner.injected_ids(text)])
    assert prompted.opening("7=?") == [9, *reasoner.injected_ids(template.question_chunk("7=?") + template.MARKER)]


@pytest.mark.parametrize("what", ["folder", "file", "shuffled"])
def test_changed_weights_are_another_evaluation_wherever_they_are_named(tmp_path, monkeypatch, what):
    monkeypatch.setattr(saved, "load_game", lambda *_: None)
    weights = tmp_path / "weights.gguf" if what == "file" else tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    named = weights if what == "file" else tmp_path
    settings = EvalSettings("nano", overrides=(f'models.reasoner="{named}"',), limit=2)
    if what == "shuffled":
        settings = EvalSettings("nano", f"shuffled:{named}", limit=2)
    before = saved._prepared(settings, None, "").depends_on()
    os.utime(weights, ns=(1, 1))
    assert saved._prepared(settings, None, "").depends_on() != before


def test_all_right_is_not_sure():
    """A bootstrap of equal outcomes has no spread; Wilson's interval is that of the proportion. Differences are none."""
    assert bootstrap_interval([False] * 20) == (0.0, pytest.approx(0.161, abs=1e-3))
    assert bootstrap_interval([True] * 20) == (pytest.approx(0.839, abs=1e-3), 1.0)
    assert bootstrap_interval([0.0] * 20) == (0.0, 0.0)


@pytest.mark.parametrize(
    "spec", ["wait:0", "wait:x", "shuffled", "shuffled:nowhere", "nowhere", "fixed:nothing", "random:2", "none:x"]
)
def test_wrong_planners_are_one_error(reasoner, lab_strategies, spec):
    with pytest.raises(UserError):
        planner_from(spec, lab_strategies, PROBLEMS, reasoner=reasoner, rules=RULES)


def test_shuffled_decisions_know_no_gate(reasoner, lab_strategies):
    with pytest.raises(UserError, match=r"rollout\.gate"):
        planner_from("shuffled:x", lab_strategies, PROBLEMS, reasoner=reasoner, rules=replace(RULES, gate=0.5))


def test_a_reasoner_without_weights_cannot_be_prompted(base_folder, lab_strategies):
    shape = load_reasoner(str(base_folder), weights=False)
    with pytest.raises(UserError, match="native"):
        planner_from("prompted", lab_strategies, PROBLEMS, reasoner=shape, rules=RULES)


def write_evaluation(folder, outcomes, questions=None):
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    lines = [
        json.dumps(
            {"index": i, "question": questions[i] if questions else str(i), "predicted": "1", "correct": c, "flexible": c}
        )
        for i, c in enumerate(outcomes)
    ]
    (folder / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_compare_pairs_questions(tmp_path):
    a = write_evaluation(tmp_path / "a", [True] * 60 + [False] * 40)
    b = write_evaluation(tmp_path / "b", [True] * 50 + [False] * 50)
    c = compare(a, b)
    assert (c.a, c.b, c.questions, c.only_a, c.only_b) == (0.6, 0.5, 100, 10, 0)
    assert c.difference == pytest.approx(0.1)
    assert 0 < c.low < 0.1 < c.high
    assert c.p == pytest.approx(2 / 2**10)
    same = compare(a, a)
    assert (same.low, same.high) == (pytest.approx(-0.037, abs=1e-3), pytest.approx(0.037, abs=1e-3)), "alike is not sure"
    with pytest.raises(UserError, match="same questions"):
        compare(a, write_evaluation(tmp_path / "c", [True] * 100, ["other"] * 100))
    with pytest.raises(UserError, match="no finished evaluation"):
        compare(a, tmp_path)
