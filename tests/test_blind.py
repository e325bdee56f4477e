"""Controls that see less: a blind planner and one that reads the question alone play and train as any other planner."""

from __future__ import annotations

import pytest

from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.loading import load_planner
from rsim.policies.planner import Planner
from rsim.training.trainer import Trainer
from tiny import RULES

PROBLEMS = [Problem(f"{a}*17+{b}=?", "1", kind="numeric") for a, b in [(4, 38), (7, 12), (9, 55), (3, 90)]]


@pytest.fixture
def seeing(base_folder, lab_strategies):
    return lambda sees: load_planner(str(base_folder), lab_strategies, seed=0, sees=sees)


def streams(reasoner, planner, seed=4):
    return [
        (planner.tokenizer.decode(e.planner_ids), [d.probabilities for d in e.decisions])
        for e in Game(reasoner, planner, RULES).play(PROBLEMS, seed=seed)
    ]


def test_a_blind_planner_reads_the_number_of_the_step_and_nothing_else(reasoner, seeing):
    played = streams(reasoner, seeing("number"))
    whole = "Question: \nNext strategy: 1\n\nNext strategy: 2\n\nNext strategy:"
    assert all(whole.startswith(text) for text, _ in played)
    assert whole in [text for text, _ in played], "an episode of three decisions says something of the second and third"
    for depth in range(3):
        reached = [probabilities[depth] for _, probabilities in played if len(probabilities) > depth]
        assert all(one == pytest.approx(reached[0], abs=1e-6) for one in reached), "whatever was asked and written"


def test_a_question_only_planner_reads_no_step(reasoner, seeing):
    for problem, (text, _) in zip(PROBLEMS, streams(reasoner, seeing("question")), strict=True):
        lines = text.split("\nNext strategy:")
        assert lines[0] == f"Question: {problem.question}"
        assert all(line.strip() in seeing("question").strategies.names or not line for line in lines[1:])


def test_a_saved_one_stays_as_blind_as_it_was(reasoner, seeing, tmp_path):
    for sees in ("number", "question", "everything"):
        planner = seeing(sees)
        planner.save_pretrained(tmp_path / sees)
        again = Planner.from_pretrained(tmp_path / sees)
        assert again.sees == sees
        assert [text for text, _ in streams(reasoner, again)] == [text for text, _ in streams(reasoner, planner)]


def test_it_is_trained_on_what_it_read(small, lab_strategies):
    """Recorded log-probs are those of the trainer: were its stream another one in training, the ratios would not be 1."""
    trainer = Trainer(small("blind", 'models.planner_sees="number"'))
    records = []
    trainer.on_metrics = records.append
    trainer.run()
    assert trainer.planner.sees == "number"
    steps = [r for r in records if "planner/sampler_kl" in r]
    assert steps
    assert all(abs(r["planner/sampler_kl"]) < 1e-9 for r in steps)
